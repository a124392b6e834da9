"""TokenDispatcher: what arrives where, asynchronous forms, replays, repeatability."""

import dataclasses
import gc
import weakref
from collections.abc import Callable

import pytest
import torch

from moe_ep.errors import StaleHandleError
from moe_ep.testing import RankContext, uneven_tokens
from tests.checks import (
    Case,
    check_dispatched,
    check_output,
    check_round_trips,
    expected_output,
    flat_rows,
    round_trip,
    run_experts,
)

Ranks = Callable[..., list]


KINDS = ("uniform", "zipf", "one", "empty", "holes")
LAYOUTS = {
    "expanded": {},
    "aligned": {"alignment": 4},
    "compact": {"layout": "compact", "weights": "experts"},
    "slab": {"layout": "slab", "max_tokens_per_rank": 40},
}


def edge_cases(num_ranks: int, **fields: object) -> list[Case]:
    """STYLE's edge list: uneven T, a rank with none, nobody with any, one expert for all, holes, K = E, e = 1."""
    uneven = tuple(uneven_tokens(9, num_ranks, seed=3))
    cases = [Case(tokens=uneven, kind=kind, seed=i, **fields) for i, kind in enumerate(KINDS)]
    return [
        *cases,
        Case(tokens=(0,) * num_ranks, **fields),
        Case(tokens=(5,) * num_ranks, top_k=12, **fields),
        Case(tokens=(7,) * num_ranks, num_experts=num_ranks, top_k=1, kind="one", **fields),
        # Many choices of few ranks: rows cross once per (token, rank) and are expanded there.
        Case(tokens=uneven, num_experts=4 * num_ranks, top_k=4, kind="holes", **fields),
        # Few choices among many ranks: rows cross once per choice.
        Case(tokens=uneven, num_experts=num_ranks, top_k=1, kind="holes", **fields),
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_arrive_in_order_and_come_back(ranks: Ranks, num_ranks: int, layout: str) -> None:
    cases = edge_cases(num_ranks, **LAYOUTS[layout])
    assert ranks(num_ranks, check_round_trips, cases) == [len(cases)] * num_ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_group_one_rank_holds_every_expert(layout: str) -> None:
    for case in edge_cases(1, **LAYOUTS[layout]):
        round_trip(RankContext(0, 1, None), case, case.dispatcher(None))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(ranks: Ranks, layout: str, dtype: torch.dtype) -> None:
    tokens = tuple(uneven_tokens(9, 2, seed=1))
    shapes = [{"top_k": 3}, {"top_k": 1, "num_experts": 2}]
    cases = [Case(tokens=tokens, dtype=dtype, kind="holes", **shape, **LAYOUTS[layout]) for shape in shapes]
    ranks(2, check_round_trips, cases)


@pytest.mark.parametrize("layout", ["expanded", "aligned", "slab"])
def test_weights_at_the_experts(ranks: Ranks, layout: str) -> None:
    ranks(3, check_round_trips, edge_cases(3, weights="experts", **LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_asynchronous_forms_give_the_same(ranks: Ranks, layout: str) -> None:
    ranks(3, check_round_trips_async, edge_cases(3, **LAYOUTS[layout]))


def check_round_trips_async(ctx: RankContext, cases: list[Case]) -> None:
    check_round_trips(ctx, cases, use_async=True)


def test_replicas_are_chosen_by_token_index(ranks: Ranks) -> None:
    # Five logical experts on eight places: expert 0 has three replicas, expert 1 two, on different ranks.
    replicas = ((0, 3, 6), (1, 4, -1), (2, -1, -1), (5, -1, -1), (7, -1, -1))
    cases = [
        Case(tokens=(9, 4), num_experts=8, top_k=2, kind=kind, expert_map=replicas, **LAYOUTS[layout])
        for kind in ("zipf", "holes", "one")
        for layout in LAYOUTS
    ]
    ranks(2, check_round_trips, cases)


def overlap_many(ctx: RankContext) -> None:
    # Everything is launched before anything is waited for, and waited for out of order.
    cases = [Case(tokens=(5, 0, 8), kind=kind, seed=s) for s, kind in enumerate(("uniform", "holes", "zipf", "one"))]
    dispatcher = cases[0].dispatcher(ctx.group)
    pending = [dispatcher.dispatch_async(case.x(ctx.rank), *case.routing(ctx.rank)) for case in cases]
    routed = {i: pending[i].wait() for i in (2, 0, 3, 1)}
    expected = [check_dispatched(case, ctx.rank, routed[i]) for i, case in enumerate(cases)]
    ys = [run_experts(case, ctx.rank, routed[i], expected[i]) for i, case in enumerate(cases)]
    pending = [dispatcher.combine_async(ys[i], routed[i].handle, routed[i].weights) for i in range(4)]
    for i in (3, 1, 0, 2):
        check_output(cases[i], ctx.rank, pending[i].wait(), expected[i])


def test_any_number_of_exchanges_may_be_pending(ranks: Ranks) -> None:
    ranks(3, overlap_many)


def forget_the_result(ctx: RankContext) -> bool:
    case = Case(tokens=(5, 4), num_experts=4, top_k=2)
    dispatcher = case.dispatcher(ctx.new_group())
    jobs = []
    real = dispatcher.buffer.submit
    dispatcher.buffer.submit = lambda run: jobs.append(real(run)) or jobs[-1]
    routed = dispatcher.dispatch_async(case.x(ctx.rank), *case.routing(ctx.rank)).wait()
    result = weakref.ref(jobs.pop().result())
    del routed
    gc.collect()
    return result() is None


def test_a_result_goes_with_its_caller(ranks: Ranks) -> None:
    assert ranks(2, forget_the_result) == [True, True]


def drop_pending(ctx: RankContext) -> None:
    case = Case(tokens=(50, 60), hidden_size=64)
    dispatcher = case.dispatcher(ctx.group)
    dispatcher.dispatch_async(case.x(ctx.rank), *case.routing(ctx.rank))
    # The inputs are gone before the exchange ran, and their memory is given to others.
    pending = dispatcher.dispatch_async(case.x(ctx.rank), *case.routing(ctx.rank))
    poison = [torch.full((case.tokens[ctx.rank], 64), float("nan")) for _ in range(8)]
    routed = pending.wait()
    assert pending.wait() is routed
    expected = check_dispatched(case, ctx.rank, routed)
    y = run_experts(case, ctx.rank, routed, expected)
    dispatcher.combine_async(y.clone(), routed.handle, routed.weights)
    pending = dispatcher.combine_async(y.clone(), routed.handle, routed.weights)
    poison += [torch.full_like(y, float("nan")) for _ in range(8)]
    check_output(case, ctx.rank, pending.wait(), expected)
    assert len(poison) == 16


def test_dropped_pendings_and_dropped_inputs_do_no_harm(ranks: Ranks) -> None:
    ranks(2, drop_pending)


def plan_chunks(ctx: RankContext, layout: dict) -> int:
    tokens = [(4, 6, 0), (3, 0, 5), (0, 0, 0), (7, 7, 7)]
    cases = [Case(tokens=t, kind="holes", seed=i, **layout) for i, t in enumerate(tokens)]
    dispatcher = cases[0].dispatcher(ctx.group)
    routings = [case.routing(ctx.rank) for case in cases]
    planned = dispatcher.plan([topk_idx for topk_idx, _ in routings])
    for i, case in enumerate(cases):
        topk_idx, topk_weights = routings[i]
        if i % 2:
            routed = dispatcher.dispatch(case.x(ctx.rank), topk_idx, topk_weights, planned=planned[i])
        else:
            routed = dispatcher.dispatch_async(case.x(ctx.rank), topk_idx, topk_weights, planned=planned[i]).wait()
        expected = check_dispatched(case, ctx.rank, routed)
        y = run_experts(case, ctx.rank, routed, expected)
        out = dispatcher.combine(y, routed.handle, routed.weights if case.weights == "combine" else None)
        check_output(case, ctx.rank, out, expected)
    return len(planned)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_planned_together_equal_chunks_planned_apart(ranks: Ranks, layout: str) -> None:
    assert ranks(3, plan_chunks, LAYOUTS[layout]) == [4] * 3


def replay_two_layers(ctx: RankContext) -> None:
    # Handles of two layers that share a Buffer are replayed in an order unlike that of their dispatches.
    first, second = Case(tokens=(6, 3), seed=1, kind="zipf"), Case(tokens=(4, 8), seed=2, kind="holes", top_k=2)
    layers = [(case, case.dispatcher(ctx.group)) for case in (first, second, first)]
    routed = [layer.dispatch(case.x(ctx.rank), *case.routing(ctx.rank)) for case, layer in layers]
    for i in (1, 0, 2, 1, 0):
        case, layer = layers[i]
        expected = check_dispatched(case, ctx.rank, routed[i])
        y = run_experts(case, ctx.rank, routed[i], expected)
        check_output(case, ctx.rank, layer.combine(y, routed[i].handle, routed[i].weights), expected)


def test_handles_replay_after_others_ran(ranks: Ranks) -> None:
    ranks(2, replay_two_layers)


def repeat_bits(ctx: RankContext, case: Case) -> list[bool]:
    dispatcher = case.dispatcher(ctx.group)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    outs, rows = [], []
    for _ in range(3):
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        rows.append(routed.x.clone())
        outs.append(dispatcher.combine(routed.x * 1.1, routed.handle, routed.weights))
    return [torch.equal(rows[0], r) and torch.equal(outs[0], o) for r, o in zip(rows[1:], outs[1:], strict=True)]


@pytest.mark.parametrize("shape", [{"top_k": 6}, {"num_experts": 8, "top_k": 2, "alignment": 8}])
def test_two_runs_give_the_same_bits(ranks: Ranks, shape: dict) -> None:
    case = Case(tokens=(33, 12, 50, 27), dtype=torch.bfloat16, kind="zipf", **shape)
    assert ranks(4, repeat_bits, case) == [[True, True]] * 4


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors that an object, its fields and what these hold keep alive."""
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = list(value.values())
    return [tensor for one in value for tensor in tensors_in(one)] if isinstance(value, list | tuple) else []


def handle_contents(ctx: RankContext) -> dict:
    case = Case(tokens=(5, 4))
    dispatcher = case.dispatcher(ctx.group)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    handle = dispatcher.dispatch(x, topk_idx, topk_weights.requires_grad_()).handle
    tensors = tensors_in(handle)
    return {
        "tensors": len(tensors) > 0,
        "grad": any(t.requires_grad for t in tensors),
        "payload": any(t.is_floating_point() for t in tensors),
    }


def test_a_handle_holds_no_payload_and_no_graph(ranks: Ranks) -> None:
    assert ranks(2, handle_contents) == [{"tensors": True, "grad": False, "payload": False}] * 2


def check_stale(ctx: RankContext) -> dict[str, str]:
    case = Case(tokens=(3, 4))
    group = ctx.new_group()
    dispatcher, twin = case.dispatcher(group), case.dispatcher(group)
    elsewhere = case.dispatcher(ctx.new_group())
    x, routing = case.x(ctx.rank), case.routing(ctx.rank)
    routed = dispatcher.dispatch(x, *routing)
    caught = {}
    for name, other in (("other dispatcher", twin), ("other group", elsewhere)):
        try:
            other.combine(routed.x, routed.handle, routed.weights)
        except StaleHandleError as error:
            caught[name] = str(error)
    for one in (twin, elsewhere):
        one.reset()
    return caught


def test_handle_of_another_dispatcher_or_group_is_refused(ranks: Ranks) -> None:
    for caught in ranks(2, check_stale):
        assert set(caught) == {"other dispatcher", "other group"}
        assert all("handle" in text for text in caught.values())


def check_reset(ctx: RankContext) -> tuple[bool, str]:
    case = Case(tokens=(3, 4))
    dispatcher = case.dispatcher(ctx.new_group())
    routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    dispatcher.reset()
    text = ""
    try:
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    except StaleHandleError as error:
        text = str(error)
    dispatcher.reset()
    round_trip(ctx, case, dispatcher)
    return isinstance(dispatcher, torch.nn.Module), text


def test_handle_from_before_a_reset_is_refused(ranks: Ranks) -> None:
    for is_module, text in ranks(2, check_reset):
        assert is_module
        assert "reset" in text


def plant(ctx: RankContext, fault: str) -> str:
    case = Case(tokens=(6, 5), kind="uniform")
    dispatcher = case.dispatcher(ctx.group)
    routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    expected = case.expected()
    rows, weights = flat_rows(routed), routed.weights
    if fault == "dropped row":
        rows[3] = 0
    elif fault == "swapped rows":
        rows[[2, 3]] = rows[[3, 2]]
    elif fault == "swapped weights":
        weights[[0, 1]] = weights[[1, 0]]
    elif fault == "miscounted":
        routed.tokens_per_expert[0] += 1
    caught = ""
    try:
        check_dispatched(case, ctx.rank, routed)
    except AssertionError:
        caught = "dispatch"
    y = run_experts(case, ctx.rank, routed, expected)
    if fault == "garbage in the output":
        y[0] *= 1.001
    out = dispatcher.combine(y, routed.handle, weights)
    if fault == "choice lost in combine":
        out = out - 0.01 * expected_output(case, ctx.rank, expected)[0].float()
    try:
        check_output(case, ctx.rank, out, expected)
    except AssertionError:
        caught += " combine"
    return caught


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ("none", ""),
        ("dropped row", "dispatch"),
        ("swapped rows", "dispatch"),
        ("swapped weights", "dispatch combine"),
        ("miscounted", "dispatch"),
        ("garbage in the output", "combine"),
        ("choice lost in combine", "combine"),
    ],
)
def test_planted_faults_are_found(ranks: Ranks, fault: str, found_by: str) -> None:
    # A row may belong to either rank: it is enough that one of them notices.
    caught = {word for text in ranks(2, plant, fault) for word in text.split()}
    assert set(found_by.split()) <= caught
    assert bool(caught) == bool(found_by)
