"""Where every row must arrive, by plain loops over tokens: an oracle that shares no code with the planner.

Written from the documentation alone, so that a mistake in ``moe_ep.plan`` cannot hide here too. Slow on purpose.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Choice = tuple[int, int, int]


@dataclass(kw_only=True)
class ExpectedRank:
    """What one rank must hold after a dispatch.

    Attributes:
        rows: layout row -> (source rank, token, choice) of every row that carries data; the choice is -1 in the compact
            layout, whose rows serve all choices of their token on this rank. Slab rows are numbered expert by expert.
        padding: layout rows inside groups that must be zero.
        num_rows: layout rows allocated; those neither in ``rows`` nor in ``padding`` are undefined.
        tokens_per_expert: rows per local expert.
        expert_ends: end of each group.
        local_ids: compact only: for every row the K local expert ids, -1 = another rank's, dropped, or no choice.
    """

    rows: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    padding: list[int] = field(default_factory=list)
    num_rows: int = 0
    tokens_per_expert: list[int] = field(default_factory=list)
    expert_ends: list[int] = field(default_factory=list)
    local_ids: list[list[int]] = field(default_factory=list)


@dataclass(kw_only=True)
class ExpectedDispatch:
    """What a dispatch must do on all ranks.

    Attributes:
        ranks: by destination rank.
        dropped: (source rank, token, choice) of the choices that a capacity drops.
        overflow: (rank, needed, given) of the first rank whose capacity is exceeded, or None.
    """

    ranks: list[ExpectedRank]
    dropped: set[Choice]
    overflow: tuple[int, int, int] | None

    def kept(self, source: int, token: int, choice: int) -> bool:
        """Whether a choice is served."""
        return (source, token, choice) not in self.dropped


def expected_dispatch(
    topk_idx: Sequence[torch.Tensor],
    *,
    num_experts: int,
    layout: str = "expanded",
    alignment: int = 1,
    rows: int | None = None,
    per_expert: int | None = None,
    factor: float | None = None,
    max_tokens_per_rank: int | None = None,
    expert_map: Sequence[Sequence[int]] | None = None,
) -> ExpectedDispatch:
    """Follow every choice of every token to its place.

    Args:
        topk_idx: by source rank, int64 [T, K], -1 = no choice.
        num_experts: E, physical.
        layout: ``expanded``, ``compact`` or ``slab``.
        alignment: groups of the expanded layout begin at multiples of it.
        rows: as in ``Capacity``; at most one of the three.
        per_expert: as in ``Capacity``.
        factor: as in ``Capacity``.
        max_tokens_per_rank: sizes slabs and ``factor``; None takes the largest T for the latter, at least 1.
        expert_map: logical expert -> its replicas, -1 after the last one.
    """
    num_ranks = len(topk_idx)
    chosen = [_choices(ids, expert_map) for ids in topk_idx]
    per_rank = num_experts // num_ranks
    # queues[j]: the choices of expert j in the promised order.
    queues: list[list[Choice]] = [[] for _ in range(num_experts)]
    for source, tokens in enumerate(chosen):
        for token, experts in enumerate(tokens):
            for choice, expert in enumerate(experts):
                if expert >= 0:
                    queues[expert].append((source, token, choice))
    if factor is not None:
        most = max_tokens_per_rank or max(ids.shape[0] for ids in topk_idx)
        share = factor * num_ranks * max(most, 1) * topk_idx[0].shape[1] / num_experts
        per_expert = max(1, math.ceil(share / alignment)) * alignment
    limits, overflow = _limits(queues, num_ranks, layout, alignment, rows, per_expert)
    dropped = {choice for queue, limit in zip(queues, limits, strict=True) for choice in queue[limit:]}
    kept = [queue[:limit] for queue, limit in zip(queues, limits, strict=True)]
    ranks = []
    for rank in range(num_ranks):
        mine = kept[rank * per_rank : (rank + 1) * per_rank]
        if layout == "compact":
            fixed = rows if rows is not None else None if per_expert is None else per_expert * per_rank
            ranks.append(_compact(mine, topk_idx[0].shape[1], fixed))
        else:
            size = num_ranks * (max_tokens_per_rank or 0) if layout == "slab" else per_expert
            ranks.append(_grouped(mine, alignment, size, rows, pads=layout != "slab"))
    return ExpectedDispatch(ranks=ranks, dropped=dropped, overflow=overflow)


def _choices(ids: torch.Tensor, expert_map: Sequence[Sequence[int]] | None) -> list[list[int]]:
    if expert_map is None:
        return ids.tolist()
    replicas = [[physical for physical in row if physical >= 0] for row in expert_map]
    return [
        [replicas[logical][token % len(replicas[logical])] if logical >= 0 else -1 for logical in row]
        for token, row in enumerate(ids.tolist())
    ]


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def _limits(
    queues: list[list[Choice]], num_ranks: int, layout: str, alignment: int, rows: int | None, per_expert: int | None
) -> tuple[list[int], tuple[int, int, int] | None]:
    """How many choices each expert keeps, and the first rank that has too many."""
    per_rank = len(queues) // num_ranks
    limits = [len(queue) for queue in queues]
    overflow = None
    if layout == "slab" or (rows is None and per_expert is None):
        return limits, None
    for rank in range(num_ranks):
        mine = range(rank * per_rank, (rank + 1) * per_rank)
        if per_expert is not None:
            needed, given = max(len(queues[j]) for j in mine), per_expert
            for j in mine:
                limits[j] = min(limits[j], per_expert)
        else:
            assert rows is not None
            given = rows
            if layout == "compact":
                needed = len({(source, token) for j in mine for source, token, _ in queues[j]})
            else:
                needed = sum(_round_up(len(queues[j]), alignment) for j in mine)
            if needed > rows:
                # Every group may need alignment - 1 rows of padding, which the rows shared out must leave.
                usable, total = rows - per_rank * (alignment - 1), sum(len(queues[j]) for j in mine)
                for j in mine:
                    limits[j] = usable * len(queues[j]) // total
        if needed > given and overflow is None:
            overflow = (rank, needed, given)
    return limits, overflow


def _grouped(
    mine: list[list[Choice]], alignment: int, size: int | None, rows: int | None, *, pads: bool
) -> ExpectedRank:
    expected = ExpectedRank()
    begin = 0
    for queue in mine:
        end = begin + (size if size is not None else _round_up(len(queue), alignment))
        for offset, choice in enumerate(queue):
            expected.rows[begin + offset] = choice
        if pads:
            expected.padding += range(begin + len(queue), end)
        expected.tokens_per_expert.append(len(queue))
        expected.expert_ends.append(end)
        begin = end
    expected.num_rows = begin if rows is None else rows
    return expected


def _compact(mine: list[list[Choice]], top_k: int, fixed_rows: int | None) -> ExpectedRank:
    expected = ExpectedRank(tokens_per_expert=[len(queue) for queue in mine])
    ids: dict[tuple[int, int], list[int]] = {}
    for local, queue in enumerate(mine):
        for source, token, choice in queue:
            ids.setdefault((source, token), [-1] * top_k)[choice] = local
    for row, (source, token) in enumerate(sorted(ids)):
        expected.rows[row] = (source, token, -1)
        expected.local_ids.append(ids[source, token])
    for count in expected.tokens_per_expert:
        expected.expert_ends.append((expected.expert_ends or [0])[-1] + count)
    expected.num_rows = len(ids) if fixed_rows is None else fixed_rows
    return expected
