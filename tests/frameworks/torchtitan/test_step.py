"""The step that is timed computes the same with both dispatchers."""

import pytest

from moe_ep.testing import RankContext
from tests.frameworks.torchtitan.models import on_ranks
from tests.frameworks.torchtitan.step import make_step


def losses(ctx: RankContext, dispatcher: str) -> list[float]:
    step = make_step(dispatcher, tokens=48, hidden=64, top_k=3, num_experts=8)
    return [step() for _ in range(3)]


def test_both_steps_take_the_same_losses():
    for native, ours in zip(*(on_ranks(2, losses, dispatcher) for dispatcher in ("native", "moe_ep")), strict=True):
        # torchtitan rounds each of the k terms of a sum to bf16; a mean over 3072 elements keeps less than one of them.
        assert ours == pytest.approx(native, rel=2**-8)
