"""The step that benchmarks time does the same work with every dispatcher."""

from collections.abc import Callable

import pytest

from moe_ep.testing import RankContext
from tests.frameworks.megatron.step import make_step

Ranks = Callable[..., list]


def steps(ctx: RankContext, dispatcher: str, count: int) -> list[float]:
    step = make_step(dispatcher, tokens=32 + ctx.rank, hidden=32, top_k=2)
    return [step() for _ in range(count)]


def test_all_dispatchers_take_the_same_steps(ranks: Ranks) -> None:
    native, ours, flex = (ranks(2, steps, dispatcher, 3) for dispatcher in ("native", "moe_ep", "deep_ep"))
    assert native == ours == flex
    assert all(losses[-1] < losses[0] for losses in native)


def test_unknown_dispatcher(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="dispatcher='stock' must be one of 'native', 'moe_ep', 'deep_ep'"):
        ranks(2, steps, "stock", 1)
