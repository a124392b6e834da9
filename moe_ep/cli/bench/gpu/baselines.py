"""NCCL's ways to the same results, measured in the same run: all-to-all with and without copies, all-gather."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_ep.cli.bench.baseline import AllToAllDispatcher
from moe_ep.cli.bench.gpu.context import Context, fill_nan, payload_of, poisoned
from moe_ep.cli.bench.gpu.inputs import Inputs, pack_fp8, unpack_fp8
from moe_ep.cli.bench.gpu.timer import Captured
from moe_ep.cli.bench.gpu.traffic import visits
from moe_ep.config import FP8_DTYPE, FP8_GROUP

# Larger exchanges are not the kind that decoding captures.
MOST_CAPTURED_TOKENS = 512


class NcclTimes:
    """The fastest of NCCL's ways, by what they do."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, str, torch.dtype, bool], float] = {}

    def note(self, op: str, layout: str, dtype: torch.dtype, captured: bool, time_us: float) -> None:
        """Keep a time if it is the best so far."""
        key = (op, layout, dtype, captured)
        self._times[key] = min(time_us, self._times.get(key, time_us))

    def best(self, op: str, layout: str, dtype: torch.dtype, *, captured: bool = False) -> float | None:
        """The best time in microseconds; of eager calls where none was captured."""
        eager = self._times.get((op, layout, dtype, False))
        return self._times.get((op, layout, dtype, True), eager) if captured else eager


def measure_baselines(context: Context, inputs: Inputs) -> NcclTimes:
    """Check and time all of NCCL's ways for one case. Collective; nothing on a single rank."""
    times = NcclTimes()
    if context.rank.size == 1:
        return times

    def measure(
        op: str, layout: str, way: str, call: Callable[[], Any], check: Callable[[Any], bool], **how: Any
    ) -> None:
        dtype = how.get("dtype", torch.bfloat16)
        what = f"{op} to {layout} rows by {way}"
        context.watch.require(check(poisoned(call)), what)
        common = {"op": op, "layout": layout, "backend": f"nccl_{way}", "dtype": dtype}
        timing = context.watch.time(call)
        times.note(op, layout, dtype, False, timing.max_us)
        context.add(inputs, mode="exact", timing=timing, **common)
        static = how.get("static")
        if static is None:
            return
        if inputs.case.tokens > MOST_CAPTURED_TOKENS:
            # Nothing in it waits for the host: with hosts that are ahead it takes what it would in a graph.
            timing = context.watch.time(static, ahead=True)
            times.note(op, layout, dtype, True, timing.max_us)
            return
        static()
        captured = Captured(static)
        fill_nan(payload_of(captured.result))
        context.watch.barrier()
        captured()
        torch.cuda.synchronize()
        context.watch.require(check(captured.result), f"captured {what}")
        timing = context.watch.time(captured)
        times.note(op, layout, dtype, True, timing.max_us)
        context.add(inputs, mode="capacity", timing=timing, **common)

    rows = RowsOnce(inputs)
    measure("dispatch", "compact", "all_to_all", rows.dispatch, inputs.has_compact, static=rows.dispatch)
    if inputs.case.shape.hidden % FP8_GROUP == 0:
        packed = pack_fp8(inputs.fp8)
        measure(
            "dispatch",
            "compact",
            "all_to_all",
            lambda: rows.dispatch(packed),
            lambda out: inputs.has_compact(*unpack_fp8(out, inputs.case.shape.hidden)),
            static=lambda: rows.dispatch(packed),
            dtype=FP8_DTYPE,
        )
    y = inputs.compact_outputs(rows.dispatch())
    measure(
        "combine",
        "compact",
        "all_to_all",
        lambda: rows.combine(y),
        inputs.has_compact_sums,
        static=lambda: rows.combine(y),
    )
    _measure_permuted(inputs, measure)
    _measure_gathered(inputs, measure)
    return times


def _measure_permuted(inputs: Inputs, measure: Callable[..., None]) -> None:
    """One copy per expert, with a permutation before and after."""
    assert inputs.rank.group is not None
    dispatcher = AllToAllDispatcher(inputs.rank.group, inputs.case.shape.experts)
    sent = (inputs.x, inputs.topk_idx, inputs.topk_weights)
    way = "all_to_all_permute"
    measure("dispatch", "expanded", way, lambda: dispatcher.dispatch(*sent), lambda got: inputs.has_grouped(got[0], 1))
    rows, _, route = dispatcher.dispatch(*sent)
    y = inputs.grouped_outputs(rows, 1)
    measure("combine", "expanded", way, lambda: dispatcher.combine(y, route), inputs.has_grouped_sums)


def _measure_gathered(inputs: Inputs, measure: Callable[..., None]) -> None:
    """All rows to all ranks, each of which selects; sums of all tokens on each rank, scattered."""
    gather = GatherAll(inputs)
    measure(
        "dispatch",
        "expanded",
        "all_gather",
        gather.dispatch,
        lambda got: inputs.has_grouped(got[0], 1),
        static=gather.dispatch_static,
    )
    y = inputs.grouped_outputs(gather.dispatch()[0], 1)
    measure(
        "combine",
        "expanded",
        "reduce_scatter",
        lambda: gather.combine(y),
        inputs.has_grouped_sums,
        static=lambda: gather.combine(y),
    )


class RowsOnce:
    """All-to-all with one row per token and rank. Sizes and places are known beforehand; no metadata travels."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        rank, shape = inputs.rank, inputs.case.shape
        went = visits(inputs.topk_idx, rank.size, shape.experts)
        target, self._token = went.T.nonzero(as_tuple=True)
        self._send_splits = list(inputs.traffic.rows[rank.rank])
        self._recv_splits = [row[rank.rank] for row in inputs.traffic.rows]
        num = len(self._token)
        # Where each token's row of each rank comes back; weight 0 where it does not.
        self._position = torch.zeros(inputs.case.tokens, rank.size, dtype=torch.int64, device=rank.device)
        self._position[self._token, target] = torch.arange(num, device=rank.device)
        self._weights = went.to(torch.bfloat16)

    def dispatch(self, rows: Tensor | None = None) -> Tensor:
        """Compact rows of this rank."""
        sent = (self._inputs.x if rows is None else rows).index_select(0, self._token)
        return self._exchange(sent, self._recv_splits, self._send_splits)

    def combine(self, y: Tensor) -> Tensor:
        """[T, H] sums."""
        returned = self._exchange(y, self._send_splits, self._recv_splits)
        return F.embedding_bag(self._position, returned, mode="sum", per_sample_weights=self._weights)

    def _exchange(self, rows: Tensor, recv_splits: list[int], send_splits: list[int]) -> Tensor:
        received = rows.new_empty(sum(recv_splits), rows.shape[1])
        dist.all_to_all_single(received, rows, recv_splits, send_splits, group=self._inputs.rank.group)
        return received


class GatherAll:
    """All-gather of tokens and choices, then a selection; and weighted sums of all tokens, then a reduce-scatter."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        size, shape = inputs.rank.size, inputs.case.shape
        self._num_all = size * inputs.case.tokens
        self._top_k = shape.top_k
        self._most = max(max(inputs.traffic.choices), 1)
        token, k = inputs.grouped
        self._position = torch.zeros(self._num_all, shape.top_k, dtype=torch.int64, device=inputs.rank.device)
        self._position[token, k] = torch.arange(len(token), device=inputs.rank.device)
        local = inputs.all_ids - inputs.first_expert
        mine = (local >= 0) & (local < inputs.num_local_experts)
        self._weights = inputs.all_weights.masked_fill(~mine, 0.0).to(torch.bfloat16)

    def dispatch(self) -> tuple[Tensor, Tensor]:
        """Rows and weights grouped by local expert; the host waits for their number."""
        x, local, weights = self._gather()
        chosen = ((local >= 0) & (local < self._inputs.num_local_experts)).flatten().nonzero()[:, 0]
        order = chosen[torch.argsort(local.flatten()[chosen], stable=True)]
        return x.index_select(0, order // self._top_k), weights.flatten()[order]

    def dispatch_static(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same in a fixed number of rows, without a wait; those behind the last are of other ranks' experts."""
        x, local, weights = self._gather(rows)
        num = self._inputs.num_local_experts
        key = torch.where((local >= 0) & (local < num), local, num).flatten()
        order = torch.argsort(key, stable=True)[: self._most]
        return x.index_select(0, order // self._top_k), weights.flatten()[order]

    def combine(self, y: Tensor) -> Tensor:
        """[T, H]: weighted sums of this rank's experts for all tokens, added up over the ranks."""
        if len(y):
            sums = F.embedding_bag(self._position, y, mode="sum", per_sample_weights=self._weights)
        else:
            sums = y.new_zeros(self._num_all, y.shape[1])
        out = y.new_empty(self._inputs.case.tokens, y.shape[1])
        dist.reduce_scatter_tensor(out, sums, group=self._inputs.rank.group)
        return out

    def _gather(self, rows: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, local expert ids and weights of all ranks; ``rows`` [T, ...] instead of the case's."""
        inputs, parts = self._inputs, []
        for tensor in (inputs.x if rows is None else rows, inputs.topk_idx, inputs.topk_weights):
            parts.append(tensor.new_empty(self._num_all, *tensor.shape[1:]))
            dist.all_gather_into_tensor(parts[-1], tensor, group=inputs.rank.group)
        return parts[0], parts[1] - inputs.first_expert, parts[2]
