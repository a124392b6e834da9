"""The control plane of a Buffer: headers in front of every exchange, bounded waits, and naming who is missing.

It runs over a gloo group of its own, so it works beside any backend of the caller's group, its sequence numbers are
private, and a failed exchange leaves the caller's group alone.

Every exchange begins with one message to each rank, the envelope: a header, a few numbers, and the payload where it
fits. gloo ends the process when a message is longer than the receive that meets it, and accepts shorter ones, so all
receives of envelopes are posted for ``ENVELOPE_BYTES``: ranks that announce different exchanges get an error, not an
abort. Larger payload follows in an exchange of its own, after the headers are known to agree.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import struct
import time
import zlib
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from moe_ep.backends.rendezvous import Connection, Rendezvous
from moe_ep.backends.trouble import TroubleReports
from moe_ep.errors import ExchangeMismatchError, MoeEpError, PeerAbortedError

_MAGIC = 0x6D6F6531
_HEADER = "8i"
HEADER_BYTES = struct.calcsize(_HEADER)
# Latency rules the smaller ones: on 2 cores, 4 ranks swap 2 KiB in 1.85 ms and 512 KiB in 1.86 ms. Pages that no
# message reaches are free, so nothing but address space bounds this.
ENVELOPE_BYTES = 16 << 20
_POLL = datetime.timedelta(seconds=0.1)
# What an exchange under way may still take when its Buffer is released, for the sake of peers that are about to come.
_GRACE_SECONDS = 2.0


class Call(NamedTuple):
    """What this rank is about to exchange.

    Attributes:
        kind: ``"settings"``, ``"dispatch"``, ``"combine"``, ...: part of the header, compared on all ranks.
        digest: hash of the settings (``ExchangeSpec.digest``).
        serial: number of the dispatch whose plan is replayed, 0 for a new one.
        detail: settings in words, shown when ranks differ.
    """

    kind: str
    digest: int = 0
    serial: int = 0
    detail: str = ""

    @staticmethod
    def of(kind: str, detail: str, serial: int = 0) -> Call:
        """A call whose digest is the hash of its settings in words."""
        return Call(kind, zlib.crc32(detail.encode()) & 0x7FFFFFFF, serial, detail)


class Outbox(NamedTuple):
    """Payload that travels in the envelopes of an exchange.

    Attributes:
        send: uint8, one message per other rank in rank order, each with room for the header in front; None when the
            payload is too large and follows later.
        splits: bytes for each rank, 0 for this one.
        inbox: uint8 [(R - 1) * stride] where the others' messages arrive.
        stride: bytes between messages in ``inbox``, at least ``ENVELOPE_BYTES``.
    """

    send: Tensor | None
    splits: list[int]
    inbox: Tensor
    stride: int


class Opening(NamedTuple):
    """An announced exchange whose peers have not been heard yet.

    Attributes:
        control: the control plane.
        call: what was announced.
        words: this rank's numbers, or None.
        error: what this rank must raise.
        outbox: payload that travels along, and where the others' arrives; None for a single rank.
        work: the exchange of envelopes.
    """

    control: ControlPlane
    call: Call
    words: Tensor | None
    error: Exception | None
    outbox: Outbox | None
    work: dist.Work | None

    def finish(self) -> Answer:
        """Check that all ranks announce the same.

        Raises:
            PeerAbortedError: another rank has an error to raise.
            ExchangeMismatchError: another rank announces something else.
            PeerTimeoutError: a rank did not come.
        """
        return self.control.conclude(self)


class Answer(NamedTuple):
    """What all ranks announced.

    Attributes:
        table: [R, n] int64 on the CPU, the words of every rank; [R, 0] where nobody has any.
        enclosed: for each rank, whether its payload came in the envelope.
    """

    table: Tensor
    enclosed: list[bool]


KINDS = ("settings", "plan", "dispatch", "replayed dispatch", "combine", "combine of gradients", "reserve")


class ControlPlane:
    """Headers, waits and trouble reports among the ranks of one group.

    Args:
        group: the caller's group; None for a single rank.
        timeout_s: bound of every wait, in seconds.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.incarnation = 0
        self.seq = 0
        self._announced: Exception | None = None
        self.wait_seconds = 0.0
        self.ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = len(self.ranks)
        self._closed_at: float | None = None
        self._connection: Connection | None = None
        self._stuck: list[Connection] = []
        self._rendezvous: Rendezvous | None = None
        if group is not None and self.size > 1:
            store = dist.PrefixStore("moe_ep", distributed_c10d._get_process_group_store(group))
            # NOTE: not each rank's own count: ranks whose constructor failed have tried more often than others.
            number = Rendezvous(dist.PrefixStore("planes", store), self.rank, self.size, timeout_s).meet_again()
            self._rendezvous = Rendezvous(dist.PrefixStore(str(number), store), self.rank, self.size, timeout_s)
        self._connect()

    def _connect(self) -> None:
        # NOTE: not dist.new_group: it names a group after the number of groups that this process has, and ranks that
        # differ in that would wait for each other, or meet a name that is taken.
        self._disconnect()
        # NOTE: new memory for new connections: an exchange that failed may still be written to the old.
        self._inbox: Tensor | None = None
        store: dist.Store | None = None
        if self._rendezvous is not None:
            store, self._connection = self._rendezvous.connect(self.incarnation)
        self._trouble = TroubleReports(store, self.rank, self.size)

    def _disconnect(self) -> None:
        # Dropping one that is stuck would wait for its peers.
        mine = [] if self._connection is None else [self._connection]
        self._stuck = [one for one in self._stuck + mine if one.is_stuck()]
        self._connection = None

    def close(self) -> None:
        """Give exchanges of other threads two seconds to end; later they raise, and their peers are told."""
        self._closed_at = time.monotonic()

    def release(self) -> None:
        """Let go of the connections, after :meth:`close`. Waits for no peer."""
        self._trouble.broken = self._trouble.broken or "its release"
        self._disconnect()
        for connection in self._stuck:
            connection.outlive_process()

    def reset(self) -> None:
        """Start afresh over new connections. Collective: all ranks must call it, and be alive.

        Raises:
            PeerTimeoutError: when ranks do not come; this Buffer stays unusable, and all ranks may try again.
        """
        self._trouble.broken = "a reset() that did not end"
        attempt = self.incarnation + 1
        self.incarnation = attempt if self._rendezvous is None else self._rendezvous.meet(attempt)
        self.seq = 0
        self._connect()

    def open(self, call: Call, words: Tensor | None = None, error: Exception | None = None) -> Tensor:
        """:meth:`begin` and :meth:`Opening.finish` in one, without payload; returns the table [R, n] of words."""
        return self.begin(call, words, error).finish().table

    def begin(
        self,
        call: Call,
        words: Tensor | None = None,
        error: Exception | None = None,
        outbox: Outbox | None = None,
    ) -> Opening:
        """Announce an exchange to all ranks and send what fits the envelope, without waiting for theirs.

        Args:
            call: what follows.
            words: [n] integers >= 0 below 2**31 for every rank, the same n on all ranks (checked through the digest).
            error: what this rank must raise instead of taking part; ``finish`` raises it, after the others were told;
                a ValueError takes its place where words are more than an envelope holds.
            outbox: payload to send along.

        Raises:
            MoeEpError: when an earlier failure left this Buffer out of step.
        """
        self.check_usable()
        self.seq += 1
        if self.size == 1:
            return Opening(self, call, words, error, None, None)
        most = (ENVELOPE_BYTES - HEADER_BYTES) // 4
        if words is not None and words.numel() > most:
            error = error or ValueError(
                f"this {call.kind} announces {words.numel()} counts per rank, {most} fit: plan fewer chunks at a time"
            )
            words = None
        if error is not None:
            self._trouble.leave_note("reason", self.seq, f"{type(error).__name__}: {error}")
        if outbox is None:
            outbox = Outbox(None, [], self._own_inbox(), ENVELOPE_BYTES)
        enclosed = outbox.send is not None and error is None
        head = struct.pack(_HEADER, *self._header(call, error, words, enclosed))
        if words is not None:
            words_on_wire = words.to(torch.int32)
            head += ctypes.string_at(words_on_wire.data_ptr(), 4 * words.numel())
        send, splits = self._address(head, outbox if enclosed else None)
        strides = [outbox.stride] * self.size
        strides[self.rank] = 0
        return Opening(self, call, words, error, outbox, self._all_to_all(outbox.inbox, send, strides, splits))

    def _address(self, head: bytes, outbox: Outbox | None) -> tuple[Tensor, list[int]]:
        """Put the header in front of each message: bytes to send, and how many to each rank."""
        if outbox is None or outbox.send is None:
            splits = [len(head)] * self.size
            splits[self.rank] = 0
            return torch.frombuffer(bytearray(head * (self.size - 1)), dtype=torch.uint8), splits
        at = outbox.send.data_ptr()
        for split in outbox.splits:
            if split:
                ctypes.memmove(at, head, len(head))
                at += split
        return outbox.send, outbox.splits

    def _own_inbox(self) -> Tensor:
        # Pages that no message reaches take no memory.
        if self._inbox is None:
            with torch.inference_mode(False):
                self._inbox = torch.empty((self.size - 1) * ENVELOPE_BYTES, dtype=torch.uint8, device="cpu")
        return self._inbox

    def conclude(self, opening: Opening) -> Answer:
        """Wait for the headers of all ranks and compare them; see :meth:`Opening.finish`."""
        words, outbox = opening.words, opening.outbox
        table = torch.empty(self.size, 0, dtype=torch.int64, device="cpu") if words is None else words.unsqueeze(0)
        if outbox is None or opening.work is None:
            if opening.error is not None:
                raise opening.error
            return Answer(table, [True])
        self.wait(opening.work)
        # Without torch, here and in begin: calls of it cost ten times as much, as caches are cold after a wait.
        inbox, num = outbox.inbox.data_ptr(), HEADER_BYTES // 4
        headers = [
            (ctypes.c_int32 * num).from_address(inbox + position * outbox.stride)[:]
            for position in range(self.size - 1)
        ]
        enclosed = outbox.send is not None and opening.error is None
        headers.insert(self.rank, self._header(opening.call, opening.error, words, enclosed))
        self._compare(opening.call, headers, opening.error)
        if words is not None:
            messages = outbox.inbox.view(torch.int32).view(self.size - 1, -1)
            theirs = messages[:, num : num + words.numel()].to(torch.int64)
            table = torch.cat([theirs[: self.rank], table, theirs[self.rank :]])
        return Answer(table, [bool(header[7]) for header in headers])

    def leave_note(self, name: str, seq: int, value: str) -> None:
        """Publish a text about an exchange; see ``TroubleReports``."""
        self._trouble.leave_note(name, seq, value)

    def read_note(self, name: str, seq: int, rank: int) -> str | None:
        """What another rank published; see ``TroubleReports``."""
        return self._trouble.read_note(name, seq, rank)

    def agree(self, detail: str, error: Exception | None = None) -> None:
        """Compare settings given in words, then raise ``error`` of whichever rank has one, on all ranks.

        A difference is reported before an error of one rank that may follow from it.
        """
        call = Call.of("settings", detail)
        self.open(call)
        self.open(call, error=error)

    def swap_even(self, words: Tensor) -> Tensor:
        """Give every rank the same words; returns [R, n]. An all-to-all takes one step, an all-gather ring R - 1."""
        out = words.new_empty(self.size, words.numel())
        self.swap(out.view(-1), words.repeat(self.size), [words.numel()] * self.size, [words.numel()] * self.size)
        return out

    def swap(self, out: Tensor, data: Tensor, out_splits: list[int], splits: list[int]) -> None:
        """``all_to_all_single`` over CPU tensors, split along the first dimension; waits with a bound."""
        if self.size == 1:
            out.copy_(data)
            return
        self.wait(self._all_to_all(out, data, out_splits, splits))

    def _all_to_all(self, out: Tensor, data: Tensor, out_splits: list[int], splits: list[int]) -> dist.Work:
        assert self._connection is not None
        return self._connection.all_to_all(out, data, out_splits, splits)

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective, listening for ranks in trouble, for at most ``timeout_s``."""
        start = time.monotonic()
        while True:
            try:
                work.wait(_POLL)
            except RuntimeError as failure:
                if work.is_completed():
                    self._reap(work, failure)
                    break
                if time.monotonic() - start > self.timeout_s + 1.0:
                    self._trouble.call_roll(self.seq, f"no answer for {self.timeout_s:g} s")
                if self._closed_at is not None and time.monotonic() - self._closed_at > _GRACE_SECONDS:
                    self._leave()
                self._trouble.listen(self.seq)
            else:
                break
        if self._connection is not None:
            self._connection.forget()
        self.wait_seconds += time.monotonic() - start

    def _leave(self) -> NoReturn:
        reason = f"the Buffer was released while exchange {self.seq} was under way"
        # At exit the process that hosts the store may be gone.
        with contextlib.suppress(RuntimeError):
            self._trouble.abort(self.seq, reason)
        raise MoeEpError(reason)

    def check_usable(self) -> None:
        """Raise MoeEpError when an earlier failure left this Buffer out of step with its peers."""
        broken = self._trouble.broken
        if broken is not None:
            raise MoeEpError(f"this Buffer cannot be used after: {broken}; call reset() on all ranks first")

    def abort(self, error: BaseException) -> None:
        """Tell the peers what this rank raised after a header, unless they know; they raise PeerAbortedError soon."""
        # NOTE: an error that went out with a header left all ranks in step.
        announced, self._announced = self._announced, None
        if error is not announced:
            self._trouble.abort(self.seq, f"{type(error).__name__}: {error}")

    def _header(self, call: Call, error: Exception | None, words: Tensor | None, enclosed: bool) -> list[int]:
        return [
            _MAGIC,
            self.seq & 0x7FFFFFFF,
            KINDS.index(call.kind),
            call.digest,
            call.serial & 0x7FFFFFFF,
            0 if words is None else words.numel(),
            int(error is not None),
            int(enclosed),
        ]

    def _compare(self, call: Call, headers: list[list[int]], error: Exception | None) -> None:
        if error is not None:
            # Until abort() has seen it and no longer: its traceback holds the caller's tensors.
            self._announced = None if isinstance(error, MoeEpError) else error
            raise error
        for rank, header in enumerate(headers):
            if header[0] == _MAGIC and header[6] and rank != self.rank:
                reason = self._trouble.read_note("reason", header[1], rank) or "unknown"
                raise PeerAbortedError(
                    f"rank {rank} raised instead of taking part in {call.kind} (exchange {self.seq}): {reason}",
                    rank=rank,
                    reason=reason,
                )
        mine = headers[self.rank]
        other = next((rank for rank, header in enumerate(headers) if header[:7] != mine[:7]), None)
        if other is not None:
            self._raise_mismatch(call, other, mine, headers)

    def _raise_mismatch(self, call: Call, other: int, mine: list[int], headers: list[list[int]]) -> NoReturn:
        # All ranks see the same headers, so all come here and all publish their side.
        self._trouble.leave_note("detail", self.seq, call.detail)
        theirs = headers[other]
        detail = self._trouble.read_note("detail", theirs[1], other) or ""
        raise ExchangeMismatchError(
            "ranks announce different exchanges: "
            f"rank {self.rank}: {_describe(mine)} [{call.detail}]; rank {other}: {_describe(theirs)} [{detail}]; "
            "every rank must use the same settings and issue the same exchanges in the same order"
        )

    def _reap(self, work: dist.Work, failure: RuntimeError) -> None:
        """A completed collective after a failed wait: either it finished in between, or this raises."""
        try:
            work.wait()
        except RuntimeError as error:
            self._trouble.call_roll(self.seq, str(error).splitlines()[0], error)


def _describe(header: list[int]) -> str:
    kind = KINDS[header[2]] if 0 <= header[2] < len(KINDS) else "?"
    replay = f" of plan {header[4]}" if header[4] else ""
    return f"exchange {header[1]}, {kind}{replay}"
