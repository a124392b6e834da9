"""One training step of torchtitan's MoE block, to be timed with either dispatcher."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.config_utils import make_moe_config, make_routed_experts_config, make_router_config

from tests.frameworks.torchtitan.blocks import EXPERTS
from tests.frameworks.torchtitan.models import OVERRIDE


def make_step(
    dispatcher: Literal["native", "moe_ep"], tokens: int, hidden: int, top_k: int, *, num_experts: int = 16
) -> Callable[[], float]:
    """Forward, backward and optimizer step of a MoE block without shared expert; returns the loss.

    Collective over WORLD.

    Args:
        dispatcher: ``"native"`` is torchtitan's AllToAllTokenDispatcher.
        tokens: T, of each rank.
        hidden: H; experts are SwiGLU MLPs of width H in bf16, as torchtitan computes them.
        top_k: K.
        num_experts: E, over all ranks.

    Returns:
        A callable that returns the loss of this rank.
    """
    set_spmd_backend("partial_dtensor")
    init = dict.fromkeys(("weight", *EXPERTS), nn.init.zeros_)
    sizes = {"dim": hidden, "num_experts": num_experts, "top_k": top_k}
    config = make_moe_config(
        num_experts=num_experts,
        router=make_router_config(**sizes, gate_param_init=init, score_func="softmax", route_norm=True),
        routed_experts=make_routed_experts_config(**sizes, hidden_dim=hidden, param_init=init, comm_backend="standard"),
    )
    if dispatcher == "moe_ep":
        apply_overrides(OverrideConfig(imports=[OVERRIDE]), config)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    moe = config.build()
    inner = moe.routed_experts.inner_experts
    for name in EXPERTS:
        setattr(
            inner, name, nn.Parameter(getattr(inner, name).detach().chunk(mesh.size())[mesh.get_local_rank()].clone())
        )
    torch.manual_seed(dist.get_rank())
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=hidden**-0.5)
        for buffer in moe.buffers():
            buffer.zero_()
    moe.bfloat16()
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, tokens, hidden, generator=generator).bfloat16()

    def step() -> float:
        optimizer.zero_grad()
        loss = (moe(x.requires_grad_()).float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
