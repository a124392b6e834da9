"""``Buffer``: the communication class that MoE frameworks program against, and the base of ``TokenDispatcher``."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ep.backends.control import Call, ControlPlane
from moe_ep.backends.cuda import load_extension, require_cuda, why_not_by_itself, why_not_cuda
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.backends.cuda_reserving import most_meta_words
from moe_ep.backends.runtime import TorchRuntime
from moe_ep.backends.torch import TorchBackend
from moe_ep.backends.worker import CommunicationThread, release, run_in_mode, run_without_grad
from moe_ep.buffer_cuda import CudaCalls
from moe_ep.buffer_internode import InternodeCalls
from moe_ep.buffer_low_latency import LowLatencyCalls, refuse_low_latency
from moe_ep.config import Config, check_int, record_bytes
from moe_ep.errors import MoeEpError, NotBuiltError
from moe_ep.events import Done, EventHandle, EventOverlap, Job

_LOGGER = logging.getLogger("moe_ep")
_DEFAULT_TIMEOUT_S = 600.0
_NUMBERS = itertools.count(1)
_LIVE: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()
# Any grant that holds this many rows per source works, in as many rounds as it takes.
_LEAST_ROWS_PER_SOURCE = 64

Result = TypeVar("Result")


class Buffer(InternodeCalls, LowLatencyCalls):
    """Exchanges rows among the ranks of a group.

    Constructing one is collective. Exchanges of one Buffer are serial and must be issued in the same order on all
    ranks; each has a bounded wait. It is released without any collective: a rank may end before the others.

    Args:
        group: ProcessGroup or 1-D DeviceMesh; None for a single rank without torch.distributed.
        num_nvl_bytes: memory granted for exchanges inside a node; 0 reserves what the first exchange needs.
        num_rdma_bytes: memory granted for exchanges between nodes.
        low_latency_mode: whether the low-latency family may be used.
        num_qps_per_rank: queue pairs between two ranks of different nodes.
        allow_nvlink_for_low_latency_mode: whether low-latency exchanges may use NVLink inside a node.
        allow_mnnvl: whether NVLink may span hosts.
        explicitly_destroy: whether the caller calls :meth:`destroy`.
        enable_mask: whether a timeout masks a rank instead of raising (low-latency family).
        enable_shrink: another name of ``enable_mask``.
        timeout_s: bound of every wait in seconds, the same on all ranks; None takes ``MOE_EP_TIMEOUT_S``, else 600. On
            the torch backend an error comes up to 3 s later, in which the ranks that are missing are found.
        ranks_per_node: ranks that share a scale-up domain; None for all of them.
        max_tokens_per_rank: largest T that :meth:`reserve` should expect.
        backend: ``"auto"``, ``"torch"`` or ``"cuda"``.

    Attributes:
        rank, group_size, group, num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, runtime: as named.
        num_sms: SMs of every exchange of this class when set; overrides ``Config.num_sms``.

    Raises:
        ValueError: for arguments that cannot work.
        NotBuiltError: for a backend that is not there.
        ExchangeMismatchError: when ranks construct with different arguments.

    Example:
        >>> buffer = Buffer(None)
        >>> x = torch.ones(3, 8)
        >>> topk_idx = torch.tensor([[0], [1], [-1]])
        >>> per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts=2)
        >>> recv_x, *_, handle, _ = buffer.dispatch(
        ...     x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
        ...     topk_idx=topk_idx, topk_weights=torch.ones(3, 1))
        >>> buffer.combine(recv_x, handle)[0].sum(1).tolist()
        [8.0, 8.0, 0.0]
    """

    num_sms: ClassVar[int | None] = None
    _shared: ClassVar[weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        *,
        enable_mask: bool = False,
        enable_shrink: bool | None = None,
        timeout_s: float | None = None,
        ranks_per_node: int | None = None,
        max_tokens_per_rank: int | None = None,
        backend: str = "auto",
    ) -> None:
        resolved = resolve_group(group)
        self._group: Callable[[], dist.ProcessGroup | None] = lambda: resolved
        self.timeout_s, wrong_timeout = _timeout(timeout_s)
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_mask = enable_mask if enable_shrink is None else enable_shrink
        self.max_tokens_per_rank = max_tokens_per_rank
        self._destroyed = False
        # Handles carry it: an id() may come back.
        self.number = next(_NUMBERS)
        _LIVE[self.number] = self
        self._dispatchers = 0
        self._thread = CommunicationThread()
        # Weak: a future holds what its exchange delivered. One that is gone was complete.
        self._last: Callable[[], Future | None] = lambda: None
        self.control = ControlPlane(resolved, self.timeout_s)
        # Runs at destroy(), when this object goes, or when the interpreter ends.
        self._release = weakref.finalize(self, release, self.control, self._thread)
        self.rank, self.group_size = self.control.rank, self.control.size
        self.ranks_per_node = self.group_size if ranks_per_node is None else ranks_per_node
        detail = (
            f"num_nvl_bytes={num_nvl_bytes}, num_rdma_bytes={num_rdma_bytes}, low_latency_mode={low_latency_mode}, "
            f"ranks_per_node={self.ranks_per_node}, backend={backend}"
        )
        self.agree(detail, lambda: self._check_arguments(backend, wrong_timeout))
        self.backend: Any
        self.backend, self.backend_reason = self._make_backend(backend)
        self.backend_name = self.backend.name
        self.runtime: Any
        if isinstance(self.backend, CudaBackend):
            self._cuda = CudaCalls(self.backend, self.group_size // self.ranks_per_node)
            self.runtime = self.backend.make_runtime(self.ranks_per_node)
        else:
            self.runtime = TorchRuntime(self.rank, self.group_size, self.ranks_per_node, num_nvl_bytes, num_rdma_bytes)

    @classmethod
    def for_group(
        cls, group: dist.ProcessGroup | DeviceMesh | None, *, timeout_s: float | None = None, backend: str = "auto"
    ) -> Buffer:
        """The Buffer that all dispatchers of a group share; made at the first call, which is collective.

        It lives as long as the group, which it does not keep alive; ranks must ask for the same timeouts and backends
        in the same order.
        """
        resolved = resolve_group(group)
        if resolved is None:
            return cls(None, timeout_s=timeout_s, backend=backend)
        buffers = cls._shared.setdefault(resolved, {})
        seconds, wrong = _timeout(timeout_s)
        # A wrong one is refused by the constructor, which tells the peers.
        key = (seconds if wrong is None else timeout_s, backend)
        if key not in buffers or buffers[key]._destroyed:
            made = cls(resolved, timeout_s=timeout_s, backend=backend)
            # A value that held its key would keep both for ever; dispatchers hold the group.
            made._group = weakref.ref(resolved)
            buffers[key] = made
        return buffers[key]

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of ranks; None for a single rank."""
        return self._group()

    # Life cycle

    def agree(self, detail: str, check: Callable[[], None]) -> None:
        """Compare settings among all ranks, then check them; an error of one rank is raised on all.

        Args:
            detail: the settings in words.
            check: raises for settings that cannot work.
        """
        error: Exception | None = None
        try:
            check()
        # Whatever it is: peers wait for this rank.
        except Exception as failure:
            error = failure
        self.submit(lambda: self.control.agree(detail, error)).result()

    def next_dispatcher(self) -> int:
        """Number of a dispatcher being constructed, which is collective: the same on every rank."""
        self._dispatchers += 1
        return self._dispatchers

    def _check_arguments(self, backend: str, wrong_timeout: ValueError | None) -> None:
        if wrong_timeout is not None:
            raise wrong_timeout
        if backend not in ("auto", "torch", "cuda"):
            raise ValueError(f'backend={backend!r} must be "auto", "torch" or "cuda"')
        if backend == "cuda":
            require_cuda()
        if self.low_latency_mode:
            refuse_low_latency("low_latency_mode=True")
        for name in ("num_nvl_bytes", "num_rdma_bytes"):
            check_int(name, getattr(self, name), 0, "0 to reserve at first use")
        if self.max_tokens_per_rank is not None:
            check_int("max_tokens_per_rank", self.max_tokens_per_rank, 1, "or None")
        check_int("ranks_per_node", self.ranks_per_node, 1)
        if self.group_size % self.ranks_per_node:
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} must divide the {self.group_size} ranks of the group"
            )

    def _make_backend(self, backend: str) -> tuple[TorchBackend | CudaBackend, str]:
        """The backend that was asked for, or the one that all ranks can use, and why. Collective."""
        reason = "asked for" if backend == "torch" else why_not_cuda()
        if reason is None and backend == "auto":
            reason = why_not_by_itself(self.group)
        if backend != "torch":
            told = self.control.open(Call("settings"), torch.tensor([int(reason is None)], device="cpu"))
            if reason is None and not bool(told.all()):
                reason = f"rank {int(told.argmin())} cannot use cuda"
        if reason is None:
            try:
                chosen = CudaBackend(self.control, self.num_nvl_bytes)
                self._release_memory = weakref.finalize(self, chosen.link.close)
                if self.num_nvl_bytes:
                    # What is granted does not depend on rows.
                    chosen.link.reserve(0, 0, 0)
                if backend == "cuda":
                    return chosen, "asked for"
                reason = "every rank has a GPU that the others reach"
                _tell_choice("cuda", reason)
                return chosen, reason
            # All ranks raise it together.
            except NotBuiltError as error:
                if backend == "cuda":
                    raise
                reason = str(error)
        if backend == "auto":
            _tell_choice("torch", reason)
        return TorchBackend(self.control, lambda: self.group), reason or ""

    def check_alive(self) -> None:
        """Raise MoeEpError after :meth:`destroy`."""
        if self._destroyed:
            raise MoeEpError("this Buffer was destroyed: construct a new one")

    def submit(self, run: Callable[[], Result]) -> Job[Result]:
        """Run an exchange on the communication thread, after all earlier ones."""
        if self._destroyed:
            raise MoeEpError("this Buffer was destroyed: construct a new one")
        inference = torch.is_inference_mode_enabled()
        future = self._thread.submit(functools.partial(run_in_mode, inference, self.control, run))
        self._last = weakref.ref(future)
        return Job(future)

    def run(self, run: Callable[[], Result]) -> Result:
        """Run an exchange now: on this thread when none is under way, which spares the hand-over."""
        last = self._last()
        if last is not None and not last.done():
            return self.submit(run).result()
        if self._destroyed:
            raise MoeEpError("this Buffer was destroyed: construct a new one")
        return run_without_grad(self.control, run)

    def run_job(self, run: Callable[[], Result]) -> Job[Result]:
        """As :meth:`run`, with the result in a job; errors are raised here."""
        return Done(self.run(run))

    def drain(self) -> None:
        """Wait for every exchange issued so far; their errors stay with their jobs."""
        last = self._last()
        if last is not None:
            last.exception()
        if isinstance(self.backend, CudaBackend):
            self.backend.link.synchronize()

    def destroy(self) -> None:
        """Stop using the group. Not collective; needs ``explicitly_destroy=True``.

        Exchanges under way have two seconds to end; those that do not end raise MoeEpError here and PeerAbortedError on
        the ranks that wait for this one.
        """
        if not self.explicitly_destroy:
            raise ValueError("destroy() needs Buffer(..., explicitly_destroy=True); otherwise release is automatic")
        self._destroyed = True
        self._release()
        if isinstance(self.backend, CudaBackend):
            self._release_memory()

    def reset(self) -> None:
        """Make the Buffer usable after a timeout or abort. Collective; handles made before become stale."""
        self.drain()
        self._overflow = None
        self.control.reset()
        self.backend.reset()

    def reserve(self, max_tokens_per_rank: int, row_bytes: int) -> int:
        """Agree on sizes among all ranks. Collective.

        Args:
            max_tokens_per_rank: tokens that this rank will send at most.
            row_bytes: bytes of a row.

        Returns:
            Bytes that exchanges of these sizes take on this rank, reported before anything is allocated.

        Raises:
            ValueError: for sizes that are not positive integers; the other ranks get PeerAbortedError.
        """
        error = _wrong_sizes(max_tokens_per_rank=max_tokens_per_rank, row_bytes=row_bytes)
        words = torch.tensor([0, 0] if error else [max_tokens_per_rank, row_bytes], device="cpu")
        sizes = self.submit(lambda: self.control.open(Call("reserve"), words, error)).result().amax(0)
        tokens, row = int(sizes[0]), int(sizes[1])
        self.backend.max_tokens = max(self.backend.max_tokens, tokens)
        self.backend.reserved_tokens = max(self.backend.reserved_tokens, tokens)
        if isinstance(self.backend, CudaBackend):
            self.backend.expect(tokens, row, most_meta_words(row))
        return self._exchange_bytes(tokens, row)

    def _exchange_bytes(self, tokens: int, row_bytes: int) -> int:
        """One send and one receive buffer, every token going to every rank."""
        return 2 * self.group_size * tokens * record_bytes(row_bytes)

    def _arena_bytes(self) -> int:
        """Device memory that is held for exchanges."""
        return self.backend.memory_bytes if self.backend_name == "cuda" else 0

    def memory_report(self, max_tokens_per_rank: int | None = None, row_bytes: int = 0) -> dict[str, int]:
        """Bytes that exchanges take on this rank, before anything is allocated.

        Args:
            max_tokens_per_rank: T; None takes the largest seen or given.
            row_bytes: bytes of a row.

        Returns:
            ``arena_bytes`` held all the time, and ``exchange_bytes``, the worst case while an exchange runs.
        """
        tokens = max_tokens_per_rank or self.max_tokens_per_rank or self.backend.max_tokens
        return {
            "arena_bytes": max(self.num_nvl_bytes + self.num_rdma_bytes, self._arena_bytes()),
            "exchange_bytes": self._exchange_bytes(tokens, row_bytes),
        }

    # Helpers of the ecosystem's interface

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Use this many SMs in every exchange; overrides ``Config.num_sms``.

        Raises:
            ValueError: unless positive and even.
        """
        Config(num_sms=new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """The current point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the extension module was built with code for compute capability 9.0."""
        try:
            return any(str(arch).startswith("90") for arch in load_extension().build_info()["cuda_archs"])
        except NotBuiltError:
            return False

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """A Config for dispatch among any number of ranks; SMs as measured for the GPU."""
        return _default_config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """A Config for combine among any number of ranks; SMs as measured for the GPU."""
        return _default_config(num_ranks)

    def get_comm_stream(self) -> torch.cuda.Stream | None:
        """The communication stream; None where exchanges run on a host thread."""
        return self.runtime.get_comm_stream()

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: int | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """A view of this rank's buffer memory, which exchanges on the CUDA backend overwrite.

        See ``TorchRuntime.get_local_buffer_tensor``.
        """
        return self.runtime.get_local_buffer_tensor(dtype, size, offset, use_rdma_buffer)

    def check_grant(self, row_bytes: int) -> None:
        """Raise ValueError for a grant that cannot hold 64 rows from each source."""
        need = self.group_size * _LEAST_ROWS_PER_SOURCE * record_bytes(row_bytes)
        if 0 < self.num_nvl_bytes < need:
            raise ValueError(
                f"num_nvl_bytes={self.num_nvl_bytes} is too small for rows of {row_bytes} bytes from "
                f"{self.group_size} ranks: grant at least {need} bytes, or 0 to reserve at first use"
            )


def _default_config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise ValueError(f"num_ranks={num_ranks} must be at least 1")
    return Config()


def _wrong_sizes(**sizes: int) -> ValueError | None:
    for name, value in sizes.items():
        # They are told to the peers as 32-bit integers.
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            return ValueError(
                f"{name}={value!r} must be a positive int below 2**31: give the largest that will be sent"
            )
    return None


@functools.lru_cache(maxsize=64)
def _tell_choice(chosen: str, reason: str | None) -> None:
    """Say once what ``backend="auto"`` chose, and why."""
    _LOGGER.info('backend="auto" chose %s: %s', chosen, reason)


def live_buffer(number: int) -> Buffer:
    """The Buffer of a number, which operators carry; the table does not keep it alive.

    Raises:
        MoeEpError: when it is gone.
    """
    buffer = _LIVE.get(number)
    if buffer is None:
        raise MoeEpError("the Buffer of this exchange no longer exists: keep it, or its group, alive")
    return buffer


def resolve_group(group: dist.ProcessGroup | DeviceMesh | None) -> dist.ProcessGroup | None:
    """The process group behind an argument; None stands for a single rank."""
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"group is a DeviceMesh with {group.ndim} dimensions; pass one of them, like mesh['ep']")
        return group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group is {type(group).__name__}; it must be a ProcessGroup, a 1-D DeviceMesh or None")
    return group


def _timeout(timeout_s: float | None) -> tuple[float, ValueError | None]:
    """Seconds, and what to raise where they were given wrongly; the default then bounds telling the peers."""
    name: str = "timeout_s"
    given: str | float = 0.0 if timeout_s is None else timeout_s
    if timeout_s is None:
        name, given = "MOE_EP_TIMEOUT_S", os.environ.get("MOE_EP_TIMEOUT_S", _DEFAULT_TIMEOUT_S)
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        return _DEFAULT_TIMEOUT_S, ValueError(f"{name}={given} must be a positive number of seconds")
    return value, None
