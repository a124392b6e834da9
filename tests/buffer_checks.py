"""Exchanges of Buffer, checked against the brute-force oracle."""

import torch

from moe_ep import Buffer
from moe_ep.testing import RankContext, uneven_tokens
from moe_ep.testing.reference import ExpectedRank
from tests.checks import Case


def make_case(num_ranks: int, **fields: object) -> Case:
    tokens = tuple(uneven_tokens(9, num_ranks, seed=num_ranks + 1))
    return Case(**{"tokens": tokens, "num_experts": 3 * num_ranks, "layout": "compact", "kind": "holes", **fields})


def layout_of(buffer: Buffer, case: Case, rank: int) -> dict:
    """The layout arguments of a dispatch, checked against plain counting."""
    topk_idx, _ = case.routing(rank)
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx, case.num_experts)
    local = case.num_experts // case.num_ranks
    rows = [{expert // local for expert in row if expert >= 0} for row in topk_idx.tolist()]
    assert (per_rank.dtype, per_expert.dtype, in_rank.dtype) == (torch.int32, torch.int32, torch.bool)
    assert per_rank.tolist() == [sum(r in row for row in rows) for r in range(case.num_ranks)]
    assert per_expert.tolist() == [int((topk_idx == j).sum()) for j in range(case.num_experts)]
    assert in_rank.tolist() == [[r in row for r in range(case.num_ranks)] for row in rows]
    assert per_node is None
    event.current_stream_wait()
    return {"num_tokens_per_rank": per_rank, "is_token_in_rank": in_rank, "num_tokens_per_expert": per_expert}


def check_received(case: Case, mine: ExpectedRank, recv_x: torch.Tensor, handle: tuple) -> None:
    """Rows in (source rank, token) order, and where they came from."""
    target = [case.x(source)[token] for source, token, _ in mine.rows.values()]
    target = torch.stack(target) if target else recv_x.new_empty(0, case.hidden_size)
    assert torch.equal(recv_x[: len(mine.rows)], target)
    assert handle[3].dtype == torch.int32
    assert handle[3].tolist() == [token for _, token, _ in mine.rows.values()]


def check_handle(case: Case, rank: int, handle: tuple) -> None:
    prefix, in_rank = handle[0], handle[4]
    assert (prefix.dtype, in_rank.dtype) == (torch.int32, torch.bool)
    assert in_rank.shape == (case.tokens[rank], case.num_ranks)
    ranks = case.expected().ranks
    for source in range(case.num_ranks):
        for destination in range(case.num_ranks):
            rows = ranks[destination].rows.values()
            assert int(prefix[source, destination]) == sum(s <= source for s, _, _ in rows)
    assert handle._fields[:6] == (
        "rank_prefix_matrix",
        "channel_prefix_matrix",
        "recv_channel_prefix_matrix",
        "recv_src_idx",
        "is_token_in_rank",
        "send_head",
    )


def visits(case: Case, rank: int) -> torch.Tensor:
    """[T, 1] number of ranks that receive each token."""
    local = case.num_experts // case.num_ranks
    counts = [len({j // local for j in row if j >= 0}) for row in case.routing(rank)[0].tolist()]
    return torch.tensor(counts, dtype=torch.float64).reshape(-1, 1)


def exchange_in(ctx: RankContext, case: Case) -> None:
    buffer = Buffer.for_group(ctx.group)
    x, (topk_idx, _) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(x, **layout, topk_idx=topk_idx)
    assert recv_x.dtype == case.dtype
    assert recv_weights is None
    assert recv_idx.tolist() == case.expected().ranks[ctx.rank].local_ids
    check_received(case, case.expected().ranks[ctx.rank], recv_x, handle)
    combined, weights, _ = buffer.combine(recv_x, handle)
    assert weights is None
    assert torch.equal(combined, (x.double() * visits(case, ctx.rank)).to(case.dtype))


def exchange_with(buffer: Buffer, ctx: RankContext) -> None:
    case = make_case(ctx.world_size)
    topk_idx, _ = case.routing(ctx.rank)
    buffer.dispatch(case.x(ctx.rank), **layout_of(buffer, case, ctx.rank), topk_idx=topk_idx)
