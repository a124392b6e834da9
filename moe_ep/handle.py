"""Handles: plans kept after a dispatch, replayed by combine and by both backward passes."""

from __future__ import annotations

import array
import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Overflow(NamedTuple):
    """The first rank whose capacity does not hold what routing asks of it."""

    rank: int
    needed: int
    given: int


@dataclasses.dataclass(frozen=True)
class Groups:
    """Where the rows of each local expert lie on one rank. All tensors are int64 on the CPU.

    Attributes:
        kept: [R, E] choices of each source rank for each expert after capacity drops.
        counts: [e] rows of each local expert.
        starts: [e] first layout row of each group.
        ends: [e] end of each aligned group.
        num_rows: layout rows allocated.
        packed: whether each group begins where the last row of the one before ends.
        zero_padded: whether the rows between a group's count and its end are zero, rather than undefined (slabs).
        overflow: set when some rank's capacity is exceeded, the same on every rank.
    """

    kept: Tensor
    counts: Tensor
    starts: Tensor
    ends: Tensor
    num_rows: int
    packed: bool
    zero_padded: bool
    overflow: Overflow | None


@dataclasses.dataclass(frozen=True)
class SendPlan:
    """The source's half of a plan. Index tensors are int64 on the tokens' device.

    Attributes:
        send_src: [S] token of each wire row.
        send_counts: wire rows for each destination rank.
        choice_pos: [T * K] place of each choice's metadata: ``row * K + k`` per token and rank, ``row`` per choice;
            -1 where nothing is sent.
        token_rows: [S] wire rows sorted by token.
        token_offsets: [T] where each token's wire rows begin in ``token_rows``.
    """

    send_src: Tensor
    send_counts: list[int]
    choice_pos: Tensor
    token_rows: Tensor
    token_offsets: Tensor


@dataclasses.dataclass(frozen=True)
class PlacePlan:
    """The destination's half of a plan. Index tensors are int64 on the rows' device.

    Attributes:
        row_src: [V] wire row behind each valid layout row; None when it is the identity.
        row_pos: [V] layout row of each valid row; None when it is the identity.
        pad_rows: [P] layout rows inside groups that must be zero.
        row_choice: [V] place in the received metadata of each valid row's weight; None when it is the identity.
        back_rows: layout rows sorted by wire row; None when it is the identity.
        back_offsets: [N] where each wire row's layout rows begin in ``back_rows``; None when each has exactly one.
    """

    row_src: Tensor | None
    row_pos: Tensor | None
    pad_rows: Tensor
    row_choice: Tensor | None
    back_rows: Tensor | None
    back_offsets: Tensor | None


_SCALARS = (
    "owner",
    "incarnation",
    "serial",
    "num_tokens",
    "top_k",
    "num_wire",
    "num_rows",
    "num_valid",
    "per_choice",
    "overflowed",
    "weight_bytes",
)
_IDENTITY_FLAGS = ("row_src", "row_pos", "row_choice", "back_rows", "back_offsets")
_numbers_of = operator.attrgetter(*_SCALARS)


def _tensor_of(numbers: Sequence[int]) -> Tensor:
    # NOTE: torch.tensor of a list takes three times as long.
    return torch.frombuffer(array.array("q", numbers), dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One exchange's plan, as index tensors and host numbers. Holds no payload and nothing that requires grad.

    Attributes:
        owner: id of the dispatcher or Buffer that made it.
        incarnation: how often its Buffer had been reset.
        serial: number of the exchange that made it, the same on every rank.
        num_tokens: T.
        top_k: K.
        num_wire: N, wire rows received.
        num_rows: layout rows allocated.
        num_valid: layout rows that carry a choice.
        per_choice: whether wire rows are per choice.
        overflowed: whether outputs must be poisoned, because a capacity was exceeded under ``on_overflow="raise"``.
        weight_bytes: bytes of one router weight on the wire, 4 or 8.
        recv_counts: wire rows from each source rank.
        send: the source's half.
        place: the destination's half.
    """

    owner: int
    incarnation: int
    serial: int
    num_tokens: int
    top_k: int
    num_wire: int
    num_rows: int
    num_valid: int
    per_choice: bool
    overflowed: bool
    weight_bytes: int
    recv_counts: list[int]
    send: SendPlan
    place: PlacePlan

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.send.send_src.device

    def sizes(self) -> Tensor:
        """All of its numbers, as :meth:`to_tensors` tells them."""
        flags = [getattr(self.place, name) is None for name in _IDENTITY_FLAGS]
        return _tensor_of([*_numbers_of(self), *flags, *self.send.send_counts, *self.recv_counts])

    def to_tensors(self, sizes: Tensor | None = None) -> list[Tensor]:
        """The plan as tensors alone, the form in which operators carry it; ``sizes`` if they are there already."""
        sizes = self.sizes() if sizes is None else sizes
        empty = self.send.send_src.new_empty(0)
        # NOTE: an operator may not return one tensor twice, so an absent or shared one is a tensor of its own.
        place = [getattr(self.place, name) for name in _IDENTITY_FLAGS]
        if self.place.row_choice is self.place.row_src and self.place.row_src is not None:
            place[_IDENTITY_FLAGS.index("row_choice")] = self.place.row_src.clone()
        if self.place.back_rows is self.place.row_pos and self.place.row_pos is not None:
            place[_IDENTITY_FLAGS.index("back_rows")] = self.place.row_pos.clone()
        send = self.send
        shared = send.token_rows is send.choice_pos
        return [
            sizes,
            send.send_src,
            send.choice_pos,
            send.token_rows.clone() if shared else send.token_rows,
            send.token_offsets,
            self.place.pad_rows,
            *(empty.clone() if tensor is None else tensor for tensor in place),
        ]

    @staticmethod
    def from_tensors(tensors: list[Tensor] | tuple[Tensor, ...]) -> Any:
        """Inverse of :meth:`to_tensors`, and of that of :class:`CudaPlan`, which has fewer numbers."""
        if tensors[0].numel() == len(_CUDA_SCALARS):
            return CudaPlan.from_tensors(tensors)
        sizes, send_src, choice_pos, token_rows, token_offsets, pad_rows, *place = tensors
        numbers = sizes.tolist()
        scalars = dict(zip(_SCALARS, numbers, strict=False))
        numbers = numbers[len(_SCALARS) :]
        flags, numbers = numbers[: len(_IDENTITY_FLAGS)], numbers[len(_IDENTITY_FLAGS) :]
        half = len(numbers) // 2
        fields = {
            name: None if absent else tensor for name, absent, tensor in zip(_IDENTITY_FLAGS, flags, place, strict=True)
        }
        scalars["per_choice"] = bool(scalars["per_choice"])
        scalars["overflowed"] = bool(scalars["overflowed"])
        return Plan(
            **scalars,
            recv_counts=numbers[half:],
            send=SendPlan(send_src, numbers[:half], choice_pos, token_rows, token_offsets),
            place=PlacePlan(pad_rows=pad_rows, **fields),
        )

    def apart(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """What stays on the host and tensors, as autograd keeps them: :meth:`together` takes both."""
        send, optional = self.send, [getattr(self.place, name) for name in _IDENTITY_FLAGS]
        there = [tensor for tensor in optional if tensor is not None]
        absent = tuple(tensor is None for tensor in optional)
        tensors = [send.send_src, send.choice_pos, send.token_rows, send.token_offsets, self.place.pad_rows, *there]
        return (_numbers_of(self), self.recv_counts, send.send_counts, absent), tensors

    @staticmethod
    def together(numbers: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
        """Inverse of :meth:`apart`, and of that of :class:`CudaPlan`, which has numbers alone."""
        if len(numbers) == len(_CUDA_SCALARS):
            return CudaPlan(*numbers, *tensors)
        scalars, recv_counts, send_counts, absent = numbers
        send_src, choice_pos, token_rows, token_offsets, pad_rows, *there = tensors
        left = iter(there)
        place = {name: None if gone else next(left) for name, gone in zip(_IDENTITY_FLAGS, absent, strict=True)}
        send = SendPlan(send_src, send_counts, choice_pos, token_rows, token_offsets)
        fields = dict(zip(_SCALARS, scalars, strict=True))
        return Plan(**fields, recv_counts=recv_counts, send=send, place=PlacePlan(pad_rows=pad_rows, **place))

    @staticmethod
    def fake_tensors(topk_idx: Tensor, num_ranks: int, size: Callable[[], Any]) -> list[Tensor]:
        """What a tracer sees of :meth:`to_tensors`.

        Args:
            topk_idx: fake int64 [T, K].
            num_ranks: R.
            size: gives a new size that only the exchange will know.
        """
        num_wire = size()
        return [
            torch.empty(_NUM_SCALARS + 2 * num_ranks, dtype=torch.int64, device="cpu"),
            topk_idx.new_empty(num_wire),
            topk_idx.new_empty(topk_idx.shape[0] * topk_idx.shape[1]),
            topk_idx.new_empty(num_wire),
            topk_idx.new_empty(topk_idx.shape[0]),
            *(topk_idx.new_empty(size()) for _ in range(NUM_PLAN_TENSORS - 5)),
        ]


_NUM_SCALARS = len(_SCALARS) + len(_IDENTITY_FLAGS)
NUM_PLAN_TENSORS = 6 + len(_IDENTITY_FLAGS)

_CUDA_SCALARS = (
    "owner",
    "incarnation",
    "serial",
    "num_tokens",
    "top_k",
    "num_experts",
    "num_rows",
    "max_chunks",
    "layout",
    "zero_padding",
    "weight_bytes",
)
_cuda_numbers_of = operator.attrgetter(*_CUDA_SCALARS)
LAYOUT_CODES = {"compact": 0, "expanded": 1, "slab": 2}


@dataclasses.dataclass(eq=False, slots=True)
class CudaPlan:
    """One exchange's plan on a GPU. Holds no payload and nothing that requires grad; nobody changes it.

    Attributes:
        owner: id of the dispatcher or Buffer that made it.
        incarnation: how often its Buffer had been reset.
        serial: number of the exchange that made it, the same on every rank.
        num_tokens: T.
        top_k: K; 0 for rows planned by a mask alone.
        num_experts: E.
        num_rows: layout rows allocated.
        max_chunks: groups per source that ``received`` has room for.
        layout: code of the layout.
        zero_padding: whether rows between a group's last and its end are zero.
        weight_bytes: bytes of one router weight, 4 or 8.
        source: int32, sizes that the opening of the exchange wrote, where this rank's tokens go, and what it took to
            know that.
        received: int32, groups of received rows, and the layout row of each received choice.
    """

    owner: int
    incarnation: int
    serial: int
    num_tokens: int
    top_k: int
    num_experts: int
    num_rows: int
    max_chunks: int
    layout: int
    zero_padding: bool
    weight_bytes: int
    source: Tensor
    received: Tensor

    @property
    def is_compact(self) -> bool:
        """Whether layout rows are the received rows."""
        return self.layout == LAYOUT_CODES["compact"]

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.source.device

    def sizes(self) -> Tensor:
        """As of :class:`Plan`."""
        return _tensor_of(_cuda_numbers_of(self))

    def to_tensors(self, sizes: Tensor | None = None) -> list[Tensor]:
        """As of :class:`Plan`; the last one's shape tells T to tracers."""
        sizes = self.sizes() if sizes is None else sizes
        return [sizes, self.source, self.received, self.source.new_empty(self.num_tokens, 0)]

    def apart(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """As of :class:`Plan`."""
        return _cuda_numbers_of(self), [self.source, self.received]

    @staticmethod
    def from_tensors(tensors: list[Tensor] | tuple[Tensor, ...]) -> CudaPlan:
        """Inverse of :meth:`to_tensors`."""
        sizes, source, received, _ = tensors
        scalars = dict(zip(_CUDA_SCALARS, sizes.tolist(), strict=True))
        scalars["zero_padding"] = bool(scalars["zero_padding"])
        return CudaPlan(**scalars, source=source, received=received)

    @staticmethod
    def fake_tensors(topk_idx: Tensor, source_words: Any, received_words: Any) -> list[Tensor]:
        """What a tracer sees of :meth:`to_tensors`.

        Args:
            topk_idx: fake int64 [T, K].
            source_words: of ``source``.
            received_words: of ``received``, or a size that only the exchange will know.
        """
        source = topk_idx.new_empty(source_words, dtype=torch.int32)
        sizes = torch.empty(len(_CUDA_SCALARS), dtype=torch.int64, device="cpu")
        return [sizes, source, source.new_empty(received_words), source.new_empty(topk_idx.shape[0], 0)]


def num_tokens_of(plan: list[Tensor]) -> Any:
    """T of a plan in the form of tensors, of either kind; a symbol while tracing."""
    # NOTE: by the count of tensors, since a tracer knows no numbers.
    return plan[4 if len(plan) == NUM_PLAN_TENSORS else 3].shape[0]


@dataclasses.dataclass(frozen=True, eq=False)
class DispatchHandle:
    """The plan of one dispatch, valid as long as it lives and for any number of replays.

    It holds nothing but index tensors: no payload, no buffer memory, nothing that requires grad.

    Attributes:
        kept: the plan, or its tensors where an operator returned them.
        sizes: of the plan: a compiled function that is given the handle would have numbers compiled in.
    """

    kept: Plan | tuple[Tensor, ...]
    sizes: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The plan in the form of the operators of ``moe_ep::``."""
        return self.kept if isinstance(self.kept, tuple) else tuple(self.kept.to_tensors(self.sizes))

    @property
    def plan(self) -> Plan:
        """The plan with its numbers on the host."""
        return Plan.from_tensors(self.kept) if isinstance(self.kept, tuple) else self.kept


class BufferHandle(NamedTuple):
    """What ``Buffer.dispatch`` returns for replays; the first six fields are those of the ecosystem.

    Attributes:
        rank_prefix_matrix: int32 [R, R]; entry [i][r] = rows that rank r receives from source ranks 0..i.
        channel_prefix_matrix: empty, unused here.
        recv_channel_prefix_matrix: empty, unused here.
        recv_src_idx: int32 [N], token index of each received row at its source; with ``num_worst_tokens`` on the CUDA
            backend as many entries, -1 after the first N.
        is_token_in_rank: bool [T, R].
        send_head: empty, unused here; on several nodes int32 [R], rows received here from source ranks 0..i.
        num_recv_tokens: int32 0-dim, N.
        plan: private.
        groups: private.
    """

    rank_prefix_matrix: Tensor
    channel_prefix_matrix: Tensor
    recv_channel_prefix_matrix: Tensor
    recv_src_idx: Tensor
    is_token_in_rank: Tensor
    send_head: Tensor
    num_recv_tokens: Tensor
    plan: Plan | CudaPlan
    groups: Any
