"""Exchanges with gradients where nobody watches or traces: Functions that do without operators.

What the operators of :mod:`moe_ep.ops` do, with the same anchors and gradients. Plans keep their numbers on the host,
and autograd keeps tensors alone, so that checkpoints and hooks of saved tensors work as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.types import Counted, Dispatch
from moe_ep.backends.weighing import weigh
from moe_ep.exchange import Exchanger, lookup
from moe_ep.handle import Plan
from moe_ep.ops import (
    are_transparent,
    filled,
    once,
    run_combine,
    run_combine_grads,
    run_dispatch,
    run_replay,
    weighted_grads,
)
from moe_ep.untraced import untraced


class EagerDispatch(torch.autograd.Function):
    """A whole dispatch: rows and their weights. ``told`` is given the rest of the result."""

    @staticmethod
    @untraced
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        told: list[Dispatch],
        exchanger: Exchanger,
        planned: Counted | None,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        anchor: Tensor,
    ) -> tuple[Tensor, Tensor]:
        result = run_dispatch(exchanger, x, topk_idx, topk_weights, planned)
        rows, weights = exchanger.layout_rows(result)
        told.append(result)
        ctx.exchanger_id = exchanger.id
        ctx.numbers, tensors = result.plan.apart()
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.like = (rows.shape, rows.dtype, weights.shape, weights.dtype, rows.device)
        return rows, weights

    @staticmethod
    @untraced
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]  # noqa: ANN401
        rows, weights = filled(grads, ctx.like)
        plan = Plan.together(ctx.numbers, ctx.saved_tensors)
        if _is_plain(rows, weights):
            dx, dweights = run_combine_grads(lookup(ctx.exchanger_id), rows, weights, plan)
        else:
            dx, dweights = torch.ops.moe_ep.combine_grads(rows, weights, plan.to_tensors(), ctx.exchanger_id)
        return None, None, None, once(dx, rows, weights), None, once(dweights, rows, weights), None


class EagerCombine(torch.autograd.Function):
    """A whole combine: [T, H]."""

    @staticmethod
    @untraced
    def forward(  # type: ignore[override]
        ctx: Any,  # noqa: ANN401
        exchanger: Exchanger,
        y: Tensor,
        row_weights: Tensor | None,
        anchor: Tensor,
        plan: Plan,
    ) -> Tensor:
        out = run_combine(exchanger, y, row_weights, plan)
        ctx.exchanger_id = exchanger.id
        ctx.numbers, tensors = plan.apart()
        ctx.num_tensors, ctx.num_rows = len(tensors), y.shape[0]
        kept = () if row_weights is None else (y, row_weights)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    @untraced
    def backward(ctx: Any, grad: Tensor) -> tuple:  # type: ignore[override]  # noqa: ANN401
        # NOTE: saved tensors may be unpacked only once under non-reentrant checkpointing.
        saved = ctx.saved_tensors
        plan, kept = Plan.together(ctx.numbers, saved[: ctx.num_tensors]), saved[ctx.num_tensors :]
        if _is_plain(grad):
            rows = run_replay(lookup(ctx.exchanger_id), grad, plan)
            dy, dweights = weigh(rows, *kept) if kept else (rows, None)
            return None, dy, dweights, None, None
        rows = torch.ops.moe_ep.dispatch_replay(grad, plan.to_tensors(), ctx.num_rows, ctx.exchanger_id)
        rows = once(rows, grad)
        dy, dweights = weighted_grads(rows, *kept) if kept else (rows, None)
        return None, dy, dweights, None, None


def _is_plain(*grads: Tensor) -> bool:
    """Whether operators would do nothing more here: they unwrap gradients that a collective has yet to bring, say."""
    return not torch.is_grad_enabled() and are_transparent(*grads)
