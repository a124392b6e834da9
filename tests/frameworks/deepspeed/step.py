"""One training step of DeepSpeed's MoE, to be timed with either exchange."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import nn

from moe_ep.integrations.deepspeed import convert
from tests.frameworks.deepspeed.models import join_world


def make_step(
    dispatcher: Literal["native", "moe_ep"],
    tokens: int,
    hidden: int,
    top_k: int,
    *,
    num_experts: int = 16,
    drop_tokens: bool = True,
) -> Callable[[], float]:
    """Build a layer; the callable runs forward, backward and an optimizer step in fp32. Both are collective over WORLD.

    Args:
        dispatcher: ``"native"`` is DeepSpeed's MOELayer as it comes.
        tokens: T, of each rank.
        hidden: H; experts are two linear layers of width H with a GELU between.
        top_k: K.
        num_experts: E, over all ranks.
        drop_tokens: DeepSpeed's default, with a capacity factor of 1; else experts take what they get.

    Returns:
        A callable that returns the loss of this rank.
    """
    num_ranks = dist.get_world_size()
    join_world(dist.get_rank(), num_ranks)
    torch.manual_seed(0)
    moe = MoE(
        hidden,
        nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden)),
        num_experts=num_experts,
        ep_size=num_ranks,
        k=top_k,
        drop_tokens=drop_tokens,
        # Choices that are drawn would differ between two layers.
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    if dispatcher == "moe_ep":
        convert(moe)
    moe.set_deepspeed_parallelism()
    optimizer = torch.optim.SGD(moe.parameters(), lr=1e-3)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> float:
        optimizer.zero_grad()
        out, l_aux, _ = moe(x.requires_grad_())
        loss = (out - 1.0).square().mean() + 0.01 * l_aux
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
