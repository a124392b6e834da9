"""The operators ``moe_ep::*``: exchanges as functional library ops, with gradients.

The reversed exchange of a dispatch is a combine, of a combine a dispatch. All that backward needs are tensors, so the
operators compile into one graph and can be named in selective-checkpoint lists. Every exchange takes an anchor, a 0-dim
tensor that requires grad: its backward then exists on every rank, also where nothing else requires a gradient, and no
rank skips an exchange that its peers wait for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moe_ep.backends.types import Counted, Dispatch
from moe_ep.backends.weighing import weigh
from moe_ep.config import ExchangeSpec
from moe_ep.exchange import Exchanger, lookup
from moe_ep.handle import Plan, num_tokens_of
from moe_ep.untraced import untraced


def extras_of(result: Dispatch) -> list[Tensor]:
    """What a dispatch returns before the replayable plan: expert_ends, overflow, topk_idx (empty unless compact)."""
    topk_idx, overflow, device = result.topk_idx, result.overflow, result.rows.device
    if topk_idx is None:
        topk_idx = torch.empty(0, dtype=torch.int64, device=device)
    if overflow is None:
        overflow = torch.zeros((), dtype=torch.bool, device=device)
    return [result.expert_ends, overflow, topk_idx]


# How many these are. Behind them comes the plan, whose tensors are fewer on the CUDA backend.
NUM_EXTRAS = 3


# NOTE: not torch.library.custom_op: its wrappers, which walk every argument as a tree, cost as much as a whole small
# exchange does (fwd + bwd at T = 4 on one rank: 1258 us of CPU time with them).
_LIBRARY = torch.library.Library("moe_ep", "FRAGMENT")
for _schema in (
    "dispatch(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor anchor, int dispatcher_id)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    "combine(Tensor y, Tensor? row_weights, Tensor[] plan, Tensor anchor, int dispatcher_id) -> Tensor",
    "dispatch_replay(Tensor x, Tensor[] plan, SymInt num_rows, int dispatcher_id) -> Tensor",
    "combine_grads(Tensor grads, Tensor weight_grads, Tensor[] plan, int dispatcher_id) -> (Tensor, Tensor)",
    "weigh_grads(Tensor grads, Tensor y, Tensor row_weights) -> (Tensor, Tensor)",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
_OPS = torch.ops.moe_ep
for _op in (_OPS.dispatch, _OPS.combine, _OPS.dispatch_replay, _OPS.combine_grads):
    # A compiled graph keeps an exchange whose result it does not use: peers wait for it.
    torch.fx.has_side_effect(_op.default)


# Tensors without a ``__torch_function__`` or ``__torch_dispatch__`` of their own.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


# What the operators do


def are_transparent(*tensors: Tensor | None) -> bool:
    """Whether nobody watches or traces what an operator would do with these: exchanges then do without operators.

    Their layers and lists of tensors cost about what planning does; :mod:`moe_ep.eager` has the gradients.
    """
    if torch.compiler.is_compiling() or torch.autograd._profiler_enabled():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack() or torch._C._is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    # NOTE: a checkpoint computes again outside of the modes that its forward ran in, and must save the same tensors.
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as all that stands before
        if tensor is not None and type(tensor) not in PLAIN_TYPES:
            return False
    return True


@untraced
def run_dispatch(
    exchanger: Exchanger,
    x: Tensor | tuple[Tensor, Tensor],
    topk_idx: Tensor,
    topk_weights: Tensor,
    planned: Counted | None = None,
    lends: bool = False,
) -> Dispatch:
    """A whole dispatch, with its hooks; arguments as in ``Exchanger.dispatch``."""
    seq = exchanger.next_seq()
    job = exchanger.dispatch(x, topk_idx, topk_weights, planned, lends)
    exchanger.fire("dispatch_launched", seq)
    result = job.result()
    exchanger.fire("dispatch_ready", seq)
    return result


@untraced
def run_combine(exchanger: Exchanger, y: Tensor, row_weights: Tensor | None, plan: Plan) -> Tensor:
    """A whole combine, with its hooks."""
    seq = exchanger.next_seq()
    job = exchanger.combine(y, row_weights, plan)
    exchanger.fire("combine_launched", seq)
    out = job.result()
    exchanger.fire("combine_ready", seq)
    return out


@untraced
def run_replay(exchanger: Exchanger, x: Tensor, plan: Plan) -> Tensor:
    """A whole reversed combine, with its hooks."""
    seq = exchanger.next_seq()
    job = exchanger.replay(x.contiguous(), plan)
    exchanger.fire("backward_combine_launched", seq)
    rows = job.result()
    exchanger.fire("backward_combine_ready", seq)
    return rows


@untraced
def run_combine_grads(exchanger: Exchanger, grads: Tensor, weight_grads: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """A whole reversed dispatch, with its hooks."""
    seq = exchanger.next_seq()
    job = exchanger.combine_grads(grads.contiguous(), weight_grads.contiguous(), plan)
    exchanger.fire("backward_dispatch_launched", seq)
    dx, dweights = job.result()
    exchanger.fire("backward_dispatch_ready", seq)
    return dx, dweights


@torch.library.impl(_LIBRARY, "dispatch", "CompositeExplicitAutograd")
@untraced
def _dispatch(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, anchor: Tensor, dispatcher_id: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Rows [T, H] to the ranks of their experts: (rows, row_weights, tokens_per_expert, extras and plan)."""
    exchanger = lookup(dispatcher_id)
    result = run_dispatch(exchanger, x, topk_idx, topk_weights)
    rows, weights = exchanger.layout_rows(result)
    return rows, weights, result.tokens_per_expert, [*extras_of(result), *result.plan.to_tensors()]


@torch.library.impl(_LIBRARY, "combine", "CompositeExplicitAutograd")
@untraced
def _combine(y: Tensor, row_weights: Tensor | None, plan: list[Tensor], anchor: Tensor, dispatcher_id: int) -> Tensor:
    """Layout rows home: [T, H], each token's (weighted) sum."""
    return run_combine(lookup(dispatcher_id), y, row_weights, Plan.from_tensors(plan))


@torch.library.impl(_LIBRARY, "dispatch_replay", "CompositeExplicitAutograd")
@untraced
def _dispatch_replay(x: Tensor, plan: list[Tensor], num_rows: int, dispatcher_id: int) -> Tensor:
    """Gradients [T, H] of a combine's output to layout rows; ``num_rows`` is the first size of the result."""
    return run_replay(lookup(dispatcher_id), x, Plan.from_tensors(plan))


@torch.library.impl(_LIBRARY, "combine_grads", "CompositeExplicitAutograd")
@untraced
def _combine_grads(
    grads: Tensor, weight_grads: Tensor, plan: list[Tensor], dispatcher_id: int
) -> tuple[Tensor, Tensor]:
    """Gradients of layout rows and row weights home: those of x [T, H] and topk_weights [T, K]."""
    return run_combine_grads(lookup(dispatcher_id), grads, weight_grads, Plan.from_tensors(plan))


@torch.library.impl(_LIBRARY, "weigh_grads", "CompositeExplicitAutograd")
@untraced
def _weigh_grads(grads: Tensor, y: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of its weights, from those of the weighted rows; no exchange."""
    return weigh(grads, y, row_weights)


# What a tracer sees


@torch.library.register_fake("moe_ep::dispatch", lib=_LIBRARY)
def _dispatch_fake(
    x: Tensor, topk_idx: Tensor, topk_weights: Tensor, anchor: Tensor, dispatcher_id: int
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    exchanger = lookup(dispatcher_id)
    spec = exchanger.spec
    rows, weights, topk_local = _fake_rows(x, topk_idx, topk_weights, spec)
    plan = exchanger.fake_plan(topk_idx, torch.library.get_ctx().new_dynamic_size)
    counts = topk_idx.new_empty(spec.num_local_experts, dtype=torch.int32)
    extras = [torch.empty_like(counts), topk_idx.new_empty((), dtype=torch.bool), topk_local]
    return rows, weights, counts, [*extras, *plan]


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


@torch.library.register_fake("moe_ep::combine", lib=_LIBRARY)
def _combine_fake(
    y: Tensor, row_weights: Tensor | None, plan: list[Tensor], anchor: Tensor, dispatcher_id: int
) -> Tensor:
    return y.new_empty(num_tokens_of(plan), y.shape[-1])


@torch.library.register_fake("moe_ep::dispatch_replay", lib=_LIBRARY)
def _dispatch_replay_fake(x: Tensor, plan: list[Tensor], num_rows: int, dispatcher_id: int) -> Tensor:
    spec = lookup(dispatcher_id).spec
    if spec.layout == "slab":
        return x.new_empty(num_rows, spec.num_ranks * (spec.max_tokens_per_rank or 0), x.shape[1])
    return x.new_empty(num_rows, x.shape[1])


@torch.library.register_fake("moe_ep::combine_grads", lib=_LIBRARY)
def _combine_grads_fake(
    grads: Tensor, weight_grads: Tensor, plan: list[Tensor], dispatcher_id: int
) -> tuple[Tensor, Tensor]:
    num_tokens, top_k = num_tokens_of(plan), lookup(dispatcher_id).spec.top_k
    return grads.new_empty(num_tokens, grads.shape[-1]), weight_grads.new_empty(num_tokens, top_k)


@torch.library.register_fake("moe_ep::weigh_grads", lib=_LIBRARY)
def _weigh_grads_fake(grads: Tensor, y: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(row_weights)


# Gradients


def weighted_grads(rows: Tensor, y: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y and of its weights, from the gradient ``rows`` of the weighted rows (all in layout shape)."""
    dy, dweights = _OPS.weigh_grads(rows, y, row_weights)
    return once(dy, rows, y, row_weights), once(dweights, rows, y, row_weights)


class _Once(torch.autograd.Function):
    """Passes a gradient on and remembers what it was made of, so that differentiating it again raises."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, *origins: Tensor) -> Tensor:  # type: ignore[override]
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple:  # noqa: ANN401
        raise RuntimeError("exchanges can be differentiated once: double backward is not supported")


def once(grad: Tensor, *origins: Tensor) -> Tensor:
    """A gradient that cannot be differentiated again, where a graph of the backward is being made."""
    # NOTE: once_differentiable cuts the origins off, so torch.autograd.grad would silently leave their part out.
    return _Once.apply(grad, *origins) if torch.is_grad_enabled() else grad


def filled(
    grads: tuple[Tensor | None, ...],
    like: tuple[torch.Size, torch.dtype, torch.Size, torch.dtype, torch.device],
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights, zeros where an output was not used: the exchange takes place all the same.

    Args:
        grads: of rows and weights, and of outputs that have none.
        like: shape and dtype of the rows' gradient, of the weights', and their device.
    """
    rows, weights = grads[:2]
    rows_shape, rows_dtype, weights_shape, weights_dtype, device = like
    if rows is None:
        rows = torch.zeros(rows_shape, dtype=rows_dtype, device=device)
    if weights is None:
        weights = torch.zeros(weights_shape, dtype=weights_dtype, device=device)
    return rows, weights


class _Dispatch(torch.autograd.Function):
    """Dispatch with its gradient; the list of the operator is flat here."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:  # noqa: ANN401
        rows, weights, counts, tensors = _below_autograd(_OPS.dispatch.default, *args)
        ctx.dispatcher_id = args[-1]
        # Gradients of index tensors are not made up as zeros, so those of rows and weights must be.
        ctx.set_materialize_grads(False)
        ctx.like = (rows.shape, rows.dtype, weights.shape, weights.dtype, rows.device)
        ctx.save_for_backward(*tensors[NUM_EXTRAS:])
        return (rows, weights, counts, *tensors)

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]  # noqa: ANN401
        rows, weights = filled(grads, ctx.like)
        dx, dweights = _OPS.combine_grads(rows, weights, list(ctx.saved_tensors), ctx.dispatcher_id)
        return once(dx, rows, weights), None, once(dweights, rows, weights), None, None


class _Combine(torch.autograd.Function):
    """Combine with its gradient; the plan comes last and flat."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        y: Tensor,
        row_weights: Tensor | None,
        anchor: Tensor,
        dispatcher_id: int,
        *plan: Tensor,
    ) -> Tensor:
        ctx.dispatcher_id = dispatcher_id
        ctx.num_rows = y.shape[0]
        ctx.num_plan = len(plan)
        kept = () if row_weights is None else (y, row_weights)
        ctx.save_for_backward(*plan, *kept)
        return _below_autograd(_OPS.combine.default, y, row_weights, list(plan), anchor, dispatcher_id)

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        # NOTE: saved tensors may be unpacked only once under non-reentrant checkpointing.
        saved = ctx.saved_tensors
        plan, kept = list(saved[: ctx.num_plan]), saved[ctx.num_plan :]
        rows = once(_OPS.dispatch_replay(grad, plan, ctx.num_rows, ctx.dispatcher_id), grad)
        dy, dweights = weighted_grads(rows, *kept) if kept else (rows, None)
        return (dy, dweights, None, None, *([None] * ctx.num_plan))


def _below_autograd(op: Any, *args: Any) -> Any:  # noqa: ANN401
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


@torch.library.impl(_LIBRARY, "dispatch", "Autograd")
@untraced
def _dispatch_autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return _below_autograd(_OPS.dispatch.default, *args)
    rows, weights, counts, *tensors = _Dispatch.apply(*args)
    return rows, weights, counts, tensors


@torch.library.impl(_LIBRARY, "combine", "Autograd")
@untraced
def _combine_autograd(
    y: Tensor, row_weights: Tensor | None, plan: list[Tensor], anchor: Tensor, dispatcher_id: int
) -> Tensor:
    if not torch.is_grad_enabled():
        return _below_autograd(_OPS.combine.default, y, row_weights, plan, anchor, dispatcher_id)
    return _Combine.apply(y, row_weights, anchor, dispatcher_id, *plan)


@torch.library.impl(_LIBRARY, "dispatch_replay", "Autograd")
@untraced
def _dispatch_replay_autograd(*args: Any) -> Tensor:  # noqa: ANN401
    return _below_autograd(_OPS.dispatch_replay.default, *args)


@torch.library.impl(_LIBRARY, "weigh_grads", "Autograd")
def _weigh_grads_autograd(*args: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return _below_autograd(_OPS.weigh_grads.default, *args)


@torch.library.impl(_LIBRARY, "combine_grads", "Autograd")
@untraced
def _combine_grads_autograd(*args: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    return _below_autograd(_OPS.combine_grads.default, *args)
