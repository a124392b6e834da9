"""``TokenDispatcher``: the nn.Module that moves tokens to the ranks of their experts and back, with gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_ep.autograd import CombineExchange, CombineLaunch, DispatchExchange, DispatchLaunch
from moe_ep.backends.types import Counted, Dispatch
from moe_ep.buffer import Buffer, resolve_group
from moe_ep.config import Capacity, ExchangeSpec, record_bytes
from moe_ep.eager import EagerCombine, EagerDispatch
from moe_ep.errors import StaleHandleError
from moe_ep.exchange import Exchanger, allow_dtype
from moe_ep.exchange_cuda import make_exchanger
from moe_ep.handle import DispatchHandle
from moe_ep.hooks import Hook, HookHandle
from moe_ep.ops import are_transparent, run_combine, run_dispatch
from moe_ep.results import Dispatched, PendingCombine, PendingDispatch, dispatched, dispatched_plainly
from moe_ep.sm_budget import SmBudget, check_sm_budget
from moe_ep.untraced import untraced
from moe_ep.validate import check_dispatcher, wrong_out

Rows = Tensor | tuple[Tensor, Tensor]
_LAYER_NUMBERS = itertools.count()


class TokenDispatcher(nn.Module):
    """Moves tokens to the ranks of their experts, and experts' outputs back.

    Constructing one is collective: settings are compared among all ranks. It has no parameters and no buffers.

    Args:
        group: ProcessGroup or 1-D DeviceMesh; None for a single rank without torch.distributed.
        num_experts: E, divisible by R; expert j lives on rank j // (E / R).
        hidden_size: H; rows must be multiples of 16 bytes.
        top_k: K, choices per token, at most 64.
        dtype: of rows: bf16, fp16, fp32 or fp64. Under autocast rows take the autocast dtype.
        layout: ``"expanded"``, ``"compact"`` or ``"slab"``, see :class:`Dispatched`.
        alignment: expanded groups start at multiples of it.
        weights: ``"combine"`` multiplies in combine; with ``"experts"`` the experts multiply and combine only sums.
        capacity: :class:`Capacity`, or None for exact sizes.
        on_overflow: ``"raise"`` or ``"drop"`` when a capacity is exceeded.
        max_tokens_per_rank: largest T of any rank; needed for slabs.
        buffer: to exchange through; None shares the group's.
        backend: ``"auto"``, ``"torch"`` or ``"cuda"``.
        num_sms: SMs of each exchange; None takes the measured default.
        sm_budget: SMs that torch's GEMMs leave free between launch and wait of an asynchronous exchange, through its
            experimental carve-out, which announces itself with a warning; None for none. No effect on a CPU.
        wire_dtype: ``torch.float8_e4m3fn`` casts rows for the wire; they arrive in ``dtype`` again.
        combine_dtype: ``torch.float32`` sends what a rank sums of a token's 16-bit rows in fp32: twice the bytes of
            combine and of dispatch's backward, and one rounding instead of one per rank. None sends rows' ``dtype``.
        expert_map: int32 [E_logical, max_replicas] physical ids, -1 after the last; ids are then logical.
        timeout_s: bound of every wait in seconds, the same on all ranks; None takes ``MOE_EP_TIMEOUT_S``, else 600. On
            the torch backend an error comes up to 3 s later, in which the ranks that are missing are found.
        validate: whether to check id values; None checks on the torch backend.

    Raises:
        ValueError, NotBuiltError, ExchangeMismatchError: for settings that cannot work, or that differ among ranks.

    Example:
        >>> dispatcher = TokenDispatcher(None, num_experts=4, hidden_size=8, top_k=2, dtype=torch.float32)
        >>> x, topk_idx = torch.ones(3, 8), torch.tensor([[0, 3], [1, 2], [3, 0]])
        >>> routed = dispatcher.dispatch(x, topk_idx, torch.full((3, 2), 0.5))
        >>> routed.tokens_per_expert.tolist()
        [2, 1, 1, 2]
        >>> dispatcher.combine(2 * routed.x, routed.handle, routed.weights).sum(1).tolist()
        [16.0, 16.0, 16.0]
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        *,
        num_experts: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        layout: str = "expanded",
        alignment: int = 1,
        weights: str = "combine",
        capacity: Capacity | None = None,
        on_overflow: str = "raise",
        max_tokens_per_rank: int | None = None,
        buffer: Buffer | None = None,
        backend: str = "auto",
        num_sms: int | None = None,
        sm_budget: int | None = None,
        wire_dtype: torch.dtype | None = None,
        combine_dtype: torch.dtype | None = None,
        expert_map: Tensor | None = None,
        timeout_s: float | None = None,
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        self.layout = layout
        self.alignment = alignment
        self.weights = weights
        self.capacity = capacity
        self.on_overflow = on_overflow
        self.max_tokens_per_rank = max_tokens_per_rank
        self.num_sms = num_sms
        self.sm_budget = sm_budget
        self.wire_dtype = wire_dtype
        self.combine_dtype = combine_dtype
        self.timeout_s = timeout_s
        self.validate = validate
        self.layer: int | str | None = next(_LAYER_NUMBERS)
        self._backend = backend
        self._expert_map = expert_map
        # NOTE: a plain attribute, not a parameter: it makes every exchange have a backward, and never gets a gradient.
        self._anchor = _new_anchor()
        self._exchanger: Exchanger | None = None
        self._attach(group, buffer)

    # Group

    @property
    def buffer(self) -> Buffer:
        """The Buffer that exchanges run through."""
        return self._live().buffer

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group, None for a single rank."""
        return self._live().buffer.group

    @property
    def rank(self) -> int:
        """This rank in the group."""
        return self._live().buffer.rank

    @property
    def group_size(self) -> int:
        """R."""
        return self._live().buffer.group_size

    @property
    def num_local_experts(self) -> int:
        """e = E / R."""
        return self.num_experts // self.group_size

    @property
    def backend_name(self) -> str:
        """The backend in use."""
        return self._live().buffer.backend_name

    def set_group(self, group: dist.ProcessGroup | DeviceMesh | None, buffer: Buffer | None = None) -> None:
        """Attach to a group, after unpickling or to move to another one. Collective; earlier handles become stale."""
        self._attach(group, buffer)

    @untraced
    def _attach(self, group: dist.ProcessGroup | DeviceMesh | None, buffer: Buffer | None) -> None:
        if buffer is None:
            buffer = Buffer.for_group(group, timeout_s=self.timeout_s, backend=self._backend)
        elif not isinstance(buffer, Buffer):
            raise ValueError(f"buffer is {type(buffer).__name__}; pass a moe_ep.Buffer of this group, or leave it out")
        elif buffer.group is not resolve_group(group):
            raise ValueError("buffer belongs to another group: pass Buffer.for_group(group), or leave it out")
        spec = self._spec(buffer.group_size)
        expert_map = self._expert_map
        replicas = expert_map.tolist() if isinstance(expert_map, Tensor) else expert_map
        detail = f"{spec.describe()}, expert_map={replicas}"

        def check() -> None:
            check_dispatcher(spec, expert_map, self.num_sms)
            check_sm_budget(self.sm_budget)

        buffer.agree(detail, check)
        validate = buffer.backend_name == "torch" if self.validate is None else self.validate
        hooks = None if self._exchanger is None else self._exchanger.hooks
        self._exchanger = make_exchanger(buffer, spec, expert_map, validate, hooks=hooks, num_sms=self.num_sms)
        self._exchanger.sm_budget = SmBudget(self.sm_budget)
        self._id = self._exchanger.id
        self._settings = spec

    def _spec(self, num_ranks: int) -> ExchangeSpec:
        return ExchangeSpec(
            num_experts=self.num_experts,
            hidden_size=self.hidden_size,
            top_k=self.top_k,
            num_ranks=num_ranks,
            dtype=self.dtype,
            layout=self.layout,
            alignment=self.alignment,
            weights=self.weights,
            capacity=self.capacity,
            on_overflow=self.on_overflow,
            max_tokens_per_rank=self.max_tokens_per_rank,
            wire_dtype=self.wire_dtype,
            combine_dtype=self.combine_dtype,
        )

    def _live(self) -> Exchanger:
        if self._exchanger is None:
            raise StaleHandleError(
                "this dispatcher has no group, because it was unpickled: call set_group(group) first"
            )
        self._exchanger.layer = self.layer
        return self._exchanger

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenDispatcher:
        super()._apply(fn, recurse)
        # There is no parameter to tell, so a tensor without elements shows whether this is .to(dtype).
        dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        if dtype != self.dtype:
            self.dtype = dtype
            if self._exchanger is not None:
                self._exchanger.spec = self._spec(self.group_size)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A group does not pickle; hooks are the caller's closures.
        return {**self.__dict__, "_exchanger": None, "_id": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenDispatcher:
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__setstate__(self.__getstate__())
        copy._anchor = _new_anchor()
        if self._exchanger is not None:
            source = self._exchanger
            copy._exchanger = make_exchanger(
                source.buffer, source.spec, source.expert_map, source.validate, source.number, num_sms=copy.num_sms
            )
            copy._exchanger.sm_budget = source.sm_budget
            copy._id = copy._exchanger.id
        return copy

    # Exchanges

    def dispatch(
        self,
        x: Rows,
        topk_idx: Tensor,
        topk_weights: Tensor,
        planned: Counted | None = None,
        *,
        out: str = "private",
    ) -> Dispatched:
        """Send tokens to the ranks of their experts.

        Args:
            x: [T, H] rows in ``dtype``, contiguous; or (e4m3 [T, H], scales [T, H / 128] fp32 or int32), not
                differentiable.
            topk_idx: [T, K] int64 expert ids, -1 = no choice; a token may not choose an expert twice.
            topk_weights: [T, K] fp32 (fp64 for fp64 rows).
            planned: what :meth:`plan` returned for this ``topk_idx``.
            out: ``"private"`` rows, or, without gradients, ``"arena"``: on the CUDA backend peers store rows where
                they stay, in memory that the next exchange writes, and ``Dispatched.in_arena`` tells whether they fit.
                On every backend such rows are over when the next exchange of the same Buffer is launched, and
                autograd raises for what it saved of them. Until then they may be read on the current stream; other
                streams must be ordered before that launch by the caller. A replayed CUDA graph ends them too,
                unnoticed.

        Returns:
            A :class:`Dispatched`. Waits for the host in exact mode, never with a capacity on the CUDA backend.

        Raises:
            ValueError: for a wrong argument, here; the other ranks get PeerAbortedError.
            CapacityError: when an earlier exchange overflowed under ``on_overflow="raise"``, on all ranks.
            PeerAbortedError, PeerTimeoutError, ExchangeMismatchError: what happened on another rank.
        """
        lends = out != "private" and self._lends(out)
        if not isinstance(x, tuple):
            x = self._cast(x)
        if are_transparent(topk_idx, topk_weights, *(x if isinstance(x, tuple) else (x,))):
            exchanger = self._live()
            if not torch.is_grad_enabled():
                result = run_dispatch(exchanger, x, topk_idx, topk_weights, planned, lends)
                return dispatched_plainly(exchanger, result, *exchanger.layout_rows(result))
            if not isinstance(x, tuple):
                told: list[Dispatch] = []
                rows, weights = EagerDispatch.apply(told, exchanger, planned, x, topk_idx, topk_weights, self._anchor)
                return dispatched_plainly(exchanger, told[0], rows, weights)
        if planned is not None or isinstance(x, tuple):
            return self.dispatch_async(x, topk_idx, topk_weights, planned, out=out).wait()
        if not _on_one_device(x, topk_idx, topk_weights):
            # An operator would refuse these on this rank alone; this raises, and tells the peers.
            self._live().dispatch(x, topk_idx, topk_weights, None, lends)
        if lends:
            return self.dispatch_async(x, topk_idx, topk_weights, out=out).wait()
        # NOTE: plain attribute reads: they are what torch.compile guards on.
        rows, weights, counts, tensors = torch.ops.moe_ep.dispatch(
            x, topk_idx, topk_weights, self._anchor, self._ready_id()
        )
        listed = None
        if self.capacity is None and self.layout != "slab" and not torch.compiler.is_compiling():
            listed = self._live().host_counts(counts)
        return dispatched(rows, weights, counts, tensors, self._settings, listed=listed)

    def combine(self, y: Tensor, handle: DispatchHandle, weights: Tensor | None = None) -> Tensor:
        """Bring expert outputs home and sum them per token, accumulated in fp32.

        Args:
            y: rows in the layout of ``Dispatched.x``, contiguous.
            handle: of the dispatch.
            weights: ``Dispatched.weights``, given exactly when this dispatcher has ``weights="combine"``.

        Returns:
            [T, H] in y's dtype; zeros for a token without choices.

        Raises:
            As :meth:`dispatch`, and StaleHandleError for a handle of another dispatcher, device, or before a reset.
        """
        y, handle = self._cast(y), self._checked(handle)
        if are_transparent(y, weights):
            if not torch.is_grad_enabled():
                return run_combine(self._live(), y, weights, handle.plan)
            return EagerCombine.apply(self._live(), y, weights, self._anchor, handle.plan)
        tensors = list(handle.tensors)
        if not _on_one_device(y, tensors[1], tensors[1] if weights is None else weights):
            self._live().combine(y, weights, handle.plan)
        return torch.ops.moe_ep.combine(y, weights, tensors, self._anchor, self._ready_id())

    @untraced
    def dispatch_async(
        self,
        x: Rows,
        topk_idx: Tensor,
        topk_weights: Tensor,
        planned: Counted | None = None,
        *,
        out: str = "private",
    ) -> PendingDispatch:
        """As :meth:`dispatch`, returning at once; work created before ``.wait()`` runs beside it, also in backward.

        Without a capacity the CUDA backend first waits up to 100 us for the sizes, so that rows are placed at once.

        NOTE: x, topk_idx and topk_weights must not be changed in place before ``.wait()``. With ``out="arena"`` no
        exchange of the Buffer may be launched before it either; ``.wait()`` then raises MoeEpError.
        """
        exchange = DispatchExchange(self._live(), out != "private" and self._lends(out))
        if isinstance(x, tuple) and len(x) != 2:
            # Refused by name, after the peers were told.
            exchange.launch(x, topk_idx, topk_weights, planned)
        rows, scales = x if isinstance(x, tuple) else (self._cast(x), None)
        token = DispatchLaunch.apply(exchange, planned, rows, scales, topk_idx, topk_weights, self._anchor)
        return PendingDispatch(exchange, token)

    @untraced
    def combine_async(self, y: Tensor, handle: DispatchHandle, weights: Tensor | None = None) -> PendingCombine:
        """As :meth:`combine`, returning at once; work created before ``.wait()`` runs beside it, also in backward.

        NOTE: y and weights must not be changed in place before ``.wait()``.
        """
        exchange = CombineExchange(self._live(), self._checked(handle))
        return PendingCombine(exchange, CombineLaunch.apply(exchange, self._cast(y), weights, self._anchor))

    @untraced
    def plan(self, chunks: list[Tensor]) -> list[Counted]:
        """Exchange the counts of several sets of tokens at once, so that their dispatches need no further one.

        Args:
            chunks: ``topk_idx`` [T_i, K] of each set; the same number on all ranks.

        Returns:
            One plan per set, to pass as ``planned`` with that ``topk_idx``.
        """
        return self._live().plan(chunks)

    # Hooks and state

    @untraced
    def register_hook(self, phase: str, fn: Hook) -> HookHandle:
        """Call ``fn(PhaseEvent)`` on the host when a phase is reached.

        Args:
            phase: ``dispatch_launched``, ``dispatch_ready``, ``combine_launched``, ``combine_ready``, or one of these
                behind ``backward_``, where ``backward_dispatch_*`` is the reversed exchange of dispatch.
            fn: what it raises is raised at the launch or wait that called it.

        Returns:
            A handle with ``remove()``.
        """
        return self._live().hooks.register(phase, fn)

    @untraced
    def check(self) -> None:
        """Wait for exchanges under way and raise the CapacityError of one that overflowed, on all ranks."""
        exchanger = self._live()
        exchanger.buffer.drain()
        exchanger.raise_overflow()

    @untraced
    def reset(self) -> None:
        """Make exchanges possible again after a timeout or abort. Collective; earlier handles become stale."""
        self._live().buffer.reset()

    def stats(self) -> dict[str, Any]:
        """Counters since construction, without a wait for the device.

        Returns:
            ``exchanges`` (number), ``tokens_per_expert`` (int64 [e] on the CPU: choices received), ``wait_seconds``
            (spent by this rank waiting for payload and headers), ``wire_bytes`` (memory kept between exchanges, where
            only pages that messages reached are resident); the last two for all dispatchers of the Buffer.
        """
        exchanger = self._live()
        return {
            "exchanges": exchanger.num_exchanges,
            "tokens_per_expert": exchanger.choices_received.clone(),
            "wait_seconds": exchanger.buffer.control.wait_seconds,
            "wire_bytes": exchanger.buffer.backend.memory_bytes,
        }

    def memory_report(self, max_tokens_per_rank: int | None = None) -> dict[str, int]:
        """Bytes on this rank before anything is allocated.

        Args:
            max_tokens_per_rank: T; None takes the constructor's, or the largest seen.

        Returns:
            ``arena_bytes`` and ``exchange_bytes`` of the Buffer; ``saved_bytes_per_layer``, what autograd keeps of one
            layer's rows until backward under even routing (y for ``weights="combine"``, nothing for ``"experts"``);
            ``plan_bytes_per_layer``, index tensors of a handle.
        """
        buffer = self.buffer
        tokens = max_tokens_per_rank or self.max_tokens_per_rank or buffer.backend.max_tokens
        row_bytes = self.hidden_size * self.dtype.itemsize
        rows = self._live().spec.static_rows or tokens * self.top_k
        return {
            **buffer.memory_report(tokens, row_bytes),
            "record_bytes": record_bytes(row_bytes),
            "saved_bytes_per_layer": rows * (row_bytes + 4) if self.weights == "combine" else 0,
            "plan_bytes_per_layer": 8 * 6 * tokens * self.top_k,
        }

    def extra_repr(self) -> str:
        """The settings in ``print(model)``."""
        return f"{self._spec(1 if self._exchanger is None else self.group_size).describe()}"

    # Internals

    def _ready_id(self) -> int:
        if self._exchanger is None:
            self._live()
        if not torch.compiler.is_compiling():
            self._live()
        return self._id

    def _lends(self, out: str) -> bool:
        """Whether rows are lent, for anything but ``"private"``; what cannot be is refused, and the peers are told."""
        error = wrong_out(out, self._settings, torch.is_grad_enabled(), torch.compiler.is_compiling())
        if error is not None and torch.compiler.is_compiling():
            # Peers trace as well.
            raise error
        if error is not None:
            self._live().refuse("dispatch", error, out == "arena")
        return True

    def _cast(self, x: Tensor) -> Tensor:
        """Rows in the autocast dtype where autocast is on."""
        # NOTE: asking about autocast on meta raises; such rows are refused later, by name.
        if not isinstance(x, Tensor) or x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
            return x
        if x.dtype == torch.float64:
            return x  # as in torch's own autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        allow_dtype(self._ready_id(), dtype)
        return x.to(dtype)

    def _checked(self, handle: DispatchHandle) -> DispatchHandle:
        if not isinstance(handle, DispatchHandle):
            error = ValueError(f"handle is {type(handle).__name__}; pass the handle of dispatch's result")
            self._live().refuse("combine", error)
        return handle


def _new_anchor() -> Tensor:
    # It outlives the caller's default device and inference mode, which models are constructed in.
    with torch.inference_mode(False):
        return torch.zeros((), device="cpu", requires_grad=True)


def _on_one_device(first: object, *others: object) -> bool:
    """Whether an operator would take these: tensors, all on one device."""
    return isinstance(first, Tensor) and all(isinstance(t, Tensor) and t.device == first.device for t in others)
