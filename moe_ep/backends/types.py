"""What passes between the torch backend and those who call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ep.backends.control import Opening, Outbox
from moe_ep.backends.transport import Load
from moe_ep.backends.wire import Metadata
from moe_ep.config import ExchangeSpec
from moe_ep.handle import Groups, SendPlan

# Begins an exchange with what fits its envelopes.
Announce = Callable[[Outbox | None], Opening]


class Counted(NamedTuple):
    """The exchanged counts of one set of tokens, the same on every rank (int64, CPU).

    Attributes:
        tokens: [R] tokens of each rank.
        choices: [R, E] choices of each rank for each expert.
        rows: [R, R] tokens that each source sends to each destination; [R, 0] where rows go per choice.
    """

    tokens: Tensor
    choices: Tensor
    rows: Tensor

    @staticmethod
    def from_table(table: Tensor, spec: ExchangeSpec) -> Counted:
        """From the words that ranks exchange: tokens, choices per expert and, unless rows go per choice, per rank."""
        return Counted(table[:, 0], table[:, 1 : 1 + spec.num_experts], table[:, 1 + spec.num_experts :])

    @staticmethod
    def num_words(spec: ExchangeSpec) -> int:
        """Words per rank in such a table."""
        return 1 + spec.num_experts + (0 if spec.per_choice else spec.num_ranks)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A dispatch whose sizes are known and whose payload has not moved.

    Attributes:
        spec: the settings.
        owner: id stored in the plan.
        serial: number of the exchange.
        topk_idx: [T, K] int64 after capacity drops.
        send: the source's plan.
        groups: this rank's groups.
        rows_per_rank: [R, R] int64, tokens per (source, destination) after drops.
        recv_counts: wire rows from each source.
    """

    spec: ExchangeSpec
    owner: int
    serial: int
    topk_idx: Tensor
    send: SendPlan
    groups: Groups
    rows_per_rank: Tensor
    recv_counts: list[int]


@dataclasses.dataclass(frozen=True)
class Packed:
    """A dispatch's rows, ready to be sent.

    Attributes:
        load: rows and metadata.
        layout: what the metadata holds.
        cast_from: dtype of the rows where they were cast to fp8 for the wire, else None.
    """

    load: Load
    layout: Metadata
    cast_from: torch.dtype | None


@dataclasses.dataclass(eq=False)
class Dispatch:
    """Result of a dispatch; nobody changes it. Shapes and the meaning of -1 as in ``moe_ep.Dispatched``.

    Attributes:
        rows: [rows, H]; slabs are flat here, [e * R * max_tokens, H].
        scales: [N, H / 128] fp32 when rows arrived as fp8, in the rows' layout.
        row_weights: [rows], or [rows, K] for compact rows, or None.
        topk_idx: [N, K] int64 local ids (compact layout only).
        recv_src_idx: [N] int32 token index at the source (one row per token and rank only).
        tokens_per_expert: int32 [e].
        expert_ends: int32 [e].
        overflow: bool 0-dim; None without a capacity.
        plan: to replay, ``Plan`` or ``CudaPlan``.
        groups: sizes on the host, ``Groups`` or what the host of a GPU knows of them.
        in_arena: whether the rows lie in memory that the next exchange writes.
    """

    rows: Tensor
    scales: Tensor | None
    row_weights: Tensor | None
    topk_idx: Tensor | None
    recv_src_idx: Tensor | None
    tokens_per_expert: Tensor
    expert_ends: Tensor
    overflow: Tensor | None
    plan: Any
    groups: Any
    in_arena: bool = False
