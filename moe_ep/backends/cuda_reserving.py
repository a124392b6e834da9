"""What ranks know of each other's sizes, and the memory that they therefore reserve at the same time."""

from __future__ import annotations

import torch

from moe_ep.backends.control import Call, ControlPlane
from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_direct import DirectRows, Record
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.config import FP8_GROUP, MAX_TOP_K, ExchangeSpec
from moe_ep.plan import rows_of_factor


class Reserving:
    """The part of the CUDA backend that makes rings, and decides when: on all ranks by what all of them know.

    Args:
        control: of the Buffer.
        link: of the backend.

    Attributes:
        max_tokens: largest T of any rank, of exchanges so far.
        reserved_tokens: what rings were made for.
    """

    def __init__(self, control: ControlPlane, link: CudaLink) -> None:
        self.control = control
        self.link = link
        self.direct = DirectRows(link)
        self.max_tokens = 0
        self.reserved_tokens = 0
        # Sizes that all ranks know of before any exchange has them, and whether rings are yet to be made for them.
        self._expected: set[tuple[int, int, int]] = set()
        self._expects = False

    def forget(self) -> None:
        """Know the same on all ranks again, after a failure that may have told some alone. Collective."""
        # What ranks know of sizes decides when they make rings.
        self.max_tokens, self.reserved_tokens = self._agree(self.max_tokens, self.reserved_tokens)
        self._expects = bool(self._expected)
        self.direct.forget()

    def expect(self, num_tokens: int, row_bytes: int, meta_words: int) -> None:
        """Make the rings of the next exchange large enough for such ones too; told on all ranks, if not together.

        Args:
            num_tokens: largest T of any rank.
            row_bytes: bytes of a row as it travels.
            meta_words: 32-bit words that travel with it.
        """
        sizes = (num_tokens, row_bytes, meta_words)
        if sizes not in self._expected:
            self._expected.add(sizes)
            self._expects = True

    def ensure(self, num_tokens: int, row_bytes: int, meta_words: int) -> None:
        """Reserve memory at the first exchange, or where one needs more. Collective when it does anything.

        Args:
            num_tokens: T of this rank, or more that it may send.
            row_bytes: bytes of a row as it travels.
            meta_words: 32-bit words that travel with it.
        """
        if self.link.fits(row_bytes, meta_words):
            wanted = self._wanted(row_bytes, meta_words)
            if not wanted or torch.cuda.is_current_stream_capturing():
                return
        else:
            # NOTE: rings of different sizes would tear exchanges apart, so ranks that differ reserve the same as well;
            # the opening of their exchange tells them.
            tokens, row_bytes, meta_words = self._agree(num_tokens, row_bytes, meta_words)
            self.max_tokens = max(self.max_tokens, tokens)
            wanted = [(max(self.reserved_tokens, tokens), row_bytes, meta_words), *self._wanted(row_bytes, meta_words)]
        self.link.reserve(*max(wanted, key=lambda sizes: self.link.payload_for(*sizes)))
        self._note_reserved()

    def _wanted(self, row_bytes: int, meta_words: int) -> list[tuple[int, int, int]]:
        """Sizes that all ranks have come to know of since rings were made; rows are those of the exchange at hand."""
        seen = [(self.max_tokens, row_bytes, meta_words)] if self.max_tokens > self.reserved_tokens else []
        return [*seen, *self._expected] if self._expects else seen

    def _note_reserved(self) -> None:
        self.reserved_tokens = max(self.reserved_tokens, self.max_tokens)
        self._expects = False

    def will_agree(self, row_bytes: int, meta_words: int) -> bool:
        """Whether peers that begin an exchange of such rows first talk about memory, as in :meth:`ensure`.

        For a rank that refuses the exchange: what they decide without a word, it decides here.
        """
        if not self.link.fits(row_bytes, meta_words):
            return True
        if any(self.link.must_grow(*sizes) for sizes in self._wanted(row_bytes, meta_words)):
            return True
        self._note_reserved()
        return False

    def direct_bytes(self, spec: ExchangeSpec, max_tokens: int, record: Record) -> int:
        """Memory of all rings together that a dispatch whose rows stay in the arena is going to take.

        Args:
            spec: the settings.
            max_tokens: largest T of any rank where outputs have a fixed size, else 0.
            record: of the dispatch, as it travels at most.
        """
        static_rows = static_sizes(spec, max_tokens)[0] if max_tokens else 0
        return self.direct.num_bytes(
            spec, max_tokens or max(self.max_tokens, self.reserved_tokens), record, static_rows
        )

    def ensure_direct(self, spec: ExchangeSpec, max_tokens: int, record: Record) -> ValueError | None:
        """Reserve memory for rows that stay in the arena, where there is no grant. Collective when it does anything.

        Arguments as in :meth:`direct_bytes`.

        Returns:
            What to raise, on all ranks, for rows of a fixed number that a grant has no room for.
        """
        if self.control.size == 1:
            return None
        needed = self.direct_bytes(spec, max_tokens, record)
        self.link.reserve(0, 0, 0, needed)
        if not max_tokens or self.direct.fits(max_tokens, record, static_sizes(spec, max_tokens)[0]):
            return None
        if not needed:
            return ValueError(f'out="arena" cannot be used with {max_tokens} tokens per rank: use out="private"')
        return ValueError(
            f'out="arena" needs {needed} bytes for these sizes, num_nvl_bytes={self.link.granted_bytes} grants less: '
            f'grant at least {needed + self.control.size * 128}, or 0 to reserve at first use, or use out="private"'
        )

    def num_laps(self, max_tokens: int, record: tuple[int, int]) -> int:
        """How often an exchange goes round the rings.

        Args:
            max_tokens: largest T of any rank.
            record: bytes of a row and words of metadata as they travel.
        """
        if self.control.size == 1:
            return 1
        chunks = -(-max_tokens // load_extension().CHUNK_TOKENS)
        return -(-chunks // self.link.ring_groups(*record))

    def agree_tokens(self, num_tokens: int) -> int:
        """The largest T of any rank. Collective."""
        tokens = self._agree(num_tokens)[0]
        self.max_tokens = max(self.max_tokens, tokens)
        return tokens

    def _agree(self, *sizes: int) -> list[int]:
        return self.control.open(Call("reserve"), torch.tensor(sizes, device="cpu")).amax(0).tolist()


def most_meta_words(row_bytes: int) -> int:
    """Words that travel with a row at most, whose number is not known: ids, places and weights, and fp8 scales."""
    return 3 * MAX_TOP_K + row_bytes // FP8_GROUP


def static_sizes(spec: ExchangeSpec, max_tokens: int) -> tuple[int, int]:
    """Layout rows of a rank with a capacity, or of slabs, and the most that it receives.

    Args:
        spec: the settings.
        max_tokens: largest T of any rank.
    """
    rows, per_expert = limits_of(spec, max_tokens)
    rows, received = rows or per_expert * spec.num_local_experts, spec.num_ranks * max_tokens
    # What a capacity does not hold never arrives.
    return rows, min(rows, received) if spec.layout == "compact" else received


def limits_of(spec: ExchangeSpec, max_tokens: int) -> tuple[int, int]:
    """Rows of a rank's output and rows of every group; 0 where not limited or fixed."""
    if spec.layout == "slab":
        return 0, spec.num_ranks * (spec.max_tokens_per_rank or 0)
    if spec.capacity is None:
        return 0, 0
    if spec.capacity.rows is not None:
        return spec.capacity.rows, 0
    return 0, spec.capacity.per_expert or rows_of_factor(spec.capacity.factor or 0.0, spec, max_tokens)
