"""The tuple interface of ``Buffer`` on the CUDA backend: the host waits for nothing but the sizes of exact dispatches.

Arguments were checked as far as that takes no look at device memory. Headers are compared by the kernels that open an
exchange, so that what goes wrong there is raised by a later call, or by the wait for sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from moe_ep.backends.control import Call
from moe_ep.backends.cuda_counting import TokenPlan
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.backends.cuda_jobs import Launch
from moe_ep.backends.cuda_plan import table_part
from moe_ep.backends.cuda_reserving import most_meta_words
from moe_ep.backends.types import Dispatch
from moe_ep.buffer_checks import Request, Rows, align_counts, overflow_error
from moe_ep.config import FP8_DTYPE, ROW_DTYPES
from moe_ep.events import EventOverlap
from moe_ep.handle import BufferHandle, CudaPlan, Overflow

Result = TypeVar("Result")

# Tokens per rank that plans of a fixed number of rows have room for at least; 64 KiB for each rank of the group.
_LEAST_TOKENS = 1 << 16
_LEAST_ROW_BYTES = 16


class Order(NamedTuple):
    """When an exchange runs, and on how much of the GPU.

    Attributes:
        previous_event: waited for in place of the current stream.
        async_finish: whether the event must be waited for, rather than the current stream.
        num_sms: None for the default.
    """

    previous_event: EventOverlap | None
    async_finish: bool
    num_sms: int | None = None


class CudaCalls:
    """Exchanges of one Buffer on the CUDA backend.

    Args:
        backend: where they run.
        nodes: number of nodes of the group.
    """

    def __init__(self, backend: CudaBackend, nodes: int) -> None:
        self.backend = backend
        self.link = backend.link
        self.nodes = nodes

    # Trouble

    def check_overflow(self) -> None:
        """Raise, once, the CapacityError of an exchange that is known to have overflowed, and any other trouble."""
        # What peers know of sizes from dispatches before, this rank knows as well when it decides on memory.
        self.link.settle()
        overflow = self.link.new_overflow()
        if overflow is not None:
            raise overflow_error(Overflow(*overflow))
        self.link.check()

    def refuse(self, call: Call, error: Exception, x: object = None) -> NoReturn:
        """Tell the peers that this rank raises instead of taking part, and raise.

        Args:
            x: the rows that were given, whatever they are.
        """
        self.check_overflow()
        # Peers whose rings are too small for such rows reserve memory first, over the control plane.
        if self.backend.will_agree(*_reserved_record(x)):
            self.link.control.open(Call("reserve"), error=error)
        self.link.refuse(call, error)

    # Calls

    def layout(
        self, topk_idx: Tensor, num_experts: int, order: Order
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """As ``Buffer.get_dispatch_layout``."""
        self.link.check_device("topk_idx", topk_idx)
        num_ranks = self.backend.control.size

        def launch() -> Launch[tuple[TokenPlan, TokenPlan | None]]:
            current = self.link.begin()
            by_rank = TokenPlan(topk_idx, num_experts, num_ranks)
            by_node = TokenPlan(topk_idx, num_experts, self.nodes) if self.nodes > 1 else None
            self.link.follow(current)
            for plan in (by_rank, by_node):
                if plan is not None:
                    plan.run(self.link.queue)
            flights = self.link.end(current, (by_rank, by_node), self.link.mark())
            return Launch(self.link, lambda: ((by_rank, by_node), flights), _layout_tensors)

        (by_rank, by_node), event = self._run(launch, order, _layout_tensors)
        per_node = None if by_node is None else by_node.tokens_per_rank
        return by_rank.tokens_per_rank, per_node, by_rank.choices_per_expert, by_rank.is_token_in_rank, event

    def check_request(self, request: Request) -> None:
        """Raise for a request that this backend cannot take."""
        self.link.check_device("x", request.rows)
        self.link.check_grant(*_record(request))

    def dispatch(
        self, request: Request, alignment: int, owner: int, order: Order
    ) -> tuple[Rows, Tensor | None, Tensor | None, list[int], BufferHandle, EventOverlap]:
        """As ``Buffer.dispatch`` without a handle."""
        self.check_overflow()
        spec, num_tokens = request.spec, request.rows.shape[0]
        self.backend.ensure(num_tokens, *_reserved_record(request.rows))
        call = Call.of("dispatch", request.describe())
        max_tokens = 0
        if spec.capacity is not None:
            assert spec.capacity.rows is not None
            # The same on all ranks: no T has to be told.
            max_tokens = max(spec.capacity.rows, self.backend.reserved_tokens, _LEAST_TOKENS)
            if num_tokens > max_tokens:
                text = f"x has {num_tokens} tokens; with num_worst_tokens={spec.capacity.rows} at most {max_tokens} fit"
                error = ValueError(f"{text}: call reserve(max_tokens_per_rank, row_bytes) on all ranks first")
                self.link.refuse(call, error)
        header = self.link.header(call)

        def launch() -> Launch[Dispatch]:
            if request.topk_idx is None:
                return self.backend.dispatch_rows(
                    request.rows,
                    request.scales,
                    request.in_rank,
                    request.per_expert,
                    spec,
                    header,
                    owner,
                    num_sms=order.num_sms,
                )
            return self.backend.dispatch(
                request.rows,
                request.scales,
                request.topk_idx,
                request.topk_weights,
                spec,
                header,
                owner,
                max_tokens=max_tokens,
                num_sms=order.num_sms,
                with_source=True,
            )

        got, event = self._run(launch, order, _dispatch_tensors)
        rows = got.rows if got.scales is None else (got.rows, got.scales)
        # On several nodes its place, handle[-4], holds the running sum of received rows.
        handle = self._handle(got, request.in_rank)
        listed = [] if got.groups.counts is None else align_counts(got.groups.counts, alignment)
        return rows, None if request.topk_idx is None else got.topk_idx, got.row_weights, listed, handle, event

    def check_rows(self, rows: Tensor, meta_words: int) -> None:
        """Raise for rows of a replay or combine that this backend cannot take."""
        self.link.check_device("x", rows)
        self.link.check_grant(_row_bytes(rows), meta_words)

    def replay(
        self, rows: Tensor, scales: Tensor | None, plan: CudaPlan, call: Call, order: Order
    ) -> tuple[Rows, EventOverlap]:
        """As ``Buffer.dispatch`` with a handle."""
        self.check_overflow()
        self.backend.ensure(rows.shape[0], *_reserved_record(rows))
        header = self.link.header(call)
        (out, out_scales), event = self._run(
            lambda: self.backend.replay(rows, plan, header, scales, order.num_sms), order, _tensors
        )
        return out if out_scales is None else (out, out_scales), event

    def combine(
        self,
        x: Tensor,
        plan: CudaPlan,
        topk_weights: Tensor | None,
        biases: tuple[Tensor, ...],
        call: Call,
        order: Order,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """As ``Buffer.combine``."""
        self.check_overflow()
        self.backend.ensure(plan.num_tokens, *_reserved_record(x))
        header = self.link.header(call)

        def launch() -> Launch[tuple[Tensor, Tensor | None]]:
            return self.backend.combine(x, None, plan, header, biases, topk_weights, num_sms=order.num_sms)

        (out, weights), event = self._run(launch, order, _tensors)
        return out, weights, event

    def _run(
        self, launch: Callable[[], Launch[Result]], order: Order, tensors: Callable[[Result], Iterable[Tensor | None]]
    ) -> tuple[Result, EventOverlap]:
        """Launch in the order that was asked for; outputs, and the event for their reader."""
        previous = order.previous_event
        with torch.no_grad():
            if previous is None or previous.event is None:
                job = launch()
                outputs = job.outputs()
            else:
                with self.link.after(previous):
                    job = launch()
                    outputs = job.outputs()
                reader = torch.cuda.current_stream(self.link.device)
                for tensor in tensors(outputs):
                    if tensor is not None:
                        tensor.record_stream(reader)
        event = job.event()
        if order.async_finish:
            return outputs, EventOverlap(event)
        event.current_stream_wait()
        return outputs, EventOverlap()

    def _handle(self, got: Dispatch, in_rank: Tensor) -> BufferHandle:
        plan: CudaPlan = got.plan
        num_ranks = self.backend.control.size
        sizes = (num_ranks, plan.num_experts)
        source_rows = table_part(plan.source, "source_rows", *sizes, num_ranks + 1)
        empty = plan.source.new_empty(0)
        assert got.recv_src_idx is not None
        return BufferHandle(
            rank_prefix_matrix=table_part(plan.source, "rank_rows", *sizes, num_ranks**2).view(num_ranks, num_ranks),
            channel_prefix_matrix=empty,
            recv_channel_prefix_matrix=empty,
            recv_src_idx=got.recv_src_idx,
            is_token_in_rank=in_rank,
            send_head=source_rows[1:] if self.nodes > 1 else empty,
            num_recv_tokens=source_rows[num_ranks],
            plan=plan,
            groups=got.groups,
        )


def weight_words(topk_weights: Tensor | None) -> int:
    """Words of metadata that a token's weights take on their way home."""
    return 0 if topk_weights is None else topk_weights.shape[1] * topk_weights.itemsize // 4


def _record(request: Request) -> tuple[int, int]:
    """Bytes of a row and words of metadata as they travel."""
    words = 0 if request.scales is None else request.scales.shape[1]
    if request.topk_idx is not None:
        weight = 0 if request.topk_weights is None else request.topk_weights.itemsize // 4
        words += (2 + weight) * request.topk_idx.shape[1]
    return _row_bytes(request.rows), words


def _row_bytes(x: Any) -> int:
    """Bytes of a row, of arguments that may be anything; as good as none where that cannot be told."""
    rows = x[0] if isinstance(x, tuple) and x else x
    # What no rank can send says nothing of the rows that its peers are sending.
    told = isinstance(rows, Tensor) and rows.dim() == 2 and rows.dtype in (*ROW_DTYPES, FP8_DTYPE)
    return rows.shape[1] * rows.itemsize if told else _LEAST_ROW_BYTES


def _reserved_record(x: Any) -> tuple[int, int]:
    """Bytes of a row and words of metadata that memory is reserved for.

    What experts make of fp8 rows goes home in 16 bits. A rank that refuses an exchange does not know its metadata, and
    has to come to the same as its peers: there is room for the most.
    """
    rows = x[0] if isinstance(x, tuple) and x else x
    row_bytes = _row_bytes(x)
    if isinstance(rows, Tensor) and rows.dtype == FP8_DTYPE:
        row_bytes *= torch.bfloat16.itemsize
    return row_bytes, most_meta_words(row_bytes)


def _layout_tensors(plans: tuple[TokenPlan, TokenPlan | None]) -> Iterable[Tensor]:
    for plan in plans:
        if plan is not None:
            yield from (plan.tokens_per_rank, plan.choices_per_expert, plan.is_token_in_rank)


def _dispatch_tensors(got: Dispatch) -> Iterable[Tensor | None]:
    # Parts of the plan are read through views of it.
    return got.rows, got.scales, got.row_weights, got.topk_idx, got.recv_src_idx, got.plan.source


def _tensors(outputs: Iterable[Tensor | None]) -> Iterable[Tensor | None]:
    return outputs
