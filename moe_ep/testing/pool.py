"""Session-long pools of worker processes on which multi-process tests run."""

import atexit
import contextlib
import multiprocessing as mp
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from moe_ep.testing.shipping import FunctionReference
from moe_ep.testing.worker import RemoteError

START_SECONDS = 120.0
SETTLE_SECONDS = 10.0
EXIT_SECONDS = 20.0
# Ranks whose peer has already failed get this long to fail by themselves.
GRACE_SECONDS = 8.0


class _Answer(NamedTuple):
    kind: str  # ok, error, dead, hung
    time: float
    payload: Any


class WorkerPool:
    """``num_ranks`` processes joined in one gloo group, each answering over a connection of its own."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.calls = 0
        self._folder = tempfile.TemporaryDirectory(prefix="moe_ep_pool_")
        self._output_begin = [0] * num_ranks
        # The store lives here, so that it outlasts every worker that a test kills.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(num_ranks):
            self._start(rank)
        answers = self._collect(START_SECONDS)
        if any(answer.kind != "ok" for answer in answers):
            text = self._failure_text(answers)
            self.kill()
            raise RuntimeError(f"a pool of {num_ranks} workers did not start:\n{text}")

    def _start(self, rank: int) -> None:
        ours, theirs = mp.Pipe()
        imports = f"import sys; sys.path[:] = {sys.path!r}\nfrom moe_ep.testing.worker import main"
        fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        loopback = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        with open(self._log(rank), "wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", f"{imports}\nmain({theirs.fileno()})"],
                env=loopback | dict(os.environ) | fixed,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        theirs.close()
        self._connections.append(ours)
        self._processes.append(process)
        ours.send_bytes(pickle.dumps((rank, self.num_ranks, self._store.port, os.getpid())))

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.log"

    def call(self, fn: Callable[..., Any], args: tuple, timeout: float) -> list[_Answer]:
        """Run ``fn(ctx, *args)`` on every rank and wait for all answers."""
        self.calls += 1
        self._output_begin = [self._log(rank).stat().st_size for rank in range(self.num_ranks)]
        message = pickle.dumps(("call", FunctionReference.of(fn), pickle.dumps(args)))
        self._send(message)
        answers = self._collect(timeout)
        if all(answer.kind == "ok" for answer in answers):
            self._print_output()
        return answers

    def check_in_step(self) -> list[_Answer]:
        """Ask whether the ranks still agree on where they are."""
        self._send(pickle.dumps(("check", self.calls)))
        return self._collect(SETTLE_SECONDS)

    def _send(self, message: bytes) -> None:
        for connection in self._connections:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.send_bytes(message)

    def _collect(self, timeout: float) -> list[_Answer]:
        deadline = time.monotonic() + timeout
        answers: dict[int, _Answer] = {}
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                answers[rank] = self._receive(rank, connection)
                if answers[rank].kind == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        self._show_stacks(list(waiting.values()))
        hung = _Answer("hung", time.monotonic(), None)
        return [answers.get(rank, hung) for rank in range(self.num_ranks)]

    def _receive(self, rank: int, connection: Connection) -> _Answer:
        try:
            return _Answer(*pickle.loads(connection.recv_bytes()))
        except (EOFError, ConnectionResetError):
            code: int | None = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._processes[rank].wait(5)
            return _Answer("dead", time.monotonic(), code)

    def _show_stacks(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._processes[rank].send_signal(signal.SIGUSR1)
        if ranks:
            time.sleep(0.3)

    def _print_output(self) -> None:
        """Print what the workers printed, so that it belongs to the test that caused it."""
        for rank in range(self.num_ranks):
            text = self._output(rank)
            if text:
                sys.stdout.write(f"[rank {rank}] {text}\n")

    def _output(self, rank: int) -> str:
        """What a rank printed since the present call began."""
        with open(self._log(rank), "rb") as log:
            log.seek(self._output_begin[rank])
            return log.read().decode(errors="replace").rstrip()

    def _failure_text(self, answers: Sequence[_Answer], expect_dead: Sequence[int] = ()) -> str:
        parts = []
        for rank, answer in enumerate(answers):
            if answer.kind == "error":
                parts.append(f"rank {rank} raised:\n{answer.payload[1]}")
            elif answer.kind == "dead" and rank not in expect_dead:
                parts.append(f"rank {rank} died with exit code {answer.payload}\n{self._output(rank)}")
            elif answer.kind == "hung":
                parts.append(f"rank {rank} did not answer in time\n{self._output(rank)}")
            elif rank in expect_dead and answer.kind == "ok":
                parts.append(f"rank {rank} was expected to die and answered")
        return "\n\n".join(parts)

    def raise_failure(self, answers: Sequence[_Answer], expect_dead: Sequence[int] = ()) -> None:
        """Raise the earliest error of any rank, its type kept, with what all ranks met as its cause."""
        text = self._failure_text(answers, expect_dead)
        if not text:
            return
        errors = sorted((a for a in answers if a.kind == "error"), key=lambda a: a.time)
        if errors and errors[0].payload[0] is not None:
            raise pickle.loads(errors[0].payload[0]) from RemoteError(text)
        raise RemoteError(text)

    def wait_exit(self, ranks: Sequence[int]) -> str:
        """Let workers end as programs do; returns what went wrong, as text."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + EXIT_SECONDS
        parts = []
        for rank in ranks:
            try:
                code = self._processes[rank].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._show_stacks([rank])
                parts.append(f"rank {rank} did not exit within {EXIT_SECONDS} s\n{self._output(rank)}")
            else:
                if code != 0:
                    parts.append(f"rank {rank} left with exit code {code}\n{self._output(rank)}")
        return "\n\n".join(parts)

    def kill(self) -> None:
        """End every process at once."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()


_pools: dict[int, WorkerPool] = {}


def run_ranks(
    num_ranks: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    fresh: bool = False,
    expect_dead: Sequence[int] = (),
) -> list[Any]:
    """Run ``fn(ctx, *args)`` on ``num_ranks`` processes and return their results by rank.

    The processes are started at the first call for that number and serve all later ones; one that failed, died, hung or
    left its group out of step makes this call raise, and the next call starts new ones.

    Args:
        num_ranks: processes, joined in one gloo group.
        fn: a function at the top level of an importable file; it gets a :class:`RankContext` first.
        args: sent to every rank; must pickle.
        timeout: seconds until a rank that has not answered counts as hung. Starting processes is not counted.
        fresh: take processes of its own, which must also exit by themselves with code 0 afterwards.
        expect_dead: ranks that ``fn`` kills (needs ``fresh``); None stands in their place in the results.

    Returns:
        One result per rank.

    Raises:
        Exception: the first error that a rank raised, of its own type; its cause is a :class:`RemoteError` with the
            tracebacks of all ranks.
        RemoteError: a rank died, hung, or raised what does not pickle.
        ValueError: ``fn`` cannot be looked up by another process, or ``expect_dead`` without ``fresh``.
    """
    if expect_dead and not fresh:
        raise ValueError(f"expect_dead={tuple(expect_dead)} needs fresh=True: a shared pool must outlive the call")
    FunctionReference.of(fn)
    pool = WorkerPool(num_ranks) if fresh else _shared_pool(num_ranks)
    keep = False
    try:
        answers = pool.call(fn, args, timeout)
        pool.raise_failure(answers, expect_dead)
        if fresh:
            trouble = pool.wait_exit([rank for rank in range(num_ranks) if rank not in expect_dead])
            if trouble:
                raise RemoteError(trouble)
        else:
            pool.raise_failure(pool.check_in_step())
            keep = True
    finally:
        if not keep:
            if not fresh:
                _pools.pop(num_ranks, None)
            pool.kill()
    return [None if rank in expect_dead else pickle.loads(answer.payload) for rank, answer in enumerate(answers)]


def _shared_pool(num_ranks: int) -> WorkerPool:
    if num_ranks not in _pools:
        _pools[num_ranks] = WorkerPool(num_ranks)
    return _pools[num_ranks]


@atexit.register
def close_pools() -> None:
    """End the processes of all pools; the next ``run_ranks`` starts new ones."""
    while _pools:
        _pools.popitem()[1].kill()
