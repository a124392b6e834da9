"""Rows that stay in the arena: where peers store them, and how much memory that takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_outputs import max_chunks
from moe_ep.config import ExchangeSpec, expected_ranks_per_token

Record = tuple[int, int]  # Bytes of a row and words of metadata as they travel.


class DirectRows:
    """The memory of one rank's arena as dispatches with ``out="arena"`` use it.

    Args:
        link: of the backend.
    """

    def __init__(self, link: CudaLink) -> None:
        self._link = link
        self._arena: Any = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        # What dispatches needed that found too little. The same on all ranks.
        self._wanted = 0

    def forget(self) -> None:
        """Start anew, on all ranks."""
        self._wanted = 0

    def num_bytes(self, spec: ExchangeSpec, max_tokens: int, record: Record, static_rows: int) -> int:
        """Memory, of all rings together, that a dispatch is going to take; the same on all ranks.

        Args:
            spec: the settings.
            max_tokens: largest T of any rank.
            record: of the dispatch.
            static_rows: layout rows where they are fixed, else 0: what even routing makes of T, and a quarter more,
                or what earlier dispatches needed.
        """
        if max_chunks(max_tokens) > self._most_chunks():
            return 0
        if static_rows:
            return self._layout(max_tokens, record, static_rows)["num_bytes"]
        compact = spec.layout == "compact"
        sizes = (spec.num_ranks, spec.num_experts, spec.top_k)
        rows = math.ceil(1.25 * max_tokens * (expected_ranks_per_token(*sizes) if compact else spec.top_k))
        if compact:
            rows = min(rows, spec.num_ranks * max_tokens)
        else:
            rows += spec.num_local_experts * (spec.alignment - 1)
        return max(self._layout(max_tokens, record, rows)["num_bytes"], self._wanted)

    def fits(self, max_tokens: int, record: Record, num_rows: int) -> bool:
        """Whether a dispatch finds enough; ``num_rows`` of the rank with most."""
        return self._link.extension.fits_directly(
            num_ranks=self._link.control.size,
            payload_bytes=self._link.payload_bytes,
            num_groups=max_chunks(max_tokens),
            row_bytes=record[0],
            meta_words=record[1],
            num_rows=num_rows,
        )

    def take(
        self, call: Any, record: Record, x: Tensor, num_rows: int, max_tokens: int, most_rows: int
    ) -> Tensor | None:
        """The rows of a dispatch, [num_rows, H] of x's dtype in the arena; None where they have to be moved.

        Args:
            call: the extension's half, of which ``lend`` was called.
            record: of the dispatch.
            x: rows that are sent.
            num_rows: layout rows of this rank.
            max_tokens: largest T of any rank.
            most_rows: layout rows of the rank with most.
        """
        if not call.is_direct(self._link.channel, max_tokens, most_rows):
            if max_chunks(max_tokens) <= self._most_chunks():
                needed = self._layout(max_tokens, record, most_rows)["num_bytes"]
                self._wanted = max(self._wanted, needed + needed // 4)
            return None
        call.lend(max_chunks(max_tokens))
        first = self._layout(max_tokens, record, num_rows)["rows"]
        return self._bytes()[first : first + num_rows * record[0]].view(x.dtype).view(num_rows, x.shape[1])

    def _layout(self, max_tokens: int, record: Record, num_rows: int) -> dict[str, Any]:
        return self._link.extension.direct_layout(
            num_ranks=self._link.control.size,
            num_groups=max_chunks(max_tokens),
            row_bytes=record[0],
            meta_words=record[1],
            num_rows=num_rows,
        )

    def _most_chunks(self) -> int:
        return int(self._link.extension.group_layout(row_bytes=0, meta_words=0)["max_ring_groups"])

    def _bytes(self) -> Tensor:
        """All rings of this rank. One tensor for all dispatches: its version is that of all rows that were lent."""
        memory = self._link.local_memory()
        assert memory is not None
        arena, offset, num_bytes = memory
        if self._arena is not arena:
            with torch.inference_mode(False):
                self._memory = torch.from_dlpack(arena.view(offset, num_bytes))
            self._arena, self._link.lease.memory = arena, self._memory
        return self._memory
