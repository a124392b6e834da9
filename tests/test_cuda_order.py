"""That exchanges of one Buffer come one behind the other, whatever streams their callers use: without a GPU."""

from __future__ import annotations

import types

import pytest

from moe_ep.backends.cuda_jobs import Flight, Order
from moe_ep.backends.cuda_queues import Queues

CALLER, OTHER, COMM = 11, 12, 77


class Streams(Queues):
    """Notes which stream was made to wait for which; events are there and over."""

    def __init__(self) -> None:
        self.waits: list[tuple[int, int]] = []
        self.current = CALLER
        self.queue = COMM
        self._order = types.SimpleNamespace(follow=lambda first, then: self.waits.append((first, then)))
        self._flights: list[Flight] = []
        self._caller = None
        self._captures = self._captured = False
        self._eager, self._in_graph = Order(COMM), Order(COMM)

    def here(self) -> int:
        return self.current

    def wait_for_all(self, stream: int) -> None:
        """An exchange on the communication stream, that ``stream`` waits for."""
        self.queue_of(stream, inline=False)
        event = types.SimpleNamespace(wait=lambda _: None, query=lambda: True)
        (flight,) = self.end(stream, (), event)
        self.current = stream
        self.land(flight)


@pytest.fixture
def streams() -> Streams:
    return Streams()


def test_exchanges_of_one_stream_need_no_event(streams: Streams) -> None:
    for _ in range(2):
        streams.queue_of(CALLER, inline=True)
    assert streams.waits == [(COMM, CALLER)]


def test_one_that_was_waited_for_needs_none(streams: Streams) -> None:
    streams.wait_for_all(CALLER)
    streams.queue_of(CALLER, inline=True)
    assert streams.waits == []
    streams.wait_for_all(CALLER)
    streams.queue_of(OTHER, inline=True)
    assert streams.waits == [(COMM, OTHER)]


def test_streams_that_take_turns_wait_for_each_other(streams: Streams) -> None:
    streams.wait_for_all(CALLER)
    for stream in (CALLER, OTHER, CALLER):
        streams.queue_of(stream, inline=True)
    assert streams.waits == [(CALLER, OTHER), (OTHER, CALLER)]
    streams.queue_of(OTHER, inline=False)
    assert streams.waits[2:] == [(CALLER, COMM)]


def test_callers_may_use_the_communication_stream_themselves(streams: Streams) -> None:
    """Whoever has waited for an exchange before has not waited for theirs."""
    streams.wait_for_all(CALLER)
    streams.queue_of(COMM, inline=True)
    streams.queue_of(CALLER, inline=True)
    assert streams.waits == [(COMM, CALLER)]


def test_waiting_for_an_earlier_exchange_is_not_waiting_for_theirs(streams: Streams) -> None:
    streams.queue_of(CALLER, inline=False)
    (flight,) = streams.end(CALLER, (), types.SimpleNamespace(wait=lambda _: None, query=lambda: True))
    streams.queue_of(COMM, inline=True)
    streams.land(flight)
    streams.queue_of(CALLER, inline=True)
    assert streams.waits == [(COMM, CALLER)]
