"""Capacities: fixed shapes, overflow that every rank reports, and drops that cost exactly the dropped choices."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moe_ep
from moe_ep import Capacity
from moe_ep.errors import CapacityError
from moe_ep.testing import RankContext
from tests.checks import Case, check_dispatched, check_output, check_round_trips, flat_rows, round_trip, run_experts

Ranks = Callable[..., list]

ROOMY = (Capacity(rows=120), Capacity(per_expert=40), Capacity(factor=4.0))
TIGHT = (Capacity(rows=13), Capacity(per_expert=4), Capacity(factor=0.2))
LAYOUTS = {
    "expanded": {},
    "aligned": {"alignment": 4},
    "experts": {"weights": "experts"},
    "compact": {"layout": "compact", "weights": "experts"},
}


def make_cases(num_ranks: int, capacity: Capacity, **fields: object) -> list[Case]:
    tokens = ((7, 0, 12, 5), (3, 9, 0, 0))
    cases = []
    for i, kind in enumerate(("uniform", "zipf", "holes", "empty")):
        for num_experts, top_k in ((3 * num_ranks, 3), (2 * num_ranks, 1)):
            case = Case(
                tokens=tokens[i % 2][:num_ranks],
                num_experts=num_experts,
                top_k=top_k,
                kind=kind,
                seed=i,
                capacity=capacity,
                max_tokens_per_rank=12,
                **fields,
            )
            cases.append(case)
    return cases


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("capacity", ROOMY, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_room_everything_arrives(ranks: Ranks, num_ranks: int, capacity: Capacity, layout: str) -> None:
    cases = make_cases(num_ranks, capacity, **LAYOUTS[layout])
    assert all(case.expected().overflow is None for case in cases)
    ranks(num_ranks, check_round_trips, cases)


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("capacity", TIGHT, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drop_keeps_each_experts_first_rows(ranks: Ranks, num_ranks: int, capacity: Capacity, layout: str) -> None:
    cases = make_cases(num_ranks, capacity, on_overflow="drop", **LAYOUTS[layout])
    # Seven tokens cannot overflow 13 compact rows.
    assert any(case.expected().dropped for case in cases) or (num_ranks == 1 and layout == "compact" and capacity.rows)
    ranks(num_ranks, check_round_trips, cases)


def fixed_shapes(ctx: RankContext, capacity: Capacity) -> tuple[set, list, list]:
    shapes, lists, flags = set(), [], []
    case = Case(tokens=(8, 8), num_experts=4, top_k=2, capacity=capacity, max_tokens_per_rank=8, on_overflow="drop")
    dispatcher = case.dispatcher(ctx.group)
    for seed, kind in enumerate(("uniform", "one", "empty")):
        other = replace(case, kind=kind, seed=seed)
        routed = dispatcher.dispatch(other.x(ctx.rank), *other.routing(ctx.rank))
        check_dispatched(other, ctx.rank, routed)
        shapes.add(tuple(routed.x.shape))
        lists.append(routed.tokens_per_expert_list)
        flags.append(bool(routed.overflow))
    return shapes, lists, flags


@pytest.mark.parametrize(
    ("capacity", "num_rows"), [(Capacity(rows=20), 20), (Capacity(per_expert=9), 18), (Capacity(factor=1.25), 20)]
)
def test_shapes_do_not_depend_on_routing(ranks: Ranks, capacity: Capacity, num_rows: int) -> None:
    for shapes, lists, flags in ranks(2, fixed_shapes, capacity):
        assert shapes == {(num_rows, 8)}
        assert lists == [None, None, None]
        # All 16 tokens choose experts 1 and 2: 16 rows for each.
        assert flags[1:] == [capacity.rows is None, False]


def overflow_and_go_on(ctx: RankContext, capacity: Capacity, layout: dict, way: str) -> dict:
    # 14 tokens choose experts 0 and 1, both on rank 0: only that rank overflows, and every rank must say so.
    case = Case(
        tokens=(8, 6, 0), num_experts=6, top_k=2, kind="one", capacity=capacity, max_tokens_per_rank=8, **layout
    )
    dispatcher = case.dispatcher(ctx.new_group())
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    pending = dispatcher.dispatch_async(x, topk_idx, topk_weights)
    found: dict = {}
    try:
        routed = pending.wait()
        found["nan"] = bool(flat_rows(routed).isnan().all())
        found["flag"] = bool(routed.overflow)
        if way == "check":
            dispatcher.check()
        elif way == "combine":
            weights = routed.weights if case.weights == "combine" else None
            dispatcher.combine(routed.x, routed.handle, weights)
        elif way == "dispatch":
            dispatcher.dispatch(x, topk_idx, topk_weights)
        elif way == "wait":
            dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
    except CapacityError as error:
        found["error"] = (error.rank, error.needed, error.given)
        found["text"] = str(error)
    dispatcher.check()
    calm = replace(case, kind="empty")
    round_trip(ctx, calm, dispatcher)
    return found


@pytest.mark.parametrize(
    ("capacity", "layout", "needed", "given"),
    [
        (Capacity(rows=20), {}, 28, 20),
        (Capacity(rows=20), {"alignment": 4}, 32, 20),
        (Capacity(per_expert=9), {}, 14, 9),
        (Capacity(factor=1.0), {}, 14, 8),
        (Capacity(rows=10), {"layout": "compact", "weights": "experts"}, 14, 10),
    ],
    ids=str,
)
def test_overflow_raises_on_all_ranks(ranks: Ranks, capacity: Capacity, layout: dict, needed: int, given: int) -> None:
    for found in ranks(3, overflow_and_go_on, capacity, layout, "check"):
        assert found["error"] == (0, needed, given)
        assert all(str(number) in found["text"] for number in (needed, given))
        assert 'on_overflow="drop"' in found["text"]
        assert found["nan"]
        assert found["flag"]


@pytest.mark.parametrize("way", ["combine", "dispatch", "wait"])
def test_overflow_raises_at_the_next_call(ranks: Ranks, way: str) -> None:
    for found in ranks(3, overflow_and_go_on, Capacity(rows=20), {}, way):
        assert found["error"] == (0, 28, 20)


def gradients(ctx: RankContext, case: Case) -> dict:
    """Gradients of sum(out * v) by autograd, and what they must be: only kept choices contribute."""
    dispatcher = case.dispatcher(ctx.group)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    topk_weights.requires_grad_()
    v = torch.linspace(-1, 1, case.hidden_size, dtype=case.dtype).expand_as(x)
    routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    if case.weights == "combine":
        y, weights = routed.x * 3, routed.weights
    elif case.layout == "compact":
        y, weights = routed.x * (3 * routed.weights.sum(1, keepdim=True)), None
    else:
        y, weights = routed.x * (3 * routed.weights.unsqueeze(1)), None
    (dispatcher.combine(y, routed.handle, weights) * v).sum().backward()
    expected = case.expected()
    kept = torch.tensor(
        [
            [topk_idx[t, k] >= 0 and expected.kept(ctx.rank, t, k) for k in range(case.top_k)]
            for t in range(case.tokens[ctx.rank])
        ],
        dtype=torch.bool,
    ).reshape(topk_idx.shape)
    dx = 3 * v * (topk_weights * kept).sum(1, keepdim=True)
    dw = 3 * (case.x(ctx.rank) * v).sum(1, keepdim=True) * kept
    # fp64: a handful of terms of magnitude one.
    torch.testing.assert_close(x.grad, dx.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(topk_weights.grad, dw, rtol=1e-12, atol=1e-12)
    assert not topk_weights.grad[~kept].any()
    return {"dropped": int((~kept & (topk_idx >= 0)).sum())}


@pytest.mark.parametrize("capacity", TIGHT, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_dropped_choices_are_zero(ranks: Ranks, capacity: Capacity, layout: str) -> None:
    case = Case(
        tokens=(7, 0, 12),
        kind="holes",
        dtype=torch.float64,
        num_experts=6,
        capacity=capacity,
        on_overflow="drop",
        max_tokens_per_rank=12,
        **LAYOUTS[layout],
    )
    assert sum(found["dropped"] for found in ranks(3, gradients, case)) == len(case.expected().dropped) > 0


def poison_undefined_rows(ctx: RankContext) -> None:
    # What lies past the last group is never read, forward or backward.
    case = Case(tokens=(5, 3), num_experts=4, top_k=2, capacity=Capacity(rows=64))
    dispatcher = case.dispatcher(ctx.group)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    topk_weights.requires_grad_()
    routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    expected = check_dispatched(case, ctx.rank, routed)
    with torch.no_grad():
        factors = run_experts(case, ctx.rank, routed, expected) / routed.x
    assert factors.isnan().any()
    out = dispatcher.combine(routed.x * factors, routed.handle, routed.weights)
    check_output(case, ctx.rank, out.detach(), expected)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert topk_weights.grad.isfinite().all()


def test_rows_past_the_last_group_are_never_read(ranks: Ranks) -> None:
    ranks(2, poison_undefined_rows)


def too_many_tokens(ctx: RankContext) -> str:
    case = Case(tokens=(4, 4), capacity=Capacity(factor=8.0), max_tokens_per_rank=4)
    dispatcher = case.dispatcher(ctx.new_group())
    more = replace(case, tokens=(5, 5))
    with pytest.raises(ValueError, match="max_tokens_per_rank=4") as caught:
        dispatcher.dispatch(more.x(ctx.rank), *more.routing(ctx.rank))
    round_trip(ctx, case, dispatcher)
    return str(caught.value)


def test_more_tokens_than_reserved_are_refused(ranks: Ranks) -> None:
    assert all("5 tokens" in text for text in ranks(2, too_many_tokens))


def start_without_tokens(ctx: RankContext) -> tuple[list, str]:
    case = Case(tokens=(5, 3), num_experts=4, top_k=2, capacity=Capacity(factor=2.0), max_tokens_per_rank=5)
    nothing, more = replace(case, tokens=(0, 0)), replace(case, tokens=(6, 1))
    # Another test may have reserved memory, and with it a size, on the shared group.
    dispatcher = case.dispatcher(ctx.new_group(), max_tokens_per_rank=None)
    shapes = []
    for other in (nothing, nothing, case, nothing):
        x = other.x(ctx.rank)
        routed = dispatcher.dispatch(x, *other.routing(ctx.rank))
        shapes.append(tuple(routed.x.shape))
        assert dispatcher.combine(routed.x, routed.handle, routed.weights).shape == x.shape
    round_trip(ctx, case, dispatcher)
    with pytest.raises(ValueError, match="pass max_tokens_per_rank") as caught:
        dispatcher.dispatch(more.x(ctx.rank), *more.routing(ctx.rank))
    return shapes, str(caught.value)


def test_a_factor_is_sized_by_the_first_exchange_that_has_tokens(ranks: Ranks) -> None:
    for shapes, refused in ranks(2, start_without_tokens):
        # Two local experts of 2.0 * R * 5 * K / E = 10 rows each; of 2, for one token per rank, before anyone knows.
        assert shapes == [(4, 8), (4, 8), (20, 8), (20, 8)]
        assert "sends 6 tokens, but Capacity(factor=...) was sized for 5" in refused


def test_public_names() -> None:
    assert moe_ep.Capacity is Capacity
    assert issubclass(CapacityError, moe_ep.errors.MoeEpError)


def plant_drop_fault(ctx: RankContext, case: Case) -> bool:
    """Drops that keep the last rows of an expert instead of the first must not pass."""
    from moe_ep.backends import torch as backend

    real = backend.drop_choices

    def keep_last(topk_idx: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        return real(topk_idx.flip(0), allowed).flip(0)

    backend.drop_choices = keep_last
    try:
        routed = case.dispatcher(ctx.group).dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
        check_dispatched(case, ctx.rank, routed)
    except AssertionError:
        return True
    finally:
        backend.drop_choices = real
    return False


def test_planted_fault_in_drops_is_found(ranks: Ranks) -> None:
    case = Case(tokens=(9, 9), num_experts=4, top_k=1, kind="one", capacity=Capacity(per_expert=3), on_overflow="drop")
    assert any(ranks(2, plant_drop_fault, case))
