"""The communication thread: runs the exchanges of one Buffer one after another, beside the caller."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import torch

from moe_ep.backends.control import ControlPlane
from moe_ep.errors import AgreedError, MoeEpError

Result = TypeVar("Result")
_Task = tuple[Future, Callable[[], Any]]
# An exchange whose peers do not come ends within about half of this.
_CLOSE_SECONDS = 5.0


class CommunicationThread:
    """Runs what it is given in order, on one thread that starts at the first.

    A daemon, and no executor of ``concurrent.futures``: those are joined at exit for as long as their peers let them
    wait. :meth:`close` joins with a bound instead.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, run: Callable[[], Result]) -> Future[Result]:
        """Run after all that was submitted before."""
        if self._closed:
            raise MoeEpError("this Buffer was released, by destroy() or because the interpreter ends")
        if self._thread is None:
            # The thread holds the queue alone: it must not keep alive whoever owns it.
            self._thread = threading.Thread(target=_work, args=(self._queue,), name="moe_ep", daemon=True)
            self._thread.start()
        future: Future[Result] = Future()
        self._queue.put((future, run))
        return future

    def close(self, timeout_s: float) -> None:
        """Take no more, and wait at most ``timeout_s`` for what was submitted."""
        self._closed = True
        self._queue.put(None)
        # It may itself drop the last reference to the owner.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)


def _work(queue: SimpleQueue[_Task | None]) -> None:
    while True:
        task = queue.get()
        if task is None:
            return
        future, run = task
        result = error = None
        try:
            result = run()
        except BaseException as failure:
            error = failure
        # Before the caller wakes: what these hold may give up the GIL as it goes, and the result is the caller's.
        del task, run
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
        del future, result, error


def release(control: ControlPlane, thread: CommunicationThread) -> None:
    """Stop exchanging without waiting for any peer: one that is dead or late must not keep this process."""
    control.close()
    # NOTE: a thread that came back from C++ into an interpreter that has ended would end the process with an abort.
    thread.close(_CLOSE_SECONDS)
    control.release()


def run_in_mode(inference: bool, control: ControlPlane, run: Callable[[], Result]) -> Result:
    """As :func:`run_without_grad`, on another thread than the caller's, in whose mode its tensors may be written."""
    with torch.inference_mode(inference):
        return run_without_grad(control, run)


def run_without_grad(control: ControlPlane, run: Callable[[], Result]) -> Result:
    with torch.no_grad():
        try:
            return run()
        except (MoeEpError, AgreedError):
            raise
        except BaseException as error:
            control.abort(error)
            raise
