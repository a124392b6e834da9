"""Autograd Functions of the layers. Each is once differentiable: a second derivative raises.

Letters: N rows, e experts of this rank, C rows per expert in a slab, A and B the widths of a product, K choices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_ep.layers.grouped import multiply_groups, weight_gradient


class AttachLoss(torch.autograd.Function):
    """Passes ``weights`` through and adds ``loss`` to whatever loss the caller differentiates.

    The gradient of ``loss`` is 1 whenever a gradient reaches ``weights``, so an auxiliary loss needs no bookkeeping:
    it lives on the edge that the router's gradient travels anyway, under checkpointing and across pipeline stages.
    """

    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """``weights`` of any shape, ``loss`` 0-dim of their dtype; returns ``weights`` unchanged."""
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad.new_ones(())


class ScaleGradient(torch.autograd.Function):
    """Passes a tensor through and multiplies its gradient."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, scale: float) -> torch.Tensor:
        """``weight`` of any shape; returns it unchanged."""
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None


class GatedActivation(torch.autograd.Function):
    """``act(gate) * up * weights`` of rows that hold gate and up side by side.

    Saves the rows and weights only and writes both halves of the gradient in place: no concatenation, no kept product.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weights: torch.Tensor | None, kind: str) -> torch.Tensor:
        """``hidden`` [..., 2I], ``weights`` [...] or None, ``kind`` "swiglu" or "geglu"; returns [..., I]."""
        gate, up = hidden.chunk(2, -1)
        out = _activate(gate, kind).mul_(up)
        if weights is not None:
            _scale(out, weights, out)
        ctx.save_for_backward(hidden, weights)
        ctx.kind = kind
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, weights = ctx.saved_tensors
        gate, up = hidden.chunk(2, -1)
        activated = _activate(gate, ctx.kind)
        grad_weights = None
        if weights is not None:
            if ctx.needs_input_grad[1]:
                # Products of low precision are summed in the precision of the weights.
                grad_weights = (activated * up).mul_(grad).sum(-1, dtype=weights.dtype)
            grad = _scale(grad, weights, torch.empty_like(grad))
        grad_hidden = torch.empty_like(hidden)
        grad_gate, grad_up = grad_hidden.chunk(2, -1)
        torch.mul(grad, activated, out=grad_up)
        _activate_backward(torch.mul(grad, up, out=activated), gate, grad_gate, ctx.kind)
        return grad_hidden, grad_weights, None


def _scale(rows: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    # On a CPU a product of two dtypes first copies the rows to the wider one, three times the cost of the product.
    weights = weights.to(rows.dtype) if rows.device.type == "cpu" else weights
    return torch.mul(rows, weights.unsqueeze(-1), out=out)


def _activate(gate: torch.Tensor, kind: str) -> torch.Tensor:
    return F.silu(gate) if kind == "swiglu" else F.gelu(gate)


def _activate_backward(grad: torch.Tensor, gate: torch.Tensor, out: torch.Tensor, kind: str) -> None:
    if kind == "swiglu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="none", grad_input=out)


class GradientSlot:
    """What the backward of a product leaves for :class:`LateGradient`: the two operands of one weight gradient."""

    def __init__(self) -> None:
        self._operands: tuple[torch.Tensor, ...] | None = None

    def put(self, *operands: torch.Tensor) -> None:
        """Keeps ``(grad, rows, ends or counts)`` until they are taken."""
        self._operands = operands

    def take(self) -> tuple[torch.Tensor, ...] | None:
        """Hands the operands out and forgets them; None when no gradient reached the product."""
        operands, self._operands = self._operands, None
        return operands


class LateGradient(torch.autograd.Function):
    """Identity on an expert weight whose backward computes the weight gradient.

    Created between Launch and Wait of a dispatch, its backward runs between Wait's and Launch's: under the reversed
    exchange. The gradient is exactly the one that the product itself would have returned.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, slot: GradientSlot) -> torch.Tensor:
        """``weight`` [e, B, A]; returns it unchanged."""
        ctx.set_materialize_grads(False)
        ctx.slot = slot
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        operands = ctx.slot.take()
        # A gradient that arrives beside the operands comes from another use of the weight, and is added.
        if operands is not None:
            late = _weight_gradient(*operands)
            grad = late if grad is None else grad + late
        return grad, None


class ExpertLinear(torch.autograd.Function):
    """Rows of each expert times that expert's transposed weight.

    Saves the rows only when the weight needs a gradient, and the weight only when the rows do.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor | None, slot: GradientSlot | None
    ) -> torch.Tensor:
        """Multiplies rows [N, A] or slabs [e, C, A] by ``weight`` [e, B, A].

        Args:
            ctx: the context of autograd.
            rows: grouped rows, or slabs of one expert each.
            weight: one matrix per expert.
            bounds: int32 [e]. Grouped rows: the end of each group. Slabs: rows that count, the others may be NaN; None
                where all rows past the counts are zero.
            slot: where the backward leaves the weight gradient's operands instead of computing it, or None.

        Returns:
            [N, B] or [e, C, B].
        """
        ctx.save_for_backward(
            rows if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, bounds
        )
        ctx.slot = slot
        return _multiply(rows, weight.transpose(1, 2), bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        rows, weight, bounds = ctx.saved_tensors
        grad_rows = None if weight is None else _multiply(grad, weight, bounds)
        grad_weight = None
        if rows is not None:
            if ctx.slot is None:
                grad_weight = _weight_gradient(grad, rows, bounds)
            else:
                ctx.slot.put(grad, rows, bounds)
        return grad_rows, grad_weight, None, None


def _multiply(rows: torch.Tensor, weight: torch.Tensor, bounds: torch.Tensor | None) -> torch.Tensor:
    if rows.dim() == 3:
        return torch.bmm(rows, weight)
    assert bounds is not None
    return multiply_groups(rows, weight, bounds)


def _weight_gradient(grad: torch.Tensor, rows: torch.Tensor, bounds: torch.Tensor | None) -> torch.Tensor:
    if rows.dim() == 2:
        assert bounds is not None
        return weight_gradient(grad, rows, bounds)
    if bounds is not None:
        # NOTE: both operands are cleared, since 0 * NaN is NaN.
        undefined = undefined_rows(bounds, rows.shape[1]).unsqueeze(-1)
        grad, rows = grad.masked_fill(undefined, 0), rows.masked_fill(undefined, 0)
    return torch.bmm(grad.transpose(1, 2), rows)


def undefined_rows(counts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """bool [e, num_rows]: True for the rows of each expert's slab past its count, ``counts`` int32 [e]."""
    return torch.arange(num_rows, device=counts.device) >= counts.unsqueeze(-1)


class ExpandRows(torch.autograd.Function):
    """One row per (row, local choice) out of compact rows; its gradient sums the choices of a row in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """``rows`` [N, H]; ``sources`` int64 [M], row of a copy; ``places`` int64 [N, K], copy of a choice or -1."""
        ctx.save_for_backward(places)
        return rows.index_select(0, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sum_places(grad, places), None, None


class ReduceRows(torch.autograd.Function):
    """Sums the copies of a row in the order of its choices, in fp32 or wider: the transpose of :class:`ExpandRows`."""

    @staticmethod
    def forward(ctx: Any, copies: torch.Tensor, sources: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """``copies`` [M, H], ``sources`` and ``places`` as in :class:`ExpandRows`; returns [N, H]."""
        ctx.save_for_backward(sources)
        return _sum_places(copies, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (sources,) = ctx.saved_tensors
        return grad.index_select(0, sources), None, None


def _sum_places(copies: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(copies.dtype, torch.float32)
    out = copies.new_zeros(places.shape[0], copies.shape[1], dtype=wide)
    if torch.compiler.is_compiling() or copies.shape[0] == 0:
        # A row for choices without a copy to point to, where there may be none; a compiled graph cannot ask.
        copies = F.pad(copies, (0, 0, 0, 1))
    for place in places.unbind(1):
        # Copies of no choice are filled over, never multiplied by zero: they may be NaN.
        chosen, none = copies.index_select(0, place.clamp(min=0)), (place < 0).unsqueeze(-1)
        if torch.compiler.is_compiling():
            out = out + chosen.masked_fill(none, 0)
        else:
            out += chosen.masked_fill_(none, 0)
    # NOTE: torch 2.11 gives a compiled Function no gradient when what it returns is an alias: of a tensor that was
    # changed in place, or of one that .to() leaves as it is.
    return out if wide == copies.dtype else out.to(copies.dtype)
