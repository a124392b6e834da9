"""What is timed computes the same either way."""

from moe_ep.testing import RankContext


def losses(ctx: RankContext, dispatcher: str) -> list[float]:
    from tests.frameworks.transformers.step import make_step
    from tests.frameworks.transformers.training import stable_sorts

    with stable_sorts():
        step = make_step(dispatcher, 24, 32, 2)
        return [step() for _ in range(3)]


def test_both_dispatchers_take_the_same_steps(ranks) -> None:
    ours = ranks(2, losses, "moe_ep")
    assert ours == ranks(2, losses, "native")
    assert all(own[2] < own[0] for own in ours)
