"""Events of exchanges: what to wait for before outputs may be read, on streams and on the host."""

from __future__ import annotations

from concurrent.futures import Future
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Waitable(Protocol):
    """Anything whose completion the current stream, or the host on CPU, can wait for."""

    def current_stream_wait(self) -> None:
        """Return when, or order the current stream after, the work is complete."""


class EventHandle:
    """A point on the current stream at the time of construction. On a machine without a GPU it is always reached.

    Example:
        >>> EventHandle().current_stream_wait()
    """

    def __init__(self) -> None:
        # NOTE: asking for availability would initialise a device that nobody has used yet.
        self._event = None
        if torch.cuda.is_initialized():
            self._event = torch.cuda.Event()
            self._event.record()

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the recorded point."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


class WorkEvent:
    """Completion of an exchange that a communication thread carries out; waiting raises what the exchange raised."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def current_stream_wait(self) -> None:
        """Block the host until the exchange is complete."""
        self._future.result()


class Job(Generic[Result]):
    """An exchange that runs, or ran, on the communication thread."""

    def __init__(self, future: Future[Result]) -> None:
        self._future = future

    def result(self) -> Result:
        """Wait for the exchange; raises what it raised."""
        try:
            return self._future.result()
        finally:
            # As in Future.result: the traceback of an error would lead back to the error.
            del self

    def done(self) -> bool:
        """Whether it is complete."""
        return self._future.done()

    def event(self) -> Waitable:
        """Its completion as an event."""
        return WorkEvent(self._future)


class Done(Job[Result]):
    """An exchange that ran where it was issued."""

    def __init__(self, result: Result) -> None:
        self._result = result

    def result(self) -> Result:
        """What it gave."""
        return self._result

    def done(self) -> bool:
        """True."""
        return True

    def event(self) -> Waitable:
        """The current point of the current stream."""
        return EventHandle()


class EventOverlap:
    """An event together with the tensors that must outlive it.

    As a context manager it waits on exit, so that the block runs beside the exchange. Without an event both are no-ops.

    Args:
        event: what to wait for, or None.
        extra_tensors: kept alive until this object goes away.

    Example:
        >>> with EventOverlap():
        ...     computed = 1 + 1
    """

    def __init__(self, event: Waitable | None = None, extra_tensors: tuple[Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Make the current stream (on CPU: the host) wait for the event."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.current_stream_wait()
