"""Starts one process per rank, shows their news, and sees to it that all of them end, whatever happens."""

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from moe_ep.cli.demo.options import DemoOptions
from moe_ep.cli.demo.processes import Failure, child_main
from moe_ep.cli.demo.progress import ConsoleReporter, SilentReporter

EXIT_FAILURE = 1
_POLL_S = 0.2
# How long the other ranks' errors are waited for: the first one heard is often only a consequence.
_COLLECT_S = 1.0
_TERMINATE_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class WorkerFailedError(RuntimeError):
    """A rank failed or died; the text names it. ``usage`` says whether the user's input was at fault."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(message)
        self.usage = usage


class StoppedError(Exception):
    """The user stopped the run; ``exit_code`` is 128 plus the signal's number."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class _Worker:
    rank: int
    process: Any
    connection: Connection
    open: bool = True
    failure: Failure | None = None
    finished: bool = False

    @property
    def failed(self) -> bool:
        # The pipe is read to its end before it counts as closed, so nothing that was said is missed.
        return self.failure is not None or not (self.open or self.finished)

    def describe_failure(self) -> str:
        if self.failure is not None:
            return f"rank {self.rank}: {self.failure.text}"
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with code {code}"
        return f"rank {self.rank} (process {self.process.pid}) {how}"

    def stop(self) -> None:
        # A process that is gone already needs no telling.
        with contextlib.suppress(OSError):
            self.connection.send("stop")


def launch(options: DemoOptions, reporter: ConsoleReporter | SilentReporter) -> dict[str, Any]:
    """Run the demo on ``options.ranks`` local processes and return rank 0's summary.

    When this returns or raises, no process is left. Should this process be killed, its ranks end by themselves.

    Raises:
        WorkerFailedError: when a rank failed or died.
        StoppedError: after Ctrl-C or SIGTERM; the checkpoint is saved.
    """
    # The store lives here, so that it outlives any rank and survivors can still tell each other what they saw.
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    workers: list[_Worker] = []
    with _signals() as received:
        try:
            workers = _start(options, store.port)
            return _Supervisor(workers, reporter, received).run()
        finally:
            _end(workers)
            reporter.close()


class _Supervisor:
    def __init__(self, workers: list[_Worker], reporter: ConsoleReporter | SilentReporter, received: list[int]) -> None:
        self.workers = workers
        self.reporter = reporter
        self.received = received
        self.result: dict[str, Any] | None = None
        self.stopped: str | None = None
        self._signals_seen = 0

    def run(self) -> dict[str, Any]:
        while any(worker.open for worker in self.workers):
            self._listen(_POLL_S)
            self._heed_signals()
            if any(worker.failed for worker in self.workers):
                self._raise_failure()
        for worker in self.workers:
            worker.process.join(_TERMINATE_S)
        if any(worker.failed for worker in self.workers):
            self._raise_failure()
        if self.received:
            number = self.received[0]
            raise StoppedError(self.stopped or "stopped", exit_code=128 + number)
        assert self.result is not None
        return self.result

    def _listen(self, timeout: float) -> None:
        """Take in every message that has arrived; waits up to ``timeout`` seconds for the first."""
        by_connection = {worker.connection: worker for worker in self.workers if worker.open}
        for connection in wait(list(by_connection), timeout):
            worker = by_connection[connection]  # type: ignore[index]
            try:
                while worker.connection.poll():
                    self._take(worker, *worker.connection.recv())
            except (EOFError, OSError):
                # Its end of the pipe is closed: the process has ended or is about to.
                worker.open = False
                worker.process.join(_TERMINATE_S)

    def _take(self, worker: _Worker, kind: str, value: Any) -> None:
        if kind == "say":
            self.reporter.say(value)
        elif kind == "step":
            self.reporter.step(value)
        elif kind == "failure":
            worker.failure = value
        elif kind == "stopped":
            worker.finished, self.stopped = True, value
        elif kind == "finished":
            worker.finished = True
            self.result = value if worker.rank == 0 else self.result

    def _heed_signals(self) -> None:
        if len(self.received) > self._signals_seen:
            self._signals_seen = len(self.received)
            if self._signals_seen > 1:
                raise StoppedError("stopped at once; the last checkpoint is kept", exit_code=128 + self.received[0])
            self.reporter.say("stopping after this step, with a checkpoint (again: at once)")
            for worker in self.workers:
                worker.stop()

    def _raise_failure(self) -> None:
        deadline = time.monotonic() + _COLLECT_S
        while time.monotonic() < deadline and any(worker.open for worker in self.workers):
            self._listen(deadline - time.monotonic())
        failed = [worker for worker in self.workers if worker.failed]
        first = min(failed, key=lambda worker: worker.failure.severity if worker.failure else 0)
        raise WorkerFailedError(first.describe_failure(), usage=bool(first.failure and first.failure.usage))


def _start(options: DemoOptions, port: int) -> list[_Worker]:
    context = multiprocessing.get_context("spawn")
    # NOTE: it must run before the signals are blocked, because starting it unblocks them.
    resource_tracker.ensure_running()
    workers = []
    # Ranks inherit the blocked Ctrl-C of the terminal: this process alone decides when they stop.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        for rank in range(options.ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=child_main, args=(rank, options, port, theirs), name=f"moe-ep rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            workers.append(_Worker(rank=rank, process=process, connection=ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return workers


def _end(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
    for worker in workers:
        worker.process.join(_TERMINATE_S)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.connection.close()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; handlers exist in the main thread only."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handler: Callable[[int, Any], None] = lambda number, _frame: received.append(number)  # noqa: E731
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
