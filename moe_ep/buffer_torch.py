"""The tuple interface of ``Buffer`` on the torch backend: what follows once arguments are checked."""

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
from moe_ep.buffer_checks import Request, Rows, align_counts, overflow_error
from moe_ep.errors import MoeEpError
from moe_ep.events import EventOverlap, Job
from moe_ep.handle import BufferHandle, Groups, Overflow, Plan

DispatchResult = tuple[Rows, Tensor | None, Tensor | None, list[int] | None, BufferHandle | None, EventOverlap]


class TorchCalls:
    """Exchanges of a ``Buffer`` on the torch backend."""

    rank: int
    group_size: int
    ranks_per_node: int
    number: int
    control: ControlPlane
    backend: TorchBackend
    submit: Callable[[Callable[[], Any]], Job]
    run: Callable[[Callable[[], Any]], Any]
    _overflow: Overflow | None = None

    def check_overflow(self) -> None:
        """Raise, once, the CapacityError of an earlier exchange with ``num_worst_tokens``."""
        overflow, self._overflow = self._overflow, None
        if overflow is not None:
            raise overflow_error(overflow)

    def _announce(self, call: Call, error: Exception | None) -> None:
        self.check_overflow()
        self.control.open(call, error=error)

    def _count(self, request: Request | None, error: Exception | None) -> Counted:
        self.check_overflow()
        if request is None or error is not None:
            self.control.open(Call("dispatch"), error=error)
            raise AssertionError("unreachable: open raises the error")
        call = Call.of("dispatch", request.describe())
        words = torch.cat(
            [
                torch.tensor([request.rows.shape[0]], device="cpu"),
                request.per_expert.to(device="cpu", dtype=torch.int64),
                request.in_rank.sum(0).cpu(),
            ]
        )
        table = self.control.open(call, words)
        return Counted.from_table(table, request.spec)

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
        listed = [] if spec.capacity is not None else align_counts(prepared.groups.counts.tolist(), alignment)
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
        return recv, None, None, align_counts(counts.tolist(), alignment), handle, event

    def _replay(self, request: Request, plan: Plan, async_finish: bool) -> DispatchResult:
        def run() -> None:
            _copy_rows(recv, *self.backend.replay(request.rows, plan, request.scales))

        with self._announced():
            recv = _empty_rows(request, plan.num_rows)
            return recv, None, None, None, None, self._finish(run, async_finish, plan.device)

    def _combine(
        self, x: Tensor, plan: Plan, topk_weights: Tensor | None, biases: tuple[Tensor, ...], async_finish: bool
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        def run() -> None:
            out.copy_(self.backend.combine(x, None, plan, biases))
            if weights is not None and topk_weights is not None:
                weights.copy_(self.backend.combine_weights(topk_weights, plan))

        with self._announced():
            out = x.new_empty(plan.num_tokens, x.shape[1])
            weights = None if topk_weights is None else topk_weights.new_empty(plan.num_tokens, topk_weights.shape[1])
            return out, weights, self._finish(run, async_finish, plan.device)

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
