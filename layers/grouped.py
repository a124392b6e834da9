"""Matrix products of rows that are grouped by expert: one call for all experts, whatever their counts.

Letters: N rows, e experts, A and B the widths of a product. ``ends`` int32 [e] holds the end of each group, so expert
i owns rows ``ends[i-1]:ends[i]``. Rows past ``ends[-1]`` are neither read nor promised any value. Nothing here is
differentiable by itself: :mod:`moe_ep.layers.functions` builds the gradients from these products.
"""

import torch
import torch.nn.functional as F

# F.grouped_mm asks that rows of all its operands start at multiples of 16 bytes.
_ROW_BYTES = 16
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def multiply_groups(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiplies each expert's rows by that expert's matrix.

    Args:
        rows: [N, A], of the dtype of ``weight``.
        weight: [e, A, B]; a transposed view costs no copy.
        ends: int32 [e], on the device of ``rows``.

    Returns:
        [N, B] of the same dtype. Waits for the device only in the loop (see :func:`grouped_mm_applies`).
    """
    if not torch.compiler.is_compiling():
        return _multiply(rows, weight, ends)
    if rows.dtype == torch.bfloat16 and grouped_mm_applies(rows.dtype, *weight.shape[1:]):
        return F.grouped_mm(rows, weight, offs=ends)
    # The fake kernel of grouped_mm knows bfloat16 only, so the rest is compiled as one opaque operator.
    return _opaque_multiply(rows, weight, ends)


def weight_gradient(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Multiplies each expert's output gradients, transposed, by its rows.

    Args:
        grad: [N, B], of the dtype of ``rows``.
        rows: [N, A].
        ends: int32 [e], on the device of ``rows``.

    Returns:
        [e, B, A] of the same dtype; zero for an expert without rows.
    """
    if not torch.compiler.is_compiling():
        return _gradient(grad, rows, ends)
    if rows.dtype == torch.bfloat16 and grouped_mm_applies(rows.dtype, rows.shape[1], grad.shape[1]):
        return F.grouped_mm(grad.t(), rows, offs=ends)
    return _opaque_gradient(grad, rows, ends)


def grouped_mm_applies(dtype: torch.dtype, *widths: int) -> bool:
    """Whether ``F.grouped_mm`` takes operands of this dtype and these widths; if not, a loop over experts does."""
    if not hasattr(F, "grouped_mm") or dtype not in _GROUPED_DTYPES:
        return False
    return all(width * dtype.itemsize % _ROW_BYTES == 0 for width in widths)


def _multiply(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    # grouped_mm also refuses the strides that an empty or expanded tensor may have.
    if rows.shape[0] and grouped_mm_applies(rows.dtype, *weight.shape[1:]):
        return F.grouped_mm(rows.contiguous(), weight, offs=ends)
    out = rows.new_empty(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = rows[start:end] @ weight[expert]
        start = end
    return out


def _gradient(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    if rows.shape[0] and grouped_mm_applies(rows.dtype, rows.shape[1], grad.shape[1]):
        return F.grouped_mm(grad.contiguous().t(), rows.contiguous(), offs=ends)
    out = rows.new_zeros(ends.shape[0], grad.shape[1], rows.shape[1])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            out[expert] = grad[start:end].t() @ rows[start:end]
        start = end
    return out


@torch.library.custom_op("moe_ep::multiply_groups", mutates_args=())
def _opaque_multiply(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _multiply(rows, weight, ends)


@_opaque_multiply.register_fake
def _(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("moe_ep::weight_gradient", mutates_args=())
def _opaque_gradient(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return _gradient(grad, rows, ends)


@_opaque_gradient.register_fake
def _(grad: torch.Tensor, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(ends.shape[0], grad.shape[1], rows.shape[1])
