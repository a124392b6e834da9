"""A training step of one MoE block of transformers, for timing one way to reach experts against another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Qwen3MoeConfig
from transformers.distributed.expert_parallel import apply_expert_parallelism
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_ep.integrations.transformers  # noqa: F401

_IMPLEMENTATIONS = {"native": "all_to_all", "moe_ep": "moe_ep"}
_PLAN = {
    "mlp.experts.gate_up_proj": "grouped_gemm",
    "mlp.experts.down_proj": "grouped_gemm",
    "mlp.experts": "ep_dispatch_experts",
}


def make_step(
    dispatcher: Literal["native", "moe_ep"],
    tokens: int,
    hidden: int,
    top_k: int,
    *,
    num_experts: int = 16,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Callable[[], float]:
    """Build a block; the callable runs forward, backward and an optimizer step. Collective, and so is every call.

    Call it on every rank of the default group, which is the expert-parallel group. Router and experts are those of
    Qwen3-MoE, and the experts compute with grouped GEMMs either way.

    Args:
        dispatcher: ``"native"``, the all-to-all of transformers; ``"moe_ep"``, ours in its place.
        tokens: T of each rank.
        hidden: H; the experts' inner size is the same.
        top_k: K.
        num_experts: E, over all ranks.
        dtype: of parameters and tokens.
        device: where they are.

    Returns:
        A callable that returns the loss.
    """
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=hidden,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    block = nn.ModuleDict({"mlp": Qwen3MoeSparseMoeBlock(config)})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=hidden**-0.5)
    block.to(device, dtype)
    mesh = DeviceMesh.from_group(dist.group.WORLD, torch.device(device).type)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    tp_mesh = DeviceMesh.from_group(alone, torch.device(device).type)
    apply_expert_parallelism(block, mesh, tp_mesh, _PLAN, ep_implementation=_IMPLEMENTATIONS[dispatcher])
    # The two kinds of parameters are on no common mesh.
    experts = list(block["mlp"].experts.parameters())
    dense = [parameter for name, parameter in block.named_parameters() if ".experts." not in name]
    optimizer = torch.optim.SGD([{"params": experts}, {"params": dense}], lr=1e-3)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(1, tokens, hidden, generator=generator).to(device, dtype)

    def step() -> float:
        optimizer.zero_grad()
        out = block["mlp"](x.requires_grad_())
        loss = (out.float() - 1.0).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
