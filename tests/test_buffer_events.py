"""Events of ``Buffer``'s calls on the CPU: the host goes on where it was asked to, and waits where it was asked to."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from moe_ep import Buffer, EventOverlap
from moe_ep.testing import RankContext
from tests.buffer_checks import layout_of, make_case

Ranks = Callable[..., list]


def hold_calls(ctx: RankContext) -> list[bool]:
    """Whether calls with ``async_finish`` come back while their payload cannot leave, and are right in the end."""
    case = make_case(2, tokens=(4, 3))
    buffer = Buffer(ctx.group, timeout_s=30)
    layout, (topk_idx, topk_weights) = layout_of(buffer, case, ctx.rank), case.routing(ctx.rank)
    x = case.x(ctx.rank)
    waited = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=topk_weights)
    summed, _, _ = buffer.combine(waited[0], waited[4])
    gate, transport = threading.Event(), buffer.backend.transport
    ship = transport.ship

    def held(*args: Any, **options: Any) -> Any:
        # A call that waited for its payload would end here.
        assert gate.wait(10)
        return ship(*args, **options)

    transport.ship = held
    seen = []
    try:
        again, *_, event = buffer.dispatch(x, handle=waited[4], async_finish=True)
        seen.append(gate.is_set())
        gate.set()
        event.current_stream_wait()
        seen.append(torch.equal(again, waited[0]))
        gate.clear()
        out, _, event = buffer.combine(waited[0], waited[4], async_finish=True)
        seen.append(gate.is_set())
        gate.set()
        event.current_stream_wait()
        seen.append(torch.equal(out, summed))
    finally:
        gate.set()
        transport.ship = ship
    return seen


def test_the_host_goes_on_before_payload_has_left(ranks: Ranks) -> None:
    assert ranks(2, hold_calls) == [[False, True, False, True]] * 2


class Noted:
    """An event that notes that it was waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream_wait(self) -> None:
        self.waits += 1


def wait_before(ctx: RankContext) -> list[int]:
    case = make_case(2, tokens=(4, 3))
    buffer = Buffer(ctx.group, timeout_s=30)
    topk_idx, topk_weights = case.routing(ctx.rank)
    noted = [Noted() for _ in range(4)]
    events = [EventOverlap(event) for event in noted]
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(
        topk_idx, case.num_experts, previous_event=events[0]
    )
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    got = buffer.dispatch(
        case.x(ctx.rank), **layout, topk_idx=topk_idx, topk_weights=topk_weights, previous_event=events[1]
    )
    buffer.dispatch(case.x(ctx.rank), handle=got[4], previous_event=events[2])
    buffer.combine(got[0], got[4], previous_event=events[3])
    return [event.waits for event in noted]


def test_calls_wait_for_the_event_before_them(ranks: Ranks) -> None:
    assert ranks(2, wait_before) == [[1] * 4] * 2
