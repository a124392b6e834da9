"""The steps that benchmarks time learn, and do the same work under either wrapper."""

import pytest

from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import Ranks
from tests.frameworks.fsdp.step import make_step


def steps(ctx: RankContext, wrapper: str) -> list[float]:
    step = make_step(wrapper, tokens=16 + ctx.rank, hidden=32, top_k=2)
    return [step() for _ in range(3)]


def test_both_wrappers_take_the_same_steps(ranks: Ranks) -> None:
    for sharded, replicated in zip(ranks(2, steps, "fsdp2"), ranks(2, steps, "ddp"), strict=True):
        assert sharded == pytest.approx(replicated, rel=1e-6)
        assert sharded[2] < sharded[1] < sharded[0]


def test_unknown_wrapper(ranks: Ranks) -> None:
    with pytest.raises(ValueError, match="dispatcher='native' must be one of 'fsdp2', 'ddp'"):
        ranks(2, steps, "native")
