"""Trouble between ranks: different settings, different order, death and lateness. Every rank ends and says why."""

import gc
import os
import signal
import time
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from moe_ep import Capacity, TokenDispatcher
from moe_ep.errors import ExchangeMismatchError, MoeEpError, PeerAbortedError, PeerTimeoutError, StaleHandleError
from moe_ep.testing import RankContext, run_ranks
from tests.checks import Case, check_dispatched, round_trip

Ranks = Callable[..., list]

CASE = Case(tokens=(4, 5, 3), num_experts=6, top_k=2)


def construct_differently(ctx: RankContext, changes: dict) -> str:
    try:
        CASE.dispatcher(ctx.new_group(), **(changes if ctx.rank == 1 else {}))
    except ExchangeMismatchError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"num_experts": 9}, ("num_experts=6", "num_experts=9")),
        ({"hidden_size": 16}, ("hidden_size=8", "hidden_size=16")),
        ({"top_k": 1}, ("top_k=2", "top_k=1")),
        ({"dtype": torch.bfloat16}, ("torch.float32", "torch.bfloat16")),
        ({"alignment": 8}, ("alignment=1", "alignment=8")),
        ({"weights": "experts"}, ("weights=combine", "weights=experts")),
        ({"capacity": Capacity(rows=64)}, ("rows=64",)),
        ({"capacity": Capacity(rows=64), "on_overflow": "drop"}, ("on_overflow=drop",)),
    ],
    ids=str,
)
def test_different_settings_are_found_at_construction_on_all_ranks(ranks: Ranks, changes: dict, sides: tuple) -> None:
    for rank, text in enumerate(ranks(3, construct_differently, changes)):
        assert text != "accepted", f"rank {rank} noticed nothing"
        assert "rank 1" in text
        assert all(side in text for side in sides)


def construct_one_badly(ctx: RankContext, changes: dict) -> Exception | None:
    try:
        CASE.dispatcher(ctx.new_group(), **(changes if ctx.rank == 2 else {}))
    except (ValueError, TypeError, MoeEpError) as error:
        return error
    return None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_sms": 7}, "num_sms=7"),
        ({"num_sms": "many"}, "num_sms='many' must be positive and even"),
        ({"timeout_s": -1}, "timeout_s=-1 must be a positive number"),
        ({"timeout_s": "soon"}, "timeout_s=soon must be a positive number"),
    ],
    ids=str,
)
def test_settings_that_one_rank_refuses_end_the_others(ranks: Ranks, changes: dict, text: str) -> None:
    results = ranks(3, construct_one_badly, changes)
    assert isinstance(results[2], ValueError | TypeError)
    for error in results[:2]:
        assert isinstance(error, PeerAbortedError)
        assert error.rank == 2
        assert text in str(error)


def swap_order(ctx: RankContext, late_s: float) -> tuple[str, str, bool]:
    dispatcher = CASE.dispatcher(ctx.new_group())
    x, routing = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    routed = dispatcher.dispatch(x, *routing)
    kind, text = "", ""
    try:
        if ctx.rank == 1:
            time.sleep(late_s)
            dispatcher.dispatch(x, *routing)
        else:
            dispatcher.combine(routed.x, routed.handle, routed.weights)
    except MoeEpError as error:
        kind, text = type(error).__name__, str(error)
    dispatcher.reset()
    round_trip(ctx, CASE, dispatcher)
    return kind, text, True


@pytest.mark.parametrize("late_s", [0.0, 0.5])
def test_different_order_is_found_with_both_sides(ranks: Ranks, late_s: float) -> None:
    for kind, text, usable in ranks(3, swap_order, late_s):
        assert kind == ExchangeMismatchError.__name__
        assert "combine" in text
        assert "dispatch" in text
        assert "same order" in text
        assert usable


def swap_layers(ctx: RankContext) -> str:
    # The same kind of exchange, but of two layers: the handles that are replayed differ.
    group = ctx.new_group()
    layers = [CASE.dispatcher(group), CASE.dispatcher(group)]
    routed = [layer.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank)) for layer in layers]
    mine = 1 if ctx.rank == 0 else 0
    try:
        layers[mine].combine(routed[mine].x, routed[mine].handle, routed[mine].weights)
    except ExchangeMismatchError as error:
        return str(error)
    return "accepted"


def test_combines_of_different_layers_do_not_mix(ranks: Ranks) -> None:
    assert all("different exchanges" in text for text in ranks(3, swap_layers))


def swap_dispatches(ctx: RankContext) -> str:
    group = ctx.new_group()
    layers = [CASE.dispatcher(group) for _ in range(2)]
    mine = 1 if ctx.rank == 0 else 0
    try:
        layers[mine].dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    except ExchangeMismatchError as error:
        for layer in layers:
            round_trip(ctx, CASE, layer)
        return str(error)
    return "accepted"


def test_dispatches_of_different_layers_do_not_mix(ranks: Ranks) -> None:
    for text in ranks(3, swap_dispatches):
        assert "dispatcher 1 of the Buffer" in text
        assert "dispatcher 2 of the Buffer" in text


def overflow_on_some(ctx: RankContext) -> str:
    """Rank 1 fails at the end of an exchange that overflows: it alone does not know of the overflow."""
    dispatcher = CASE.dispatcher(ctx.new_group(), timeout_s=20, capacity=Capacity(per_expert=1))
    x, (topk_idx, topk_weights) = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    backend = dispatcher.buffer.backend
    real = backend.dispatch

    def fail(*args: object) -> None:
        real(*args)
        raise MemoryError("no room")

    if ctx.rank == 1:
        backend.dispatch = fail
    kind = "none"
    try:
        dispatcher.dispatch(x, topk_idx, topk_weights)
    except MemoryError as error:
        kind = type(error).__name__
    backend.dispatch = real
    dispatcher.reset()
    nothing = torch.full_like(topk_idx, -1)
    assert not dispatcher.dispatch(x, nothing, topk_weights).tokens_per_expert.any()
    return kind


def test_reset_forgets_an_overflow(ranks: Ranks) -> None:
    assert ranks(3, overflow_on_some) == ["none", "MemoryError", "none"]


def skip_one(ctx: RankContext) -> tuple[str, tuple[int, ...], str]:
    dispatcher = CASE.dispatcher(ctx.new_group(), timeout_s=2)
    round_trip(ctx, CASE, dispatcher)
    if ctx.rank == 2:
        return "absent", (), ""
    try:
        dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    except PeerTimeoutError as error:
        try:
            dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
        except MoeEpError as refused:
            return str(error), error.ranks, str(refused)
    return "accepted", (), ""


def test_a_rank_that_never_comes_is_named(ranks: Ranks) -> None:
    results = ranks(3, skip_one)
    for text, named, refused in results[:2]:
        assert named == (2,)
        assert "rank(s) 2" in text
        assert "timeout_s" in text
        # Until reset() the Buffer refuses work at once.
        assert "reset()" in refused


def come_late(ctx: RankContext, late_s: float) -> tuple[str, tuple[int, ...], bool]:
    group = ctx.new_group()
    dispatcher = CASE.dispatcher(group, timeout_s=2)
    round_trip(ctx, CASE, dispatcher)
    kind, named = "", ()
    if ctx.rank == 1:
        time.sleep(late_s)
    try:
        dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    except PeerTimeoutError as error:
        kind, named = type(error).__name__, error.ranks
    dispatcher.reset()
    round_trip(ctx, CASE, dispatcher)
    return kind, named, True


def test_a_late_rank_times_out_and_all_go_on_after_reset(ranks: Ranks) -> None:
    results = ranks(3, come_late, 7.0)
    # What the others had sent before they gave up may still serve the late rank, so it alone need not fail.
    assert [results[rank][0] for rank in (0, 2)] == [PeerTimeoutError.__name__] * 2
    assert results[0][1] == results[2][1] == (1,)


def test_a_rank_that_comes_in_time_is_waited_for(ranks: Ranks) -> None:
    assert [kind for kind, _, _ in ranks(3, come_late, 1.0)] == ["", "", ""]


def die_in_exchange(ctx: RankContext, moment: str) -> tuple[str, tuple[int, ...]]:
    # A broken connection ends the wait long before this timeout.
    dispatcher = CASE.dispatcher(ctx.group, timeout_s=600)
    round_trip(ctx, CASE, dispatcher)
    routed = dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    if ctx.rank == 1:
        if moment == "inside":
            # The header is out and the payload is not.
            backend = dispatcher.buffer.backend
            backend.combine = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    try:
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    except PeerTimeoutError as error:
        return str(error), error.ranks
    return "accepted", ()


@pytest.mark.parametrize("moment", ["before", "inside"])
def test_survivors_of_a_dead_rank_name_it_and_exit(moment: str) -> None:
    # run_ranks(fresh=True) also checks that the survivors' interpreters end by themselves.
    results = run_ranks(3, die_in_exchange, moment, fresh=True, expect_dead=(1,), timeout=40)
    for text, named in (results[0], results[2]):
        assert named == (1,), text
        assert "rank(s) 1" in text


def leave_early(ctx: RankContext) -> int:
    dispatcher = CASE.dispatcher(ctx.group)
    round_trip(ctx, CASE, dispatcher)
    pending = dispatcher.dispatch_async(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    if ctx.rank != 0:
        check_dispatched(CASE, ctx.rank, pending.wait())
    # Rank 0 leaves with a pending exchange that nobody waits for.
    return ctx.rank


def test_interpreters_end_without_their_peers() -> None:
    assert run_ranks(3, leave_early, fresh=True) == [0, 1, 2]


def use_stale_on_one(ctx: RankContext) -> Exception | None:
    group = ctx.new_group()
    first, second = CASE.dispatcher(group), CASE.dispatcher(group)
    routed = first.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    others = second.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    handle = routed.handle if ctx.rank == 2 else others.handle
    try:
        second.combine(others.x, handle, others.weights)
    except (StaleHandleError, PeerAbortedError) as error:
        round_trip(ctx, CASE, second)
        return error
    return None


def test_a_stale_handle_on_one_rank_ends_all(ranks: Ranks) -> None:
    results = ranks(3, use_stale_on_one)
    assert isinstance(results[2], StaleHandleError)
    for error in results[:2]:
        assert isinstance(error, PeerAbortedError)
        assert error.rank == 2
        assert "handle" in error.reason


def fail_late(ctx: RankContext) -> tuple[str, str, bool]:
    """Rank 1 runs out of memory when its payload is out: the others finish that exchange and begin the next."""
    dispatcher = CASE.dispatcher(ctx.new_group(), timeout_s=30)
    backend = dispatcher.buffer.backend
    real = backend.place
    if ctx.rank == 1:

        def place(*args: object) -> None:
            real(*args)
            raise MemoryError("no room for rows")

        backend.place = place
    x, routing = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    begin = time.monotonic()
    try:
        routed = dispatcher.dispatch(x, *routing)
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    except (MemoryError, PeerAbortedError) as error:
        seconds = time.monotonic() - begin
        backend.place = real
        dispatcher.reset()
        round_trip(ctx, CASE, dispatcher)
        return type(error).__name__, str(error), seconds < 10
    return "accepted", "", False


def test_a_rank_that_fails_after_its_payload_left_ends_all_at_once(ranks: Ranks) -> None:
    results = ranks(3, fail_late)
    assert [kind for kind, _, _ in results] == ["PeerAbortedError", "MemoryError", "PeerAbortedError"]
    assert all("no room for rows" in text and early for _, text, early in results)


def skip_a_wait(ctx: RankContext) -> tuple[bool, bool]:
    """Rank 1 sends only after the others have looked at rows that they did not wait for."""
    dispatcher = CASE.dispatcher(ctx.new_group())
    x = CASE.x(ctx.rank)
    routed = dispatcher.dispatch(x, *CASE.routing(ctx.rank))
    check_dispatched(CASE, ctx.rank, routed)
    backend, plan = dispatcher.buffer.backend, routed.handle.plan
    control, real = backend.control, backend.control.wait
    works: list = []
    if ctx.rank == 1:
        for other in (0, 2):
            dist.recv(torch.empty(1), other, group=ctx.group)
    else:
        control.wait = works.append
    # Twice the rows: memory that happens to hold the first exchange's must not look right.
    early = backend.replay(x * 2, plan)[0].clone()
    if ctx.rank != 1:
        dist.send(torch.ones(1), 1, group=ctx.group)
        control.wait = real
    for work in works:
        real(work)
    late = backend.replay(x * 2, plan)[0]
    return torch.equal(early, routed.x * 2), torch.equal(late, routed.x * 2)


def test_a_skipped_wait_is_found(ranks: Ranks) -> None:
    assert ranks(3, skip_a_wait) == [(False, True), (True, True), (False, True)]


class Ballast:
    """Stands for tensors of a caller whose exchange was refused."""


def refuse(dispatcher: TokenDispatcher, x: torch.Tensor, routing: tuple) -> weakref.ref:
    ballast = Ballast()
    with pytest.raises(ValueError, match="topk_idx"):
        dispatcher.dispatch(x, routing[0] + 100, routing[1])
    return weakref.ref(ballast)


def let_go_of_refused(ctx: RankContext) -> bool:
    dispatcher = CASE.dispatcher(ctx.new_group())
    x, routing = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    ballast = refuse(dispatcher, x, routing)
    gc.collect()
    round_trip(ctx, CASE, dispatcher)
    return ballast() is None


def test_a_refused_exchange_keeps_nothing_of_its_caller(ranks: Ranks) -> None:
    assert ranks(3, let_go_of_refused) == [True] * 3


def reset_without_one(ctx: RankContext, moment: str) -> tuple[str, tuple[int, ...], int]:
    dispatcher = CASE.dispatcher(ctx.new_group())
    x, routing = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    control = dispatcher.buffer.control
    rendezvous = control._rendezvous
    assert rendezvous is not None
    # Peers that are late shall not need the 30 s that ranks have to come together.
    rendezvous._seconds = 1.0
    named, refused, stale = (), "", dispatcher.dispatch(x, *routing)
    connect = rendezvous.connect
    if ctx.rank == 2 and moment == "before connecting":

        def fail(attempt: int) -> None:
            raise PeerTimeoutError("no descriptors left", ranks=(2,))

        rendezvous.connect = fail
    if ctx.rank != 2 or moment == "before connecting":
        try:
            dispatcher.reset()
        except PeerTimeoutError as error:
            named = error.ranks
        try:
            dispatcher.dispatch(x, *routing)
        except MoeEpError as error:
            refused = str(error)
    rendezvous.connect, rendezvous._seconds = connect, 20.0
    dist.barrier(group=ctx.group)
    dispatcher.reset()
    with pytest.raises((StaleHandleError, PeerAbortedError)):
        dispatcher.combine(stale.x, stale.handle, stale.weights)
    round_trip(ctx, CASE, dispatcher)
    return refused, named, control.incarnation


@pytest.mark.parametrize("moment", ["before all", "before connecting"])
def test_a_reset_that_failed_can_be_tried_again(ranks: Ranks, moment: str) -> None:
    results = ranks(3, reset_without_one, moment)
    for refused, named, _ in results[:2]:
        assert named == (2,)
        assert "call reset() on all ranks" in refused
    assert len({incarnation for *_, incarnation in results}) == 1
