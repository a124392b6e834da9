"""Events: waiting once, as a context manager, without anything to wait for, and when the exchange failed."""

import gc
import threading
import weakref
from concurrent.futures import Future

import pytest
import torch

from moe_ep import EventHandle, EventOverlap
from moe_ep.events import WorkEvent


class Recorder:
    """An event that counts its waits."""

    def __init__(self) -> None:
        self.waits = 0

    def current_stream_wait(self) -> None:
        self.waits += 1


def test_without_an_event_nothing_is_waited_for() -> None:
    EventHandle().current_stream_wait()
    overlap = EventOverlap()
    overlap.current_stream_wait()
    assert overlap.event is None
    with overlap as entered:
        assert entered is overlap


def test_context_manager_waits_on_exit_not_before() -> None:
    recorder = Recorder()
    with EventOverlap(recorder):
        assert recorder.waits == 0
    assert recorder.waits == 1


def test_waiting_returns_when_the_exchange_is_complete() -> None:
    future: Future = Future()
    done = threading.Event()

    def finish() -> None:
        done.set()
        future.set_result(None)

    timer = threading.Timer(0.2, finish)
    timer.start()
    with EventOverlap(WorkEvent(future)):
        assert not done.is_set()
    assert done.is_set()


def test_waiting_raises_what_the_exchange_raised() -> None:
    future: Future = Future()
    future.set_exception(KeyError("lost"))
    with pytest.raises(KeyError, match="lost"):
        EventOverlap(WorkEvent(future)).current_stream_wait()


def test_extra_tensors_live_as_long_as_the_event() -> None:
    tensor = torch.ones(3)
    alive = weakref.ref(tensor)
    overlap = EventOverlap(EventHandle(), (tensor,))
    del tensor
    gc.collect()
    assert alive() is not None
    del overlap
    gc.collect()
    assert alive() is None
