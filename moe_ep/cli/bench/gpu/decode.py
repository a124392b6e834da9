"""Exchanges of few tokens as decoding makes them: many in one CUDA graph, dispatch after combine, and each alone."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ep.cli.bench.gpu.baselines import MOST_CAPTURED_TOKENS, GatherAll
from moe_ep.cli.bench.gpu.context import Context, poisoned
from moe_ep.cli.bench.gpu.exchange import BF16, LAYOUTS, expert_outputs, has_sums, is_right, time_captured
from moe_ep.cli.bench.gpu.inputs import Inputs, cast_fp8, pack_fp8, unpack_fp8
from moe_ep.cli.bench.gpu.timer import CALLS_IN_GRAPH, GRAPH_MODE, Call, Captured, Timing, in_a_row
from moe_ep.config import FP8_DTYPE, FP8_GROUP
from moe_ep.dispatcher import TokenDispatcher

PAIR = "decode_pair"
DECODE_LAYOUTS = (*LAYOUTS, "slab")

# Microseconds by op and dtype.
Times = dict[tuple[str, torch.dtype], float]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to dispatch and combine one case's tokens, ours or NCCL's.

    Attributes:
        layout: of its rows.
        names: its backend in the results, by op.
        rows: makes of tokens [T, H] in bf16 what ``dispatch`` takes, in a dtype.
        dispatch: returns whatever ``is_right`` and ``combine`` ask for.
        is_right: whether a dispatch of rows in a dtype delivered the case's.
        y: what experts might have made of dispatched rows.
        combine: brings such rows home, along the dispatch that is given.
        has_sums: whether a combine of ``y`` gave the sums.
    """

    layout: str
    names: Mapping[str, str]
    rows: Callable[[Tensor, torch.dtype], Any]
    dispatch: Callable[[Any], Any]
    is_right: Callable[[torch.dtype, Any], bool]
    y: Tensor
    combine: Callable[[Tensor, Any], Tensor]
    has_sums: Callable[[Tensor], bool]

    def pair(self, rows: Any, y: Tensor) -> tuple[Any, Tensor]:  # noqa: ANN401
        """What a dispatch delivers, and the sums of a combine behind it. Nothing happens in between."""
        routed = self.dispatch(rows)
        return routed, self.combine(y, routed)

    def is_right_pair(self, dtype: torch.dtype, results: tuple[Any, Tensor]) -> bool:
        """Whether both halves of a pair are right."""
        routed, sums = results
        return self.is_right(dtype, routed) and self.has_sums(sums)


def measure_decode(context: Context) -> None:
    """Pairs and their halves at every T of the sweep that decoding captures, with one routing. Collective."""
    settings = context.settings
    for tokens in decode_tokens(settings.tokens):
        inputs = context.inputs(tokens, settings.routings[0])
        nccl: Times = {}
        if context.rank.size > 1:
            nccl = Decoding(context, inputs, nccl_way(inputs), {}).measure()
        for layout in DECODE_LAYOUTS:
            dispatcher = context.dispatcher(inputs, layout, with_capacity=True)
            Decoding(context, inputs, our_way(dispatcher, inputs), nccl).measure()
            # Slabs of every expert are large.
            torch.cuda.empty_cache()


def decode_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Those that decoding captures."""
    return tuple(count for count in tokens if count <= MOST_CAPTURED_TOKENS)


def our_way(dispatcher: TokenDispatcher, inputs: Inputs) -> Way:
    """A dispatcher's exchanges; rows travel in bf16 or as they come in fp8, sums in bf16. Collective."""
    layout = dispatcher.layout

    def dispatch(rows: Any) -> Any:  # noqa: ANN401
        return dispatcher.dispatch(rows, inputs.topk_idx, inputs.topk_weights)

    def combine(y: Tensor, routed: Any) -> Tensor:  # noqa: ANN401
        return dispatcher.combine(y, routed.handle, None if layout == "compact" else routed.weights)

    return Way(
        layout=layout,
        names=dict.fromkeys((PAIR, "dispatch", "combine"), "cuda"),
        rows=lambda x, dtype: x if dtype == BF16 else cast_fp8(x),
        dispatch=dispatch,
        is_right=lambda dtype, routed: routed.x.dtype == dtype and is_right(inputs, routed, layout),
        y=expert_outputs(inputs, dispatch(inputs.x), layout)[0],
        combine=combine,
        has_sums=lambda out: has_sums(inputs, out, layout),
    )


def nccl_way(inputs: Inputs) -> Way:
    """All rows to all ranks, which select theirs; sums of all tokens on each rank, scattered. Collective."""
    gather, hidden = GatherAll(inputs), inputs.case.shape.hidden

    def is_right_gather(dtype: torch.dtype, result: tuple[Tensor, Tensor]) -> bool:
        rows, scales = (result[0], None) if dtype == BF16 else unpack_fp8(result[0], hidden)
        return inputs.has_grouped(rows, 1, scales)

    return Way(
        layout="expanded",
        names={PAIR: "nccl_all_gather_reduce_scatter", "dispatch": "nccl_all_gather", "combine": "nccl_reduce_scatter"},
        rows=lambda x, dtype: x if dtype == BF16 else pack_fp8(cast_fp8(x)),
        dispatch=gather.dispatch_static,
        is_right=is_right_gather,
        y=inputs.grouped_outputs(gather.dispatch()[0], 1),
        combine=lambda y, _: gather.combine(y),
        has_sums=inputs.has_grouped_sums,
    )


class Decoding:
    """Measures one way at one case. All methods are collective.

    Args:
        context: of the run.
        inputs: the case.
        way: to measure.
        nccl: times of NCCL's way; none while that is measured.
    """

    def __init__(self, context: Context, inputs: Inputs, way: Way, nccl: Times) -> None:
        self._context = context
        self._inputs = inputs
        self._way = way
        self._nccl = nccl
        self._times: Times = {}

    def measure(self) -> Times:
        """Check and time pairs and both halves.

        All calls of a graph but the last move negated rows: what they leave behind where the last one should have
        written does not pass for its results.
        """
        way, x = self._way, self._inputs.x
        y, other_y = way.y, -way.y
        for dtype in (BF16, FP8_DTYPE) if self._inputs.case.shape.hidden % FP8_GROUP == 0 else (BF16,):
            rows, other_rows = way.rows(x, dtype), way.rows(-x, dtype)
            self._take(
                PAIR,
                dtype,
                functools.partial(way.pair, rows, y),
                functools.partial(way.pair, other_rows, other_y),
                functools.partial(way.is_right_pair, dtype),
            )
            self._take(
                "dispatch",
                dtype,
                functools.partial(way.dispatch, rows),
                functools.partial(way.dispatch, other_rows),
                functools.partial(way.is_right, dtype),
            )
        routed = way.dispatch(way.rows(x, BF16))
        self._take(
            "combine",
            BF16,
            functools.partial(way.combine, y, routed),
            functools.partial(way.combine, other_y, routed),
            way.has_sums,
        )
        return self._times

    def _take(self, op: str, dtype: torch.dtype, last: Call, others: Call, check: Callable[[Any], bool]) -> None:
        """Check a call, eager and as the last of a graph, time the graph, and keep its share."""
        context, inputs, way, name = self._context, self._inputs, self._way, self._way.names[op]
        what = f"{op} of {way.layout} rows in {dtype} by {name}"
        context.watch.require(check(poisoned(last)), what)
        captured = Captured(in_a_row(last, others))
        timing = time_captured(context, captured, check, f"{what}, {GRAPH_MODE}").of_each(CALLS_IN_GRAPH)
        self._times[op, dtype] = timing.max_us
        facts: dict[str, Any] = {"op": op, "layout": way.layout, "mode": GRAPH_MODE, "dtype": dtype, "backend": name}
        if op == PAIR:
            facts["dtype_home"] = BF16
        if name == "cuda":
            facts |= {"floor": self._floor(op, dtype), "num_sms": self._num_sms(op)}
            facts["nccl_us"] = self._nccl.get((op, dtype))
        context.add(inputs, timing=timing, **facts)

    def _floor(self, op: str, dtype: torch.dtype) -> Timing | None:
        """The same bytes pushed, as often in a graph; of a pair those of both halves, one after the other."""
        floors = []
        if op != "combine":
            floors.append(self._context.floor_of(self._inputs, dtype, in_graph=True))
        if op != "dispatch":
            floors.append(self._context.floor_of(self._inputs, BF16, reverse=True, in_graph=True))
        known = [floor for floor in floors if floor is not None]
        return functools.reduce(Timing.plus, known) if known else None

    def _num_sms(self, op: str) -> int:
        """SMs of the call, of a pair those of its larger half."""
        halves = ("dispatch", "combine") if op == PAIR else (op,)
        return max(self._context.num_sms(half, self._way.layout) for half in halves)
