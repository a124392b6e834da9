"""Between wire rows and layout rows: placing what arrived, and summing what goes back."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ep.config import FP8_DTYPE, HALF_DTYPES
from moe_ep.handle import PlacePlan, Plan


def reduce_rows(
    rows: Tensor,
    index: Tensor,
    offsets: Tensor,
    weights: Tensor | None = None,
    bias: tuple[Tensor, ...] = (),
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum runs of rows, accumulated in fp32 (fp64 for fp64 rows) in the order of ``index``, rounded once.

    Args:
        rows: [M, H].
        index: [n] rows to add.
        offsets: [B] where each sum begins in ``index``.
        weights: [n] factors, or None.
        bias: [B, H] tensors added before rounding.
        dtype: of the sums; None for that of ``rows``.

    Returns:
        [B, H] sums; zeros where a run is empty.
    """
    dtype = rows.dtype if dtype is None else dtype
    if rows.dtype in HALF_DTYPES and (weights is not None or bias or dtype != rows.dtype):
        rows = rows.float()
    if index.numel():
        if weights is not None:
            weights = weights.to(rows.dtype)
        # EmbeddingBag is torch's fused gather and sum; it accumulates 16-bit rows in fp32.
        out = torch.embedding_bag(rows, index, offsets, False, 0, False, weights)[0]
    else:
        out = rows.new_zeros(offsets.numel(), rows.shape[1])
    for term in bias:
        out = out + term
    return out.to(dtype)


def spread(valid: Tensor, plan: Plan) -> Tensor:
    """Valid rows [V, ...] to their places among ``num_rows``; zero where groups are padded, undefined past them."""
    place = plan.place
    if place.row_pos is None and plan.num_rows == plan.num_valid:
        return valid
    rows = valid.new_empty(plan.num_rows, *valid.shape[1:])
    # Bytes are placed: index_copy_ does not know fp8.
    target, source = (rows.view(torch.uint8), valid.view(torch.uint8)) if rows.dtype == FP8_DTYPE else (rows, valid)
    if place.row_pos is None:
        target[: plan.num_valid] = source
    else:
        target.index_copy_(0, place.row_pos, source)
    if place.pad_rows.numel():
        target.index_fill_(0, place.pad_rows, 0)
    return rows


def place_values(values: Tensor, plan: Plan) -> Tensor:
    """Per-wire-row values [N, n] to layout rows [num_rows, n]."""
    source = plan.place.row_src
    return spread(values if source is None else values.index_select(0, source), plan)


def place_choices(weights: Tensor, plan: Plan) -> Tensor:
    """Weights as received ([N, K] or [N]) to layout rows [num_rows]."""
    flat = weights.flatten()
    return spread(flat if plan.place.row_choice is None else flat.index_select(0, plan.place.row_choice), plan)


def fill_rows(values: Tensor, plan: Plan, fill: float) -> Tensor:
    """[N, K] to [num_rows, K] where a capacity gives compact rows a fixed number."""
    if values.shape[0] == plan.num_rows:
        return values
    out = values.new_full((plan.num_rows, values.shape[1]), fill)
    out[: values.shape[0]] = values
    return out


def collect_choices(row_values: Tensor, plan: Plan) -> Tensor:
    """Inverse of :func:`place_choices`: [N, K] or [N, 1], zero where a choice is another rank's."""
    place = plan.place
    if row_values.dim() == 2:
        return row_values[: plan.num_wire]
    if plan.per_choice:
        taken = row_values[: plan.num_wire] if place.back_rows is None else row_values[place.back_rows]
        return taken.unsqueeze(1)
    assert place.row_choice is not None
    out = row_values.new_zeros(plan.num_wire * plan.top_k)
    out[place.row_choice] = row_values[: plan.num_valid] if place.row_pos is None else row_values[place.row_pos]
    return out.view(plan.num_wire, plan.top_k)


def identity_places(device: torch.device) -> PlacePlan:
    """Layout rows are the wire rows, as they came."""
    return PlacePlan(None, None, torch.empty(0, dtype=torch.int64, device=device), None, None, None)


def poison(rows: Tensor) -> Tensor:
    """Fill with NaN in place; outputs after an overflow must not be mistaken for results."""
    if rows.dtype == FP8_DTYPE:
        rows.view(torch.uint8).fill_(0x7F)  # the NaN of e4m3fn, which knows no fill
        return rows
    return rows.fill_(float("nan"))
