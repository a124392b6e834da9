"""How rows of the CUDA backend travel: the extension's settings, made once for calls that are alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda_counting import WORD_BYTES
from moe_ep.config import FP8_GROUP, ExchangeSpec
from moe_ep.handle import LAYOUT_CODES

_ELEMENTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float64: 3}
_CASTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
# How many of 24 blocks send; the others place or reduce.
_SENDERS_OF_24 = {"compact": 12, "expanded": 8, "slab": 8, "combine": 18, "combine compact": 16}
# Of combines that go round the rings, where reducers make room for senders.
_SENDERS_OF_24_IN_LAPS = 14
# SMs until a number is given: where the measured curve of two H100s begins to flatten (benchmarks/NOTES.md).
_DEFAULT_SMS = {"compact": 24, "expanded": 32, "slab": 32, "combine": 32, "combine compact": 24}
_MOST_SETTINGS = 256
# Of kernels that wait for peers, so that others', NCCL's say, always find room beside them.
_MOST_SMS = 96


class Settings:
    """Settings of dispatches, replays and combines.

    Args:
        extension: the compiled one.
        bulk: whether rows go through the copy engine; may be changed.
        num_ranks: of the group.
        num_sms: of the GPU.
    """

    def __init__(self, extension: Any, bulk: bool, num_ranks: int, num_sms: int) -> None:  # noqa: ANN401
        self._extension = extension
        self.bulk = bulk
        self._num_ranks = num_ranks
        self._num_sms = num_sms
        self._made: dict[tuple[Any, ...], Any] = {}

    def rows(
        self,
        spec: ExchangeSpec,
        x: Tensor,
        scales: Tensor | None,
        topk_weights: Tensor | None,
        num_sms: int | None,
    ) -> tuple[Any, tuple[int, int]]:
        """How the rows of a dispatch travel: the extension's settings, and bytes of a row and words of metadata."""
        weight_words = 0 if topk_weights is None else topk_weights.itemsize // WORD_BYTES
        scale_words = 0 if scales is None else scales.shape[1]
        key = ("dispatch", self.bulk, spec, x.dtype, x.shape[1], weight_words, scale_words, num_sms)
        if key not in self._made:
            cast, row_bytes, num_scales = 0, x.shape[1] * x.itemsize, scale_words
            if spec.wire_dtype is not None and scales is None:
                cast, row_bytes, num_scales = _CASTS[x.dtype], x.shape[1], x.shape[1] // FP8_GROUP
            senders, placers = self.split(spec.layout, num_sms)
            settings = self._extension.RowSettings(
                row_bytes=row_bytes,
                weight_words=weight_words,
                scale_words=num_scales,
                cast=cast,
                num_senders=senders,
                num_placers=placers,
                bulk=self.bulk and cast == 0,
            )
            self._remember(key, (settings, (row_bytes, (2 + weight_words) * spec.top_k + num_scales)))
        return self._made[key]

    def replay(self, x: Tensor, scale_words: int, compact: bool, num_sms: int | None) -> Any:  # noqa: ANN401
        key = ("replay", self.bulk, x.dtype, x.shape[1], scale_words, compact, num_sms)
        if key not in self._made:
            senders, placers = self.split("compact" if compact else "expanded", num_sms)
            settings = self._extension.RowSettings(
                row_bytes=x.shape[1] * x.itemsize,
                weight_words=0,
                scale_words=scale_words,
                cast=0,
                num_senders=senders,
                num_placers=placers,
                bulk=self.bulk,
            )
            self._remember(key, settings)
        return self._made[key]

    def combine(
        self,
        y: Tensor,
        words: tuple[int, int],
        only_own_values: bool,
        wide: bool,
        compact: bool,
        num_sms: int | None,
        in_laps: bool,
    ) -> Any:  # noqa: ANN401
        key = ("combine", self.bulk, y.dtype, y.shape[1], words, only_own_values, wide, compact, num_sms, in_laps)
        if key not in self._made:
            what = "combine compact" if compact else "combine"
            senders, reducers = self.split(what, num_sms, in_laps)
            settings = self._extension.CombineSettings(
                element=_ELEMENTS[y.dtype],
                hidden=y.shape[1],
                wide_wire=wide,
                weight_words=words[0],
                value_words=words[1],
                only_own_values=only_own_values,
                num_senders=senders,
                num_reducers=reducers,
                bulk=self.bulk,
            )
            self._remember(key, settings)
        return self._made[key]

    def split(self, what: str, num_sms: int | None, in_laps: bool = False) -> tuple[int, int]:
        """Blocks of the two roles of a kernel, by the layout that a dispatch places, or what a combine reads."""
        # Blocks wait for each other, so all of them have to be resident.
        num_sms = min(num_sms or _DEFAULT_SMS[what], self._num_sms, _MOST_SMS)
        of_24 = _SENDERS_OF_24_IN_LAPS if in_laps and what not in LAYOUT_CODES else _SENDERS_OF_24[what]
        senders = max(num_sms * of_24 // 24, 1)
        others = max(num_sms - senders, 1)
        return (0, senders + others) if self._num_ranks == 1 else (senders, others)

    def _remember(self, key: tuple[Any, ...], settings: Any) -> None:  # noqa: ANN401
        # Settings that vary without end are not worth keeping.
        if len(self._made) >= _MOST_SETTINGS:
            self._made.clear()
        self._made[key] = settings
