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
        streams: the current one when the first half was launched, and that of the first half.
        keep: what both halves read.
        later: whether the current stream may have been given more work since.
        holds: whether what it is given next waits until rows are being placed.
    """

    def __init__(
        self,
        link: CudaLink,
        note_sizes: Callable[[int], int],
        counts: Counts,
        out: Outputs,
        streams: tuple[int, int],
        keep: tuple[Any, ...],
        later: bool,
        holds: bool,
    ) -> None:
        self._link = link
        self._note_sizes = note_sizes
        self._counts = counts
        self._out = out
        self._current, self._queue = streams
        self._keep = keep
        self._later = later
        self._holds = holds
        self._result: Dispatch | None = None
        self._flights: tuple[Flight, ...] = ()

    def place(self) -> None:
        """Wait for the sizes, allocate, and launch."""
        link, counts = self._link, self._counts
        try:
            sizes = link.wait_sizes(counts.call)
        except BaseException:
            # The first half may still read it.
            if self._queue != self._current:
                link.end(self._current, self._keep, link.mark())
            raise
        finally:
            link.placed(self.place)
        keep = self._keep
        if self._later:
            # What the current stream has been given since may use its memory. What lies in that of the placing stream
            # comes behind that stream's own work, so that nobody has to keep it.
            with torch.cuda.stream(link.place_stream):
                self._out.allocate(*sizes)
        else:
            # The sizes came behind all that the current stream had been given.
            self._out.allocate(*sizes)
            keep = (*keep, self._out)
        # An exchange on the current stream is over for what that is given next.
        told = self._queue == link.queue
        event = counts.call.place(
            link.channel, self._current, self._queue, link.place_queue, self._note_sizes(sizes[2]), self._holds, told
        )
        counts.host_counts = counts.call.host_counts(link.channel)
        self._result = self._out.result()
        self._flights = link.end(self._current, keep, event, self._later)

    def outputs(self) -> tuple[Dispatch, tuple[Flight, ...]]:
        """The outputs, and what to wait for before they are read."""
        if self._result is None:
            self.place()
        assert self._result is not None
        return self._result, self._flights
