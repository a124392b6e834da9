"""The second half of a dispatch whose sizes the host has to learn before there is memory for its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moe_ep.backends.cuda_counting import Counts
from moe_ep.backends.cuda_jobs import Flight
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_outputs import Outputs
from moe_ep.backends.types import Dispatch


class Placing:
    """The second half of a dispatch whose sizes the host has to learn first.

    Args:
        link: of the backend.
        note_sizes: told the largest T of any rank; returns how often the exchange goes round the rings.
        counts: of the tokens.
        out: what is to be allocated.
        launched: the first half, and what the second reads.
        beside: whether the caller may have given the current stream more work since, which placing need not wait for.
    """

    def __init__(
        self,
        link: CudaLink,
        note_sizes: Callable[[int], int],
        counts: Counts,
        out: Outputs,
        launched: tuple[Flight, tuple[Any, ...]],
        beside: bool,
    ) -> None:
        self._link = link
        self._note_sizes = note_sizes
        self._counts = counts
        self._out = out
        self._flight, self._keep = launched
        self._beside = beside
        self._result: Dispatch | None = None
        self._flights: tuple[Flight, ...] = ()

    def place(self) -> None:
        """Wait for the sizes, allocate, and launch."""
        link, counts = self._link, self._counts
        try:
            sizes = link.wait_sizes(counts.call)
        finally:
            link.placed(self.place)
        here = self._allocate(sizes)
        event = counts.call.place(link.channel, here, link.queue, link.place_queue, self._note_sizes(sizes[2]))
        counts.host_counts = counts.call.host_counts(link.channel)
        self._result = self._out.result()
        # Inputs go back to the stream that they came from. Outputs that were allocated on the placing stream go back to
        # that, which comes after its own work, so that nobody has to keep them.
        inputs = link.end(self._flight.stream, self._keep, event)
        outputs = () if here == link.place_queue else (self._out, self._result)
        self._flights = (link.end(here, outputs, event), inputs, self._flight)

    def _allocate(self, sizes: tuple[int, int, int]) -> int:
        """Allocate outputs; returns the stream that they belong to, which placing comes behind."""
        link = self._link
        if not self._beside:
            self._out.allocate(*sizes)
            return link.here()
        # Memory of the current stream may be in use by what that stream has been given since the launch.
        with torch.cuda.stream(link.place_stream):
            self._out.allocate(*sizes)
        return link.place_queue

    def outputs(self) -> tuple[Dispatch, tuple[Flight, ...]]:
        """The outputs, and what to wait for before they are read."""
        if self._result is None:
            self.place()
        assert self._result is not None
        return self._result, self._flights
