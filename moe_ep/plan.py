"""The routing plan: everything that follows from ``topk_idx`` and the exchanged counts, without any payload.

Words: T tokens, K choices, E experts, R ranks, e = E / R. A *wire row* is a row as it crosses between ranks: one per
(token, rank), or one per choice (``ExchangeSpec.per_choice``). A *layout row* is a row of ``Dispatched.x``.
Wire rows are ordered by (destination, [local expert,] token) where they are sent, hence by (source, [local expert,]
token) where they arrive; layout rows follow the promised order (source rank, token), inside an expert where rows are
grouped. Nothing here loops over tokens or experts, and nothing communicates.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from moe_ep.config import ExchangeSpec
from moe_ep.handle import Groups, Overflow, PlacePlan, SendPlan


def exclusive_cumsum(counts: Tensor) -> Tensor:
    """[n] sums of everything before each entry."""
    return counts.cumsum(0) - counts


def ranges(starts: Tensor, counts: Tensor, total: int | None = None) -> Tensor:
    """Concatenation of ``arange(starts[i], starts[i] + counts[i])``, without a loop.

    Args:
        starts: [n] int64.
        counts: [n] int64.
        total: sum of counts where the host knows it, which spares a wait for the device.
    """
    shift = torch.repeat_interleave(starts - exclusive_cumsum(counts), counts, output_size=total)
    return shift + torch.arange(shift.numel(), device=shift.device)


def logical_to_physical(topk_idx: Tensor, expert_map: Tensor) -> Tensor:
    """Replace logical experts by replicas: replica = token index mod number of replicas.

    Args:
        topk_idx: [T, K] int64 logical ids, -1 = no choice.
        expert_map: [E_logical, max_replicas] integer physical ids, -1 after the last replica of an expert.

    Returns:
        [T, K] int64 physical ids, -1 = no choice.
    """
    table = expert_map.to(device=topk_idx.device, dtype=torch.int64)
    replicas = (table >= 0).sum(1).clamp_(min=1)
    logical = topk_idx.clamp(min=0)
    token = torch.arange(topk_idx.shape[0], device=topk_idx.device).unsqueeze(1)
    physical = table[logical, token % replicas[logical]]
    return torch.where(topk_idx >= 0, physical, -1)


def count_choices(topk_idx: Tensor, num_experts: int) -> Tensor:
    """[E] int64 choices of each expert. ``topk_idx`` [T, K] int64, -1 = no choice."""
    return torch.bincount(topk_idx.flatten() + 1, minlength=num_experts + 1)[1:]


def count_tokens_and_choices(topk_idx: Tensor, num_experts: int) -> Tensor:
    """[1 + E] int64 on the CPU: T, then the choices of each expert. ``topk_idx`` [T, K] int64, -1 = no choice."""
    counts = torch.bincount(topk_idx.flatten() + 1, minlength=num_experts + 1).cpu()
    # The place of those that are no choice.
    counts[0] = topk_idx.shape[0]
    return counts


def tokens_in_rank(topk_idx: Tensor, num_experts: int, num_ranks: int) -> Tensor:
    """[T, R] bool: whether a token goes to a rank, once however many of that rank's experts it chose."""
    rank = torch.div(topk_idx, num_experts // num_ranks, rounding_mode="floor")  # -1 stays -1
    hits = torch.zeros(topk_idx.shape[0], num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    return hits.scatter_(1, rank + 1, True)[:, 1:].contiguous()


def fit_capacity(
    counts: Tensor, rows_per_rank: Tensor, spec: ExchangeSpec, max_tokens: int
) -> tuple[Tensor, int, Overflow | None]:
    """Apply the capacity to the count matrix, identically on every rank.

    Args:
        counts: [R, E] int64, choices of each source rank for each expert.
        rows_per_rank: [R, R] int64, tokens that source r sends to rank d.
        spec: the settings that all ranks share.
        max_tokens: largest token count of any rank so far.

    Returns:
        kept: [R, E] choices that remain: each expert keeps its first ones in the order (source rank, token).
        per_expert: rows of each fixed-size group, 0 where groups are packed.
        overflow: None, or the first rank that overflowed.
    """
    capacity = spec.capacity
    if spec.layout == "slab":
        return counts, spec.num_ranks * (spec.max_tokens_per_rank or 0), None
    if capacity is None:
        return counts, 0, None
    wanted = counts.sum(0)
    if capacity.rows is None:
        per_expert = capacity.per_expert or rows_of_factor(capacity.factor or 0.0, spec, max_tokens)
        needed = wanted.view(spec.num_ranks, -1).amax(1)
        limit, keep = per_expert, wanted.clamp(max=per_expert)
    else:
        per_expert, limit = 0, capacity.rows
        needed, keep = _share_rows(wanted, rows_per_rank, spec, limit)
    over = (needed > limit).nonzero()
    if not over.numel():
        return counts, per_expert, None
    rank = int(over[0])
    before = counts.cumsum(0) - counts
    kept = torch.minimum((keep - before).clamp(min=0), counts)
    return kept, per_expert, Overflow(rank, int(needed[rank]), limit)


def rows_of_factor(factor: float, spec: ExchangeSpec, max_tokens: int) -> int:
    """Rows per expert of ``Capacity(factor=...)``: even share times the factor, rounded up to the alignment.

    Where no rank has tokens, that of one token each.
    """
    share = factor * spec.num_ranks * max(max_tokens, 1) * spec.top_k / spec.num_experts
    units = -(-share // spec.alignment)
    return max(int(units), 1) * spec.alignment


def _share_rows(wanted: Tensor, rows_per_rank: Tensor, spec: ExchangeSpec, limit: int) -> tuple[Tensor, Tensor]:
    """Rows [R] that each rank needs, and rows [E] that each expert keeps: floor(rows x its share) where too many."""
    per_rank = wanted.view(spec.num_ranks, -1)
    aligned = -(-per_rank // spec.alignment) * spec.alignment
    needed = rows_per_rank.sum(0) if spec.layout == "compact" else aligned.sum(1)
    # Room for padding first, so that the kept groups fit however their sizes round up.
    usable = limit - per_rank.shape[1] * (spec.alignment - 1)
    share = usable * per_rank // per_rank.sum(1, keepdim=True).clamp(min=1)
    keep = torch.where((needed > limit).unsqueeze(1), share, per_rank)
    return needed, keep.flatten()


def make_groups(
    kept: Tensor, rows_per_rank: Tensor, per_expert: int, overflow: Overflow | None, spec: ExchangeSpec, rank: int
) -> Groups:
    """Lay out the groups of one rank.

    Args:
        kept: [R, E] from :func:`fit_capacity`.
        rows_per_rank: [R, R] wire rows per (source, destination) when sent per token and rank.
        per_expert: rows of each fixed-size group, 0 where groups are packed.
        overflow: passed on.
        spec: the settings.
        rank: this rank.
    """
    first = rank * spec.num_local_experts
    counts = kept[:, first : first + spec.num_local_experts].sum(0)
    if spec.layout == "compact":
        ends = counts.cumsum(0)
        num_rows = int(rows_per_rank[:, rank].sum())
        if spec.capacity is not None:
            num_rows = spec.capacity.rows or per_expert * spec.num_local_experts
        return Groups(kept, counts, ends - counts, ends, num_rows, True, False, overflow)
    packed = False
    if per_expert:
        sizes = torch.full_like(counts, per_expert)
    elif spec.alignment == 1:
        sizes, packed = counts, True
    else:
        sizes = -(-counts // spec.alignment) * spec.alignment
        packed = torch.equal(sizes, counts)
    ends = sizes.cumsum(0)
    num_rows = int(ends[-1])
    if spec.capacity is not None and spec.capacity.rows is not None:
        num_rows = spec.capacity.rows
    return Groups(kept, counts, ends - sizes, ends, num_rows, packed, spec.layout != "slab", overflow)


def _sort_by_expert(topk_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Valid choices as flat indices t * K + k in the order (expert, token), and their experts."""
    flat = topk_idx.flatten()
    valid = (flat >= 0).nonzero().squeeze(1)
    experts, order = torch.sort(flat[valid], stable=True)
    return valid[order], experts


def drop_choices(topk_idx: Tensor, allowed: Tensor) -> Tensor:
    """Keep each expert's first choices in token order, set the others to -1.

    Args:
        topk_idx: [T, K] int64, -1 = no choice.
        allowed: [E] int64 choices that this source may keep of each expert.
    """
    allowed = allowed.to(topk_idx.device)
    choices, experts = _sort_by_expert(topk_idx)
    starts = exclusive_cumsum(torch.bincount(experts, minlength=allowed.numel()))
    position = torch.arange(choices.numel(), device=topk_idx.device) - starts[experts]
    kept = choices[position < allowed[experts]]
    out = torch.full_like(topk_idx, -1)
    out.view(-1)[kept] = topk_idx.flatten()[kept]
    return out


def plan_send_per_choice(topk_idx: Tensor, num_experts: int, num_ranks: int) -> SendPlan:
    """One wire row per choice, ordered by (destination, local expert, token).

    Args:
        topk_idx: [T, K] int64, -1 = no choice.
        num_experts: E.
        num_ranks: R.
    """
    num_tokens, top_k = topk_idx.shape
    device = topk_idx.device
    experts, choices = torch.sort(topk_idx.flatten(), stable=True)
    borders = torch.arange(0, num_experts + 1, num_experts // num_ranks, device=device)
    edges = torch.searchsorted(experts, borders).tolist()
    send_counts = [end - begin for begin, end in itertools.pairwise(edges)]
    rows = torch.arange(choices.numel() - edges[0], device=device)
    if edges[0] == 0:
        choice_pos = torch.empty_like(choices).scatter_(0, choices, rows)
        token_rows = choice_pos
        token_offsets = torch.arange(0, choices.numel(), top_k, device=device)
    else:
        choices = choices[edges[0] :]
        choice_pos = torch.full((num_tokens * top_k,), -1, dtype=torch.int64, device=device).scatter_(0, choices, rows)
        chosen = choice_pos >= 0
        token_rows = choice_pos[chosen]
        token_offsets = exclusive_cumsum(chosen.view(num_tokens, top_k).sum(1))
    send_src = torch.div(choices, top_k, rounding_mode="floor")
    return SendPlan(send_src, send_counts, choice_pos, token_rows, token_offsets)


def plan_send_per_rank(in_rank: Tensor, send_counts: list[int], topk_idx: Tensor | None, num_experts: int) -> SendPlan:
    """One wire row per (token, rank), ordered by (destination, token).

    Args:
        in_rank: [T, R] bool.
        send_counts: tokens for each rank, the column sums of ``in_rank``.
        topk_idx: [T, K] int64, -1 = no choice; None for an exchange of rows alone.
        num_experts: E.
    """
    num_tokens, num_ranks = in_rank.shape
    by_rank = in_rank.t().contiguous()
    # Wire rows up to and including each (rank, token).
    row = by_rank.view(-1).cumsum(0).sub_(1).view(num_ranks, num_tokens).t()
    choice_pos = torch.empty(0, dtype=torch.int64, device=in_rank.device)
    if topk_idx is not None:
        top_k = topk_idx.shape[1]
        rank = torch.div(topk_idx, num_experts // num_ranks, rounding_mode="floor").clamp_(min=0)
        place = row.gather(1, rank).mul_(top_k).add_(torch.arange(top_k, device=in_rank.device))
        choice_pos = place.masked_fill_(topk_idx < 0, -1).flatten()
    return SendPlan(
        # NOTE: a copy: the column alone would keep both alive.
        send_src=by_rank.nonzero()[:, 1].clone(),
        send_counts=send_counts,
        choice_pos=choice_pos,
        token_rows=row.masked_select(in_rank),
        token_offsets=exclusive_cumsum(in_rank.sum(1)),
    )


def localize(topk_idx: Tensor, num_local_experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Number expert ids as a rank does.

    Args:
        topk_idx: [N, K] int64, -1 = no choice.
        num_local_experts: e.
        rank: whose experts count.

    Returns:
        [N, K] int64 local ids, -1 where a choice is another rank's, and [N, K] bool where one is.
    """
    foreign = torch.div(topk_idx, num_local_experts, rounding_mode="floor") != rank
    return (topk_idx - rank * num_local_experts).masked_fill_(foreign, -1), foreign


def place_per_rank(local_ids: Tensor, groups: Groups) -> PlacePlan:
    """Expand rows that came once per (token, rank) into groups by local expert.

    Args:
        local_ids: [N, K] int64 local expert ids of the received rows, -1 = another rank's.
        groups: this rank's groups.
    """
    num_wire, top_k = local_ids.shape
    device = local_ids.device
    # Choices of other ranks come first.
    num_foreign = local_ids.numel() - int(groups.counts.sum())
    choices = torch.sort(local_ids.flatten(), stable=True).indices[num_foreign:]
    positions = _valid_positions(groups, device)
    layout = torch.arange(choices.numel(), device=device) if positions is None else positions
    of_choice = torch.empty(num_wire * top_k, dtype=torch.int64, device=device).scatter_(0, choices, layout)
    chosen = local_ids >= 0
    return PlacePlan(
        row_src=torch.div(choices, top_k, rounding_mode="floor"),
        row_pos=positions,
        pad_rows=_pad_rows(groups, device),
        row_choice=choices,
        back_rows=of_choice.masked_select(chosen.flatten()),
        back_offsets=exclusive_cumsum(chosen.sum(1)),
    )


def place_per_choice(source_counts: Tensor, groups: Groups, num_rows: int, device: torch.device) -> PlacePlan:
    """Regroup rows that came once per choice: (source, local expert, token) -> (local expert, source, token).

    Args:
        source_counts: [R, e] int64 on the CPU, rows from each source for each local expert.
        groups: this rank's groups.
        num_rows: sum of the counts.
        device: of the rows.
    """
    positions = _valid_positions(groups, device)
    if min(source_counts.shape) == 1:
        return PlacePlan(None, positions, _pad_rows(groups, device), None, positions, None)
    counts = source_counts.t().flatten()
    starts = exclusive_cumsum(source_counts.flatten()).view_as(source_counts).t().flatten()
    rows = torch.arange(num_rows)
    row_src = torch.repeat_interleave(starts - exclusive_cumsum(counts), counts, output_size=num_rows).add_(rows)
    row_src = row_src.to(device)
    layout = rows.to(device) if positions is None else positions
    back_rows = torch.empty_like(row_src).scatter_(0, row_src, layout)
    return PlacePlan(row_src, positions, _pad_rows(groups, device), row_src, back_rows, None)


def _valid_positions(groups: Groups, device: torch.device) -> Tensor | None:
    """[V] layout row of each valid row in the order of the groups; None when the groups are packed without gaps."""
    return None if groups.packed else ranges(groups.starts, groups.counts).to(device)


def _pad_rows(groups: Groups, device: torch.device) -> Tensor:
    if not groups.zero_padded or groups.packed:
        return torch.empty(0, dtype=torch.int64, device=device)
    pads = groups.ends - groups.starts - groups.counts
    return ranges(groups.starts + groups.counts, pads).to(device)
