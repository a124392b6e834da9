"""The second half of a dispatch whose sizes the host has to learn before there is memory for its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moe_ep.backends.cuda_jobs import Flight
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.backends.cuda_outputs import Counts, Outputs
from moe_ep.backends.types import Dispatch

# What a launch sends of the laps round the rings: the first one needs no room to be made by peers.
FIRST_LAP, LATER_LAPS = 1, 2


class Placing:
    """The second half of a dispatch whose sizes the host has to learn first."""

    def __init__(
        self,
        link: CudaLink,
        note_sizes: Callable[[int], int],
        counts: Counts,
        out: Outputs,
        arguments: Any,
        split: tuple[int, int],
        bulk: bool,
        opened: Any,
        launched: tuple[Flight, tuple[Any, ...]],
    ) -> None:
        self._link = link
        self._note_sizes = note_sizes
        self._counts = counts
        self._out = out
        self._arguments = arguments
        self._split = split
        self._bulk = bulk
        self._opened = opened
        self._flight, self._keep = launched
        self._result: Dispatch | None = None
        self._flights: tuple[Flight, ...] = ()

    def place(self) -> None:
        """Wait for the sizes, allocate on the current stream, and launch."""
        link, counts = self._link, self._counts
        try:
            sizes = link.wait_sizes(counts.ticket)
        finally:
            link.placed(self.place)
        counts.host_counts = link.channel.host_counts(counts.ticket, counts.num_local_experts)
        here = link.here()
        self._result = self._out.allocate(*sizes)
        stream = link.place_queue
        self._opened.wait(stream)
        link.order(here, stream)
        # Later laps are sent and placed by one launch, so that senders never wait for placers that are not there.
        num_laps = self._note_sizes(sizes[2])
        link.channel.dispatch(
            self._arguments,
            num_senders=self._split[0] if num_laps > 1 else 0,
            num_placers=self._split[1],
            laps=LATER_LAPS,
            bulk=self._bulk,
            stream=stream,
        )
        # Later exchanges come after this one's rows are placed.
        link.order(stream, link.queue)
        self._flights = (link.end(here, (*self._keep, self._result)), self._flight)

    def outputs(self) -> tuple[Dispatch, tuple[Flight, ...]]:
        """The outputs, and what to wait for before they are read."""
        if self._result is None:
            self.place()
        assert self._result is not None
        return self._result, self._flights
