"""TokenDispatcher on parts of the world, meshes and copies; fp8 rows, reports and timeouts."""

import copy
import dataclasses
import os
import time
from collections.abc import Callable

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

import moe_ep
from moe_ep import Capacity, TokenDispatcher
from moe_ep.errors import MoeEpError
from moe_ep.testing import RankContext, make_routing
from tests.checks import (
    Case,
    flat_rows,
    round_trip,
    rounding_of_sums,
)

Ranks = Callable[..., list]


LAYOUTS = {
    "expanded": {},
    "aligned": {"alignment": 4},
    "compact": {"layout": "compact", "weights": "experts"},
    "slab": {"layout": "slab", "max_tokens_per_rank": 40},
}


def collect_attributes(ctx: RankContext) -> dict:
    case = Case(tokens=(3, 3), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(ctx.group, backend="torch")
    routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    names = ("rank", "group_size", "num_experts", "num_local_experts", "hidden_size", "top_k", "dtype", "layout")
    found = {name: getattr(dispatcher, name) for name in (*names, "weights", "capacity", "backend_name")}
    found["same group"] = dispatcher.group is ctx.group
    found["parameters"] = len(list(dispatcher.parameters())) + len(dispatcher.state_dict())
    found["list"] = routed.tokens_per_expert_list == routed.tokens_per_expert.tolist()
    found["num_rows"] = int(routed.num_rows) == routed.x.shape[0]
    found["overflow"], found["scales"] = routed.overflow, routed.scales
    found["frozen"] = dataclasses.is_dataclass(routed) and type(routed).__dataclass_params__.frozen
    return found


def test_attributes_and_exact_mode(ranks: Ranks) -> None:
    for rank, found in enumerate(ranks(2, collect_attributes)):
        assert found == {
            "rank": rank,
            "group_size": 2,
            "num_experts": 6,
            "num_local_experts": 3,
            "hidden_size": 8,
            "top_k": 2,
            "dtype": torch.float32,
            "layout": "expanded",
            "weights": "combine",
            "capacity": None,
            "backend_name": "torch",
            "same group": True,
            "parameters": 0,
            "list": True,
            "num_rows": True,
            "overflow": None,
            "scales": None,
            "frozen": True,
        }


def reports(ctx: RankContext, case: Case) -> tuple[dict, dict]:
    dispatcher = case.dispatcher(ctx.group)
    before = dispatcher.memory_report(max_tokens_per_rank=100)
    round_trip(ctx, case, dispatcher)
    # Rank 0 waits for it.
    time.sleep(0.5 * ctx.rank)
    round_trip(ctx, case, dispatcher)
    assert dispatcher.memory_report(max_tokens_per_rank=100) == before
    return dispatcher.stats(), before


def test_reports(ranks: Ranks) -> None:
    case = Case(tokens=(6, 4), kind="zipf")
    for rank, (stats, memory) in enumerate(ranks(2, reports, case)):
        assert stats["exchanges"] == 4
        assert stats["tokens_per_expert"].tolist() == [2 * n for n in case.expected().ranks[rank].tokens_per_expert]
        assert stats["wait_seconds"] > (0.3 if rank == 0 else 0)
        # Rows of 32 bytes and their weights, one for each choice; six words of a plan for each choice.
        assert memory["saved_bytes_per_layer"] == 100 * case.top_k * (32 + 4)
        assert memory["plan_bytes_per_layer"] == 100 * case.top_k * 6 * 8
        assert memory["arena_bytes"] == 0
        # 100 tokens of 32 bytes go to each of two ranks at least.
        assert memory["exchange_bytes"] > 100 * 32 * 2


def exchange_in_subgroups(ctx: RankContext) -> None:
    # Ranks 0 and 3 have made more groups than 1 and 2: nothing may follow from how many a process has.
    ctx.new_group([0, 3])
    halves = [ctx.new_group([0, 2]), ctx.new_group([3, 1])]
    members = [[0, 2], [1, 3]]
    mine = 0 if halves[0] is not None else 1
    place = members[mine].index(ctx.rank)
    case = Case(tokens=(5, 6), kind="holes", seed=mine)
    # Both halves exchange at the same time, and one of them makes a second Buffer.
    dispatcher = case.dispatcher(halves[mine])
    assert (dispatcher.rank, dispatcher.group_size) == (place, 2)
    round_trip(RankContext(place, 2, halves[mine]), case, dispatcher)
    if mine == 0:
        own = moe_ep.Buffer(halves[0])
        round_trip(RankContext(place, 2, halves[0]), case, case.dispatcher(halves[0], buffer=own))
        with pytest.raises(ValueError, match="buffer belongs to another group"):
            case.dispatcher(halves[0], buffer=moe_ep.Buffer(None))


def test_groups_that_are_parts_of_the_world(ranks: Ranks) -> None:
    ranks(4, exchange_in_subgroups)


def exchange_over_meshes(ctx: RankContext) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    place = ctx.rank % 2
    case = Case(tokens=(5, 6), kind="holes", seed=ctx.rank // 2)
    dispatcher = case.dispatcher(mesh["ep"])
    assert dispatcher.group is mesh["ep"].get_group()
    round_trip(RankContext(place, 2, dispatcher.group), case, dispatcher)
    with pytest.raises(ValueError, match="2 dimensions"):
        case.dispatcher(mesh)


def test_device_meshes(ranks: Ranks) -> None:
    ranks(4, exchange_over_meshes)


def fp8_pairs(ctx: RankContext, case: Case, grad: bool) -> None:
    def quantized(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = torch.rand(case.tokens[rank], 2, generator=torch.Generator().manual_seed(rank))
        return case.x(rank).to(torch.float8_e4m3fn), scales.t().contiguous().t()

    dispatcher = case.dispatcher(ctx.group)
    with torch.set_grad_enabled(grad), pytest.MonkeyPatch.context() as patch:
        if not grad:
            # Whoever waits at once, and for rows alone, is given no stream and no Function.
            patch.delattr(TokenDispatcher, "dispatch_async")
        routed = dispatcher.dispatch(quantized(ctx.rank), *case.routing(ctx.rank))
    mine = case.expected().ranks[ctx.rank]
    everyone = [quantized(rank) for rank in range(case.num_ranks)]
    assert (routed.x.dtype, routed.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    rows, scales = flat_rows(routed).view(torch.uint8), routed.scales.reshape(-1, 2)
    for row, (source, token, _) in mine.rows.items():
        assert torch.equal(rows[row], everyone[source][0][token].view(torch.uint8))
        assert torch.equal(scales[row], everyone[source][1][token])
    assert not rows[mine.padding].any()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [{"num_experts": 6, "top_k": 4}, {"num_experts": 2, "top_k": 1}], ids=str)
def test_fp8_rows_travel_with_their_scales(ranks: Ranks, layout: str, shape: dict, grad: bool) -> None:
    case = Case(tokens=(5, 7), hidden_size=256, dtype=torch.bfloat16, kind="holes", **shape, **LAYOUTS[layout])
    ranks(2, fp8_pairs, case, grad)


def cast_on_the_wire(ctx: RankContext, case: Case) -> None:
    dispatcher = case.dispatcher(ctx.group, wire_dtype=torch.float8_e4m3fn)
    x = case.x(ctx.rank).requires_grad_()
    topk_idx, topk_weights = case.routing(ctx.rank)
    routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    assert routed.x.dtype == case.dtype
    assert routed.scales is None
    for row, (source, token, _) in case.expected().ranks[ctx.rank].rows.items():
        sent, groups = case.x(source)[token].float(), routed.x[row].detach().float().view(-1, 128)
        # e4m3 keeps 3 bits behind the point: half a unit is 2^-4 of the value, or 2^-10 of the scale near zero, where
        # scale = amax / 448; the result is rounded to bf16 once more.
        amax = sent.view(-1, 128).abs().amax(1, keepdim=True)
        bound = (2.0**-4 + 2.0**-8) * sent.view(-1, 128).abs() + 2.0**-10 * amax / 448
        assert bool(((groups - sent.view(-1, 128)).abs() <= bound).all())
    # Straight through: the gradient is that of an exchange without a cast.
    dispatcher.combine(routed.x, routed.handle, routed.weights).sum().backward()
    weights = (topk_weights * (topk_idx >= 0)).sum(1, keepdim=True)
    # Partial sums are rounded to bf16 per rank and once more in the end, and each term is of one sign.
    torch.testing.assert_close(x.grad.float(), weights.expand_as(x), rtol=2 * 2.0**-8 * 1.01, atol=0)


@pytest.mark.parametrize("shape", [{"num_experts": 6, "top_k": 4}, {"num_experts": 2, "top_k": 1}], ids=str)
@pytest.mark.parametrize(("tokens", "kind"), [((5, 7), "holes"), ((5, 0), "one"), ((0, 0), "holes")])
def test_rows_may_be_cast_for_the_wire(ranks: Ranks, shape: dict, tokens: tuple[int, int], kind: str) -> None:
    case = Case(tokens=tokens, hidden_size=256, dtype=torch.bfloat16, kind=kind, **shape)
    ranks(2, cast_on_the_wire, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["expanded", "slab"])
def test_sums_may_travel_in_fp32(ranks: Ranks, layout: str, dtype: torch.dtype) -> None:
    for out, dx in ranks(2, rounding_of_sums, layout, dtype, torch.float32):
        assert out <= 1.001
        assert dx <= 1.001
    # What the option is for: without it sums are rounded once per rank as well.
    for out, dx in ranks(2, rounding_of_sums, layout, dtype, None):
        assert 1.1 < out < 3.0
        assert 1.1 < dx < 3.0


def train_after(ctx: RankContext, mode: str) -> None:
    """A dispatcher constructed, and first used, in a mode of the caller's trains outside of it."""
    case = Case(tokens=(5, 4), num_experts=4, top_k=2)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)

    def exchange(dispatcher: moe_ep.TokenDispatcher, asynchronous: bool) -> torch.Tensor:
        if asynchronous:
            routed = dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
            return dispatcher.combine_async(routed.x, routed.handle, routed.weights).wait()
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        return dispatcher.combine(routed.x, routed.handle, routed.weights)

    entered = torch.inference_mode() if mode == "inference" else torch.device("meta")
    with entered:
        dispatcher = case.dispatcher(ctx.new_group())
        first = [exchange(dispatcher, asynchronous) for asynchronous in (False, True)]
    x.requires_grad_()
    for asynchronous, out in zip((True, False), first, strict=True):
        again = exchange(dispatcher, asynchronous)
        assert torch.equal(again, out)
        again.sum().backward()
    assert dispatcher.stats()["tokens_per_expert"].sum() > 0
    round_trip(ctx, case, dispatcher)


@pytest.mark.parametrize("mode", ["inference", "default device"])
def test_modes_of_the_caller_leave_no_trace(ranks: Ranks, mode: str) -> None:
    ranks(2, train_after, mode)


def read_timeouts(ctx: RankContext) -> list[float]:
    timeouts = [moe_ep.Buffer(ctx.new_group()).timeout_s]
    os.environ["MOE_EP_TIMEOUT_S"] = "7"
    try:
        timeouts.append(moe_ep.Buffer(ctx.new_group()).timeout_s)
        timeouts.append(moe_ep.Buffer(ctx.new_group(), timeout_s=3).timeout_s)
    finally:
        del os.environ["MOE_EP_TIMEOUT_S"]
    return timeouts


def test_timeouts_come_from_argument_environment_default(ranks: Ranks) -> None:
    assert ranks(2, read_timeouts) == [[600.0, 7.0, 3.0]] * 2


def copy_and_reattach(ctx: RankContext) -> str:
    case = Case(tokens=(3, 4))
    dispatcher = case.dispatcher(ctx.group)
    clone = copy.deepcopy(dispatcher)
    text = ""
    if clone.group is None:
        try:
            clone.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
        except (MoeEpError, ValueError) as error:
            text = str(error)
    clone.set_group(ctx.group)
    round_trip(ctx, case, clone)
    round_trip(ctx, case, dispatcher)
    return text


def test_a_copy_works_once_its_group_is_set(ranks: Ranks) -> None:
    ranks(2, copy_and_reattach)


def fp8_weights(ctx: RankContext) -> None:
    dispatcher = TokenDispatcher(
        ctx.group, num_experts=4, hidden_size=128, top_k=2, dtype=torch.float32, weights="experts"
    )
    topk_idx, weights = make_routing(6 * ctx.rank, 2, 4, kind="uniform", seed=ctx.rank)
    weights.requires_grad_()
    rows = torch.ones(topk_idx.shape[0], 128).to(torch.float8_e4m3fn)
    routed = dispatcher.dispatch((rows, torch.ones(topk_idx.shape[0], 1)), topk_idx, weights)
    assert not routed.x.requires_grad
    y = routed.x.float() * routed.weights.unsqueeze(1)
    dispatcher.combine(y, routed.handle).sum().backward()
    # Each row of ones adds its weight to 128 channels.
    assert torch.equal(weights.grad, torch.full_like(weights, 128.0))


def test_fp8_rows_pass_the_gradient_of_their_weights(ranks: Ranks) -> None:
    ranks(2, fp8_weights)


def outgrow_factor(ctx: RankContext) -> tuple[list[int], str]:
    group = ctx.new_group()
    dispatcher = TokenDispatcher(
        group, num_experts=4, hidden_size=8, top_k=2, dtype=torch.float32, capacity=Capacity(factor=2.0)
    )
    other = TokenDispatcher(group, num_experts=4, hidden_size=8, top_k=2, dtype=torch.float32)
    sizes, text = [], ""
    for exchanger, tokens in ((dispatcher, 6), (other, 50), (dispatcher, 3), (dispatcher, 7), (dispatcher, 6)):
        own = tokens - ctx.rank
        topk_idx, weights = make_routing(own, 2, 4, kind="uniform", seed=ctx.rank)
        try:
            routed = exchanger.dispatch(torch.ones(own, 8), topk_idx, weights)
        except ValueError as error:
            text = str(error)
        else:
            sizes += [routed.num_rows] if exchanger is dispatcher else []
    return sizes, text


def test_a_capacity_factor_keeps_the_tokens_of_the_first_exchange(ranks: Ranks) -> None:
    for sizes, text in ranks(2, outgrow_factor):
        # ceil(2.0 * R * T * K / E) rows for each of e = 2 experts, T = 6, whatever came in between.
        assert sizes == [2 * 12] * 3
        assert "7 tokens" in text
        assert "max_tokens_per_rank" in text


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_tokens_per_rank": "8"}, "max_tokens_per_rank='8' must be an integer of at least 1, or None"),
        ({"max_tokens_per_rank": 1.5}, r"max_tokens_per_rank=1\.5 must be an integer"),
        ({"num_experts": True}, "num_experts=True must be an integer"),
        ({"expert_map": torch.zeros(0, 2, dtype=torch.int32)}, r"expert_map has shape \[0, 2\]: give at least one"),
        ({"buffer": "b"}, "buffer is str"),
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind_are_named(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        TokenDispatcher(None, **{"num_experts": 4, "hidden_size": 8, "top_k": 2, **settings})


def test_the_low_latency_family_is_refused_by_name() -> None:
    with pytest.raises(moe_ep.errors.NotBuiltError, match="low_latency_mode=True needs the low-latency family"):
        moe_ep.Buffer(None, low_latency_mode=True)
    with pytest.raises(moe_ep.errors.NotBuiltError, match="get_low_latency_rdma_size_hint needs"):
        moe_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    buffer = moe_ep.Buffer(None, backend="torch")
    names = ("clean_low_latency_buffer", "low_latency_dispatch", "low_latency_combine")
    names += ("get_next_low_latency_combine_buffer", "low_latency_update_mask_buffer")
    for name in (*names, "low_latency_query_mask_buffer", "low_latency_clean_mask_buffer"):
        with pytest.raises(moe_ep.errors.NotBuiltError, match=f"{name} needs.*TokenDispatcher with a capacity"):
            getattr(buffer, name)(None, None)
