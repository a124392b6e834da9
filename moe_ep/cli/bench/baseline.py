"""What an all-to-all dispatcher does: one copy of a token per chosen expert, permuted, exchanged, permuted again.

This is the usual way, written as well as plain PyTorch allows: one sort, one gather, contiguous copies of whole groups
instead of a second gather, and an un-permute that gathers, weights and sums in one pass.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class AllToAllRoute:
    """What the way back needs.

    Attributes:
        position: int64 [T, K]: row of (token, choice) among this rank's sent rows; ``num_sent`` where there is none.
        weights: [T, K], 0 where there is no choice.
        send_splits: rows sent to each rank.
        recv_splits: rows received from each rank.
        recv_counts: rows by source rank and local expert, R lists of e numbers.
    """

    position: torch.Tensor
    weights: torch.Tensor
    send_splits: list[int]
    recv_splits: list[int]
    recv_counts: list[list[int]]

    @property
    def num_sent(self) -> int:
        return sum(self.send_splits)


class AllToAllDispatcher:
    """Dispatch and combine through ``all_to_all_single`` with one row per (token, chosen expert). Forward only.

    Args:
        group: the process group.
        num_experts: E in all, a multiple of the group's size; expert j lives on rank j // (E / R).
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.group_size = group.size()
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.group_size

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, AllToAllRoute]:
        """Send every token to each of its experts.

        Args:
            x: [T, H].
            topk_idx: int64 [T, K], -1 where there is no choice.
            topk_weights: [T, K], kept at the source.

        Returns:
            Rows [N, H] grouped by local expert and ordered by (source rank, token) inside a group, rows per local
            expert int64 [e], and what ``combine`` needs.
        """
        choices = topk_idx.flatten()
        counts = torch.bincount(choices + 1, minlength=self.num_experts + 1)
        num_none = counts[0]
        recv_counts = torch.empty_like(counts[1:])
        dist.all_to_all_single(recv_counts, counts[1:].contiguous(), group=self.group)

        # The sort runs while nothing else can: the counts above travel first, so that no rank waits for them longer.
        order = torch.argsort(choices, stable=True)[int(num_none) :]
        sent = x.index_select(0, order // topk_idx.shape[1])
        send_splits = counts[1:].view(self.group_size, -1).sum(1).tolist()
        by_source = recv_counts.view(self.group_size, self.num_local_experts)
        route = AllToAllRoute(
            position=_inverse(order, choices.numel()).view_as(topk_idx),
            weights=topk_weights.masked_fill(topk_idx < 0, 0.0),
            send_splits=send_splits,
            recv_splits=by_source.sum(1).tolist(),
            recv_counts=by_source.tolist(),
        )
        received = self._exchange(sent, route.recv_splits, route.send_splits)
        return self._group_by_expert(received, route), by_source.sum(0), route

    def combine(self, y: torch.Tensor, route: AllToAllRoute) -> torch.Tensor:
        """Bring the rows back and sum each token's, weighted.

        Args:
            y: [N, H] in the order of the dispatched rows.
            route: as ``dispatch`` returned it.

        Returns:
            [T, H] in y's dtype.
        """
        returned = self._exchange(self._group_by_source(y, route), route.send_splits, route.recv_splits)
        if route.num_sent == 0:
            return y.new_zeros(route.position.shape[0], y.shape[1])
        # embedding_bag gathers, weights and sums in one pass and accumulates in fp32. It wants weights of the rows'
        # dtype: rounding them is what makes this way fast in bf16, so that is the opponent to beat.
        return F.embedding_bag(
            route.position.clamp(max=route.num_sent - 1),
            returned,
            mode="sum",
            per_sample_weights=route.weights.to(returned.dtype),
        )

    def _exchange(self, rows: torch.Tensor, recv_splits: list[int], send_splits: list[int]) -> torch.Tensor:
        received = rows.new_empty(sum(recv_splits), rows.shape[1])
        dist.all_to_all_single(received, rows, recv_splits, send_splits, group=self.group)
        return received

    def _group_by_expert(self, rows: torch.Tensor, route: AllToAllRoute) -> torch.Tensor:
        if self.num_local_experts == 1:
            return rows
        chunks = rows.split([count for counts in route.recv_counts for count in counts])
        num = self.num_local_experts
        return torch.cat([chunks[source * num + i] for i in range(num) for source in range(self.group_size)])

    def _group_by_source(self, rows: torch.Tensor, route: AllToAllRoute) -> torch.Tensor:
        if self.num_local_experts == 1:
            return rows
        num = self.num_local_experts
        chunks = rows.split([counts[i] for i in range(num) for counts in route.recv_counts])
        return torch.cat(
            [chunks[i * self.group_size + source] for source in range(self.group_size) for i in range(num)]
        )


def _inverse(order: torch.Tensor, size: int) -> torch.Tensor:
    position = order.new_full((size,), order.numel())
    position[order] = torch.arange(order.numel(), device=order.device)
    return position
