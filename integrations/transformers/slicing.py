"""A rank's part of tensors that hold all experts, and the whole from the parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def cut(whole: Tensor, num_experts: int, rank: int, num_ranks: int, expert_last: bool = False) -> Tensor:
    """A copy of the part of one rank.

    Args:
        whole: [E * n, ...]: n rows of each expert, one expert after the other; or, with ``expert_last``,
            [m, n * E], where the expert is the fastest index.
        num_experts: E.
        rank: which part.
        num_ranks: R.
        expert_last: see ``whole``.
    """
    if expert_last:
        parts = whole.view(whole.shape[0], -1, num_experts).chunk(num_ranks, dim=2)
        return parts[rank].reshape(whole.shape[0], -1).clone()
    return whole.chunk(num_ranks)[rank].clone()


def join(own: Tensor, num_local: int, group: dist.ProcessGroup, expert_last: bool = False) -> Tensor:
    """The inverse of :func:`cut` on every rank of ``group``. Collective.

    Args:
        own: this rank's part.
        num_local: e.
        group: in the order of ``cut``'s ranks.
        expert_last: as it was cut.
    """
    num_ranks = dist.get_world_size(group)
    parts = own.new_empty(num_ranks * own.shape[0], *own.shape[1:])
    dist.all_gather(list(parts.chunk(num_ranks)), own.contiguous(), group=group)
    if not expert_last:
        return parts
    per_rank = parts.view(num_ranks, own.shape[0], -1, num_local)
    return torch.cat(tuple(per_rank), dim=2).reshape(own.shape[0], -1)
