"""One training step of DeepSpeed's MoE, to be timed with either exchange."""

from collections.abc import Callable
from typing import Literal

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from moe_ep.integrations.deepspeed import convert


def make_step(
    dispatcher: Literal["native", "moe_ep"],
    tokens: int,
    hidden: int,
    top_k: int,
    *,
    num_experts: int = 8,
    drop_tokens: bool = True,
) -> Callable[[], float]:
    """Forward, backward and optimizer step of a MoE layer in fp32; returns the loss. Collective over WORLD.

    Args:
        dispatcher: ``"native"`` is DeepSpeed's MOELayer as it comes.
        tokens: T, of each rank.
        hidden: H; experts are two linear layers of width H with a GELU between.
        top_k: K.
        num_experts: E, over all ranks.
        drop_tokens: DeepSpeed's default, with a capacity factor of 1; else experts take what they get.
    """
    # Only inference asks for it, and building it takes a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    one_expert = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    moe = MoE(
        hidden, one_expert, num_experts=num_experts, ep_size=dist.get_world_size(), k=top_k, drop_tokens=drop_tokens
    )
    if dispatcher == "moe_ep":
        convert(moe)
    moe.set_deepspeed_parallelism()
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-4)
    torch.manual_seed(dist.get_rank())
    x = torch.randn(tokens, hidden, requires_grad=True)

    def step() -> float:
        optimizer.zero_grad()
        out, l_aux, _ = moe(x)
        loss = out.square().mean() + 0.01 * l_aux
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
