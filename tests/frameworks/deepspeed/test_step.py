"""The step that is timed computes the same with both dispatchers."""

import pytest

from moe_ep.testing import RankContext
from tests.frameworks.deepspeed.models import on_ranks
from tests.frameworks.deepspeed.step import make_step


def losses(ctx: RankContext, dispatcher: str) -> list[float]:
    step = make_step(dispatcher, tokens=48, hidden=64, top_k=3, num_experts=8)
    return [step() for _ in range(3)]


def test_both_steps_take_the_same_losses():
    for native, ours in zip(*(on_ranks(2, losses, dispatcher) for dispatcher in ("native", "moe_ep")), strict=True):
        assert native[2] < native[0]
        # Sums of at most 64 terms, and of 48 rows for a gradient, each rounded by 2^-24: below 1e-5 of a loss near 1.
        assert ours == pytest.approx(native, rel=1e-5)
