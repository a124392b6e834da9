"""Planted faults in gradients are found, and ranks that part ways in backward end with an error."""

import pytest
import torch

from moe_ep.errors import ExchangeMismatchError, PeerTimeoutError
from moe_ep.testing import RankContext, distributed_gradcheck
from tests.sharded import Leaves, Ranks, check_against_unsharded, make_case, make_leaves, run_layer

TINY = {"num_experts": 4, "top_k": 2, "hidden_size": 2}


def plant(ctx: RankContext, fault: str) -> tuple[str, str]:
    """Which of the two checks of this file see a fault in the backward exchanges."""
    case = make_case(ctx.world_size, tokens=(4, 3), kind="uniform", **TINY)
    dispatcher = case.dispatcher(ctx.group)
    exchanger = dispatcher._exchanger
    replay, combine_grads = exchanger.replay, exchanger.combine_grads
    if fault == "weight gradients swapped":
        exchanger.combine_grads = lambda grads, weights, plan: combine_grads(grads, weights.flip(0), plan)
    elif fault == "weight gradients lost":
        exchanger.combine_grads = lambda grads, weights, plan: combine_grads(grads, torch.zeros_like(weights), plan)
    elif fault == "row of gradients lost":
        exchanger.combine_grads = lambda grads, weights, plan: combine_grads(
            torch.cat([grads[:-1], torch.zeros_like(grads[-1:])]), weights, plan
        )
    elif fault == "tokens swapped in the reversed combine":
        exchanger.replay = lambda grad, plan: replay(grad.flip(0), plan)
    caught, topk_idx = [], case.routing(ctx.rank)[0]
    try:
        check_against_unsharded(ctx, case, dispatcher)
    except AssertionError as error:
        caught.append(str(error)[:40])
    try:
        distributed_gradcheck(
            lambda *leaves: run_layer(case, dispatcher, Leaves(*leaves), topk_idx),
            make_leaves(case, ctx.rank),
            group=ctx.group,
            max_elements=16,
        )
    except AssertionError as error:
        caught.append(str(error)[:40])
    return tuple(caught)


@pytest.mark.parametrize(
    "fault",
    [
        "none",
        "weight gradients swapped",
        "weight gradients lost",
        "row of gradients lost",
        "tokens swapped in the reversed combine",
    ],
)
def test_planted_faults_are_found(ranks: Ranks, fault: str) -> None:
    caught = ranks(2, plant, fault)
    if fault == "none":
        assert caught == [(), ()]
        return
    # The differences are compared on all ranks; equality on the rank whose gradients are wrong.
    assert all("gradients are wrong" in texts[-1] for texts in caught)
    assert any(len(texts) == 2 for texts in caught)


def leave_out_the_anchor(ctx: RankContext) -> tuple[str, tuple[int, ...]]:
    case = make_case(ctx.world_size, tokens=(3, 3, 0))
    dispatcher = case.dispatcher(ctx.new_group(), timeout_s=2)
    leaves = make_leaves(case, ctx.rank)
    if ctx.rank == 1:
        dispatcher._anchor = torch.zeros(())
        for leaf in leaves:
            leaf.requires_grad_(False)
    out = run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0])
    try:
        if out.requires_grad:
            out.sum().backward()
    except PeerTimeoutError as error:
        return type(error).__name__, error.ranks
    return "", ()


def test_without_the_anchor_peers_end_with_an_error(ranks: Ranks) -> None:
    assert ranks(3, leave_out_the_anchor) == [("PeerTimeoutError", (1,)), ("", ()), ("PeerTimeoutError", (1,))]


def use_no_output(ctx: RankContext) -> str:
    case = make_case(ctx.world_size)
    dispatcher, leaves = case.dispatcher(ctx.new_group(), timeout_s=5), make_leaves(case, ctx.rank)
    topk_idx = case.routing(ctx.rank)[0]
    try:
        out = run_layer(case, dispatcher, leaves, topk_idx)
        (out.sum() if ctx.rank == 0 else leaves.x.sum()).backward()
        run_layer(case, dispatcher, leaves, topk_idx)
    except ExchangeMismatchError as error:
        return str(error)
    return ""


def test_a_loss_without_the_output_on_one_rank_is_found_by_the_header(ranks: Ranks) -> None:
    for text in ranks(2, use_no_output):
        assert "replayed dispatch" in text
        assert ", dispatch" in text
