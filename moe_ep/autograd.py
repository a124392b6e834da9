"""Exchanges in two halves: the pairs of Functions Launch and Wait.

Work created between them runs beside the exchange, in both directions: backward of Wait launches the reversed exchange,
backward of Launch waits for it. The form without halves is in ``ops``; gradients and anchors are the same in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe_ep.backends.types import Counted, Dispatch
from moe_ep.config import FP8_DTYPE
from moe_ep.errors import MoeEpError
from moe_ep.events import Job
from moe_ep.exchange import Exchanger
from moe_ep.handle import DispatchHandle, Plan
from moe_ep.ops import PLAIN_TYPES, filled, once, weighted_grads
from moe_ep.untraced import untraced


def take(exchange: DispatchExchange | CombineExchange, name: str) -> Job[Any]:
    """A job, which its exchange lets go before waiting: the traceback of its error would keep the exchange alive."""
    job = getattr(exchange, name)
    setattr(exchange, name, None)
    if job is None:
        raise MoeEpError("this exchange is over: an earlier wait() raised what it met")
    return job


def _settled(tensor: Any) -> Any:  # noqa: ANN401
    """A tensor that a collective has yet to bring, as one that has it; anything else as it is."""
    # Such a wrapper waits in operators alone, and stays one in views; a copy is neither.
    return tensor.clone() if isinstance(tensor, Tensor) and type(tensor) not in PLAIN_TYPES else tensor


class DispatchExchange:
    """A dispatch under way, and its reversed exchange: the state that Launch and Wait share.

    Args:
        exchanger: carries it out.
        lends: as in its ``dispatch``.
    """

    def __init__(self, exchanger: Exchanger, lends: bool = False) -> None:
        self.exchanger = exchanger
        self.lends = lends
        self.seq = 0
        self.job: Job[Dispatch] | None = None
        self.result: Dispatch | None = None
        self.plan_tensors: list[Tensor] = []
        self.backward_seq = 0
        self.backward_job: Job[tuple[Tensor, Tensor]] | None = None

    def launch(
        self, x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor, topk_weights: Tensor, planned: Counted | None
    ) -> None:
        """Start it."""
        self.seq = self.exchanger.next_seq()
        x = tuple(map(_settled, x)) if isinstance(x, tuple) else _settled(x)
        topk_idx, topk_weights = _settled(topk_idx), _settled(topk_weights)
        with self.exchanger.overlapped():
            job = self.exchanger.dispatch(x, topk_idx, topk_weights, planned, self.lends)
        self.job = self.exchanger.sm_budget.hold(job, topk_idx.device)
        self.exchanger.fire("dispatch_launched", self.seq)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Rows and weights."""
        self.result = take(self, "job").result()
        assert self.result is not None
        self.plan_tensors = self.result.plan.to_tensors()
        self.exchanger.fire("dispatch_ready", self.seq)
        return self.exchanger.layout_rows(self.result)

    def launch_backward(self, grads: Tensor, weight_grads: Tensor, plan_tensors: list[Tensor]) -> None:
        """Start the reversed exchange."""
        self.backward_seq = self.exchanger.next_seq()
        with self.exchanger.overlapped():
            plan = Plan.from_tensors(plan_tensors)
            grads, weight_grads = _settled(grads), _settled(weight_grads)
            job = self.exchanger.combine_grads(grads.contiguous(), weight_grads.contiguous(), plan)
        self.backward_job = self.exchanger.sm_budget.hold(job, grads.device)
        self.exchanger.fire("backward_dispatch_launched", self.backward_seq)

    def row_dtype(self, rows: Tensor) -> torch.dtype:
        """In which gradients of rows travel."""
        return self.exchanger.spec.dtype if rows.dtype == FP8_DTYPE else rows.dtype

    def wait_backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of x and topk_weights."""
        grads = take(self, "backward_job").result()
        self.exchanger.fire("backward_dispatch_ready", self.backward_seq)
        return grads


class CombineExchange:
    """A combine under way, and its reversed exchange."""

    def __init__(self, exchanger: Exchanger, handle: DispatchHandle) -> None:
        self.exchanger = exchanger
        self.handle = handle
        self.seq = 0
        self.job: Job[Tensor] | None = None
        self.backward_seq = 0
        self.backward_job: Job[Tensor] | None = None

    def launch(self, y: Tensor, row_weights: Tensor | None) -> None:
        """Start it."""
        self.seq = self.exchanger.next_seq()
        y, row_weights = _settled(y), _settled(row_weights)
        with self.exchanger.overlapped():
            job = self.exchanger.combine(y, row_weights, self.handle.plan)
        self.job = self.exchanger.sm_budget.hold(job, y.device)
        self.exchanger.fire("combine_launched", self.seq)

    def wait(self) -> Tensor:
        """[T, H]."""
        out = take(self, "job").result()
        self.exchanger.fire("combine_ready", self.seq)
        return out

    def launch_backward(self, grad: Tensor, plan_tensors: list[Tensor]) -> None:
        """Start the reversed exchange."""
        self.backward_seq = self.exchanger.next_seq()
        with self.exchanger.overlapped():
            job = self.exchanger.replay(_settled(grad).contiguous(), Plan.from_tensors(plan_tensors))
        self.backward_job = self.exchanger.sm_budget.hold(job, grad.device)
        self.exchanger.fire("backward_combine_launched", self.backward_seq)

    def wait_backward(self) -> Tensor:
        """Gradients of the layout rows."""
        rows = take(self, "backward_job").result()
        self.exchanger.fire("backward_combine_ready", self.backward_seq)
        return rows


class DispatchLaunch(torch.autograd.Function):
    """Starts a dispatch; returns a 0-dim token that ties Wait to it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        exchange: DispatchExchange,
        planned: Counted | None,
        x: Tensor,
        scales: Tensor | None,
        topk_idx: Tensor,
        topk_weights: Tensor,
        anchor: Tensor,
    ) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        exchange.launch(x if scales is None else (x, scales), topk_idx, topk_weights, planned)
        return torch.zeros((), device=x.device)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad_token: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        dx, dweights = ctx.exchange.wait_backward()
        return None, None, once(dx, grad_token), None, None, once(dweights, grad_token), None


class DispatchWait(torch.autograd.Function):
    """Waits for a dispatch; returns rows and their weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, exchange: DispatchExchange, token: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weights = exchange.wait()
        ctx.exchange = exchange  # type: ignore[attr-defined]
        ctx.save_for_backward(*exchange.plan_tensors)
        if rows.dtype == FP8_DTYPE:
            # Rows that came as fp8 have no gradient; those of their weights travel home all the same.
            ctx.mark_non_differentiable(rows)
        ctx.set_materialize_grads(False)
        ctx.like = (rows.shape, exchange.row_dtype(rows), weights.shape, weights.dtype, rows.device)  # type: ignore[attr-defined]
        return rows, weights

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]  # noqa: ANN401
        grad_rows, grad_weights = filled(grads, ctx.like)
        ctx.exchange.launch_backward(grad_rows, grad_weights, list(ctx.saved_tensors))
        return None, once(grad_weights.new_zeros((), dtype=torch.float32), grad_rows, grad_weights)


class CombineLaunch(torch.autograd.Function):
    """Starts a combine; returns a 0-dim token that ties Wait to it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx, exchange: CombineExchange, y: Tensor, row_weights: Tensor | None, anchor: Tensor
    ) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        if row_weights is not None:
            ctx.save_for_backward(y, row_weights)
        exchange.launch(y, row_weights)
        return torch.zeros((), device=y.device)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad_token: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        rows = once(ctx.exchange.wait_backward(), grad_token)
        saved = ctx.saved_tensors
        dy, dweights = weighted_grads(rows, *saved) if saved else (rows, None)
        return None, dy, dweights, None


class CombineWait(torch.autograd.Function):
    """Waits for a combine; returns [T, H]."""

    @staticmethod
    def forward(ctx: FunctionCtx, exchange: CombineExchange, token: Tensor) -> Tensor:  # type: ignore[override]
        ctx.exchange = exchange  # type: ignore[attr-defined]
        ctx.save_for_backward(*exchange.handle.tensors)
        return exchange.wait()

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        ctx.exchange.launch_backward(grad, list(ctx.saved_tensors))
        return None, once(grad.new_zeros((), dtype=torch.float32), grad)
