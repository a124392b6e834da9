"""Gradients of a weighted sum of expert rows: one kernel where there is one, plain torch elsewhere."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension, why_not_cuda

# As the extension numbers them.
_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_ALIGNMENT = 16


def weigh(grads: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of their weights, from those of the weighted rows.

    Args:
        grads: [..., H] gradients of ``weights * rows``.
        rows: [..., H] in the same dtype.
        weights: [...] fp32, fp64 for fp64 rows.

    Returns:
        [..., H] in the dtype of rows, and [...] in that of weights. Rows are rounded once; sums over H are taken in the
        dtype of weights, in no promised order.
    """
    if _has_kernel(grads, rows, weights):
        return _weigh_by_kernel(grads, rows, weights)
    wide = weights.dtype
    return (grads * weights.unsqueeze(-1)).to(rows.dtype), torch.linalg.vecdot(rows.to(wide), grads.to(wide))


def _has_kernel(grads: Tensor, rows: Tensor, weights: Tensor) -> bool:
    if grads.device.type != "cuda" or grads.dtype not in _ELEMENTS or grads.dtype != rows.dtype:
        return False
    if weights.dtype != (torch.float64 if rows.dtype == torch.float64 else torch.float32):
        return False
    if not (grads.is_contiguous() and rows.is_contiguous() and weights.is_contiguous()):
        return False
    aligned = grads.data_ptr() % _ALIGNMENT == 0 and rows.data_ptr() % _ALIGNMENT == 0
    return aligned and rows.shape[-1] * rows.itemsize % _ALIGNMENT == 0 and _is_built(grads.device.index)


@functools.cache
def _is_built(device: int) -> bool:
    with torch.cuda.device(device):
        return why_not_cuda() is None


def _weigh_by_kernel(grads: Tensor, rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    out_rows, out_weights = torch.empty_like(rows), torch.empty_like(weights)
    with torch.cuda.device(rows.device):
        load_extension().weigh(
            grads.data_ptr(),
            rows.data_ptr(),
            weights.data_ptr(),
            out_rows.data_ptr(),
            out_weights.data_ptr(),
            weights.numel(),
            rows.shape[-1],
            _ELEMENTS[rows.dtype],
            torch.cuda.current_stream(rows.device).cuda_stream,
        )
    return out_rows, out_weights
