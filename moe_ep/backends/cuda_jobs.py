"""Exchanges of the CUDA backend that were launched: their outputs, their end, and what they keep alive until then."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from moe_ep.events import Waitable

Result = TypeVar("Result")


@dataclasses.dataclass(eq=False)
class Flight:
    """Work on the communication streams, and what must outlive it.

    Attributes:
        event: its end, an event of the extension.
        stream: address of the stream that its tensors were allocated on.
        keep: inputs, outputs and temporaries; nothing once it has landed.
        landed: whether a stream of the caller waits for it.
        foreign: whether its outputs were allocated on another stream, none of the caller's.
        captured: whether it belongs to a graph, so that its event says nothing to the host.
        number: of flights so far, eager ones and captured ones apart.
    """

    event: Any
    stream: int
    keep: tuple[Any, ...]
    captured: bool
    number: int
    foreign: bool = False
    landed: bool = False

    def let_go(self) -> bool:
        """Keep nothing any more, if the host knows of its end; returns whether it does."""
        if self.captured or not self.event.query():
            return False
        self.keep = ()
        return True


@dataclasses.dataclass(eq=False, slots=True)
class Order:
    """Where exchanges were launched, so that each comes behind the one before; of eager ones or of captured ones.

    Attributes:
        last: address of the stream of the last one.
        flights: how many took the communication stream so far.
        joined: the stream that has waited for the last of these, if one has.
    """

    last: int
    flights: int = 0
    joined: int | None = None


class Lander(Protocol):
    """What is needed of a ``CudaLink``."""

    def land(self, flight: Flight, *outputs: Tensor | None) -> None: ...


class CudaJob(Generic[Result]):
    """An exchange that was launched; the same face as ``events.Job``."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._value: Result | None = None

    def result(self) -> Result:
        """Make the current stream wait for the exchange; in exact mode the host first waits for its sizes."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._value = finish()
        return self._value  # type: ignore[return-value]

    def done(self) -> bool:
        """Whether ``result`` has been asked for."""
        return self._finish is None


class Launch(Generic[Result]):
    """An exchange that was launched, whose outputs can be had before any stream waits for them.

    Args:
        lander: the link of the exchange.
        place: gives outputs and flights; in exact mode the host waits for the sizes.
        tensors_of: the tensors of the outputs.
    """

    def __init__(
        self,
        lander: Lander,
        place: Callable[[], tuple[Result, tuple[Flight, ...]]],
        tensors_of: Callable[[Result], Iterable[Tensor | None]],
    ) -> None:
        self._lander = lander
        self._tensors_of = tensors_of
        self._place: Callable[[], tuple[Result, tuple[Flight, ...]]] | None = place
        self._placed: tuple[Result, tuple[Flight, ...]] | None = None

    def outputs(self) -> Result:
        """The outputs, which no stream may read before it has waited for :meth:`event`."""
        if self._placed is None:
            assert self._place is not None
            self._placed = self._place()
            self._place = None
        return self._placed[0]

    def event(self) -> Waitable:
        """The end of the exchange."""
        self.outputs()
        assert self._placed is not None
        result, flights = self._placed
        return Landing(self._lander, flights, tuple(self._tensors_of(result)))

    def result(self) -> Result:
        """The outputs, after making the current stream wait for them."""
        value = self.outputs()
        assert self._placed is not None
        if self._placed[1]:
            self.event().current_stream_wait()
        return value


class Landing:
    """Flights as one event, which any number of streams may wait for, any number of times."""

    def __init__(self, lander: Lander, flights: tuple[Flight, ...], outputs: tuple[Tensor | None, ...]) -> None:
        self._lander = lander
        self._flights = flights
        self._outputs = outputs

    def current_stream_wait(self) -> None:
        """Make the current stream wait for all flights."""
        for flight in self._flights:
            self._lander.land(flight, *self._outputs)
