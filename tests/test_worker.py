"""A Buffer that is released while an exchange is under way: its process waits for no peer, and its peers are told."""

from __future__ import annotations

import atexit
import gc
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_ep import Buffer, TokenDispatcher
from moe_ep.errors import MoeEpError, PeerAbortedError, PeerTimeoutError
from moe_ep.testing import RankContext, run_ranks
from tests.checks import Case, round_trip

Ranks = Callable[..., list]

CASE = Case(tokens=(4, 5, 3), num_experts=6, top_k=2)


def outlive(pid: int) -> None:
    """Wait for the end of another process, and fail when it does not come."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os._exit(3)


def leave_alone(ctx: RankContext, where: str) -> int:
    """Rank 0 leaves during an exchange that the others never join, and they stay until it is gone."""
    dispatcher = CASE.dispatcher(ctx.group, timeout_s=600 if where == "thread" else 1)
    round_trip(ctx, CASE, dispatcher)
    pids = [torch.empty(1, dtype=torch.int64) for _ in range(ctx.world_size)]
    dist.all_gather(pids, torch.tensor([os.getpid()]), group=ctx.group)
    if ctx.rank != 0:
        atexit.register(outlive, int(pids[0]))
    elif where == "thread":
        dispatcher.dispatch_async(CASE.x(0), *CASE.routing(0))
    else:
        with pytest.raises(PeerTimeoutError):
            dispatcher.dispatch(CASE.x(0), *CASE.routing(0))
    # Kept to the end, as a script's variables are.
    ctx._subgroups[()] = dispatcher
    return ctx.rank


@pytest.mark.parametrize("where", ["thread", "caller"])
def test_an_interpreter_ends_while_its_exchange_waits_for_living_peers(where: str) -> None:
    assert run_ranks(3, leave_alone, where, fresh=True) == [0, 1, 2]


def own_buffer(ctx: RankContext, timeout_s: float) -> TokenDispatcher:
    buffer = Buffer(ctx.new_group(), explicitly_destroy=True, timeout_s=timeout_s)
    dispatcher = CASE.dispatcher(buffer.group, buffer=buffer, timeout_s=None)
    round_trip(ctx, CASE, dispatcher)
    return dispatcher


def destroy_early(ctx: RankContext, num_pending: int) -> str:
    dispatcher = own_buffer(ctx, 600)
    x, routing = CASE.x(ctx.rank), CASE.routing(ctx.rank)
    text = ""
    if ctx.rank == 0:
        pending = [dispatcher.dispatch_async(x, *routing) for _ in range(num_pending)]
        dispatcher.buffer.destroy()
        for one in pending:
            with pytest.raises(MoeEpError):
                one.wait()
        with pytest.raises(MoeEpError, match="destroyed"):
            dispatcher.dispatch(x, *routing)
    dist.barrier(group=ctx.group)
    if ctx.rank != 0:
        # What rank 0 had sent may still serve the first.
        try:
            for _ in range(num_pending + 1):
                dispatcher.dispatch(x, *routing)
        except PeerAbortedError as error:
            text = f"{error.rank}: {error.reason}"
    return text


@pytest.mark.parametrize("num_pending", [1, 3])
def test_destroy_ends_an_exchange_under_way_and_the_peers_hear_of_it(ranks: Ranks, num_pending: int) -> None:
    for text in ranks(3, destroy_early, num_pending, timeout=20)[1:]:
        assert text.startswith("0: ")
        assert "released" in text


def drop_stuck(ctx: RankContext, where: str) -> bool:
    dispatcher = own_buffer(ctx, 1)
    buffer = weakref.ref(dispatcher.buffer)
    if ctx.rank == 0 and where == "thread":
        dispatcher.dispatch_async(CASE.x(0), *CASE.routing(0))
    elif ctx.rank == 0:
        with pytest.raises(PeerTimeoutError):
            dispatcher.dispatch(CASE.x(0), *CASE.routing(0))
    del dispatcher
    end = time.monotonic() + 15
    while buffer() is not None and time.monotonic() < end:
        gc.collect()
        time.sleep(0.1)
    # Only now: until here the connections of the others are not what ends the exchange.
    dist.barrier(group=ctx.group)
    return buffer() is None


@pytest.mark.parametrize("where", ["thread", "caller"])
def test_a_buffer_goes_while_its_exchange_waits_for_living_peers(ranks: Ranks, where: str) -> None:
    assert ranks(3, drop_stuck, where, timeout=25) == [True] * 3


def reset_stuck(ctx: RankContext) -> bool:
    dispatcher = own_buffer(ctx, 1)
    if ctx.rank != 2:
        with pytest.raises(PeerTimeoutError):
            dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    dist.barrier(group=ctx.group)
    dispatcher.reset()
    round_trip(ctx, CASE, dispatcher)
    return True


def test_reset_does_not_wait_for_the_exchange_that_failed(ranks: Ranks) -> None:
    # Connections wait for peers of their own accord for 30 s.
    assert ranks(3, reset_stuck, timeout=20) == [True] * 3
