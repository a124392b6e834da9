"""The streams that exchanges of one Buffer run on, in the order of their launches, and what must outlive them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda_jobs import Flight, Order
from moe_ep.backends.lease import Lease
from moe_ep.events import EventOverlap


class Queues:
    """Communication and placing stream of one rank, and the exchanges that were launched on them.

    Args:
        device: of the streams.
        extension: the compiled one.
    """

    def __init__(self, device: torch.device, extension: Any) -> None:  # noqa: ANN401
        self.device = device
        self.extension = extension
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.place_stream = torch.cuda.Stream(device, priority=-1)
        # Streams as the extension takes them; asking torch for one each time costs as much as a launch.
        self.queue: int = self.stream.cuda_stream
        self.place_queue: int = self.place_stream.cuda_stream
        self._order = extension.Event()
        self.lease = Lease()
        self._flights: list[Flight] = []
        self._unplaced: list[Callable[[], None]] = []
        self._caller: int | None = None
        self._eager, self._in_graph = Order(self.queue), Order(self.queue)
        # Whether the exchange that began last belongs to a graph, and whether any since there are these rings.
        self._captures = False
        self._captured = False

    def synchronize(self) -> None:
        """Wait for every exchange that was launched."""
        self._gather()
        self.stream.synchronize()
        self.place_stream.synchronize()

    def _gather(self) -> None:
        """Order the communication stream behind all exchanges."""
        if self._eager.last != self.queue:
            self._order.follow(self._eager.last, self.queue)
            self._eager.last = self.queue

    def begin(self) -> int:
        """Get ready for an exchange; returns the current stream, which :meth:`follow` takes.

        Rows of dispatches that nobody has waited for are placed first: peers take the next exchange for a sign that the
        rings are free again.
        """
        self.settle()
        self._captures = torch.cuda.is_current_stream_capturing()
        if self._flights and not self._captures:
            self._flights = [one for one in self._flights if not one.let_go()]
        return self.here()

    def queue_of(self, current: int, inline: bool) -> int:
        """Address of the stream for an exchange that is about to be launched, which comes behind the one before.

        NOTE: a stream that is no stream of torch's has to live until the next exchange was launched.

        Args:
            current: what :meth:`begin` returned.
            inline: whether it runs on the current stream, as any operator does: nobody has to wait for its end then,
                nor keep its tensors. Otherwise it takes the communication stream, and waits for the current one itself.
        """
        queue = current if inline else self.queue
        order = self._in_graph if self._captures else self._eager
        self._captured = self._captured or self._captures
        last, order.last = order.last, queue
        if last not in (queue, current) and not (last == self.queue and order.joined == current):
            self._order.follow(last, queue)
        if inline and queue == self.queue:
            # The caller's stream is the communication stream: whoever has waited for that has not waited for this one.
            order.flights += 1
            order.joined = None
        return queue

    def is_idle(self) -> bool:
        """Whether the caller waits, or has waited, for all exchanges so far."""
        return all(flight.landed for flight in self._flights)

    def follow(self, current: int) -> None:
        """Order the communication stream after the current one, once outputs are allocated on it.

        What it has done so far has written the inputs, and may still use the memory that the outputs were given.
        """
        self.order(current, self.queue)

    def order(self, first: int, then: int) -> None:
        """Make a stream wait for all that another one has been given so far."""
        if first != then:
            self._order.order(first, then)

    def here(self) -> int:
        """Address of the current stream."""
        # NOTE: torch.cuda.current_stream makes an object, which takes ten times as long.
        return int(torch._C._cuda_getCurrentRawStream(self.device.index))

    def settle(self) -> None:
        """Place the rows of dispatches that nobody has waited for; the host waits for their sizes."""
        while self._unplaced:
            self._unplaced[0]()

    @contextlib.contextmanager
    def after(self, event: EventOverlap) -> Iterator[None]:
        """Exchanges inside wait for an event instead of the current stream, and allocate on the communication stream.

        Memory of the current stream may be in use by what that stream has yet to do. What is allocated inside and is
        for the caller's stream needs ``record_stream``.
        """
        self.settle()
        caller = self.here()
        if self.lease.memory is not None:
            # It may still read rows that were lent, where peers write once this rank has opened the next exchange.
            self.order(caller, self.queue)
        with torch.cuda.stream(self.stream):
            event.current_stream_wait()
            self._caller = caller
            try:
                yield
            finally:
                self._caller = None

    def defer(self, place: Callable[[], None]) -> None:
        """Call ``place`` before the next exchange, unless :meth:`placed` says that it was done."""
        self._unplaced.append(place)

    def placed(self, place: Callable[[], None]) -> None:
        """What was deferred is done, or has failed."""
        if place in self._unplaced:
            self._unplaced.remove(place)

    def mark(self) -> Any:  # noqa: ANN401
        """The end of what the communication stream has been given so far: an event."""
        event = self.extension.Event()
        event.record(self.queue)
        return event

    def end(self, current: int, keep: tuple[Any, ...], event: Any, foreign: bool = False) -> tuple[Flight, ...]:  # noqa: ANN401
        """Keep the tensors of what was launched since :meth:`begin` until it ends.

        Args:
            current: the stream that the tensors belong to.
            keep: them.
            event: that end; None for an exchange on the current stream itself, which is no flight.
            foreign: whether outputs that are not among them were allocated on the placing stream.
        """
        if event is None:
            return ()
        # What was allocated on the communication stream goes back to it, which comes after its own exchanges.
        stream = current if self._caller is None else self._caller
        order = self._in_graph if self._captures else self._eager
        order.flights += 1
        order.joined = None
        flight = Flight(event, stream, keep, self._captures, order.flights, foreign)
        self._flights.append(flight)
        return (flight,)

    def land(self, flight: Flight, *outputs: Tensor | None) -> None:
        """Make the current stream wait for a flight; its tensors may go where they were allocated on this stream.

        Args:
            flight: what :meth:`end` returned.
            outputs: what the caller goes on with.
        """
        current = self.here()
        flight.event.wait(current)
        flight.landed = True
        order = self._in_graph if flight.captured else self._eager
        if flight.number == order.flights:
            order.joined = current
        if current != flight.stream or flight.foreign:
            self.lend(outputs, torch.cuda.current_stream(self.device))
        if current == flight.stream and flight in self._flights:
            self._flights.remove(flight)
            flight.keep = ()

    def lend(self, outputs: tuple[Tensor | None, ...], stream: torch.cuda.Stream) -> None:
        """Outputs go to another stream than they were allocated on: their memory is not free before it is done, too.

        Callers cannot say so themselves: the next exchange, or autograd, may have chosen the stream of the allocation.
        """
        for output in outputs:
            if output is not None:
                output.record_stream(stream)
