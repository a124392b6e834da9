"""One rank's connection to its peers' GPUs: the shared arenas, and what goes wrong there."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_ep.backends.control import KINDS, Call, ControlPlane
from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_errors import error_of
from moe_ep.backends.cuda_queues import Queues
from moe_ep.backends.cuda_retired import RetiredArenas
from moe_ep.backends.sharing import gather_capability, host_id, local_capability, share
from moe_ep.errors import MoeEpError, PeerTimeoutError

_LOGGER = logging.getLogger("moe_ep")
_MAGIC = 0x6D6F6531
# Payload of all sources together that is reserved unless the caller grants a size; more travels in laps of the rings.
_DEFAULT_PAYLOAD_BYTES = 512 << 20
_LEAST_GROUPS = 8
_ALIGNMENT = 128
_WARN_SECONDS = 30.0
_POLL_SECONDS = 0.05
# How long memory that goes waits for exchanges under way.
_LEAVE_SECONDS = 5.0


class CudaLink(Queues):
    """Arena, channel and, by its base, streams of one rank. Constructing one is collective.

    Args:
        control: of the Buffer.
        granted_bytes: memory for all rings; 0 reserves what the first exchange needs.

    Raises:
        NotBuiltError: on all ranks, when they cannot share memory.
    """

    def __init__(self, control: ControlPlane, granted_bytes: int) -> None:
        self.control = control
        super().__init__(torch.device("cuda", torch.cuda.current_device()), load_extension())
        self.granted_bytes = granted_bytes
        arena = self.extension.Arena
        self.way, capabilities = gather_capability(
            lambda: local_capability(arena, self.device.index, host_id()), control.rank, self.gather_bytes
        )
        self.compute_capability = min(tuple(one["compute_capability"]) for one in capabilities)
        self.num_sms = min(int(one["sms"]) for one in capabilities)
        self.arena: Any = None
        self.channel: Any = None
        self.payload_bytes = 0
        self._retired = RetiredArenas()
        # Makes int32 tensors on the device.
        self.words = torch.empty(0, dtype=torch.int32, device=self.device)
        self._overflows = 0
        self._broken: MoeEpError | None = None
        self._calls = 0
        self._closed = False

    # Memory

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Bytes of any length from every rank, in rank order. Collective."""
        length = torch.tensor([len(data)], device="cpu")
        lengths = self.control.open(Call.of("settings", "length of shared bytes"), length)[:, 0].tolist()
        words = torch.zeros(max(lengths), dtype=torch.int64, device="cpu")
        words[: len(data)] = torch.tensor(list(data), dtype=torch.int64, device="cpu")
        table = self.control.open(Call.of("settings", f"{max(lengths)} shared bytes"), words)
        return [bytes(row[:length].tolist()) for row, length in zip(table, lengths, strict=True)]

    def group_bytes(self, row_bytes: int, meta_words: int) -> int:
        """Bytes of one group of rows in a ring."""
        return _group_layout(row_bytes, meta_words)["num_bytes"]

    def ring_groups(self, row_bytes: int, meta_words: int) -> int:
        """Groups that each source's ring holds."""
        told = _group_layout(row_bytes, meta_words)
        return max(min(self.payload_bytes // told["num_bytes"], told["max_ring_groups"]), 1)

    def payload_for(self, max_tokens: int, row_bytes: int, meta_words: int, least_bytes: int = 0) -> int:
        """Bytes of each source's ring for exchanges of these sizes; the same on all ranks.

        Args:
            max_tokens: largest T of any rank.
            row_bytes: as rows travel.
            meta_words: as they travel.
            least_bytes: of all rings together, unless there is a grant.
        """
        group, num_ranks = self.group_bytes(row_bytes, meta_words), self.control.size
        if self.granted_bytes:
            return self.granted_bytes // num_ranks // _ALIGNMENT * _ALIGNMENT
        if num_ranks == 1:
            return 0
        groups = max(-(-max_tokens // self.extension.CHUNK_TOKENS), _LEAST_GROUPS)
        least = -(-least_bytes // (num_ranks * _ALIGNMENT)) * _ALIGNMENT
        return max(min(group * groups, max(_DEFAULT_PAYLOAD_BYTES // num_ranks, group * _LEAST_GROUPS)), least)

    def check_grant(self, row_bytes: int, meta_words: int) -> None:
        """Raise ValueError for a grant whose rings do not hold a single group."""
        group = self.group_bytes(row_bytes, meta_words)
        if self.granted_bytes and self.control.size > 1 and self.payload_for(0, row_bytes, meta_words) < group:
            raise ValueError(
                f"num_nvl_bytes={self.granted_bytes} is too small for rows of {row_bytes} bytes with {meta_words} "
                f"words of metadata: grant at least {self.control.size * group} bytes, or 0 to reserve at first use"
            )

    def check_device(self, name: str, tensor: Tensor) -> None:
        """Raise ValueError for a tensor elsewhere."""
        if tensor.device != self.device:
            raise ValueError(
                f'{name} is on {tensor.device}; this Buffer exchanges on {self.device} (backend="cuda"): '
                'move it there, or use backend="torch"'
            )

    def fits(self, row_bytes: int, meta_words: int) -> bool:
        """Whether the rings hold the least that an exchange of such rows needs."""
        if self.control.size == 1 or self.granted_bytes:
            return self.channel is not None
        return self.channel is not None and self.payload_bytes >= _LEAST_GROUPS * self.group_bytes(
            row_bytes, meta_words
        )

    def must_grow(self, *sizes: int) -> bool:
        """Whether :meth:`reserve` would make new rings."""
        return self.channel is None or self.payload_for(*sizes) > self.payload_bytes

    def reserve(self, *sizes: int) -> None:
        """Make rings large enough for these, as in ``payload_for``. Collective, with the same sizes on all ranks.

        Waits for the device.
        """
        if not self.must_grow(*sizes):
            return
        payload = self.payload_for(*sizes)
        if torch.cuda.is_current_stream_capturing():
            raise MoeEpError(
                "the arena has to grow during a capture: run the same exchange once before, or call "
                "reserve(max_tokens_per_rank, row_bytes)"
            )
        self.settle()
        torch.cuda.synchronize(self.device)
        epoch = 0 if self.channel is None else self.channel.epoch()
        if self.arena is not None:
            # Peers may still store into it: all ranks have finished what came before.
            captured = torch.tensor([int(self._captured)], device="cpu")
            told = self.control.open(Call.of("reserve", f"{payload} bytes from each source"), captured)
            # Rows that were lent are over: what the device was given to read them has ended.
            self.lease.end()
            self.lease.memory = None
            # On all ranks alike: each reset goes through the retired ones as well.
            if bool(told.any()):
                self._retired.add(self.arena, self.channel, self._overflows)
            else:
                self.arena.close()
        # Whatever fails below, what is gone is not used again.
        self.arena = self.channel = None
        self.payload_bytes, self._overflows, self._captured = 0, 0, False
        size = self._arena_size(payload)
        arena = self._allocate(size)
        addresses = share(
            arena, self.control.rank, self.control.size, self.gather_bytes, timeout_s=self.control.timeout_s
        )
        channel = self.extension.Channel(
            arenas=addresses,
            rank=self.control.rank,
            payload_bytes=payload,
            device=self.device.index,
            timeout_s=self.control.timeout_s,
        )
        if epoch:
            channel.reset(epoch)
        self.arena, self.channel = arena, channel
        self.payload_bytes = payload
        _LOGGER.info("moe_ep: arena of %d bytes per rank, shared by %s", size, self.way)

    def _allocate(self, num_bytes: int) -> Any:  # noqa: ANN401
        """An arena on every rank, or an error on all."""
        arena, error = None, None
        try:
            arena = self.extension.Arena(num_bytes=num_bytes, device=self.device.index, way=self.way)
        # Whatever it is: peers wait for this rank's.
        except Exception as failure:
            error = failure
        self.control.open(Call("reserve"), error=error)
        return arena

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arena, and of earlier ones that CUDA graphs use."""
        return self._retired.num_bytes + (0 if self.arena is None else int(self.arena.num_bytes))

    def local_memory(self) -> tuple[Any, int, int] | None:
        """Arena, and offset and size of its rings; None once it is released, and no arena before it is reserved."""
        if self._closed:
            return None
        num_bytes = 0 if self.arena is None else self.control.size * self.payload_bytes
        # The rings are what an arena ends with.
        return self.arena, self._arena_size(self.payload_bytes) - num_bytes, num_bytes

    def _arena_size(self, payload_bytes: int) -> int:
        return int(self.extension.arena_bytes(num_ranks=self.control.size, payload_bytes=payload_bytes))

    def close(self) -> None:
        """Release the memory; exchanges under way are waited for, but not for long, and then end as after a failure."""
        if self.channel is not None and not torch.cuda.is_current_stream_capturing():
            # A process that ends may have taken the context down, or an error may have; nothing runs there any more.
            with contextlib.suppress(RuntimeError):
                self._leave()
        self._closed = True
        self.lease.memory = None
        self._flights.clear()
        self._retired.close()
        if self.arena is not None:
            self.arena.close()
        self.arena = self.channel = None

    def _leave(self) -> None:
        """Wait until no kernel uses the memory; one may be about to tell the peers that this rank has raised."""
        self._gather()
        end = time.monotonic() + min(_LEAVE_SECONDS, self.control.timeout_s)
        while not (self.stream.query() and self.place_stream.query()):
            if time.monotonic() > end:
                self.channel.abandon()
                self._retired.abandon()
                self.synchronize()
            else:
                time.sleep(1e-4)

    def reset(self) -> None:
        """Go on after a failure. Collective, after the control plane's own reset."""
        if self.channel is not None or self._retired:
            own = [] if self.channel is None else [self.channel.epoch()]
            epochs = torch.tensor([*self._retired.epochs(), *own], device="cpu")
            numbers = (self.control.open(Call("reserve"), epochs).amax(0) + 1).tolist()
            if own:
                self.channel.reset(numbers.pop())
            self._retired.reset(numbers)
            # Nobody opens an exchange before all ranks have left the failed one.
            self.control.open(Call("reserve"))
        self._broken = None
        self._overflows = 0 if self.channel is None else int(self.channel.overflow()[0])
        self._flights.clear()
        self._unplaced.clear()

    # Exchanges

    def header(self, call: Call, error: Exception | None = None) -> list[int]:
        """Words that all ranks compare on the GPU before an exchange, which is about to be launched."""
        self.lease.end()
        self._calls += 1
        if error is not None:
            self.control.leave_note("reason", self._calls, f"{type(error).__name__}: {error}")
        kind = KINDS.index(call.kind)
        return [_MAGIC, kind, call.digest, int(error is not None), call.serial & 0x7FFFFFFF, self._calls, 0, 0]

    def refuse(self, call: Call, error: Exception) -> NoReturn:
        """Tell the peers that this rank raises instead of taking part, and raise."""
        if self.channel is not None and self.control.size > 1:
            self.channel.open(self.header(call, error), self.queue_of(self.begin(), inline=True))
            self._broken = MoeEpError(f"{type(error).__name__}: {error}")
        raise error

    def wait_sizes(self, call: Any) -> tuple[int, int, int, int]:  # noqa: ANN401
        """Layout rows, received rows, the largest T and, where counted, the most layout rows; the host waits."""
        start, warned = time.monotonic(), False
        while True:
            sizes = call.wait_sizes(self.channel, _POLL_SECONDS)
            if sizes is not None:
                return sizes
            self.check()
            elapsed = time.monotonic() - start
            if elapsed > _WARN_SECONDS and not warned:
                warned = True
                _LOGGER.warning(
                    "moe_ep: rank %d has waited %.0f s for peers to open an exchange", self.control.rank, elapsed
                )
            if elapsed > self.control.timeout_s + _WARN_SECONDS:
                self._fail(PeerTimeoutError(f"rank {self.control.rank}: the GPU did not begin an exchange in time"))

    # Trouble

    def new_overflow(self) -> tuple[int, int, int] | None:
        """(rank, needed, given) of a capacity that did not hold since the last call. Waits for nothing."""
        if self.channel is None:
            return self._retired.new_overflow()
        times, rank, needed, given = self.channel.overflow()
        if times == self._overflows:
            return self._retired.new_overflow()
        self._overflows = times
        return rank, needed, given

    def is_quiet(self) -> bool:
        """Whether :meth:`new_overflow` and :meth:`check` would find nothing."""
        if self._broken is not None or not (self.channel is None or self.channel.is_quiet(self._overflows)):
            return False
        return not self._retired or self._retired.is_quiet()

    def check(self) -> None:
        """Raise what went wrong in an exchange before. Waits for nothing."""
        if self.is_quiet():
            return
        if self._broken is not None:
            raise MoeEpError(f"this Buffer cannot be used after: {self._broken}; call reset() on all ranks first")
        trouble = (None if self.channel is None else self.channel.trouble()) or self._retired.trouble()
        if trouble is not None:
            self._fail(error_of(trouble, self.control))

    def _fail(self, error: MoeEpError) -> NoReturn:
        self._broken = error
        raise error


@functools.lru_cache(maxsize=256)
def _group_layout(row_bytes: int, meta_words: int) -> dict[str, int]:
    return load_extension().group_layout(row_bytes=row_bytes, meta_words=meta_words)


def pointer(tensor: Tensor | None) -> int:
    """Device address of a tensor, 0 for None or an empty one."""
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and starting at a multiple of 16 bytes."""
    tensor = tensor.contiguous()
    address = tensor.data_ptr()
    # A wrapper, of what a collective has yet to bring, say, has no address; its copy has.
    return tensor if address and address % 16 == 0 else tensor.clone()
