"""Hooks of TokenDispatcher: every phase in order, beside other work, recomputed, raising."""

from collections.abc import Callable

import torch

import moe_ep
from moe_ep.testing import RankContext
from tests.checks import (
    Case,
    round_trip,
)

Ranks = Callable[..., list]


PHASES = [
    f"{prefix}{kind}_{moment}"
    for prefix in ("", "backward_")
    for kind in ("dispatch", "combine")
    for moment in ("launched", "ready")
]


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


def test_hooks_stay_when_the_group_is_set() -> None:
    case = Case(tokens=(5,))
    dispatcher, phases = case.dispatcher(None), []
    handle = dispatcher.register_hook("dispatch_ready", lambda event: phases.append(event.phase))
    dispatcher.set_group(None)
    dispatcher.dispatch(case.x(0), *case.routing(0))
    handle.remove()
    dispatcher.dispatch(case.x(0), *case.routing(0))
    assert phases == ["dispatch_ready"]
