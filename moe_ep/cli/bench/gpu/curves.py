"""How exchanges depend on their SMs, and on how often they go round their rings."""

from typing import Any

import torch

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.buffer import Buffer
from moe_ep.cli.bench.gpu.context import Context
from moe_ep.cli.bench.gpu.exchange import BF16, LAYOUTS, combine_of, has_sums, is_right, time_captured
from moe_ep.cli.bench.gpu.inputs import Inputs
from moe_ep.cli.bench.gpu.timer import Captured

# Words beside a row: place, id and weight of each choice.
_WORDS_PER_CHOICE = 3


def measure_sms(context: Context) -> None:
    """Dispatch and combine at one T, by number of SMs. Collective."""
    inputs = context.inputs(context.settings.curve_tokens, "uniform")
    for num_sms in context.settings.sm_counts:
        for layout in LAYOUTS:
            _measure(context, inputs, layout, what=f"on {num_sms} SMs", asked=num_sms)


def measure_laps(context: Context) -> None:
    """The same in an arena that forces several rounds. Collective; a single rank has no rings."""
    if context.rank.size == 1:
        return
    inputs = context.inputs(context.settings.curve_tokens, "uniform")
    for laps in context.settings.laps:
        granted = granted_bytes(inputs, laps)
        buffer = Buffer(context.rank.group, granted, backend="cuda", explicitly_destroy=True)
        for layout in LAYOUTS:
            _measure(context, inputs, layout, what=f"in {laps} rounds", buffer=buffer)
        # Peers may still store into the arena that goes.
        context.watch.barrier()
        buffer.destroy()


def granted_bytes(inputs: Inputs, laps: int) -> int:
    """Memory in which each source's ring holds one of ``laps`` equal parts of its largest exchange."""
    extension, case = load_extension(), inputs.case
    groups = -(-case.tokens // extension.CHUNK_TOKENS)
    words = _WORDS_PER_CHOICE * case.shape.top_k
    group = extension.group_layout(row_bytes=case.shape.hidden * BF16.itemsize, meta_words=words)["num_bytes"]
    return int(case.ranks * -(-groups // laps) * group)


def _measure(
    context: Context, inputs: Inputs, layout: str, *, what: str, asked: int | None = None, buffer: Buffer | None = None
) -> None:
    """One dispatch and one combine of a layout, captured: what the host does would hide the differences."""
    dispatcher = context.dispatcher(inputs, layout, with_capacity=True, num_sms=asked, buffer=buffer)

    def dispatch() -> Any:
        return dispatcher.dispatch(inputs.x, inputs.topk_idx, inputs.topk_weights)

    dispatch()
    facts = {} if buffer is None else _memory_facts(dispatcher.buffer.backend, inputs)
    common: dict[str, Any] = {"layout": layout, "mode": "capacity", **facts}
    floor = context.floor_of(inputs, BF16)
    timing = time_captured(
        context,
        Captured(dispatch),
        lambda routed: is_right(inputs, routed, layout),
        f"dispatch to {layout} rows {what}",
    )
    context.add(
        inputs, op="dispatch", timing=timing, floor=floor, num_sms=context.num_sms("dispatch", layout, asked), **common
    )
    combine = combine_of(dispatcher, inputs, layout)
    combine()
    floor = context.floor_of(inputs, BF16, reverse=True)
    about = f"combine of {layout} rows {what}"
    timing = time_captured(context, Captured(combine), lambda out: has_sums(inputs, out, layout), about)
    context.add(
        inputs, op="combine", timing=timing, floor=floor, num_sms=context.num_sms("combine", layout, asked), **common
    )
    torch.cuda.synchronize()


def _memory_facts(backend: CudaBackend, inputs: Inputs) -> dict[str, int]:
    shape = inputs.case.shape
    record = (shape.hidden * BF16.itemsize, _WORDS_PER_CHOICE * shape.top_k)
    return {"laps": backend.num_laps(inputs.case.tokens, record), "arena_bytes": backend.memory_bytes}
