"""What crosses between ranks: rows with their metadata packed behind them, and the fp8 cast."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from moe_ep.config import FP8_DTYPE, FP8_GROUP, ExchangeSpec
from moe_ep.handle import SendPlan
from moe_ep.plan import localize

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


class Memory(NamedTuple):
    """Memory that rows are packed into or arrive in.

    Attributes:
        rows: [M, W], contiguous.
        words: [M * W * itemsize / 4] int32, the same bytes.
    """

    rows: Tensor
    words: Tensor

    @staticmethod
    def of(rows: Tensor) -> Memory:
        return Memory(rows, rows.view(torch.int32).view(-1))


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


class Numbers(NamedTuple):
    """What travels with rows, as it arrives; None where absent.

    Attributes:
        ids: [N, K] int64 local expert ids, -1 = another rank's.
        weights: [N, K], or [N] where rows go per choice.
        scales: [N, H / 128].
        source: [N] int32 token indices at the source.
    """

    ids: Tensor | None
    weights: Tensor | None
    scales: Tensor | None
    source: Tensor | None


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
        self, topk_idx: Tensor, topk_weights: Tensor | None, scales: Tensor | None, send: SendPlan
    ) -> Tensor | None:
        """[S, words] int32."""
        # What is the same in all of a token's rows, to be gathered at once.
        table = []
        if self.per_choice:
            if scales is not None:
                table.append(as_words(scales))
        else:
            tokens = torch.arange(topk_idx.shape[0], dtype=torch.int32, device=topk_idx.device)
            table += [tokens.unsqueeze(1), topk_idx.to(torch.int32)]
            table += [as_words(values) for values in (topk_weights, scales) if values is not None]
        parts = []
        if self.per_choice and topk_weights is not None:
            parts.append(as_words(_choices_in_wire_order(topk_weights, send).unsqueeze(1)))
        if table:
            rows = torch.cat(table, dim=1) if len(table) > 1 else table[0]
            parts.append(rows.index_select(0, send.send_src))
        if len(parts) > 1:
            return torch.cat(parts, dim=1)
        return parts[0] if parts else None

    def unpack(self, meta: Tensor | None, spec: ExchangeSpec, rank: int) -> Numbers:
        """The inverse, at the rank whose experts were chosen."""
        if meta is None:
            return Numbers(None, None, None, None)
        ids = weights = scales = source = foreign = None
        at = 0
        if not self.per_choice:
            source = meta[:, 0].contiguous()
            ids, foreign = localize(meta[:, 1 : 1 + self.num_weights].to(torch.int64), spec.num_local_experts, rank)
            at = 1 + self.num_weights
        if self.weight_dtype is not None:
            words = self.num_weights * self.weight_dtype.itemsize // WORD_BYTES
            weights = from_words(meta[:, at : at + words], self.weight_dtype)
            if foreign is None:
                weights = weights.squeeze(1)
            elif spec.layout == "compact":
                # In the other layouts nobody reads them.
                weights = weights.masked_fill(foreign, 0)
            at += words
        if self.scale_dtype is not None:
            scales = from_words(meta[:, at:], self.scale_dtype)
        return Numbers(ids, weights, scales, source)


def _choices_in_wire_order(topk_weights: Tensor, send: SendPlan) -> Tensor:
    num_rows, flat, pos = send.send_src.numel(), topk_weights.flatten(), send.choice_pos
    if num_rows < pos.numel():
        chosen = pos >= 0
        flat, pos = flat[chosen], pos[chosen]
    return flat.new_empty(num_rows).scatter_(0, pos, flat)


def as_words(values: Tensor) -> Tensor:
    """Values [N, n] as int32 words [N, n * itemsize / 4]."""
    # NOTE: a single value counts as contiguous whatever its stride, but a view of another width asks for stride 1.
    values = values.contiguous() if values.stride(-1) == 1 else values.clone(memory_format=torch.contiguous_format)
    return values.view(torch.int32)


def from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`as_words`."""
    # NOTE: a single row counts as contiguous wherever it begins, but a view of 8 bytes asks for even places.
    words = words.contiguous() if dtype.itemsize == WORD_BYTES else words.clone(memory_format=torch.contiguous_format)
    return words.view(dtype)


def region_rows(counts: list[int], meta_words: int, row_bytes: int) -> list[int]:
    """Rows that travel to or from each rank: its wire rows, then as many whole rows as their metadata fills."""
    return [count - (-count * meta_words * WORD_BYTES // row_bytes) for count in counts]


def pack_rows(
    memories: list[Memory],
    starts: list[int],
    rows: Tensor,
    index: Tensor | None,
    counts: list[int],
    meta: Tensor | None,
) -> None:
    """Copy each rank's rows, and their metadata behind them, to its region.

    Args:
        memories: where the region of each rank lies.
        starts: row where each rank's region begins there.
        rows: [M, W].
        index: [S] rows to copy, by rank; None takes them in order.
        counts: wire rows of each rank.
        meta: [S, words] int32, or None.
    """
    width = rows.shape[1] * rows.itemsize // WORD_BYTES
    words_per_row = 0 if meta is None else meta.shape[1]
    flat = None if meta is None else meta.view(-1)
    first = 0
    for memory, start, count in zip(memories, starts, counts, strict=True):
        if not count:
            continue
        target = memory.rows[start : start + count]
        if index is None:
            target.copy_(rows[first : first + count])
        else:
            torch.index_select(rows, 0, index[first : first + count], out=target)
        if flat is not None:
            begin, size = (start + count) * width, count * words_per_row
            at = first * words_per_row
            memory.words[begin : begin + size].copy_(flat[at : at + size])
        first += count


def unpack_rows(memory: Memory, counts: list[int], starts: list[int], meta_words: int) -> Received:
    """Find rows and metadata of each source in what arrived.

    Args:
        memory: of what arrived.
        counts: wire rows of each source.
        starts: row where each source's region begins.
        meta_words: int32 words of metadata per row, 0 for none.
    """
    rows = memory.rows
    places = list(zip(counts, starts, strict=True))
    index = torch.cat([torch.arange(start, start + count, device=rows.device) for count, start in places])
    if not meta_words:
        return Received(rows, index, None)
    width = rows.shape[1] * rows.itemsize // WORD_BYTES
    metas = []
    for count, start in places:
        begin = (start + count) * width
        metas.append(memory.words[begin : begin + count * meta_words])
    return Received(rows, index, torch.cat(metas).view(-1, meta_words))
