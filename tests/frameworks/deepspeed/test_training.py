"""Training with DeepSpeed's engine: the same losses as with DeepSpeed's own exchange, and as without any."""

import pytest
import torch

from moe_ep.integrations.deepspeed import EPMOELayer
from moe_ep.testing import RankContext
from tests.frameworks.deepspeed.models import (
    LEARNING_RATE,
    Setup,
    Trained,
    build,
    engine_of,
    join,
    on_ranks,
    relative_bound,
    train,
    unsharded_losses,
)

UNEVEN = ((4, 6), (1, 3))
EMPTY = ((3, 5), (0, 7))


def train_one(ctx: RankContext, setup: Setup, *, ours: bool) -> Trained:
    engine = engine_of(build(ctx, setup, ours=ours), setup)
    assert isinstance(engine.module.moe.deepspeed_moe, EPMOELayer) == ours
    trained = train(ctx, engine, setup)
    engine.destroy()
    return trained


def difference_allowed(setup: Setup, trained: Trained) -> float:
    """A step of SGD with momentum 0.5 moves parameters by at most 2 lr g, and an error of g by as much of itself."""
    drift = 2 * setup.steps * LEARNING_RATE * trained.gradient_norm**2
    return relative_bound(setup) * (max(map(abs, trained.losses)) + drift)


def check_same(setup: Setup, stock: Trained, ours: Trained) -> None:
    allowed = difference_allowed(setup, stock)
    found = max(abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True))
    assert found <= allowed, f"{setup}: losses {ours.losses} are not {stock.losses}, {found} > {allowed}"
    # In bf16 a gate may see another last bit from the second step on, and prefer another expert.
    steps = setup.steps if setup.dtype == torch.float32 else 1
    assert stock.counts[:steps] == ours.counts[:steps]


def compare_with_stock(ctx: RankContext, setups: list[Setup]) -> None:
    join(ctx)
    for setup in setups:
        stock, ours = (train_one(ctx, setup, ours=ours) for ours in (False, True))
        assert stock.gradient_norm > 0.01
        check_same(setup, stock, ours)


def compare_with_unsharded(ctx: RankContext, setups: list[Setup]) -> None:
    join(ctx)
    for setup in setups:
        ours = train_one(ctx, setup, ours=True)
        alone = [step[ctx.rank] for step in unsharded_losses(ctx, setup, ctx.world_size)]
        allowed = difference_allowed(setup, ours)
        found = max(abs(a - b) for a, b in zip(ours.losses, alone, strict=True))
        assert found <= allowed, f"{setup}: losses {ours.losses} are not {alone}, {found} > {allowed}"
        assert ours.gradient_norm > 0.01


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_losses_equal_those_of_deepspeeds_own_exchange(stage: int):
    setups = [Setup(stage=stage, k=k, drop=drop) for k in (1, 2, 3) for drop in (True, False)]
    on_ranks(2, compare_with_stock, setups)


def test_bf16_losses_equal_those_of_deepspeeds_own_exchange():
    # Two steps: what bf16 rounds in the first, the second step's gates may route by.
    setup = Setup(dtype=torch.bfloat16, steps=2)
    setups = [setup.with_(stage=stage, k=k, drop=drop) for stage in (0, 1, 2) for k, drop in ((1, True), (2, False))]
    on_ranks(2, compare_with_stock, [*setups, setup.with_(stage=2, k=3), setup.with_(stage=2, k=3, drop=False)])


def test_residual_experts_stay():
    on_ranks(2, compare_with_stock, [Setup(use_residual=True), Setup(use_residual=True, stage=2, k=1)])


def test_uneven_tokens_equal_deepspeeds_own_exchange_where_it_has_one():
    # With drop_tokens, and with k = 1, its capacities differ among ranks and its equal all-to-all cannot be.
    on_ranks(2, compare_with_stock, [Setup(tokens=UNEVEN, drop=False, k=k) for k in (2, 3)])


@pytest.mark.parametrize("tokens", [((4, 6), (4, 6)), UNEVEN, EMPTY], ids=["even", "uneven", "empty rank"])
def test_losses_equal_the_unsharded_model(tokens: tuple):
    setup = Setup(tokens=tokens, use_rts=False, sample_second=False, min_capacity=4)
    stages = ((1, 2), (2, 0), (3, 1))
    setups = [setup.with_(k=k, drop=drop, stage=stage) for k, stage in stages for drop in (True, False)]
    on_ranks(2, compare_with_unsharded, setups)


def test_one_local_expert_on_three_ranks():
    setup = Setup(num_experts=3, ep_size=3, k=1, tokens=((2, 3), (1, 4), (2, 1)), use_rts=False)
    on_ranks(3, compare_with_unsharded, [setup, setup.with_(k=3, drop=False, stage=2)])


def test_experts_on_two_ranks_of_four():
    setup = Setup(tokens=((2, 3), (1, 4), (2, 1), (3, 3)), use_rts=False, k=3, steps=3)
    on_ranks(4, compare_with_unsharded, [setup.with_(stage=stage) for stage in (0, 1, 2)])


def test_one_rank_per_expert_group():
    on_ranks(2, compare_with_stock, [Setup(ep_size=1, k=k, stage=1) for k in (1, 3)])


def weigh_wrongly(ctx: RankContext, setup: Setup, fault: str) -> bool:
    """Whether the comparison notices weights that are their neighbours', or missing for every other token."""
    join(ctx)
    stock = train_one(ctx, setup, ours=False)
    route = EPMOELayer._route

    def faulty(*args: object) -> tuple[torch.Tensor, torch.Tensor]:
        topk_idx, topk_weights = route(*args)
        if fault == "swapped":
            return topk_idx, topk_weights.roll(1, 0)
        return topk_idx, topk_weights * (torch.arange(len(topk_idx)) % 2).unsqueeze(1)

    EPMOELayer._route = faulty
    try:
        ours = train_one(ctx, setup, ours=True)
    finally:
        EPMOELayer._route = route
    try:
        check_same(setup, stock, ours)
    except AssertionError as error:
        return "losses" in str(error)
    return False


@pytest.mark.parametrize(("dtype", "fault"), [(torch.float32, "swapped"), (torch.bfloat16, "missing")])
def test_a_planted_fault_is_caught(dtype: torch.dtype, fault: str):
    setup = Setup(k=1, use_rts=False, drop=False, dtype=dtype, steps=2)
    assert on_ranks(2, weigh_wrongly, setup, fault) == [True, True]


def clip(ctx: RankContext, setup: Setup) -> list[float]:
    """Global gradient norms that the engine clips by, of both."""
    join(ctx)
    norms = []
    for ours in (False, True):
        engine = engine_of(build(ctx, setup, ours=ours), setup, gradient_clipping=0.01)
        train(ctx, engine, setup)
        norms.append(float(engine.get_global_grad_norm()))
        engine.destroy()
    return norms


def test_gradients_are_clipped_as_before():
    setup = Setup(stage=2, k=1)
    for stock, ours in on_ranks(2, clip, setup):
        assert stock > 0.01
        assert abs(stock - ours) <= relative_bound(setup) * stock
