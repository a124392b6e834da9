"""The tuple interface of ``Buffer``: layout, dispatch and combine as MoE frameworks call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from moe_ep.backends.control import Call
from moe_ep.buffer_checks import (
    UNSPECIFIED,
    Request,
    Rows,
    as_biases,
    check_again,
    check_call,
    check_combine,
    check_events,
    check_layout,
    check_no_layout,
    check_request,
    describe_combine,
    describe_rows,
)
from moe_ep.buffer_cuda import CudaCalls, Order, weight_words
from moe_ep.buffer_torch import DispatchResult, TorchCalls
from moe_ep.config import Config
from moe_ep.errors import StaleHandleError
from moe_ep.events import EventOverlap
from moe_ep.handle import BufferHandle, CudaPlan, Plan
from moe_ep.plan import count_choices, tokens_in_rank


class BufferCalls(TorchCalls):
    """Methods of ``Buffer`` that move rows."""

    num_sms: ClassVar[int | None]
    check_alive: Callable[[], None]
    check_grant: Callable[[int], None]
    _cuda: CudaCalls | None = None

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
            topk_idx: [T, K] int64, -1 = no choice. On the CUDA backend ids are not read by the host, and those outside
                of 0 .. E - 1 are no choice.
            num_experts: E, divisible by R.
            previous_event: waited for first.
            async_finish: whether ``event`` must be waited for, rather than the current stream.
            allocate_on_comm_stream: needs ``previous_event`` and ``async_finish``.

        Returns:
            num_tokens_per_rank int32 [R]; num_tokens_per_rdma_rank int32 [nodes] or None on one node;
            num_tokens_per_expert int32 [E]; is_token_in_rank bool [T, R]; event. A token counts once per rank.

        Ids outside -1 .. E - 1 count as no choice here: :meth:`dispatch` refuses them, and tells the peers.

        Raises:
            ValueError: for a wrong dtype, shape or number of experts, on this rank alone.
        """
        check_events(previous_event, async_finish, allocate_on_comm_stream)
        topk_idx = check_layout(topk_idx, num_experts, self.group_size)
        if self._cuda is not None:
            return self._cuda.layout(topk_idx, num_experts, Order(previous_event, async_finish))
        _wait(previous_event)
        topk_idx = torch.where((topk_idx >= 0) & (topk_idx < num_experts), topk_idx, -1)
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
            config: ``num_sms`` of the CUDA backend's kernels, unless ``Buffer.num_sms`` is set.
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
        order = self._order(previous_event, async_finish, config)
        if handle is not None:
            layout = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
            return self._dispatch_again(x, handle, (*layout, topk_idx, topk_weights), order)
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
                expert_alignment,
                check_values=self._cuda is None,
            )
            self.check_grant(request.rows.shape[1] * request.rows.itemsize)
            self.backend.lease.check("x", request.rows)
            if self._cuda is not None:
                self._cuda.check_request(request)
        # Whatever it is: peers wait for this rank's header.
        except Exception as failure:
            error = failure
        if self._cuda is not None:
            if error is not None:
                self._cuda.refuse(Call("dispatch"), error, x)
            assert request is not None
            return self._cuda.dispatch(request, expert_alignment, self.number, order)
        self.backend.lease.end()
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
        order = self._order(previous_event, async_finish, config)
        plan, error = self._plan_of(handle)
        biases, shapes = as_biases(bias), ""
        try:
            if error is None:
                check_combine(x, plan, topk_weights, biases)
                self.backend.lease.check("x", x)
                shapes = describe_combine(x, topk_weights)
                if self._cuda is not None:
                    self._cuda.check_rows(x, weight_words(topk_weights))
        except Exception as failure:
            error = failure
        call = Call.of("combine", shapes, plan.serial)
        if self._cuda is not None:
            if error is not None:
                self._cuda.refuse(call, error, x)
            assert isinstance(plan, CudaPlan)
            return self._cuda.combine(x, plan, topk_weights, biases, call, order)
        self.backend.lease.end()
        self.run(lambda: self._announce(call, error))
        assert isinstance(plan, Plan)
        return self._combine(x, plan, topk_weights, biases, async_finish)

    # Checks

    def check_overflow(self) -> None:
        """Raise, once, the CapacityError of an earlier exchange with ``num_worst_tokens``.

        On the CUDA backend, where nobody waits for an exchange to end, also any other error of an earlier one.
        """
        if self._cuda is not None:
            self._cuda.check_overflow()
        super().check_overflow()

    def _check_call(
        self,
        handle: BufferHandle | None,
        needs_handle: bool,
        previous_event: EventOverlap | None,
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ) -> None:
        """What no exchange can begin with; the peers are told."""
        self.check_alive()
        error = check_call(handle, needs_handle, previous_event, async_finish, allocate_on_comm_stream)
        if error is not None and self._cuda is not None:
            self._cuda.refuse(Call("dispatch"), error)
        if error is not None:
            self.backend.lease.end()
            self.run(lambda: self.control.open(Call("dispatch"), error=error))

    def _order(self, previous_event: EventOverlap | None, async_finish: bool, config: Config | None) -> Order:
        """How to run an exchange; without the CUDA backend it runs after what the current stream does next."""
        if self._cuda is None:
            _wait(previous_event)
        num_sms = self.num_sms if self.num_sms is not None or config is None else config.num_sms
        return Order(previous_event, async_finish, num_sms)

    def _plan_of(self, handle: BufferHandle) -> tuple[Plan | CudaPlan, Exception | None]:
        plan = handle.plan
        # Buffers that take each other's handles may differ in their backends.
        if plan.owner != self.number or isinstance(plan, CudaPlan) != (self._cuda is not None):
            return plan, StaleHandleError("the handle was made by another Buffer: pass one that this Buffer returned")
        if plan.incarnation != self.control.incarnation:
            return plan, StaleHandleError("the handle is from before reset(): dispatch again")
        return plan, None

    # Exchanges

    def _dispatch_again(
        self, x: Rows, handle: BufferHandle, layout: tuple[Tensor | None, ...], order: Order
    ) -> DispatchResult:
        plan, error = self._plan_of(handle)
        shapes, request = "", None
        try:
            check_no_layout(layout)
            if error is None:
                rows, scales = check_again(x, plan)
                self.backend.lease.check("x", rows)
                request = Request(rows, scales, None, None, handle.is_token_in_rank, rows, UNSPECIFIED)
                shapes = describe_rows(rows, scales)
                if self._cuda is not None:
                    self._cuda.check_rows(rows, 0 if scales is None else scales.shape[1])
        except Exception as failure:
            error = failure
        call = Call.of("replayed dispatch", shapes, plan.serial)
        if self._cuda is not None:
            if error is not None:
                self._cuda.refuse(call, error, x)
            assert isinstance(plan, CudaPlan)
            again, event = self._cuda.replay(rows, scales, plan, call, order)
            return again, None, None, None, None, event
        self.backend.lease.end()
        self.run(lambda: self._announce(call, error))
        assert request is not None
        assert isinstance(plan, Plan)
        return self._replay(request, plan, order.async_finish)


def _wait(previous_event: EventOverlap | None) -> None:
    if previous_event is not None:
        previous_event.current_stream_wait()
