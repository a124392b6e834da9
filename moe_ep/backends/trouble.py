"""Trouble reports: what ranks tell each other through the group's store when an exchange fails.

gloo names no rank when a collective fails, and a rank that raises cannot be heard over the collective it left. So each
rank in trouble leaves a record, ranks that wait look for records, and those that are stuck find out who is missing.
"""

from __future__ import annotations

import json
import time
from typing import NoReturn

import torch.distributed as dist

from moe_ep.errors import MoeEpError, PeerAbortedError, PeerTimeoutError

# How long survivors wait for each other's records before they call a rank missing.
_ROLL_CALL_SECONDS = 2.0


class TroubleReports:
    """Records of the ranks of one group over one set of connections.

    Args:
        store: the group's, private to these connections; None for a single rank.
        rank: of this process.
        size: ranks in the group.

    Attributes:
        broken: why no further exchange is possible, None while all is well.
    """

    def __init__(self, store: dist.Store | None, rank: int, size: int) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self.broken: str | None = None

    def leave_note(self, name: str, seq: int, value: str) -> None:
        """Publish a text about an exchange, for :meth:`read_note`."""
        if self._store is not None:
            self._store.set(f"{name}/{seq}/{self._rank}", value)

    def read_note(self, name: str, seq: int, rank: int) -> str | None:
        """What another rank published, which may come a little later; None when nothing comes."""
        if self._store is None:
            return None
        key = f"{name}/{seq}/{rank}"
        end = time.monotonic() + _ROLL_CALL_SECONDS
        while time.monotonic() < end:
            if self._store.check([key]):
                return self._store.get(key).decode()
            time.sleep(0.01)
        return None

    def abort(self, seq: int, reason: str) -> None:
        """Tell the peers that this rank takes part in no exchange from ``seq`` on; they raise PeerAbortedError soon."""
        if self._store is not None and self.broken is None:
            self.broken = f"exchange {seq} failed on this rank ({reason})"
            self._record(seq, "aborted", reason)

    def listen(self, seq: int) -> None:
        """While waiting for an exchange: has a peer reported trouble? Until reset() it takes part in no further one.

        Raises:
            PeerAbortedError: a peer left this exchange or an earlier one.
            PeerTimeoutError: a peer is stuck.
        """
        assert self._store is not None
        try:
            if not self._store.add("trouble/count", 0):
                return
            records = self._records()
        except RuntimeError as failure:
            self.call_roll(seq, f"the group's store does not answer ({failure})")
        self._raise_aborted(seq, records)
        if any(record["state"] == "stuck" for record in records.values()):
            self.call_roll(seq, "a peer reported that it is stuck")

    def call_roll(self, seq: int, symptom: str, cause: Exception | None = None) -> NoReturn:
        """Report this rank as stuck, see who else reports within two seconds, and name those who do not."""
        self.broken = f"exchange {seq} failed ({symptom})"
        missing: list[int] | None = None
        try:
            self._record(seq, "stuck", symptom)
            end = time.monotonic() + _ROLL_CALL_SECONDS
            while time.monotonic() < end:
                records = self._records()
                self._raise_aborted(seq, records)
                missing = [
                    rank
                    for rank in range(self._size)
                    if rank != self._rank and (rank not in records or records[rank]["seq"] < seq)
                ]
                if not missing:
                    break
                time.sleep(0.05)
        except RuntimeError as failure:
            if isinstance(failure, MoeEpError):
                raise
            symptom += "; the group's store, which one rank or the launcher hosts, is gone as well"
        named = tuple(missing or ())
        who = f"rank(s) {', '.join(map(str, named))} missing or behind" if named else "no rank could be named"
        raise PeerTimeoutError(
            f"exchange {seq} of rank {self._rank} failed: {who} ({symptom}); "
            "see those ranks' logs; raise timeout_s if they are only late; call reset() on all ranks to go on",
            ranks=named,
        ) from cause

    def _record(self, seq: int, state: str, reason: str) -> None:
        assert self._store is not None
        record = {"seq": seq, "state": state, "reason": reason}
        self._store.set(f"trouble/{self._rank}", json.dumps(record))
        self._store.add("trouble/count", 1)

    def _records(self) -> dict[int, dict]:
        assert self._store is not None
        found = {}
        for rank in range(self._size):
            key = f"trouble/{rank}"
            if rank != self._rank and self._store.check([key]):
                found[rank] = json.loads(self._store.get(key))
        return found

    def _raise_aborted(self, seq: int, records: dict[int, dict]) -> None:
        for rank, record in records.items():
            # One that failed after its payload had left lets this exchange end, and is missing from every later one.
            if record["seq"] <= seq and record["state"] == "aborted":
                self.broken = f"rank {rank} aborted exchange {record['seq']}"
                raise PeerAbortedError(
                    f"rank {rank} raised instead of taking part in exchange {seq}, or in exchange "
                    f"{record['seq']} after its payload had left: {record['reason']}",
                    rank=rank,
                    reason=record["reason"],
                )
