"""TokenDispatcher: what arrives where, asynchronous forms, hooks, replays, repeatability."""

import copy
import dataclasses
import os
from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import moe_ep
from moe_ep.errors import MoeEpError, StaleHandleError
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
PHASES = [
    f"{prefix}{kind}_{moment}"
    for prefix in ("", "backward_")
    for kind in ("dispatch", "combine")
    for moment in ("launched", "ready")
]


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


def collect_attributes(ctx: RankContext) -> dict:
    case = Case(tokens=(3, 3), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(ctx.group, backend="torch")
    routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    names = ("rank", "group_size", "num_experts", "num_local_experts", "hidden_size", "top_k", "dtype", "layout")
    found = {name: getattr(dispatcher, name) for name in (*names, "weights", "capacity", "backend_name")}
    found["same group"] = dispatcher.group is ctx.group
    found["parameters"] = len(list(dispatcher.parameters())) + len(dispatcher.state_dict())
    found["list"] = routed.tokens_per_expert_list == routed.tokens_per_expert.tolist()
    found["num_rows"] = int(routed.num_rows) == routed.x.shape[0]
    found["overflow"], found["scales"] = routed.overflow, routed.scales
    found["frozen"] = dataclasses.is_dataclass(routed) and type(routed).__dataclass_params__.frozen
    return found


def test_attributes_and_exact_mode(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(2, collect_attributes)):
        assert found == {
            "rank": rank,
            "group_size": 2,
            "num_experts": 6,
            "num_local_experts": 3,
            "hidden_size": 8,
            "top_k": 2,
            "dtype": torch.float32,
            "layout": "expanded",
            "weights": "combine",
            "capacity": None,
            "backend_name": "torch",
            "same group": True,
            "parameters": 0,
            "list": True,
            "num_rows": True,
            "overflow": None,
            "scales": None,
            "frozen": True,
        }


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


def handle_contents(ctx: RankContext) -> dict:
    case = Case(tokens=(5, 4))
    dispatcher = case.dispatcher(ctx.group)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    handle = dispatcher.dispatch(x, topk_idx, topk_weights.requires_grad_()).handle
    tensors = [t for value in vars(handle).values() for t in (value if isinstance(value, (tuple, list)) else [value])]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
    return {
        "tensors": len(tensors) > 0,
        "grad": any(t.requires_grad for t in tensors),
        "payload": any(t.is_floating_point() for t in tensors),
    }


def test_a_handle_holds_no_payload_and_no_graph(ranks: Ranks) -> None:
    assert ranks(2, handle_contents) == [{"tensors": True, "grad": False, "payload": False}] * 2


def record_hooks(ctx: RankContext) -> dict:
    case = Case(tokens=(5, 0))
    dispatcher = case.dispatcher(ctx.group)
    dispatcher.layer = "decoder.3"
    events: list[moe_ep.PhaseEvent] = []
    hooks = [dispatcher.register_hook(phase, events.append) for phase in PHASES]
    x, (topk_idx, topk_weights) = case.x(ctx.rank).requires_grad_(), case.routing(ctx.rank)

    def forward() -> torch.Tensor:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        return dispatcher.combine(routed.x, routed.handle, routed.weights)

    forward().sum().backward()
    full = [event.phase for event in events]
    sequence = [event.seq for event in events]
    fields = {(event.layer, event.recompute) for event in events}
    events.clear()
    hooks[0].remove()
    forward().sum().backward()
    removed = [event.phase for event in events]
    return {"full": full, "sequence": sequence, "fields": fields, "removed": removed}


def test_hooks_are_called_on_all_eight_phases_in_order(ranks: Ranks) -> None:
    order = [
        "dispatch_launched",
        "dispatch_ready",
        "combine_launched",
        "combine_ready",
        "backward_combine_launched",
        "backward_combine_ready",
        "backward_dispatch_launched",
        "backward_dispatch_ready",
    ]
    for found in ranks(2, record_hooks):
        assert found["full"] == order
        assert found["sequence"] == sorted(found["sequence"])
        assert found["fields"] == {("decoder.3", False)}
        assert found["removed"] == order[1:]


def hooks_around_async(ctx: RankContext) -> list[str]:
    case = Case(tokens=(5, 4))
    dispatcher = case.dispatcher(ctx.group)
    log: list[str] = []
    for phase in PHASES:
        dispatcher.register_hook(phase, lambda event: log.append(event.phase))
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    pending = dispatcher.dispatch_async(x, topk_idx, topk_weights)
    log.append("work beside dispatch")
    routed = pending.wait()
    pending = dispatcher.combine_async(routed.x, routed.handle, routed.weights)
    log.append("work beside combine")
    pending.wait()
    return log


def test_hooks_show_what_runs_beside_an_exchange(ranks: Ranks) -> None:
    expected = [
        "dispatch_launched",
        "work beside dispatch",
        "dispatch_ready",
        "combine_launched",
        "work beside combine",
        "combine_ready",
    ]
    assert ranks(2, hooks_around_async) == [expected] * 2


def hooks_under_checkpoint(ctx: RankContext) -> dict:
    case = Case(tokens=(5, 4))
    dispatcher = case.dispatcher(ctx.group)
    flags: dict[str, list[bool]] = {phase: [] for phase in PHASES}
    for phase in PHASES:
        dispatcher.register_hook(phase, lambda event: flags[event.phase].append(event.recompute))
    topk_idx, topk_weights = case.routing(ctx.rank)

    def block(x: torch.Tensor) -> torch.Tensor:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        return dispatcher.combine(routed.x * 2, routed.handle, routed.weights)

    x = case.x(ctx.rank).requires_grad_()
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    return flags


def test_hooks_know_a_recomputed_forward(ranks: Ranks) -> None:
    for flags in ranks(2, hooks_under_checkpoint):
        assert flags["dispatch_launched"] == flags["dispatch_ready"] == [False, True]
        # The recomputation may stop as soon as everything that backward needs is there.
        assert flags["combine_launched"][0] is False
        assert flags["backward_dispatch_launched"] == flags["backward_combine_launched"] == [False]


def raise_in_hook(ctx: RankContext) -> list[str]:
    case = Case(tokens=(2, 2))
    dispatcher = case.dispatcher(ctx.new_group())
    texts = []

    def complain(event: object) -> None:
        raise KeyError(f"said by the hook at {event.phase}")

    hook = dispatcher.register_hook("dispatch_ready", complain)
    try:
        dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    except KeyError as error:
        texts.append(str(error))
    hook.remove()
    round_trip(ctx, case, dispatcher)
    try:
        dispatcher.register_hook("dispatch_done", complain)
    except ValueError as error:
        texts.append(str(error))
    return texts


def test_what_a_hook_raises_is_raised_there(ranks: Ranks) -> None:
    for first, second in ranks(2, raise_in_hook):
        assert "said by the hook at dispatch_ready" in first
        assert "dispatch_done" in second
        assert "dispatch_launched" in second


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


def copy_and_reattach(ctx: RankContext) -> str:
    case = Case(tokens=(3, 4))
    dispatcher = case.dispatcher(ctx.group)
    clone = copy.deepcopy(dispatcher)
    text = ""
    if clone.group is None:
        try:
            clone.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
        except (MoeEpError, ValueError) as error:
            text = str(error)
    clone.set_group(ctx.group)
    round_trip(ctx, case, clone)
    round_trip(ctx, case, dispatcher)
    return text


def test_a_copy_works_once_its_group_is_set(ranks: Ranks) -> None:
    ranks(2, copy_and_reattach)


def reports(ctx: RankContext, case: Case) -> tuple[dict, dict]:
    dispatcher = case.dispatcher(ctx.group)
    before = dispatcher.memory_report(max_tokens_per_rank=100)
    round_trip(ctx, case, dispatcher)
    round_trip(ctx, case, dispatcher)
    assert dispatcher.memory_report(max_tokens_per_rank=100) == before
    return dispatcher.stats(), before


def test_reports(ranks: Ranks) -> None:
    case = Case(tokens=(6, 4), kind="zipf")
    for rank, (stats, memory) in enumerate(ranks(2, reports, case)):
        assert stats["exchanges"] == 4
        assert stats["tokens_per_expert"].tolist() == [2 * n for n in case.expected().ranks[rank].tokens_per_expert]
        assert stats["wait_seconds"] >= 0
        assert memory["arena_bytes"] == 0
        # 100 tokens of 32 bytes go to each of two ranks at least.
        assert memory["exchange_bytes"] > 100 * 32 * 2


def exchange_in_subgroups(ctx: RankContext) -> None:
    # Ranks 0 and 3 have made more groups than 1 and 2: nothing may follow from how many a process has.
    ctx.new_group([0, 3])
    halves = [ctx.new_group([0, 2]), ctx.new_group([3, 1])]
    members = [[0, 2], [1, 3]]
    mine = 0 if halves[0] is not None else 1
    place = members[mine].index(ctx.rank)
    case = Case(tokens=(5, 6), kind="holes", seed=mine)
    # Both halves exchange at the same time, and one of them makes a second Buffer.
    dispatcher = case.dispatcher(halves[mine])
    assert (dispatcher.rank, dispatcher.group_size) == (place, 2)
    round_trip(RankContext(place, 2, halves[mine]), case, dispatcher)
    if mine == 0:
        own = moe_ep.Buffer(halves[0])
        round_trip(RankContext(place, 2, halves[0]), case, case.dispatcher(halves[0], buffer=own))
        with pytest.raises(ValueError, match="buffer belongs to another group"):
            case.dispatcher(halves[0], buffer=moe_ep.Buffer(None))


def test_groups_that_are_parts_of_the_world(ranks: Ranks) -> None:
    ranks(4, exchange_in_subgroups)


def exchange_over_meshes(ctx: RankContext) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    place = ctx.rank % 2
    case = Case(tokens=(5, 6), kind="holes", seed=ctx.rank // 2)
    dispatcher = case.dispatcher(mesh["ep"])
    assert dispatcher.group is mesh["ep"].get_group()
    round_trip(RankContext(place, 2, dispatcher.group), case, dispatcher)
    with pytest.raises(ValueError, match="2 dimensions"):
        case.dispatcher(mesh)


def test_device_meshes(ranks: Ranks) -> None:
    ranks(4, exchange_over_meshes)


def fp8_pairs(ctx: RankContext, case: Case) -> None:
    def quantized(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = torch.rand(case.tokens[rank], 2, generator=torch.Generator().manual_seed(rank))
        return case.x(rank).to(torch.float8_e4m3fn), scales.t().contiguous().t()

    dispatcher = case.dispatcher(ctx.group)
    routed = dispatcher.dispatch(quantized(ctx.rank), *case.routing(ctx.rank))
    mine = case.expected().ranks[ctx.rank]
    everyone = [quantized(rank) for rank in range(case.num_ranks)]
    assert (routed.x.dtype, routed.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    rows, scales = flat_rows(routed).view(torch.uint8), routed.scales.reshape(-1, 2)
    for row, (source, token, _) in mine.rows.items():
        assert torch.equal(rows[row], everyone[source][0][token].view(torch.uint8))
        assert torch.equal(scales[row], everyone[source][1][token])
    assert not rows[mine.padding].any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{"num_experts": 6, "top_k": 4}, {"num_experts": 2, "top_k": 1}], ids=str)
def test_fp8_rows_travel_with_their_scales(ranks: Ranks, layout: str, shape: dict) -> None:
    case = Case(tokens=(5, 7), hidden_size=256, dtype=torch.bfloat16, kind="holes", **shape, **LAYOUTS[layout])
    ranks(2, fp8_pairs, case)


def cast_on_the_wire(ctx: RankContext, case: Case) -> None:
    dispatcher = case.dispatcher(ctx.group, wire_dtype=torch.float8_e4m3fn)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    assert routed.x.dtype == case.dtype
    assert routed.scales is None
    for row, (source, token, _) in case.expected().ranks[ctx.rank].rows.items():
        sent, groups = case.x(source)[token].float(), routed.x[row].detach().float().view(-1, 128)
        # e4m3 keeps 3 bits behind the point: half a unit is 2^-4 of the value, or 2^-10 of the scale near zero, where
        # scale = amax / 448; the result is rounded to bf16 once more.
        amax = sent.view(-1, 128).abs().amax(1, keepdim=True)
        bound = (2.0**-4 + 2.0**-8) * sent.view(-1, 128).abs() + 2.0**-10 * amax / 448
        assert bool(((groups - sent.view(-1, 128)).abs() <= bound).all())
    # Straight through: the gradient is that of an exchange without a cast.
    dispatcher.combine(routed.x, routed.handle, routed.weights).sum().backward()
    weights = (topk_weights * (topk_idx >= 0)).sum(1, keepdim=True)
    # Partial sums are rounded to bf16 per rank and once more in the end, and each term is of one sign.
    torch.testing.assert_close(x.grad.float(), weights.expand_as(x), rtol=2 * 2.0**-8 * 1.01, atol=0)


@pytest.mark.parametrize("shape", [{"num_experts": 6, "top_k": 4}, {"num_experts": 2, "top_k": 1}], ids=str)
def test_rows_may_be_cast_for_the_wire(ranks: Ranks, shape: dict) -> None:
    case = Case(tokens=(5, 7), hidden_size=256, dtype=torch.bfloat16, kind="holes", **shape)
    ranks(2, cast_on_the_wire, case)


def read_timeouts(ctx: RankContext) -> list[float]:
    timeouts = [moe_ep.Buffer(ctx.new_group()).timeout_s]
    os.environ["MOE_EP_TIMEOUT_S"] = "7"
    try:
        timeouts.append(moe_ep.Buffer(ctx.new_group()).timeout_s)
        timeouts.append(moe_ep.Buffer(ctx.new_group(), timeout_s=3).timeout_s)
    finally:
        del os.environ["MOE_EP_TIMEOUT_S"]
    return timeouts


def test_timeouts_come_from_argument_environment_default(ranks: Ranks) -> None:
    assert ranks(2, read_timeouts) == [[600.0, 7.0, 3.0]] * 2


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
