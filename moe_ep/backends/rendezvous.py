"""How the ranks of a group come together over its store, and part: which attempt this is, and connections for it."""

from __future__ import annotations

import ctypes
import datetime
import time

import torch.distributed as dist
from torch import Tensor

from moe_ep.errors import PeerTimeoutError

# Ranks come to a collective construction or reset at different times, however short exchanges must be.
_CONNECT_SECONDS = 30.0
_POLL_SECONDS = 0.02


class Connection:
    """Connections among all ranks of a group, which carry one exchange at a time."""

    def __init__(self, group: dist.ProcessGroupGloo) -> None:
        self._group = group
        self._work: dist.Work | None = None

    def all_to_all(self, out: Tensor, data: Tensor, out_splits: list[int], splits: list[int]) -> dist.Work:
        """Begin ``all_to_all_single`` over CPU tensors, split along the first dimension."""
        # NOTE: missing from torch's stubs; torch.distributed's function of this name wants a registered group.
        self._work = self._group.alltoall_base(out, data, out_splits, splits)  # type: ignore[attr-defined]
        return self._work

    def forget(self) -> None:
        """The exchange is over: drop its tensors."""
        self._work = None

    def is_stuck(self) -> bool:
        """Whether an exchange still waits for peers."""
        return self._work is not None and not self._work.is_completed()

    def outlive_process(self) -> None:
        """Never let go: ~ProcessGroupGloo joins threads that wait for the peers of a stuck exchange."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))


class Rendezvous:
    """Brings the ranks of one group together, as often as it takes.

    Args:
        store: private to this use of the group.
        rank: of this process.
        size: ranks in the group.
        timeout_s: bound of every wait, in seconds; at least 30 are given.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._seconds = max(timeout_s, _CONNECT_SECONDS)

    def connect(self, attempt: int) -> tuple[dist.Store, Connection]:
        """New connections among all ranks, and a store of their own.

        Args:
            attempt: the same on all ranks, and never used before.

        Raises:
            PeerTimeoutError: when ranks do not come.
        """
        store = dist.PrefixStore(str(attempt), self._store)
        store.set(f"joining/{self._rank}", "")
        timeout = datetime.timedelta(seconds=self._seconds)
        try:
            group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), self._rank, self._size, timeout)
        except RuntimeError as failure:
            self._propose(-attempt)
            here = [rank for rank in range(self._size) if store.check([f"joining/{rank}"])]
            raise self._absence(here) from failure
        return store, Connection(group)

    def meet(self, at_least: int) -> int:
        """Agree with all ranks on the number of the next attempt: the largest that any of them proposes.

        Ranks that gave up on an attempt, and those that never heard of it, thus meet in one that none of them has used.

        Args:
            at_least: what this rank proposes, more than any attempt it took part in, positive.

        Raises:
            PeerTimeoutError: when ranks do not come.
        """
        mine, end = at_least, time.monotonic() + self._seconds
        self._propose(mine)
        while True:
            proposals = self._proposals()
            if max(proposals) > mine:
                mine = max(proposals)
                self._propose(mine)
            elif min(proposals) == mine:
                return mine
            elif time.monotonic() > end:
                # Nobody may count on this rank any more, and it was not missing.
                self._propose(-mine)
                raise self._absence([rank for rank, proposal in enumerate(proposals) if abs(proposal) == mine])
            time.sleep(_POLL_SECONDS)

    def meet_again(self) -> int:
        """As :meth:`meet`, in an attempt that comes after those which this rank took part in."""
        return self.meet(abs(self._proposals()[self._rank]) + 1)

    def _propose(self, attempt: int) -> None:
        self._store.set(f"proposal/{self._rank}", str(attempt))

    def _proposals(self) -> list[int]:
        keys = [f"proposal/{rank}" for rank in range(self._size)]
        return [int(self._store.get(key)) if self._store.check([key]) else 0 for key in keys]

    def _absence(self, here: list[int]) -> PeerTimeoutError:
        missing = tuple(rank for rank in range(self._size) if rank not in here)
        return PeerTimeoutError(
            f"rank {self._rank} could not connect to all {self._size} ranks within {self._seconds:g} s: "
            f"rank(s) {', '.join(map(str, missing)) or 'unknown'} missing; all ranks of the group must "
            "construct, and must reset(), together",
            ranks=missing,
        )
