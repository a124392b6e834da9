"""The tuple interface of ``Buffer``: layout, dispatch and combine as MoE frameworks call them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.control import Call, ControlPlane
from moe_ep.backends.place import identity_places
from moe_ep.backends.torch import TorchBackend
from moe_ep.backends.types import Counted
from moe_ep.buffer_checks import UNSPECIFIED, Request, Rows, check_again, check_combine, check_events, check_request
from moe_ep.config import Config, check_limits
from moe_ep.errors import CapacityError, MoeEpError, NotBuiltError, StaleHandleError
from moe_ep.events import EventOverlap, Job
from moe_ep.handle import BufferHandle, Groups, Overflow, Plan
from moe_ep.plan import count_choices, tokens_in_rank
from moe_ep.validate import check_ids, check_tensor

DispatchResult = tuple[Rows, Tensor | None, Tensor | None, list[int] | None, BufferHandle | None, EventOverlap]


class BufferCalls:
    """Methods of ``Buffer`` that move rows."""

    rank: int
    group_size: int
    ranks_per_node: int
    number: int
    control: ControlPlane
    backend: TorchBackend
    submit: Callable[[Callable[[], Any]], Job]
    run: Callable[[Callable[[], Any]], Any]
    check_grant: Callable[[int], None]
    _overflow: Overflow | None = None

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count where tokens go. Local: nothing is exchanged.

        Args:
            topk_idx: [T, K] int64, -1 = no choice.
            num_experts: E, divisible by R.
            previous_event: waited for first.
            async_finish: whether ``event`` must be waited for, rather than the current stream.
            allocate_on_comm_stream: needs ``previous_event`` and ``async_finish``.

        Returns:
            num_tokens_per_rank int32 [R]; num_tokens_per_rdma_rank int32 [nodes] or None on one node;
            num_tokens_per_expert int32 [E]; is_token_in_rank bool [T, R]; event. A token counts once per rank.

        Raises:
            ValueError: for a wrong dtype, shape or id.
        """
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        check_tensor("topk_idx", topk_idx, shape=(None, None), dtypes=(torch.int64,))
        if num_experts <= 0 or num_experts % self.group_size:
            raise ValueError(f"num_experts={num_experts} must be divisible by the {self.group_size} ranks of the group")
        check_limits(num_experts, topk_idx.shape[1], ("num_experts", "topk_idx.shape[1]"))
        _wait(previous_event)
        check_ids(topk_idx, num_experts)
        in_rank = tokens_in_rank(topk_idx, num_experts, self.group_size)
        nodes = self.group_size // self.ranks_per_node
        per_node = None
        if nodes > 1:
            per_node = in_rank.view(-1, nodes, self.ranks_per_node).any(2).sum(0).to(torch.int32)
        per_expert = count_choices(topk_idx, num_experts).to(torch.int32)
        return in_rank.sum(0).to(torch.int32), per_node, per_expert, in_rank, EventOverlap()

    def dispatch(
        self,
        x: Rows,
        handle: BufferHandle | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> DispatchResult:
        """Send rows to the ranks of their experts, once per (token, rank).

        Args:
            x: [T, H] bf16, fp16, fp32 or fp64 rows, or (e4m3 [T, H], scales [T, H/128] fp32 or int32 of any strides).
            handle: replay this plan; every layout and topk argument must then be None.
            num_tokens_per_rank: int32 [R] from :meth:`get_dispatch_layout`.
            num_tokens_per_rdma_rank: int32 [nodes], or None on one node.
            is_token_in_rank: bool [T, R].
            num_tokens_per_expert: int32 [E].
            topk_idx: [T, K] int64, -1 = no choice; None moves rows alone.
            topk_weights: [T, K] fp32, or None.
            expert_alignment: the counts in the returned list are rounded up to it.
            num_worst_tokens: fixed number of output rows; needs ``topk_idx``.
            config: SMs and chunk sizes; no effect without a GPU.
            previous_event: the exchange waits for it.
            async_finish: outputs may be read after ``event``.
            allocate_on_comm_stream: needs ``previous_event`` and ``async_finish``.

        Returns:
            recv_x: [N, H] (or the fp8 pair, scales row-major) in the order (source rank, token).
            recv_topk_idx: [N, K] int64 local ids, -1 where a choice is another rank's.
            recv_topk_weights: [N, K] fp32, 0 there.
            num_recv_tokens_per_expert_list: received choices per local expert, rounded up to ``expert_alignment``.
            handle: for replays; None when replaying.
            event: an ``EventOverlap``.

        Raises:
            ValueError, PeerAbortedError, ExchangeMismatchError, PeerTimeoutError, StaleHandleError: as their texts say.
            CapacityError: at the next call, when ``num_worst_tokens`` did not suffice somewhere.
        """
        self._check_call(handle, False, previous_event, async_finish, allocate_on_comm_stream)
        _wait(previous_event)
        if handle is not None:
            layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
            return self._dispatch_again(x, handle, (*layout, topk_idx, topk_weights), async_finish)
        request: Request | None = None
        error: Exception | None = None
        try:
            request = check_request(
                self.group_size,
                x,
                num_tokens_per_rank,
                is_token_in_rank,
                num_tokens_per_expert,
                topk_idx,
                topk_weights,
                num_worst_tokens,
            )
            self.check_grant(request.rows.shape[1] * request.rows.itemsize)
            if expert_alignment <= 0:
                raise ValueError(f"expert_alignment={expert_alignment} must be positive")
        # Whatever it is: peers wait for this rank's header.
        except Exception as failure:
            error = failure
        counted = self.run(lambda: self._count(request, error))
        assert request is not None
        with self._announced():
            if request.topk_idx is None:
                return self._dispatch_masked(request, counted, expert_alignment, async_finish)
            return self._dispatch_chosen(request, counted, expert_alignment, async_finish)

    def combine(
        self,
        x: Tensor,
        handle: BufferHandle,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows home and sum them over ranks, in rank order, accumulated in fp32.

        Args:
            x: [N, H] rows in the order of the dispatch.
            handle: of the dispatch.
            topk_weights: [N, K] fp32, summed back elementwise, or None.
            bias: one or two [T, H] tensors added before rounding.
            config: as in :meth:`dispatch`.
            previous_event: as in :meth:`dispatch`.
            async_finish: as in :meth:`dispatch`.
            allocate_on_comm_stream: as in :meth:`dispatch`.

        Returns:
            combined_x [T, H] in x's dtype, zeros (plus bias) for a token that nobody received; combined_topk_weights
            [T, K] fp32 or None; event.

        Raises:
            ValueError, PeerAbortedError, ExchangeMismatchError, PeerTimeoutError, StaleHandleError: as their texts say.
        """
        self._check_call(handle, True, previous_event, async_finish, allocate_on_comm_stream)
        _wait(previous_event)
        plan, error = self._plan_of(handle)
        biases = () if bias is None else (bias if isinstance(bias, tuple) else (bias,))
        shapes = ""
        try:
            if error is None:
                check_combine(x, plan, topk_weights, biases)
                width = None if topk_weights is None else f"{topk_weights.shape[1]} {topk_weights.dtype}"
                shapes = f"{x.shape[1]}, {x.dtype}, weights={width}"
        except Exception as failure:
            error = failure
        self.run(lambda: self._announce("combine", plan, shapes, error))

        def run() -> None:
            out.copy_(self.backend.combine(x, None, plan, biases))
            if weights is not None and topk_weights is not None:
                weights.copy_(self.backend.combine_weights(topk_weights, plan))

        with self._announced():
            out = x.new_empty(plan.num_tokens, x.shape[1])
            weights = None if topk_weights is None else topk_weights.new_empty(plan.num_tokens, topk_weights.shape[1])
            return out, weights, self._finish(run, async_finish, plan.device)

    # Checks

    def check_overflow(self) -> None:
        """Raise, once, the CapacityError of an earlier exchange with ``num_worst_tokens``."""
        overflow, self._overflow = self._overflow, None
        if overflow is not None:
            raise CapacityError(
                f"rank {overflow.rank} had to receive {overflow.needed} rows, num_worst_tokens={overflow.given}: "
                "raise num_worst_tokens; outputs since then are NaN",
                rank=overflow.rank,
                needed=overflow.needed,
                given=overflow.given,
            )

    def _check_call(
        self,
        handle: BufferHandle | None,
        needs_handle: bool,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        """What no exchange can begin with; the peers are told."""
        if self.backend.name != "torch":
            # All ranks have the same backend, so all raise.
            raise NotBuiltError(
                f'the tuple calls of Buffer do not run on backend="{self.backend.name}" in this version: construct it '
                'with backend="torch", which serves GPU tensors too, or exchange through TokenDispatcher'
            )
        error: ValueError | None = None
        try:
            check_events(previous_event, async_finish, allocate_on_comm_stream)
            if not isinstance(handle, BufferHandle) and (needs_handle or handle is not None):
                raise ValueError(f"handle is {type(handle).__name__}; pass the handle that dispatch returned")
        except ValueError as failure:
            error = failure
        if error is not None:
            self.run(lambda: self.control.open(Call("dispatch"), error=error))

    def _plan_of(self, handle: BufferHandle) -> tuple[Plan, Exception | None]:
        plan = handle.plan
        if plan.owner != self.number:
            return plan, StaleHandleError("the handle was made by another Buffer: pass one that this Buffer returned")
        if plan.incarnation != self.control.incarnation:
            return plan, StaleHandleError("the handle is from before reset(): dispatch again")
        return plan, None

    # Exchanges

    def _announce(self, kind: str, plan: Plan, shapes: str, error: Exception | None) -> None:
        self.check_overflow()
        self.control.open(Call.of(kind, shapes, plan.serial), error=error)

    def _count(self, request: Request | None, error: Exception | None) -> Counted:
        self.check_overflow()
        if request is None or error is not None:
            self.control.open(Call("dispatch"), error=error)
            raise AssertionError("unreachable: open raises the error")
        spec = request.spec
        parts = {"topk": request.topk_idx, "weights": request.topk_weights, "scales": request.scales}
        carried = ", ".join(f"{name}={None if value is None else value.dtype}" for name, value in parts.items())
        call = Call.of("dispatch", f"{spec.describe()}, {carried}")
        words = torch.cat(
            [
                torch.tensor([request.rows.shape[0]], device="cpu"),
                request.per_expert.to(device="cpu", dtype=torch.int64),
                request.in_rank.sum(0).cpu(),
            ]
        )
        table = self.control.open(call, words)
        return Counted.from_table(table, spec)

    def _dispatch_chosen(
        self, request: Request, counted: Counted, alignment: int, async_finish: bool
    ) -> DispatchResult:
        assert request.topk_idx is not None
        spec, rows = request.spec, request.rows
        prepared = self.backend.prepare(request.topk_idx, counted, spec, self.number)
        weight_bytes = 4 if request.topk_weights is None else request.topk_weights.itemsize
        plan = self.backend.make_plan(prepared, identity_places(rows.device), weight_bytes)
        if plan.overflowed:
            self._overflow = prepared.groups.overflow
        recv = _empty_rows(request, plan.num_rows)
        recv_idx = request.topk_idx.new_empty(plan.num_rows, spec.top_k)
        recv_weights = None
        if request.topk_weights is not None:
            recv_weights = request.topk_weights.new_empty(plan.num_rows, spec.top_k)
        source = torch.empty(plan.num_wire, dtype=torch.int32, device=rows.device)

        def run() -> None:
            moved = self.backend.move(rows, request.scales, request.topk_weights, prepared)
            _copy_rows(recv, moved.rows, moved.scales)
            assert moved.topk_idx is not None
            assert moved.recv_src_idx is not None
            recv_idx.copy_(moved.topk_idx)
            source.copy_(moved.recv_src_idx)
            if recv_weights is not None and moved.row_weights is not None:
                recv_weights.copy_(moved.row_weights)

        event = self._finish(run, async_finish, plan.device)
        handle = self._handle(plan, prepared.groups, prepared.rows_per_rank, source, request.in_rank)
        listed = [] if spec.capacity is not None else _aligned(prepared.groups.counts, alignment)
        return recv, recv_idx, recv_weights, listed, handle, event

    def _dispatch_masked(
        self, request: Request, counted: Counted, alignment: int, async_finish: bool
    ) -> DispatchResult:
        plan = self.backend.plan_rows(request.in_rank, counted.rows, self.number)
        per_rank = request.spec.num_local_experts
        counts = counted.choices[:, self.rank * per_rank : (self.rank + 1) * per_rank].sum(0)
        ends = counts.cumsum(0)
        groups = Groups(counted.choices, counts, ends - counts, ends, plan.num_rows, True, False, None)
        recv = _empty_rows(request, plan.num_rows)
        source = torch.empty(plan.num_wire, dtype=torch.int32, device=request.rows.device)

        def run() -> None:
            rows, scales, tokens = self.backend.move_rows(request.rows, request.scales, plan)
            _copy_rows(recv, rows, scales)
            source.copy_(tokens)

        event = self._finish(run, async_finish, plan.device)
        handle = self._handle(plan, groups, counted.rows, source, request.in_rank)
        return recv, None, None, _aligned(counts, alignment), handle, event

    def _dispatch_again(
        self, x: Rows, handle: BufferHandle, layout: tuple[Tensor | None, ...], async_finish: bool
    ) -> DispatchResult:
        plan, error = self._plan_of(handle)
        shapes, request = "", None
        try:
            if any(argument is not None for argument in layout):
                raise ValueError("handle was given together with layout or topk arguments: pass None for those")
            if error is None:
                rows, scales = check_again(x, plan)
                request = Request(rows, scales, None, None, handle.is_token_in_rank, rows, UNSPECIFIED)
                shapes = f"{rows.shape[1]}, {rows.dtype}, scales={None if scales is None else scales.dtype}"
        except Exception as failure:
            error = failure
        self.run(lambda: self._announce("replayed dispatch", plan, shapes, error))
        assert request is not None

        def run() -> None:
            _copy_rows(recv, *self.backend.replay(request.rows, plan, request.scales))

        with self._announced():
            recv = _empty_rows(request, plan.num_rows)
            return recv, None, None, None, None, self._finish(run, async_finish, plan.device)

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        """Around what follows a header: peers wait for this rank's payload, and are told when it cannot come."""
        try:
            yield
        except MoeEpError:
            raise
        except BaseException as error:
            self.control.abort(error)
            raise

    def _finish(self, run: Callable[[], None], async_finish: bool, device: torch.device) -> EventOverlap:
        # Work for a GPU is issued here in any case: on another thread it would not be ordered with the current stream.
        if async_finish and device.type == "cpu":
            return EventOverlap(self.submit(run).event())
        self.run(run)
        return EventOverlap()

    def _handle(
        self, plan: Plan, groups: Groups, rows_per_rank: Tensor, source: Tensor, in_rank: Tensor
    ) -> BufferHandle:
        device = source.device
        empty = torch.empty(0, dtype=torch.int32, device=device)
        prefix = rows_per_rank.cumsum(0).to(device=device, dtype=torch.int32)
        return BufferHandle(
            rank_prefix_matrix=prefix,
            channel_prefix_matrix=empty,
            recv_channel_prefix_matrix=empty,
            recv_src_idx=source,
            is_token_in_rank=in_rank,
            # On several nodes this place, handle[-4], holds the running sum of received rows.
            send_head=prefix[:, self.rank].contiguous() if self.group_size > self.ranks_per_node else empty,
            num_recv_tokens=torch.tensor(plan.num_wire, dtype=torch.int32, device=device),
            plan=plan,
            groups=groups,
        )


def _empty_rows(request: Request, num_rows: int) -> Rows:
    rows = request.rows.new_empty(num_rows, request.rows.shape[1])
    if request.scales is None:
        return rows
    return rows, request.scales.new_empty(num_rows, request.scales.shape[1])


def _copy_rows(out: Rows, rows: Tensor, scales: Tensor | None) -> None:
    if isinstance(out, tuple):
        assert scales is not None
        out[1].copy_(scales)
        out = out[0]
    out.view(torch.uint8).copy_(rows.view(torch.uint8))


def _aligned(counts: Tensor, alignment: int) -> list[int]:
    return (-(-counts // alignment) * alignment).tolist()


def _wait(previous_event: EventOverlap | None) -> None:
    if previous_event is not None:
        previous_event.current_stream_wait()
