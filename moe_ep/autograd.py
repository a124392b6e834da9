"""Gradients of exchanges: the reversed exchange of a dispatch is a combine, of a combine a dispatch.

Two forms share one ``Exchanger``. The operators ``moe_ep::*`` are functional, so they compile into one graph and can be
named in selective-checkpoint lists. The pairs of Functions Launch and Wait let work created between them run beside the
exchange, in both directions: backward of Wait launches the reversed exchange, backward of Launch waits for it.
Every exchange takes an anchor, a 0-dim tensor that requires grad: its backward then exists on every rank, also where
nothing else requires a gradient, and no rank skips an exchange that its peers wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe_ep.backends.torch import Counted, Dispatch
from moe_ep.config import ExchangeSpec
from moe_ep.events import Job
from moe_ep.exchange import Exchanger, lookup
from moe_ep.handle import NUM_PLAN_TENSORS, NUM_SCALARS

# Behind the replayable plan, a dispatch returns: expert_ends, overflow, topk_idx (empty unless compact).
NUM_EXTRAS = 3


def extras_of(result: Dispatch) -> list[Tensor]:
    """What a dispatch returns beside rows, weights, counts and the plan."""
    topk_idx = result.topk_idx
    if topk_idx is None:
        topk_idx = torch.empty(0, dtype=torch.int64, device=result.rows.device)
    return [result.expert_ends, result.overflow, topk_idx]


# Operators


@torch.library.custom_op("moe_ep::dispatch", mutates_args=())
def dispatch_op(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, anchor: Tensor, dispatcher_id: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Rows [T, H] to the ranks of their experts: (rows, row_weights, tokens_per_expert, plan and extras)."""
    exchanger = lookup(dispatcher_id)
    seq = exchanger.next_seq()
    job = exchanger.dispatch(x, topk_idx, topk_weights, None)
    exchanger.fire("dispatch_launched", seq)
    result = job.result()
    rows, weights = exchanger.layout_rows(result)
    exchanger.fire("dispatch_ready", seq)
    return rows, weights, result.tokens_per_expert, [*result.plan.to_tensors(), *extras_of(result)]


@torch.library.custom_op("moe_ep::combine", mutates_args=())
def combine_op(y: Tensor, row_weights: Tensor | None, plan: list[Tensor], anchor: Tensor, dispatcher_id: int) -> Tensor:
    """Layout rows home: [T, H], each token's (weighted) sum."""
    exchanger = lookup(dispatcher_id)
    seq = exchanger.next_seq()
    job = exchanger.combine(y, row_weights, plan)
    exchanger.fire("combine_launched", seq)
    out = job.result()
    exchanger.fire("combine_ready", seq)
    return out


@torch.library.custom_op("moe_ep::dispatch_replay", mutates_args=())
def dispatch_replay_op(x: Tensor, plan: list[Tensor], num_rows: int, dispatcher_id: int) -> Tensor:
    """Gradients [T, H] of a combine's output to layout rows; ``num_rows`` is the first size of the result."""
    exchanger = lookup(dispatcher_id)
    seq = exchanger.next_seq()
    job = exchanger.replay(x.contiguous(), plan)
    exchanger.fire("backward_combine_launched", seq)
    rows = job.result()
    exchanger.fire("backward_combine_ready", seq)
    return rows


@torch.library.custom_op("moe_ep::combine_grads", mutates_args=())
def combine_grads_op(
    grads: Tensor, weight_grads: Tensor, plan: list[Tensor], dispatcher_id: int
) -> tuple[Tensor, Tensor]:
    """Gradients of layout rows and row weights home: those of x [T, H] and topk_weights [T, K]."""
    exchanger = lookup(dispatcher_id)
    seq = exchanger.next_seq()
    job = exchanger.combine_grads(grads.contiguous(), weight_grads.contiguous(), plan)
    exchanger.fire("backward_dispatch_launched", seq)
    dx, dweights = job.result()
    exchanger.fire("backward_dispatch_ready", seq)
    return dx, dweights


@dispatch_op.register_fake
def _dispatch_fake(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, anchor: Tensor, dispatcher_id: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    spec = lookup(dispatcher_id).spec
    size = torch.library.get_ctx().new_dynamic_size
    rows, weights, topk_local = _fake_rows(x, topk_idx, topk_weights, spec)
    num_wire = size()
    plan = [
        torch.empty(NUM_SCALARS + 2 * spec.num_ranks, dtype=torch.int64),
        topk_idx.new_empty(num_wire),
        topk_idx.new_empty(topk_idx.shape[0] * topk_idx.shape[1]),
        topk_idx.new_empty(num_wire),
        topk_idx.new_empty(topk_idx.shape[0]),
        *(topk_idx.new_empty(size()) for _ in range(NUM_PLAN_TENSORS - 5)),
    ]
    counts = topk_idx.new_empty(spec.num_local_experts, dtype=torch.int32)
    extras = [torch.empty_like(counts), topk_idx.new_empty((), dtype=torch.bool), topk_local]
    return rows, weights, counts, [*plan, *extras]


def _fake_rows(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, spec: ExchangeSpec) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    if spec.layout == "slab":
        shape = (spec.num_local_experts, spec.num_ranks * (spec.max_tokens_per_rank or 0))
        return x.new_empty(*shape, x.shape[1]), topk_weights.new_empty(shape), topk_idx.new_empty(0)
    num_rows: Any = size() if spec.static_rows is None else spec.static_rows
    rows = x.new_empty(num_rows, x.shape[1])
    if spec.layout == "compact":
        return rows, topk_weights.new_empty(num_rows, spec.top_k), topk_idx.new_empty(num_rows, spec.top_k)
    return rows, topk_weights.new_empty(num_rows), topk_idx.new_empty(0)


@combine_op.register_fake
def _combine_fake(
    y: Tensor, row_weights: Tensor | None, plan: list[Tensor], anchor: Tensor, dispatcher_id: int
) -> Tensor:
    return y.new_empty(plan[4].shape[0], y.shape[-1])


@dispatch_replay_op.register_fake
def _dispatch_replay_fake(x: Tensor, plan: list[Tensor], num_rows: int, dispatcher_id: int) -> Tensor:
    spec = lookup(dispatcher_id).spec
    if spec.layout == "slab":
        return x.new_empty(num_rows, spec.num_ranks * (spec.max_tokens_per_rank or 0), x.shape[1])
    return x.new_empty(num_rows, x.shape[1])


@combine_grads_op.register_fake
def _combine_grads_fake(
    grads: Tensor, weight_grads: Tensor, plan: list[Tensor], dispatcher_id: int
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = plan[4].shape[0], lookup(dispatcher_id).spec.top_k
    return grads.new_empty(num_tokens, grads.shape[-1]), weight_grads.new_empty(num_tokens, top_k)


def _dispatch_setup(ctx: Any, inputs: tuple, output: tuple) -> None:  # noqa: ANN401
    rows, row_weights, _, tensors = output
    ctx.dispatcher_id = inputs[-1]
    ctx.save_for_backward(*tensors[:NUM_PLAN_TENSORS])


def _dispatch_backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor, *_: object) -> tuple:  # noqa: ANN401
    dx, dweights = torch.ops.moe_ep.combine_grads(grad_rows, grad_weights, list(ctx.saved_tensors), ctx.dispatcher_id)
    return dx, None, dweights, None, None


def _combine_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:  # noqa: ANN401
    y, row_weights, plan, _, dispatcher_id = inputs
    ctx.dispatcher_id = dispatcher_id
    ctx.num_rows = y.shape[0]
    ctx.num_plan = len(plan)
    if row_weights is None:
        ctx.save_for_backward(*plan)
    else:
        ctx.save_for_backward(*plan, y, row_weights)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple:  # noqa: ANN401
    # NOTE: saved tensors may be unpacked only once under non-reentrant checkpointing.
    saved = ctx.saved_tensors
    plan, kept = list(saved[: ctx.num_plan]), saved[ctx.num_plan :]
    rows = torch.ops.moe_ep.dispatch_replay(grad, plan, ctx.num_rows, ctx.dispatcher_id)
    dy, dweights = weighted_grads(rows, *kept) if kept else (rows, None)
    return dy, dweights, [None] * ctx.num_plan, None, None


def weighted_grads(rows: Tensor, y: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of its weights, from the gradient ``rows`` of the weighted rows (all in layout shape)."""
    dy = (rows * row_weights.unsqueeze(-1)).to(y.dtype)
    dweights = torch.linalg.vecdot(y.to(row_weights.dtype), rows.to(row_weights.dtype))
    return dy, dweights


dispatch_op.register_autograd(_dispatch_backward, setup_context=_dispatch_setup)
combine_op.register_autograd(_combine_backward, setup_context=_combine_setup)


# Launch and Wait


class DispatchExchange:
    """A dispatch under way, and its reversed exchange: the state that Launch and Wait share."""

    def __init__(self, exchanger: Exchanger) -> None:
        self.exchanger = exchanger
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
        with self.exchanger.overlapped():
            self.job = self.exchanger.dispatch(x, topk_idx, topk_weights, planned)
        self.exchanger.fire("dispatch_launched", self.seq)

    def wait(self) -> tuple[Tensor, Tensor]:
        """Rows and weights."""
        assert self.job is not None
        self.result = self.job.result()
        self.plan_tensors = self.result.plan.to_tensors()
        self.exchanger.fire("dispatch_ready", self.seq)
        return self.exchanger.layout_rows(self.result)

    def launch_backward(self, grads: Tensor, weight_grads: Tensor, plan_tensors: list[Tensor]) -> None:
        """Start the reversed exchange."""
        self.backward_seq = self.exchanger.next_seq()
        with self.exchanger.overlapped():
            job = self.exchanger.combine_grads(grads.contiguous(), weight_grads.contiguous(), plan_tensors)
        self.backward_job = job
        self.exchanger.fire("backward_dispatch_launched", self.backward_seq)

    def wait_backward(self) -> tuple[Tensor, Tensor]:
        """Gradients of x and topk_weights."""
        assert self.backward_job is not None
        grads = self.backward_job.result()
        self.backward_job = None
        self.exchanger.fire("backward_dispatch_ready", self.backward_seq)
        return grads


class CombineExchange:
    """A combine under way, and its reversed exchange."""

    def __init__(self, exchanger: Exchanger, plan_tensors: list[Tensor]) -> None:
        self.exchanger = exchanger
        self.plan_tensors = plan_tensors
        self.seq = 0
        self.job: Job[Tensor] | None = None
        self.backward_seq = 0
        self.backward_job: Job[Tensor] | None = None

    def launch(self, y: Tensor, row_weights: Tensor | None) -> None:
        """Start it."""
        self.seq = self.exchanger.next_seq()
        with self.exchanger.overlapped():
            self.job = self.exchanger.combine(y, row_weights, self.plan_tensors)
        self.exchanger.fire("combine_launched", self.seq)

    def wait(self) -> Tensor:
        """[T, H]."""
        assert self.job is not None
        out = self.job.result()
        self.exchanger.fire("combine_ready", self.seq)
        return out

    def launch_backward(self, grad: Tensor, plan_tensors: list[Tensor]) -> None:
        """Start the reversed exchange."""
        self.backward_seq = self.exchanger.next_seq()
        with self.exchanger.overlapped():
            self.backward_job = self.exchanger.replay(grad.contiguous(), plan_tensors)
        self.exchanger.fire("backward_combine_launched", self.backward_seq)

    def wait_backward(self) -> Tensor:
        """Gradients of the layout rows."""
        assert self.backward_job is not None
        rows = self.backward_job.result()
        self.backward_job = None
        self.exchanger.fire("backward_combine_ready", self.backward_seq)
        return rows


class _Once(torch.autograd.Function):
    """Passes a gradient on and remembers what it was made of, so that differentiating it again raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *origins: Tensor) -> Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:  # noqa: ANN401
        raise RuntimeError("exchanges can be differentiated once: double backward is not supported")


def _once(grad: Tensor, *origins: Tensor) -> Tensor:
    # NOTE: once_differentiable cuts the origins off, so torch.autograd.grad would silently leave their part out.
    return _Once.apply(grad, *origins) if torch.is_grad_enabled() else grad


class DispatchLaunch(torch.autograd.Function):
    """Starts a dispatch; returns a 0-dim token that ties Wait to it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: FunctionCtx,
        exchange: DispatchExchange,
        planned: Counted | None,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        anchor: Tensor,
    ) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        exchange.launch(x, topk_idx, topk_weights, planned)
        return torch.zeros((), device=x.device)

    @staticmethod
    def backward(ctx: Any, grad_token: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        dx, dweights = ctx.exchange.wait_backward()
        return None, None, _once(dx, grad_token), None, _once(dweights, grad_token), None


class DispatchWait(torch.autograd.Function):
    """Waits for a dispatch; returns rows and their weights."""

    @staticmethod
    def forward(ctx: FunctionCtx, exchange: DispatchExchange, token: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        rows, weights = exchange.wait()
        ctx.exchange = exchange  # type: ignore[attr-defined]
        ctx.save_for_backward(*exchange.plan_tensors)
        return rows, weights

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        ctx.exchange.launch_backward(grad_rows, grad_weights, list(ctx.saved_tensors))
        return None, _once(grad_weights.new_zeros((), dtype=torch.float32), grad_rows, grad_weights)


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
    def backward(ctx: Any, grad_token: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        rows = _once(ctx.exchange.wait_backward(), grad_token)
        saved = ctx.saved_tensors
        dy, dweights = weighted_grads(rows, *saved) if saved else (rows, None)
        return None, dy, dweights, None


class CombineWait(torch.autograd.Function):
    """Waits for a combine; returns [T, H]."""

    @staticmethod
    def forward(ctx: FunctionCtx, exchange: CombineExchange, token: Tensor) -> Tensor:  # type: ignore[override]
        ctx.exchange = exchange  # type: ignore[attr-defined]
        ctx.save_for_backward(*exchange.plan_tensors)
        return exchange.wait()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        ctx.exchange.launch_backward(grad, list(ctx.saved_tensors))
        return None, _once(grad.new_zeros((), dtype=torch.float32), grad)
