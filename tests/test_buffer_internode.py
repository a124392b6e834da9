"""The internode names of Buffer's exchanges, on one node and on several."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_ep import Buffer
from moe_ep.errors import PeerAbortedError
from moe_ep.testing import RankContext
from tests.buffer_checks import make_case

Ranks = Callable[..., list]


def exchange_both_ways(ctx: RankContext, ranks_per_node: int) -> None:
    case = make_case(ctx.world_size)
    buffer = Buffer(ctx.new_group(), timeout_s=20, ranks_per_node=ranks_per_node)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.num_experts)
    assert (per_node is None) == (ranks_per_node == ctx.world_size)
    layout = (per_rank, per_node, in_rank, per_expert, topk_idx, topk_weights)
    results = []
    for dispatch, combine in (
        (buffer.dispatch, buffer.combine),
        (buffer.internode_dispatch, buffer.internode_combine),
    ):
        recv_x, recv_idx, recv_weights, counts, handle, event = dispatch(x, None, *layout, expert_alignment=4)
        event.current_stream_wait()
        again = dispatch(2 * x, handle)[0]
        combined, weights, event = combine(recv_x, handle, recv_weights, bias=x, async_finish=True)
        event.current_stream_wait()
        results.append([recv_x, recv_idx, recv_weights, torch.tensor(counts), *handle[:7], again, combined, weights])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    with pytest.raises((ValueError, PeerAbortedError), match="handle is NoneType"):
        buffer.internode_combine(x, None)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 2), (2, 1), (4, 2), (3, 1)])
def test_internode_names_give_the_same(ranks: Ranks, num_ranks: int, ranks_per_node: int) -> None:
    ranks(num_ranks, exchange_both_ways, ranks_per_node)
