"""What all measurements of a run share: settings, the ranks, a stopwatch, the floor, and the rows found so far."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.buffer import Buffer
from moe_ep.cli.bench.cases import Case, Shape
from moe_ep.cli.bench.gpu.floor import Floor
from moe_ep.cli.bench.gpu.inputs import ALIGNMENT, Inputs
from moe_ep.cli.bench.gpu.timer import Call, Stopwatch, Timing
from moe_ep.cli.bench.gpu.traffic import row_bytes_of
from moe_ep.cli.bench.timing import Rank
from moe_ep.config import Capacity
from moe_ep.dispatcher import TokenDispatcher
from moe_ep.results import Dispatched


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one run measures.

    Attributes:
        parts: of ``PARTS``.
        shape: H, K and E.
        tokens: T of the sweep, and of decoding as far as that has so many.
        routings: of the sweep; the first one is that of decoding.
        curve_tokens: T of everything else.
        sm_counts: of the SM curve.
        laps: into how many rounds of the rings the arena forces an exchange.
        overlap_sms: of exchanges beside a GEMM; None takes the defaults.
        gemm: M = N = K of the GEMM beside an exchange.
        layer: H, K and E of the MoE layer.
        intermediate: I of its experts and of its shared expert.
        chunks: of the layer.
        repeats: timed calls per figure.
    """

    parts: tuple[str, ...]
    shape: Shape
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    curve_tokens: int
    sm_counts: tuple[int, ...]
    laps: tuple[int, ...]
    overlap_sms: tuple[int | None, ...]
    gemm: int
    layer: Shape
    intermediate: int
    chunks: tuple[int, ...]
    repeats: int


class Context:
    """One run on one number of ranks. Constructing one is collective."""

    def __init__(self, rank: Rank, settings: Settings) -> None:
        self.rank = rank
        self.settings = settings
        self.watch = Stopwatch(rank, settings.repeats)
        self.buffer = Buffer(rank.group, backend="cuda")
        assert isinstance(self.buffer.backend, CudaBackend)
        self.floor = Floor(self.buffer.backend, self.watch)
        self.rows: list[dict[str, Any]] = []

    def inputs(self, tokens: int, routing: str, shape: Shape | None = None) -> Inputs:
        """Tokens and routing of one case."""
        shape = shape or self.settings.shape
        return Inputs(
            self.rank, Case(ranks=self.rank.size, tokens=tokens, shape=shape, dtype="bfloat16", routing=routing)
        )

    def dispatcher(
        self,
        inputs: Inputs,
        layout: str,
        *,
        with_capacity: bool = False,
        buffer: Buffer | None = None,
        num_sms: int | None = None,
        sm_budget: int | None = None,
    ) -> TokenDispatcher:
        """A dispatcher for a case; experts weight compact rows, combine weights the others. Collective.

        Slabs have room for every row, and take no other capacity.
        """
        compact, slab, shape = layout == "compact", layout == "slab", inputs.case.shape
        rows = max(*(inputs.traffic.received if compact else inputs.traffic.expanded), 1)
        if not compact:
            # Room for the padding of every local expert's rows.
            rows += shape.experts // self.rank.size * (ALIGNMENT - 1)
        return TokenDispatcher(
            self.rank.group,
            num_experts=shape.experts,
            hidden_size=shape.hidden,
            top_k=shape.top_k,
            layout=layout,
            alignment=ALIGNMENT if layout == "expanded" else 1,
            weights="experts" if compact else "combine",
            capacity=Capacity(rows=rows) if with_capacity and not slab else None,
            max_tokens_per_rank=inputs.case.tokens if with_capacity or slab else None,
            buffer=buffer or self.buffer,
            num_sms=num_sms,
            sm_budget=sm_budget,
        )

    def floor_of(
        self, inputs: Inputs, dtype: torch.dtype, *, reverse: bool = False, in_graph: bool = False
    ) -> Timing | None:
        """The floor of a dispatch, or reversed of a combine; alone, or among others in a graph. Collective."""
        row_bytes = row_bytes_of(dtype, inputs.case.shape.hidden)
        return self.floor.time(inputs.traffic.pushed_bytes(row_bytes, reverse=reverse), in_graph=in_graph)

    def num_sms(self, op: str, layout: str, asked: int | None = None) -> int:
        """SMs of a dispatch to a layout, or of a combine from it."""
        what = layout if op == "dispatch" else "combine compact" if layout == "compact" else "combine"
        return sum(self.buffer.backend.settings.split(what, asked))

    def add(self, inputs: Inputs, *, timing: Timing, floor: Timing | None = None, **facts: Any) -> None:
        """Keep one row of results."""
        self.rows.append(make_row(inputs.case, inputs.traffic, timing=timing, floor=floor, **facts))


def make_row(
    case: Case,
    traffic: Any,
    *,
    op: str,
    layout: str,
    mode: str,
    timing: Timing,
    dtype: torch.dtype = torch.bfloat16,
    dtype_home: torch.dtype | None = None,
    backend: str = "cuda",
    num_sms: int | None = None,
    floor: Timing | None = None,
    nccl_us: float | None = None,
    with_rates: bool = True,
    **measured: Any,
) -> dict[str, Any]:
    """One row of a results file.

    Args:
        case: what was measured.
        traffic: of its routing.
        op: its name.
        layout: of the rows.
        mode: ``"exact"``, ``"capacity"`` (captured in a graph) or ``"replay"``; ``"arena"`` and ``"arena capacity"``
            where rows stay in the arena; ``GRAPH_MODE`` for one of many captured in one graph.
        timing: of the whole call.
        dtype: of the rows.
        dtype_home: of rows that go home in the same time.
        backend: ``"cuda"``, or how NCCL does it.
        num_sms: SMs of the exchange's kernels.
        floor: time of its bytes alone.
        nccl_us: the fastest of NCCL's ways to the same result.
        with_rates: whether the time is that of one exchange alone, so that bytes over it say something.
        **measured: further keys, left out where None.
    """
    row_bytes = sum(row_bytes_of(one, case.shape.hidden) for one in (dtype, dtype_home) if one is not None)
    wire, logical, time_us = traffic.wire_bytes(row_bytes), traffic.logical_bytes(row_bytes), timing.max_us
    row = {
        "op": op,
        "backend": backend,
        "layout": layout,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "ranks": case.ranks,
        "hidden": case.shape.hidden,
        "top_k": case.shape.top_k,
        "experts": case.shape.experts,
        "routing": case.routing,
        "num_sms": num_sms,
        "time_us_max": time_us,
        "time_us_mean": timing.mean_us,
        "wire_bytes": wire or None,
        "wire_gbps": wire / time_us / 1e3 if wire and with_rates else None,
        "logical_gbps": logical / time_us / 1e3 if with_rates else None,
        "floor_us": None if floor is None else floor.max_us,
        "ratio_to_floor": None if floor is None else time_us / floor.max_us,
        "nccl_us": nccl_us,
        "mode": mode,
    }
    return row | {key: value for key, value in measured.items() if value is not None}


def poisoned(call: Call) -> Any:
    """What a call returns when it writes on memory that held NaN.

    The allocator gives the second call the memory of the first one's results.
    """
    fill_nan(payload_of(call()))
    torch.cuda.synchronize()
    return call()


def fill_nan(tensors: Sequence[Tensor]) -> None:
    """All bits set are NaN in fp32, bf16 and e4m3."""
    for tensor in tensors:
        tensor.view(torch.uint8).fill_(0xFF)


def payload_of(result: Any) -> list[Tensor]:
    """Rows, scales and weights of what a dispatch, a combine or both returned; numbers are none."""
    if isinstance(result, Tensor):
        return [] if result.dtype == torch.int64 else [result]
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in payload_of(part)]
    if isinstance(result, Dispatched):
        return payload_of((result.x, result.scales, result.weights))
    return []
