"""Dispatch and combine of one case: exact, with a capacity in a graph, and replayed; checked before they are timed."""

from typing import Any

import torch

from moe_ep.cli.bench.gpu.baselines import NcclTimes
from moe_ep.cli.bench.gpu.context import Context, fill_nan, payload_of, poisoned
from moe_ep.cli.bench.gpu.inputs import ALIGNMENT, Inputs
from moe_ep.cli.bench.gpu.timer import Captured, Timing
from moe_ep.config import FP8_DTYPE, FP8_GROUP
from moe_ep.dispatcher import TokenDispatcher
from moe_ep.results import Dispatched

BF16 = torch.bfloat16
LAYOUTS = ("compact", "expanded")
# Of dispatches that leave rows in the arena: senders alone fill the links.
ARENA_SMS = 8


def measure_case(context: Context, inputs: Inputs, nccl: NcclTimes) -> None:
    """All figures of one T and routing. Collective."""
    for layout in LAYOUTS:
        measure_dispatch(context, inputs, layout, BF16, nccl)
        measure_combine(context, inputs, layout, nccl)
    measure_dispatch_in_arena(context, inputs, nccl)
    if inputs.case.shape.hidden % FP8_GROUP == 0:
        measure_dispatch(context, inputs, "compact", FP8_DTYPE, nccl)


def measure_dispatch(context: Context, inputs: Inputs, layout: str, dtype: torch.dtype, nccl: NcclTimes) -> None:
    """A dispatch in every mode."""
    watch, rows = context.watch, inputs.x if dtype == BF16 else inputs.fp8
    floor = context.floor_of(inputs, dtype)
    common: dict[str, Any] = {"op": "dispatch", "layout": layout, "dtype": dtype, "floor": floor}
    common |= {"num_sms": context.num_sms("dispatch", layout)}
    facts: dict[str, Any]

    def dispatch(dispatcher: TokenDispatcher) -> Dispatched:
        return dispatcher.dispatch(rows, inputs.topk_idx, inputs.topk_weights)

    exact = context.dispatcher(inputs, layout)
    routed = poisoned(lambda: dispatch(exact))
    watch.require(is_right(inputs, routed, layout), f"exact dispatch to {layout} rows")
    nccl_us = nccl.best("dispatch", layout, dtype)
    timing = watch.time(lambda: dispatch(exact))
    arena = {"arena_bytes": context.buffer.backend.memory_bytes}
    context.add(inputs, mode="exact", timing=timing, nccl_us=nccl_us, **common, **arena)

    if dtype == BF16:
        call = replay_of(exact, inputs, routed)
        watch.require(_has_rows(inputs, poisoned(call), layout), f"replayed dispatch to {layout} rows")
        facts = {"nccl_us": nccl_us, "host_us": watch.host(call)}
        context.add(inputs, mode="replay", timing=watch.time(call), **common, **facts)
    del routed

    fixed = context.dispatcher(inputs, layout, with_capacity=True)
    dispatch(fixed)
    captured = Captured(lambda: dispatch(fixed))
    timing = time_captured(context, captured, lambda result: is_right(inputs, result, layout), f"dispatch to {layout}")
    facts = {"nccl_us": nccl.best("dispatch", layout, dtype, captured=True)}
    facts |= {"host_us": watch.host(lambda: dispatch(fixed))}
    context.add(inputs, mode="capacity", timing=timing, **common, **facts, **arena)


def measure_dispatch_in_arena(context: Context, inputs: Inputs, nccl: NcclTimes) -> None:
    """A dispatch to compact rows that stay in the arena, on few SMs, eager and in a graph. Collective.

    A single rank has no arena for them.
    """
    if context.rank.size == 1:
        return
    watch, what = context.watch, "dispatch to compact rows in the arena"
    common: dict[str, Any] = {"op": "dispatch", "layout": "compact", "floor": context.floor_of(inputs, BF16)}
    common |= {"num_sms": context.num_sms("dispatch", "compact", ARENA_SMS)}

    def dispatch(dispatcher: TokenDispatcher) -> Dispatched:
        return dispatcher.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights, out="arena")

    def check(routed: Dispatched) -> bool:
        return routed.in_arena and is_right(inputs, routed, "compact")

    exact = context.dispatcher(inputs, "compact", num_sms=ARENA_SMS)
    # Skewed routing may find too little memory the first time.
    dispatch(exact)
    watch.require(check(poisoned(lambda: dispatch(exact))), what)
    arena = {"arena_bytes": context.buffer.backend.memory_bytes}
    nccl_us = nccl.best("dispatch", "compact", BF16)
    context.add(inputs, mode="arena", timing=watch.time(lambda: dispatch(exact)), nccl_us=nccl_us, **common, **arena)

    fixed = context.dispatcher(inputs, "compact", with_capacity=True, num_sms=ARENA_SMS)
    dispatch(fixed)
    timing = time_captured(context, Captured(lambda: dispatch(fixed)), check, what)
    facts: dict[str, Any] = {"nccl_us": nccl.best("dispatch", "compact", BF16, captured=True)}
    facts |= {"host_us": watch.host(lambda: dispatch(fixed))}
    context.add(inputs, mode="arena capacity", timing=timing, **common, **facts, **arena)


def measure_combine(context: Context, inputs: Inputs, layout: str, nccl: NcclTimes) -> None:
    """A combine, eager and in a graph: of compact rows the sum, of expanded ones the weighted sum."""
    watch = context.watch
    floor, sms = context.floor_of(inputs, BF16, reverse=True), context.num_sms("combine", layout)
    common: dict[str, Any] = {"op": "combine", "layout": layout, "floor": floor, "num_sms": sms}

    exact = context.dispatcher(inputs, layout)
    call = combine_of(exact, inputs, layout)
    watch.require(has_sums(inputs, poisoned(call), layout), f"combine of {layout} rows")
    context.add(inputs, mode="exact", timing=watch.time(call), nccl_us=nccl.best("combine", layout, BF16), **common)
    del call

    call = combine_of(context.dispatcher(inputs, layout, with_capacity=True), inputs, layout)
    call()
    captured = Captured(call)
    timing = time_captured(context, captured, lambda out: has_sums(inputs, out, layout), f"combine of {layout} rows")
    facts: dict[str, Any] = {"nccl_us": nccl.best("combine", layout, BF16, captured=True), "host_us": watch.host(call)}
    context.add(inputs, mode="capacity", timing=timing, **common, **facts)


def time_captured(context: Context, captured: Captured, check: Any, what: str) -> Timing:
    """Poison what a graph writes, replay and check it, then time it."""
    fill_nan(payload_of(captured.result))
    context.watch.barrier()
    captured()
    torch.cuda.synchronize()
    context.watch.require(check(captured.result), f"captured {what}")
    return context.watch.time(captured)


def replay_of(dispatcher: TokenDispatcher, inputs: Inputs, routed: Dispatched) -> Any:
    """A call that sends the rows along the plan of an earlier dispatch."""
    exchanger, plan = dispatcher._live(), routed.handle.plan
    return lambda: exchanger.replay(inputs.x, plan).result()


def combine_of(dispatcher: TokenDispatcher, inputs: Inputs, layout: str) -> Any:
    """A call that combines what experts might have made of dispatched rows."""
    routed = dispatcher.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)
    y, weights = expert_outputs(inputs, routed, layout)
    handle = routed.handle
    return lambda: dispatcher.combine(y, handle, weights)


def expert_outputs(inputs: Inputs, routed: Dispatched, layout: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What experts might have made of dispatched rows, and the weights that combine applies."""
    if layout == "compact":
        return inputs.compact_outputs(routed.x), None
    if layout == "slab":
        return inputs.slab_outputs(routed.x), routed.weights
    return inputs.grouped_outputs(routed.x, ALIGNMENT), routed.weights


def is_right(inputs: Inputs, routed: Dispatched, layout: str) -> bool:
    """Whether a dispatch delivered rows, scales, weights and counts."""
    if not torch.equal(routed.tokens_per_expert.long(), inputs.tokens_per_expert):
        return False
    return _has_rows(inputs, routed.x, layout, routed.scales) and inputs.has_weights(routed.weights, layout)


def has_sums(inputs: Inputs, out: torch.Tensor, layout: str) -> bool:
    """Whether a combine gave the sums."""
    return inputs.has_compact_sums(out) if layout == "compact" else inputs.has_grouped_sums(out)


def _has_rows(inputs: Inputs, rows: torch.Tensor, layout: str, scales: torch.Tensor | None = None) -> bool:
    if layout == "compact":
        return inputs.has_compact(rows, scales)
    return inputs.has_slabs(rows, scales) if layout == "slab" else inputs.has_grouped(rows, ALIGNMENT, scales)
