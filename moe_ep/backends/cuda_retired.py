"""Arenas that larger ones have replaced but CUDA graphs still use: kernels of a graph keep the addresses they had."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(eq=False, slots=True)
class _Retired:
    arena: Any
    channel: Any
    overflows: int


class RetiredArenas:
    """Arenas and their channels, kept for graphs that were captured while they were in use; watched for trouble."""

    def __init__(self) -> None:
        self._all: list[_Retired] = []

    def __len__(self) -> int:
        return len(self._all)

    def add(self, arena: Any, channel: Any, overflows: int) -> None:  # noqa: ANN401
        """Keep an arena.

        Args:
            arena: to be kept.
            channel: of its exchanges.
            overflows: how many of these are known to have overflowed.
        """
        self._all.append(_Retired(arena, channel, overflows))

    @property
    def num_bytes(self) -> int:
        """Bytes of all arenas."""
        return sum(int(one.arena.num_bytes) for one in self._all)

    def is_quiet(self) -> bool:
        """Whether :meth:`new_overflow` and :meth:`trouble` would find nothing."""
        return all(one.channel.is_quiet(one.overflows) for one in self._all)

    def new_overflow(self) -> tuple[int, int, int] | None:
        """(rank, needed, given) of a capacity that did not hold since the last call."""
        for one in self._all:
            times, rank, needed, given = one.channel.overflow()
            if times != one.overflows:
                one.overflows = times
                return rank, needed, given
        return None

    def trouble(self) -> dict[str, Any] | None:
        """What went wrong first, as ``Channel.trouble`` tells it."""
        return next((trouble for one in self._all if (trouble := one.channel.trouble()) is not None), None)

    def epochs(self) -> list[int]:
        """Exchanges opened so far through each; waits for the device."""
        return [one.channel.epoch() for one in self._all]

    def reset(self, epochs: list[int]) -> None:
        """Go on after a failure, with exchanges numbered from these on."""
        for one, epoch in zip(self._all, epochs, strict=True):
            one.channel.reset(epoch)
            one.overflows = int(one.channel.overflow()[0])

    def abandon(self) -> None:
        """End all waits of kernels."""
        for one in self._all:
            one.channel.abandon()

    def close(self) -> None:
        """Release the memory, without waiting for peers."""
        for one in self._all:
            one.arena.close()
        self._all.clear()
