"""Asynchronous exchanges: what runs beside them in both directions, many of them at once, hooks that fail."""

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_ep
from moe_ep.errors import MoeEpError, PeerAbortedError
from moe_ep.hooks import PHASES
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import (
    EXACT,
    MODES,
    Ranks,
    apply_experts,
    check_against_unsharded,
    check_grads,
    for_combine,
    make_case,
    make_leaves,
    probe,
    unsharded,
)


class Mark(torch.autograd.Function):
    """The identity; writes its name down when it is created and when its backward runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, log: list[str]) -> Tensor:
        ctx.name, ctx.log = name, log
        log.append(name)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.log.append(f"backward of {ctx.name}")
        return grad, None, None


def log_phases(dispatcher: moe_ep.TokenDispatcher, log: list[str]) -> None:
    for phase in PHASES:
        dispatcher.register_hook(phase, lambda event: log.append(event.phase))


def trace_overlap(ctx: RankContext, mode: str) -> list[str]:
    """A layer with work before, beside and after each exchange; every piece is marked."""
    case = make_case(ctx.world_size, **MODES[mode])
    dispatcher, leaves, topk_idx = case.dispatcher(ctx.group), make_leaves(case, ctx.rank), case.routing(ctx.rank)[0]
    log: list[str] = []
    log_phases(dispatcher, log)
    side = leaves.x * 1.0
    side = Mark.apply(side, "before", log)
    pending = dispatcher.dispatch_async(Mark.apply(leaves.x, "input", log), topk_idx, leaves.topk_weights)
    side = Mark.apply(side, "beside dispatch", log)
    matrices = Mark.apply(leaves.matrices, "matrices beside dispatch", log)
    routed = pending.wait()
    y = Mark.apply(apply_experts(case, routed, routed.x, routed.weights, matrices), "experts", log)
    pending = dispatcher.combine_async(y, routed.handle, for_combine(case, routed.weights))
    side = Mark.apply(side, "beside combine", log)
    out = Mark.apply(pending.wait(), "after", log) + side
    out.backward(probe(case, ctx.rank))
    grads = unsharded(case)[1][ctx.rank]
    check_grads(leaves.grads(), [grads[0] + probe(case, ctx.rank), *grads[1:]])
    return log


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("mode", ["expanded", "compact", "slab, experts"])
def test_what_overlaps_forward_overlaps_backward(ranks: Ranks, num_ranks: int, mode: str) -> None:
    forward = [
        "before",
        "input",
        "dispatch_launched",
        "beside dispatch",
        "matrices beside dispatch",
        "dispatch_ready",
        "experts",
        "combine_launched",
        "beside combine",
        "combine_ready",
        "after",
    ]
    backward = [
        "backward of after",
        "backward_combine_launched",
        "backward of beside combine",
        "backward_combine_ready",
        "backward of experts",
        "backward_dispatch_launched",
        "backward of matrices beside dispatch",
        "backward of beside dispatch",
        "backward_dispatch_ready",
        "backward of input",
        "backward of before",
    ]
    assert ranks(num_ranks, trace_overlap, mode) == [forward + backward] * num_ranks


def hold_exchanges(ctx: RankContext) -> tuple[list[bool], list[bool]]:
    """Whether exchanges truly run beside the host: one that cannot finish lets the host go on."""
    case = make_case(ctx.world_size, tokens=(3, 3))
    dispatcher, leaves, topk_idx = case.dispatcher(ctx.group), make_leaves(case, ctx.rank), case.routing(ctx.rank)[0]
    gate = threading.Event()
    transport = dispatcher.buffer.backend.transport
    ship = transport.ship

    def held(*args: Any, **options: Any) -> Any:
        assert gate.wait(20)
        return ship(*args, **options)

    transport.ship = held
    try:
        forward, backward = [], []
        pending = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights)
        forward.append(pending._exchange.job.done())
        gate.set()
        routed = pending.wait()
        gate.clear()
        pending = dispatcher.combine_async(routed.x, routed.handle, routed.weights)
        forward.append(pending._exchange.job.done())
        side = Release.apply(leaves.x * 1.0, gate, backward)
        gate.set()
        out = pending.wait() + side
        gate.clear()
        out.backward(probe(case, ctx.rank))
    finally:
        transport.ship = ship
    return forward, backward


class Release(torch.autograd.Function):
    """The identity; its backward notes whether the gate still holds exchanges back, and opens it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Any, log: list[bool]) -> Tensor:
        ctx.gate, ctx.log = gate, log
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        ctx.log.append(ctx.gate.is_set())
        ctx.gate.set()
        return grad, None, None


def test_the_host_goes_on_while_an_exchange_is_held_back(ranks: Ranks) -> None:
    assert ranks(2, hold_exchanges) == [([False, False], [False])] * 2


def wait_in_another_order(ctx: RankContext, mode: str, orders: list[tuple[int, ...]]) -> None:
    # Each chunk is a layer of its own; their weights are shared, so their gradients add up.
    cases = [make_case(ctx.world_size, seed=seed, **MODES[mode]) for seed in range(3)]
    dispatcher = cases[0].dispatcher(ctx.group)
    leaves = [make_leaves(case, ctx.rank) for case in cases]
    routings = [case.routing(ctx.rank)[0] for case in cases]
    pending = [
        dispatcher.dispatch_async(own.x, topk_idx, own.topk_weights)
        for own, topk_idx in zip(leaves, routings, strict=True)
    ]
    routed = {i: pending[i].wait() for i in orders[0]}
    sums = {}
    for i in orders[1]:
        y = apply_experts(cases[i], routed[i], routed[i].x, routed[i].weights, leaves[i].matrices)
        sums[i] = dispatcher.combine_async(y, routed[i].handle, for_combine(cases[i], routed[i].weights))
    outs = {i: sums[i].wait() for i in orders[2]}
    loss = sum((outs[i] * probe(cases[i], ctx.rank)).sum() for i in range(3))
    loss.backward()
    for i, case in enumerate(cases):
        expected, grads = unsharded(case)
        torch.testing.assert_close(outs[i], expected[ctx.rank], **EXACT)
        check_grads(leaves[i].grads(), grads[ctx.rank])


@pytest.mark.parametrize("mode", ["expanded", "compact"])
@pytest.mark.parametrize(
    "orders",
    [[(0, 1, 2), (0, 1, 2), (0, 1, 2)], [(2, 0, 1), (1, 2, 0), (0, 2, 1)], [(2, 1, 0), (0, 1, 2), (2, 1, 0)]],
    ids=["in order", "mixed", "reversed"],
)
def test_pending_exchanges_may_be_waited_for_in_any_order(ranks: Ranks, mode: str, orders: list) -> None:
    ranks(3, wait_in_another_order, mode, orders)


def drop_pending(ctx: RankContext) -> list[bool]:
    case = make_case(ctx.world_size)
    dispatcher, topk_idx = case.dispatcher(ctx.group), case.routing(ctx.rank)[0]
    leaves = make_leaves(case, ctx.rank)
    routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights)
    gone = []
    for _ in range(2):
        pending = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights)
        gone.append(weakref.ref(pending._exchange))
        pending = dispatcher.combine_async(routed.x, routed.handle, routed.weights)
        gone.append(weakref.ref(pending._exchange))
        del pending
        # Exchanges go on behind those that nobody waits for, and their gradients are right.
        check_against_unsharded(ctx, case, dispatcher, use_async=True)
    dispatcher.check()
    gc.collect()
    return [ref() is None for ref in gone]


def test_a_dropped_pending_disturbs_nothing(ranks: Ranks) -> None:
    assert ranks(2, drop_pending) == [[True] * 4] * 2


def wait_twice(ctx: RankContext) -> list[bool]:
    case = make_case(ctx.world_size)
    dispatcher, leaves = case.dispatcher(ctx.group), make_leaves(case, ctx.rank)
    pending = dispatcher.dispatch_async(leaves.x, case.routing(ctx.rank)[0], leaves.topk_weights)
    routed = pending.wait()
    summed = dispatcher.combine_async(routed.x, routed.handle, routed.weights)
    out = summed.wait()
    return [pending.wait() is routed, summed.wait() is out, dispatcher.stats()["exchanges"] == 2]


def test_waiting_twice_gives_the_same_result(ranks: Ranks) -> None:
    assert ranks(2, wait_twice) == [[True, True, True]] * 2


def keep_outputs(ctx: RankContext, mode: str, use_async: bool) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    dispatcher, leaves, topk_idx = case.dispatcher(ctx.group), make_leaves(case, ctx.rank), case.routing(ctx.rank)[0]
    if use_async:
        routed = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights).wait()
    else:
        routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights)
    y = apply_experts(case, routed, routed.x, routed.weights, leaves.matrices)
    out = dispatcher.combine(y, routed.handle, for_combine(case, routed.weights))
    kept = [routed.x, routed.weights, routed.tokens_per_expert, routed.expert_ends, y, out, *routed.handle.tensors]
    copies = [(t.detach().clone(), t._version) for t in kept]
    for seed in range(1, 4):
        other = make_case(ctx.world_size, seed=seed, kind="zipf", **MODES[mode])
        check_against_unsharded(ctx, other, other.dispatcher(ctx.group), use_async=True)
        later = dispatcher.dispatch_async(other.x(ctx.rank), *other.routing(ctx.rank)).wait()
        dispatcher.combine_async(later.x, later.handle, for_combine(case, later.weights)).wait()
    for tensor, (copy, version) in zip(kept, copies, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
        assert tensor._version == version
    out.backward(probe(case, ctx.rank))
    check_grads(leaves.grads(), unsharded(case)[1][ctx.rank])


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["expanded", "compact", "slab"])
def test_later_exchanges_leave_outputs_alone(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(2, keep_outputs, mode, use_async)


def planned_gradients(ctx: RankContext) -> None:
    cases = [make_case(ctx.world_size, seed=seed) for seed in range(2)]
    dispatcher = cases[0].dispatcher(ctx.group)
    routings = [case.routing(ctx.rank)[0] for case in cases]
    for case, topk_idx, planned in zip(cases, routings, dispatcher.plan(routings), strict=True):
        leaves = make_leaves(case, ctx.rank)
        routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights, planned=planned)
        y = apply_experts(case, routed, routed.x, routed.weights, leaves.matrices)
        dispatcher.combine(y, routed.handle, routed.weights).backward(probe(case, ctx.rank))
        check_grads(leaves.grads(), unsharded(case)[1][ctx.rank])


def test_gradients_of_chunks_planned_together(ranks: Ranks) -> None:
    ranks(3, planned_gradients)


def run_with_failing_hook(ctx: RankContext, case: Case, phase: str, use_async: bool) -> str:
    """Where an exception of a hook surfaces: at the call, or in backward."""
    dispatcher = case.dispatcher(ctx.new_group(), timeout_s=5)
    leaves, topk_idx, place = make_leaves(case, ctx.rank), case.routing(ctx.rank)[0], "dispatch"

    def complain(event: object) -> None:
        raise KeyError(f"hook of {event.phase}")

    hook = dispatcher.register_hook(phase, complain)
    try:
        if use_async:
            pending = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights)
            place = "dispatch wait"
            routed = pending.wait()
            place = "combine"
            pending = dispatcher.combine_async(routed.x, routed.handle, routed.weights)
            place = "combine wait"
            out = pending.wait()
        else:
            routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights)
            place = "combine"
            out = dispatcher.combine(routed.x, routed.handle, routed.weights)
        place = "backward"
        out.sum().backward()
        place = "nowhere"
    except KeyError as error:
        if f"hook of {phase}" not in str(error):
            raise
    hook.remove()
    # Hooks are called behind or before exchanges, not inside: all ranks are still in step.
    check_against_unsharded(ctx, case, dispatcher, use_async=use_async)
    return place


def failing_hooks(ctx: RankContext, use_async: bool) -> list[str]:
    case = make_case(ctx.world_size)
    return [run_with_failing_hook(ctx, case, phase, use_async) for phase in PHASES]


def test_what_a_hook_raises_surfaces_at_the_call(ranks: Ranks) -> None:
    sync = ["dispatch", "dispatch", "combine", "combine"]
    split = ["dispatch", "dispatch wait", "combine", "combine wait"]
    assert ranks(2, failing_hooks, False) == [sync + ["backward"] * 4] * 2
    assert ranks(2, failing_hooks, True) == [split + ["backward"] * 4] * 2


def remove_inside(ctx: RankContext) -> list[str]:
    case = make_case(ctx.world_size)
    dispatcher, log = case.dispatcher(ctx.group), []
    hooks = {}
    for phase in PHASES:
        # Each hook takes itself out: it is called once.
        hooks[phase] = dispatcher.register_hook(
            phase, lambda event: (log.append(event.phase), hooks[event.phase].remove())
        )
    for use_async in (True, False):
        check_against_unsharded(ctx, case, dispatcher, use_async=use_async)
    return log


def test_a_hook_may_remove_itself(ranks: Ranks) -> None:
    order = [*PHASES[:4], *PHASES[6:], *PHASES[4:6]]
    assert ranks(2, remove_inside) == [order] * 2


def fail_to_wait(ctx: RankContext, kind: str) -> str:
    """A dispatcher whose exchange failed goes with its last reference, without the garbage collector."""
    case = make_case(ctx.world_size)
    dispatcher = case.dispatcher(ctx.new_group(), timeout_s=5)
    x, (topk_idx, weights) = case.x(ctx.rank), case.routing(ctx.rank)
    routed = dispatcher.dispatch(x, topk_idx, weights)
    gone, text = weakref.ref(dispatcher._exchanger), ""
    gc.disable()
    try:
        # Rank 0 raises at once, the other learns of it where it waits.
        if kind == "dispatch":
            pending = dispatcher.dispatch_async(x[:, :1] if ctx.rank == 0 else x, topk_idx, weights)
        else:
            given = None if ctx.rank == 0 else routed.weights
            pending = dispatcher.combine_async(routed.x, routed.handle, given)
        with pytest.raises(PeerAbortedError) as caught:
            pending.wait()
        text = str(caught.value)
        del caught
        with pytest.raises(MoeEpError, match="earlier wait"):
            pending.wait()
        del routed, pending, dispatcher
        assert gone() is None
    except ValueError:
        text = "refused"
    finally:
        gc.enable()
    return text


@pytest.mark.parametrize("kind", ["dispatch", "combine"])
def test_an_error_does_not_keep_its_dispatcher(ranks: Ranks, kind: str) -> None:
    mine, theirs = ranks(2, fail_to_wait, kind)
    assert mine == "refused"
    assert "rank 0" in theirs
