"""The life of one rank's process: under ``launch``, which started it, or under torchrun."""

import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moe_ep.cli.demo.options import DemoOptions, UsageError
from moe_ep.cli.demo.progress import ConsoleReporter, SilentReporter, StepReport
from moe_ep.cli.demo.worker import InterruptedRunError, Run
from moe_ep.errors import MoeEpError, NotBuiltError, PeerAbortedError, PeerTimeoutError


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank failed.

    Attributes:
        text: for the user; with the traceback when the cause is not a known kind of error.
        usage: the user's input was at fault.
        severity: 1 for a cause, 2 for what may only be the consequence of another rank's failure.
    """

    text: str
    usage: bool
    severity: int

    @staticmethod
    def of(error: BaseException) -> "Failure":
        """Describe ``error``."""
        consequence = isinstance(error, (PeerAbortedError, PeerTimeoutError, dist.DistError)) or (
            isinstance(error, RuntimeError) and "onnection" in str(error)
        )
        known = isinstance(error, (UsageError, MoeEpError, ArithmeticError, OSError))
        text = f"{type(error).__name__}: {error}"
        return Failure(
            text=text if known else f"{text}\n{''.join(traceback.format_exception(error))}",
            usage=isinstance(error, (UsageError, NotBuiltError)),
            severity=2 if consequence else 1,
        )


class PipeReporter:
    """Rank 0's news, sent to the process that started it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def say(self, text: str) -> None:
        """Send a text."""
        self._connection.send(("say", text))

    def step(self, report: StepReport) -> None:
        """Send the state of the training."""
        self._connection.send(("step", report))


def child_main(rank: int, options: DemoOptions, port: int, connection: Connection) -> None:
    """Main function of a process that ``launch`` started; tells the outcome through ``connection``."""
    stop = threading.Event()
    threading.Thread(target=_listen, args=(connection, stop), daemon=True).start()
    try:
        # Local ranks need no more than the loopback interface, and no name lookup.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform.startswith("linux") else "lo0")
        torch.set_num_threads(threads_per_rank(options.ranks))
        store = dist.TCPStore("127.0.0.1", port, None, False)
        dist.init_process_group(_process_group_backend(options), store=store, rank=rank, world_size=options.ranks)
        reporter = PipeReporter(connection) if rank == 0 else SilentReporter()
        summary = Run(options, group=_world(), reporter=reporter, stop=stop.is_set).complete()
        connection.send(("finished", summary))
        dist.destroy_process_group()
    except InterruptedRunError as interrupted:
        connection.send(("stopped", str(interrupted)))
    except BaseException as error:
        connection.send(("failure", Failure.of(error)))
        # Peers may hang in an exchange with this rank; an orderly teardown could wait for them.
        os._exit(1)


def run_under_torchrun(options: DemoOptions) -> dict[str, Any] | None:
    """Be the rank that torchrun started; returns the summary on rank 0, None elsewhere.

    Raises:
        InterruptedRunError: after Ctrl-C or SIGTERM; the checkpoint is saved.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: stop.set())
    torch.set_num_threads(threads_per_rank(int(os.environ.get("LOCAL_WORLD_SIZE", options.ranks))))
    dist.init_process_group(_process_group_backend(options))
    shown = dist.get_rank() == 0 and not options.quiet
    reporter = ConsoleReporter(every=options.log_every) if shown else SilentReporter()
    try:
        return Run(options, group=_world(), reporter=reporter, stop=stop.is_set).complete()
    finally:
        reporter.close()


def threads_per_rank(ranks: int) -> int:
    """Threads for one rank, so that ``ranks`` of them do not crowd this process's share of the machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // ranks)


def _listen(connection: Connection, stop: threading.Event) -> None:
    try:
        while True:
            if connection.recv() == "stop":
                stop.set()
    except (EOFError, OSError):
        # The process that started this one is gone: nobody is left to report to.
        os._exit(1)


def _process_group_backend(options: DemoOptions) -> str:
    return "cpu:gloo,cuda:nccl" if options.device == "cuda" else "gloo"


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
