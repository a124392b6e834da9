"""torchtitan's MoE block alone: its experts sliced by hand, so that every rank may have its own number of tokens."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.config import OverrideConfig, apply_overrides
from torchtitan.distributed.utils import set_spmd_backend
from torchtitan.models.common.config_utils import (
    make_ffn_config,
    make_moe_config,
    make_routed_experts_config,
    make_router_config,
)
from torchtitan.models.common.moe import MoE

from moe_ep.testing import RankContext
from tests.frameworks.torchtitan.models import OVERRIDE

HIDDEN = 32
INNER = 48
EXPERTS = ("w1_EFD", "w2_EDF", "w3_EFD")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A MoE block and every rank's tokens, (batch, length)."""

    top_k: int = 3
    num_experts: int = 8
    tokens: tuple[tuple[int, int], ...] = ((2, 6), (2, 6))
    dtype: torch.dtype = torch.float32
    comm_backend: str = "standard"

    def with_(self, **changes: object) -> "Block":
        return replace(self, **changes)


def config_of(block: Block) -> MoE.Config:
    init = dict.fromkeys(("weight", "bias", *EXPERTS), nn.init.zeros_)
    return make_moe_config(
        num_experts=block.num_experts,
        router=make_router_config(
            dim=HIDDEN,
            num_experts=block.num_experts,
            gate_param_init=init,
            top_k=block.top_k,
            score_func="softmax",
            route_norm=block.top_k > 1,
        ),
        routed_experts=make_routed_experts_config(
            dim=HIDDEN,
            hidden_dim=INNER,
            num_experts=block.num_experts,
            top_k=block.top_k,
            param_init=init,
            comm_backend=block.comm_backend,
        ),
        shared_experts=make_ffn_config(dim=HIDDEN, hidden_dim=INNER, w1_param_init=init, w2w3_param_init=init),
    )


def moe_of(block: Block, *, ours: bool, settings: dict | None = None) -> MoE:
    """The whole block, the same on every rank, not yet sharded."""
    config = config_of(block)
    if ours:
        apply_overrides(OverrideConfig(imports=[(OVERRIDE, settings or {})]), config)
    moe = config.build()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        for buffer in moe.buffers():
            buffer.zero_()
    return moe.to(block.dtype)


def shard(ctx: RankContext, moe: MoE) -> MoE:
    """Keep this rank's experts, and tell the dispatcher who has the others, as ``MoE.parallelize`` does."""
    set_spmd_backend("partial_dtensor")
    mesh = init_device_mesh("cpu", (ctx.world_size,), mesh_dim_names=("ep",))
    inner = moe.routed_experts.inner_experts
    for name in EXPERTS:
        mine = getattr(inner, name).detach().chunk(ctx.world_size)[ctx.rank].clone()
        setattr(inner, name, nn.Parameter(mine))
    moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=mesh)
    return moe


def rows_of(block: Block, rank: int) -> Tensor:
    """[batch, length, HIDDEN] of one rank, which every rank can compute."""
    generator = torch.Generator().manual_seed(40 + rank)
    return torch.randn(*block.tokens[rank], HIDDEN, generator=generator).to(block.dtype)
