"""What a routing makes the ranks send and hold: counts of rows, bytes and sizes, from the choices of all ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_ep.config import FP8_GROUP

SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Rows of one exchange without duplicates: one row per token and rank that it visits.

    Attributes:
        rows: [R][R] rows from each source to each destination, the diagonal stays on its rank.
        expanded: [R] rows of each rank's expert groups, each aligned.
        choices: [R] choices that each rank receives.
    """

    rows: tuple[tuple[int, ...], ...]
    expanded: tuple[int, ...]
    choices: tuple[int, ...]

    @property
    def num_ranks(self) -> int:
        return len(self.rows)

    @property
    def received(self) -> tuple[int, ...]:
        """Compact rows of each rank."""
        return tuple(sum(column) for column in zip(*self.rows, strict=True))

    def wire_bytes(self, row_bytes: int) -> int:
        """Payload through the links of the busiest rank: the larger of what leaves it and what reaches it."""
        ranks = range(self.num_ranks)
        out = [sum(self.rows[rank][peer] for peer in ranks if peer != rank) for rank in ranks]
        back = [sum(self.rows[peer][rank] for peer in ranks if peer != rank) for rank in ranks]
        return max(max(out), max(back)) * row_bytes

    def logical_bytes(self, row_bytes: int) -> int:
        """Payload of the busiest rank, what stays on it counted too."""
        return max(max(sum(row) for row in self.rows), max(self.received)) * row_bytes

    def pushed_bytes(self, row_bytes: int, *, reverse: bool = False) -> tuple[tuple[int, ...], ...]:
        """[R][R] bytes that the floor moves from each rank to each other one; a single rank copies its own rows.

        Args:
            row_bytes: of one row.
            reverse: the way back, as combine goes.
        """
        table = list(zip(*self.rows, strict=True)) if reverse else self.rows
        alone = self.num_ranks == 1
        return tuple(
            tuple(count * row_bytes if alone or source != target else 0 for target, count in enumerate(row))
            for source, row in enumerate(table)
        )


def count_traffic(topk_idx: Sequence[Tensor], num_experts: int, alignment: int) -> Traffic:
    """Count what the choices of all ranks make.

    Args:
        topk_idx: of each rank, int64 [T, K], -1 = no choice.
        num_experts: E.
        alignment: of expert groups.
    """
    num_ranks = len(topk_idx)
    local = num_experts // num_ranks
    rows = [visits(idx, num_ranks, num_experts).sum(0).tolist() for idx in topk_idx]
    chosen = torch.cat([idx.flatten() for idx in topk_idx])
    counts = torch.bincount(chosen[chosen >= 0], minlength=num_experts).view(num_ranks, local)
    aligned = (counts + alignment - 1) // alignment * alignment
    return Traffic(
        rows=tuple(tuple(row) for row in rows),
        expanded=tuple(aligned.sum(1).tolist()),
        choices=tuple(counts.sum(1).tolist()),
    )


def visits(topk_idx: Tensor, num_ranks: int, num_experts: int) -> Tensor:
    """Bool [T, R]: whether a token goes to a rank."""
    found = torch.zeros(topk_idx.shape[0], num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    rank = torch.where(topk_idx >= 0, topk_idx // (num_experts // num_ranks), num_ranks)
    return found.scatter_(1, rank, True)[:, :num_ranks]


def row_bytes_of(dtype: torch.dtype, hidden: int) -> int:
    """Bytes of a row as it travels; fp8 rows with their fp32 scales."""
    scales = hidden // FP8_GROUP * SCALE_BYTES if dtype.itemsize == 1 else 0
    return hidden * dtype.itemsize + scales
