"""What crosses between ranks: rows with their metadata packed behind them, and the fp8 cast."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ep.config import FP8_DTYPE, FP8_GROUP, ExchangeSpec
from moe_ep.handle import SendPlan
from moe_ep.plan import local_choices

WORD_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Received:
    """What arrives over the wire.

    Attributes:
        buffer: [M, W] rows, with metadata rows among them.
        index: [N] where the wire rows lie in ``buffer``; None when they are all of it, in order.
        meta: [N, words] int32 metadata of the wire rows, or None.
    """

    buffer: Tensor
    index: Tensor | None
    meta: Tensor | None


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Cast rows to e4m3 with one fp32 scale per 128 channels: scale = max(amax, 1e-4) / 448.

    Args:
        x: [T, H], H a multiple of 128.

    Returns:
        (e4m3 [T, H], fp32 [T, H / 128]).
    """
    groups = x.float().view(x.shape[0], x.shape[1] // FP8_GROUP, FP8_GROUP)
    scales = groups.abs().amax(2).clamp_(min=1e-4) / torch.finfo(FP8_DTYPE).max
    return (groups / scales.unsqueeze(2)).to(FP8_DTYPE).view_as(x), scales


def dequantize(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`quantize` up to rounding; rows [N, H] e4m3, scales [N, H / 128] fp32."""
    groups = rows.to(torch.float32).view(rows.shape[0], rows.shape[1] // FP8_GROUP, FP8_GROUP)
    return (groups * scales.unsqueeze(2)).view(rows.shape).to(dtype)


class Metadata(NamedTuple):
    """Which numbers travel with a row, as int32 words: source token and ids (per token and rank), weights, scales."""

    per_choice: bool
    num_weights: int
    weight_dtype: torch.dtype | None
    scale_dtype: torch.dtype | None

    @staticmethod
    def of(spec: ExchangeSpec, topk_weights: Tensor | None, scales: Tensor | None) -> Metadata:
        return Metadata(
            per_choice=spec.per_choice,
            num_weights=1 if spec.per_choice else spec.top_k,
            weight_dtype=None if topk_weights is None else topk_weights.dtype,
            scale_dtype=None if scales is None else scales.dtype,
        )

    @property
    def weight_bytes(self) -> int:
        return WORD_BYTES if self.weight_dtype is None else self.weight_dtype.itemsize

    def pack(
        self,
        topk_idx: Tensor,
        topk_weights: Tensor | None,
        scales: Tensor | None,
        send: SendPlan,
        spec: ExchangeSpec,
    ) -> Tensor | None:
        """[S, words] int32."""
        parts = []
        if self.per_choice:
            if topk_weights is not None:
                parts.append(as_words(_choices_in_wire_order(topk_weights, send).unsqueeze(1)))
        else:
            ids = local_choices(topk_idx, send, spec.num_experts)
            parts += [send.send_src.to(torch.int32).unsqueeze(1), ids.to(torch.int32)]
            if topk_weights is not None:
                parts.append(as_words(topk_weights.index_select(0, send.send_src).masked_fill_(ids < 0, 0)))
        if scales is not None:
            parts.append(as_words(scales.index_select(0, send.send_src)))
        return torch.cat(parts, dim=1) if parts else None

    def unpack(self, meta: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Local ids int64 [N, K], weights [N, K] or [N], scales, source tokens int32 [N]; None where absent."""
        ids = weights = scales = source = None
        if meta is None:
            return ids, weights, scales, source
        at = 0
        if not self.per_choice:
            source = meta[:, 0].contiguous()
            ids = meta[:, 1 : 1 + self.num_weights].to(torch.int64)
            at = 1 + self.num_weights
        if self.weight_dtype is not None:
            words = self.num_weights * self.weight_dtype.itemsize // WORD_BYTES
            weights = meta[:, at : at + words].contiguous().view(self.weight_dtype)
            weights = weights.squeeze(1) if self.per_choice else weights
            at += words
        if self.scale_dtype is not None:
            scales = meta[:, at:].contiguous().view(self.scale_dtype)
        return ids, weights, scales, source


def _choices_in_wire_order(topk_weights: Tensor, send: SendPlan) -> Tensor:
    values = topk_weights.new_empty(send.send_src.numel())
    chosen = send.choice_pos >= 0
    values[send.choice_pos[chosen]] = topk_weights.flatten()[chosen]
    return values


def as_words(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32)


def region_rows(counts: list[int], meta_words: int, row_bytes: int) -> list[int]:
    """Rows that travel to or from each rank: its wire rows, then as many whole rows as their metadata fills."""
    return [count - (-count * meta_words * WORD_BYTES // row_bytes) for count in counts]


def pack_rows(
    targets: list[Tensor], rows: Tensor, index: Tensor | None, counts: list[int], meta: Tensor | None
) -> None:
    """Copy each rank's rows, and their metadata behind them, to its region.

    Args:
        targets: region of each rank, [rows of ``region_rows``, W], contiguous.
        rows: [M, W].
        index: [S] rows to copy, by rank; None takes them in order.
        counts: wire rows of each rank.
        meta: [S, words] int32, or None.
    """
    first = 0
    for target, count in zip(targets, counts, strict=True):
        if index is None:
            target[:count] = rows[first : first + count]
        else:
            torch.index_select(rows, 0, index[first : first + count], out=target[:count])
        if meta is not None:
            words = target[count:].view(torch.int32).view(-1)
            words[: count * meta.shape[1]] = meta[first : first + count].view(-1)
        first += count


def unpack_rows(buffer: Tensor, counts: list[int], starts: list[int], meta_words: int) -> Received:
    """Find rows and metadata of each source in what arrived.

    Args:
        buffer: [M, W].
        counts: wire rows of each source.
        starts: row where each source's region begins.
        meta_words: int32 words of metadata per row, 0 for none.
    """
    width = buffer.shape[1] * buffer.itemsize // WORD_BYTES
    index = torch.cat([torch.arange(at, at + n, device=buffer.device) for n, at in zip(counts, starts, strict=True)])
    if not meta_words:
        return Received(buffer, index, None)
    words = buffer.view(torch.int32).view(-1)
    metas = []
    for count, start in zip(counts, starts, strict=True):
        begin = (start + count) * width
        metas.append(words[begin : begin + count * meta_words].view(count, meta_words))
    return Received(buffer, index, torch.cat(metas))
