"""What dispatches and combines give: results, and objects for those still under way."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from moe_ep.autograd import CombineExchange, CombineWait, DispatchExchange, DispatchWait
from moe_ep.backends.types import Dispatch
from moe_ep.config import ExchangeSpec
from moe_ep.exchange import Exchanger
from moe_ep.handle import DispatchHandle
from moe_ep.ops import extras_of
from moe_ep.untraced import untraced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What a dispatch delivers. N received compact rows, e local experts, rows the number of layout rows.

    Attributes:
        x: [rows, H] grouped by local expert ("expanded"), [N, H] ("compact") or [e, R * max_tokens, H] ("slab").
        scales: fp32 [rows, H / 128], only when x came as fp8 with scales.
        weights: router weights in the rows' layout: [rows], [N, K] or [e, R * max_tokens]; differentiable.
        topk_idx: int64 [N, K] local expert ids, -1 where a choice is another rank's ("compact" only).
        tokens_per_expert: int32 [e] real rows of each local expert, on the device.
        expert_ends: int32 [e] end of each aligned group, what grouped GEMMs take as offsets, on the device.
        tokens_per_expert_list: the same numbers on the host, where sizes are exact, else None.
        num_rows: rows of ``x`` (of all slabs together).
        overflow: bool 0-dim on the device, set when a capacity was exceeded; None without a capacity.
        handle: what ``combine`` needs.
        in_arena: whether ``x`` lies where the next exchange writes; with ``out="arena"``, as far as it fits there.
    """

    x: Tensor
    scales: Tensor | None
    weights: Tensor
    topk_idx: Tensor | None
    tokens_per_expert: Tensor
    expert_ends: Tensor
    tokens_per_expert_list: list[int] | None
    num_rows: int
    overflow: Tensor | None
    handle: DispatchHandle
    in_arena: bool = False


class PendingDispatch:
    """A dispatch under way. Must not cross the border of an activation checkpoint."""

    def __init__(self, exchange: DispatchExchange, token: Tensor) -> None:
        self._exchange = exchange
        self._token = token
        self._result: Dispatched | None = None

    @untraced
    def wait(self) -> Dispatched:
        """Wait for the rows; the current stream (on CPU: the host) waits. A second call returns the same result.

        Raises:
            CapacityError, PeerAbortedError, PeerTimeoutError, ExchangeMismatchError: what the exchange met.
        """
        if self._result is None:
            rows, weights = DispatchWait.apply(self._exchange, self._token)
            result = self._exchange.result
            assert result is not None
            tensors = [*extras_of(result), *self._exchange.plan_tensors]
            counts = host_list(result.groups.counts)
            spec = self._exchange.exchanger.spec
            self._result = dispatched(
                rows,
                weights,
                result.tokens_per_expert,
                tensors,
                spec,
                scales=result.scales,
                listed=counts,
                in_arena=result.in_arena,
            )
            # The payload now belongs to the caller alone.
            self._exchange.result = None
        return self._result


class PendingCombine:
    """A combine under way. Must not cross the border of an activation checkpoint."""

    def __init__(self, exchange: CombineExchange, token: Tensor) -> None:
        self._exchange = exchange
        self._token = token
        self._result: Tensor | None = None

    @untraced
    def wait(self) -> Tensor:
        """Wait for the sums [T, H]; a second call returns the same tensor."""
        if self._result is None:
            self._result = CombineWait.apply(self._exchange, self._token)
        assert self._result is not None
        return self._result


def host_list(counts: Tensor | list[int] | None) -> list[int] | None:
    """Counts that the host knows, as a list."""
    return counts.tolist() if isinstance(counts, Tensor) else counts


def dispatched_plainly(exchanger: Exchanger, result: Dispatch, rows: Tensor, weights: Tensor) -> Dispatched:
    """What a dispatch returns to its caller where no operator stands in between.

    Args:
        exchanger: that carried it out.
        result: of it.
        rows: of the result, in the layout, with their place in autograd's graph.
        weights: likewise.
    """
    spec = exchanger.spec
    exact = spec.capacity is None and spec.layout != "slab"
    return Dispatched(
        x=rows,
        scales=result.scales,
        weights=weights,
        topk_idx=result.topk_idx,
        tokens_per_expert=result.tokens_per_expert,
        expert_ends=result.expert_ends,
        tokens_per_expert_list=exchanger.host_counts(result.tokens_per_expert) if exact else None,
        num_rows=result.plan.num_rows,
        overflow=None if spec.capacity is None else result.overflow,
        handle=DispatchHandle(result.plan, result.plan.sizes()),
        in_arena=result.in_arena,
    )


def dispatched(
    rows: Tensor,
    weights: Tensor,
    counts: Tensor,
    tensors: list[Tensor],
    spec: ExchangeSpec,
    *,
    scales: Tensor | None = None,
    listed: list[int] | None = None,
    in_arena: bool = False,
) -> Dispatched:
    """What a dispatch returns to its caller, from what the operator returns.

    Args:
        rows: in the layout.
        weights: in the layout.
        counts: int32 [e].
        tensors: ``extras_of`` and, behind it, the plan.
        spec: the settings.
        scales: of fp8 rows.
        listed: counts on the host, where they are known.
        in_arena: whether rows lie where the next exchange writes.
    """
    expert_ends, overflow, topk_idx, *plan = tensors
    exact = spec.capacity is None and spec.layout != "slab"
    return Dispatched(
        x=rows,
        scales=scales,
        weights=weights,
        topk_idx=topk_idx if spec.layout == "compact" else None,
        tokens_per_expert=counts,
        expert_ends=expert_ends,
        tokens_per_expert_list=listed if exact else None,
        num_rows=rows.shape[0] * rows.shape[1] if spec.layout == "slab" else rows.shape[0],
        overflow=None if spec.capacity is None else overflow,
        handle=DispatchHandle(tuple(plan)),
        in_arena=in_arena,
    )
