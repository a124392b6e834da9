"""The process at the other end of a pool: joins the group, runs shipped functions, answers over one connection."""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moe_ep.testing.shipping import FunctionReference

# A test that hangs is ended by its pool long before: this only bounds what nobody watches.
GROUP_TIMEOUT = timedelta(minutes=10)


class RemoteError(RuntimeError):
    """What ranks of a pool raised, as text with rank numbers; the cause of the error that ``run_ranks`` raises."""


@dataclass
class RankContext:
    """What a shipped function knows about its place; its first argument.

    Attributes:
        rank: this process's rank.
        world_size: processes in the pool.
        group: the WORLD process group (gloo).
    """

    rank: int
    world_size: int
    group: dist.ProcessGroup
    _subgroups: dict[tuple[int, ...], Any] = field(default_factory=dict)
    _private_groups: list[Any] = field(default_factory=list)

    def subgroup(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The group of ``ranks``, kept for later calls; None on the others. Every rank of the pool calls it."""
        key = tuple(ranks)
        if key not in self._subgroups:
            self._subgroups[key] = self._make(key)
        return self._subgroups[key]

    def new_group(self, ranks: Sequence[int] | None = None) -> dist.ProcessGroup | None:
        """A group of ``ranks`` (None: all) for this call only, to break it in peace. Every rank calls it."""
        group = self._make(tuple(range(self.world_size)) if ranks is None else tuple(ranks))
        if group is not None:
            self._private_groups.append(group)
        return group

    def _make(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        group = dist.new_group(list(ranks), timeout=GROUP_TIMEOUT)
        return group if self.rank in ranks else None

    def settle(self) -> None:
        """Undo what a call may have left behind, and fail when the ranks are no longer in step."""
        for group in self._private_groups:
            dist.destroy_process_group(group)
        self._private_groups.clear()
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(1)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        _collect()

    def check_in_step(self, call: int) -> None:
        """All ranks say which call they ended: a message left over from a test would answer something else."""
        seen = [torch.empty(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(seen, torch.tensor([call]))
        calls = [int(one) for one in seen]
        if calls != [call] * self.world_size:
            raise RuntimeError(f"after call {call} the WORLD group holds a message of another exchange: {calls}")


def main(connection_fd: int) -> None:
    """Serve calls until the connection closes."""
    connection = Connection(connection_fd)
    rank, world_size, port, parent_pid = pickle.loads(connection.recv_bytes())
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    context = RankContext(rank, world_size, group)
    _collect()
    _answer(connection, ("ok", time.monotonic(), None))
    while True:
        try:
            message = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        _serve(connection, context, *message)


def _collect() -> None:
    # Later collections look only at what later calls make: the modules of torch and its compiler are a million objects.
    gc.collect()
    gc.freeze()


def _serve(connection: Connection, context: RankContext, kind: str, *payload: Any) -> None:
    answer: tuple[str, float, Any]
    try:
        if kind == "call":
            result = _call(context, *payload)
            answer = ("ok", time.monotonic(), result)
            context.settle()
        else:
            context.check_in_step(*payload)
            answer = ("ok", time.monotonic(), None)
    # Whatever it is, SystemExit too: the parent is told.
    except BaseException as error:
        answer = ("error", time.monotonic(), _portable(error))
    _answer(connection, answer)


def _call(context: RankContext, reference: FunctionReference, arguments: bytes) -> bytes:
    fn = reference.resolve()
    torch.manual_seed(0)
    # Unpickled only now: the arguments may be of classes that the test module defines.
    return pickle.dumps(fn(context, *pickle.loads(arguments)))


def _answer(connection: Connection, answer: tuple) -> None:
    connection.send_bytes(pickle.dumps(answer))


def _portable(error: BaseException) -> tuple[bytes | None, str]:
    text = "".join(traceback.format_exception(error)).rstrip()
    try:
        shipped = pickle.dumps(error)
        pickle.loads(shipped)
    except Exception:
        return None, text
    return shipped, text


def _end_with_parent(parent_pid: int) -> None:
    # A worker inside a collective does not see its connection close.
    while os.getppid() == parent_pid:
        time.sleep(1)
    os._exit(1)
