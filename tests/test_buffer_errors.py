"""Buffer: wrong arguments on one rank, stale handles, ranks that differ, grants that are too small."""

from collections.abc import Callable

import pytest
import torch

from moe_ep import Buffer, buffer_torch
from moe_ep.errors import (
    ExchangeMismatchError,
    MoeEpError,
    PeerAbortedError,
    StaleHandleError,
)
from moe_ep.testing import RankContext
from tests.buffer_checks import check_received, exchange_with, layout_of, make_case, visits

Ranks = Callable[..., list]


def dispatch_badly(ctx: RankContext, fault: str) -> Exception | None:
    case = make_case(2, tokens=(4, 4))
    group = ctx.new_group()
    buffer = Buffer(group, timeout_s=20)
    topk_idx, topk_weights = case.routing(ctx.rank)
    arguments: dict = {"x": case.x(ctx.rank), "topk_idx": topk_idx, "topk_weights": topk_weights}
    arguments |= layout_of(buffer, case, ctx.rank)
    if ctx.rank == 1:
        if fault == "x strided":
            arguments["x"] = arguments["x"].t().contiguous().t()
        elif fault == "x int":
            arguments["x"] = arguments["x"].int()
        elif fault == "odd rows":
            arguments["x"] = arguments["x"][:, :3].contiguous()
        elif fault == "ids int32":
            arguments["topk_idx"] = topk_idx.int()
        elif fault == "layout missing":
            arguments["is_token_in_rank"] = None
        elif fault == "layout of other tokens":
            arguments["is_token_in_rank"] = ~arguments["is_token_in_rank"]
        elif fault == "weights without ids":
            arguments["topk_idx"] = None
        elif fault == "alignment":
            arguments["expert_alignment"] = 0
        elif fault == "flags":
            arguments["allocate_on_comm_stream"] = True
        elif fault == "empty tuple":
            arguments["x"] = ()
        elif fault == "ids in a list":
            arguments["topk_idx"] = topk_idx.tolist()
        elif fault == "too many choices":
            arguments["topk_idx"] = topk_idx.new_full((4, 65), -1)
            arguments["topk_weights"] = None
        elif fault == "too many experts":
            arguments["num_tokens_per_expert"] = torch.zeros(4098, dtype=torch.int32)
    caught: Exception | None = None
    try:
        buffer.dispatch(**arguments)
    except (ValueError, MoeEpError) as error:
        caught = error
    # Nothing is lost.
    x = case.x(ctx.rank)
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout_of(buffer, case, ctx.rank), topk_idx=topk_idx)
    check_received(case, case.expected().ranks[ctx.rank], recv_x, handle)
    return caught


DISPATCH_FAULTS = {
    "x strided": r"x has strides.*contiguous",
    "x int": r"x has dtype torch\.int32",
    "odd rows": r"x\.shape\[1\]=3.*16 bytes",
    "ids int32": r"topk_idx.*torch\.int32.*torch\.int64",
    "layout missing": r"is_token_in_rank is NoneType",
    "layout of other tokens": r"is_token_in_rank",
    "weights without ids": r"topk_weights.*topk_idx",
    "alignment": r"expert_alignment=0",
    "flags": r"allocate_on_comm_stream=True needs",
    "empty tuple": r"x is tuple",
    "ids in a list": r"topk_idx is list",
    "too many choices": r"topk_idx\.shape\[1\]=65 must be at most 64",
    "too many experts": r"num_tokens_per_expert\.numel\(\)=4098 must be at most 4096",
}


@pytest.mark.parametrize("fault", DISPATCH_FAULTS)
def test_bad_dispatch_on_one_rank_ends_all(ranks: Ranks, fault: str) -> None:
    first, second = ranks(2, dispatch_badly, fault)
    with pytest.raises(ValueError, match=DISPATCH_FAULTS[fault]):
        raise second
    assert isinstance(first, PeerAbortedError)
    assert (first.rank, first.reason) == (1, f"ValueError: {second}")


def combine_badly(ctx: RankContext, fault: str) -> Exception | None:
    case = make_case(2, tokens=(4, 4))
    group = ctx.new_group()
    buffer, other = Buffer(group, timeout_s=20), Buffer(group, timeout_s=20)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=topk_weights)
    elsewhere = other.dispatch(x, **layout, topk_idx=topk_idx)[4]
    arguments: dict = {"x": recv_x, "handle": handle}
    if ctx.rank == 1:
        if fault == "rows missing":
            arguments["x"] = recv_x[1:]
        elif fault == "no handle":
            arguments["handle"] = None
        elif fault == "handle of another buffer":
            arguments["handle"] = elsewhere
        elif fault == "three biases":
            arguments["bias"] = (x, x, x)
        elif fault == "bias of another shape":
            arguments["bias"] = x[1:]
        elif fault == "weights of another shape":
            arguments["topk_weights"] = topk_weights.new_empty(recv_x.shape[0] + 1, 3)
        elif fault == "weights of another width":
            arguments["topk_weights"] = topk_weights.new_empty(recv_x.shape[0], case.top_k + 1)
        elif fault == "fp8 rows":
            arguments["x"] = recv_x.to(torch.float8_e4m3fn).repeat(1, 2)
    caught: Exception | None = None
    try:
        buffer.combine(**arguments)
    except (ValueError, MoeEpError) as error:
        caught = error
    combined = buffer.combine(recv_x, handle)[0]
    assert torch.equal(combined, (x.double() * visits(case, ctx.rank)).to(case.dtype))
    return caught


COMBINE_FAULTS = {
    "rows missing": (ValueError, r"x has shape"),
    "no handle": (ValueError, r"handle is NoneType"),
    "handle of another buffer": (StaleHandleError, r"another Buffer"),
    "three biases": (ValueError, r"bias has 3"),
    "bias of another shape": (ValueError, r"bias has shape"),
    "weights of another shape": (ValueError, r"topk_weights has shape"),
    "weights of another width": (ValueError, r"topk_weights has shape"),
    "fp8 rows": (ValueError, r"x has dtype torch\.float8_e4m3fn.*combine bf16"),
}


@pytest.mark.parametrize("fault", COMBINE_FAULTS)
def test_bad_combine_on_one_rank_ends_all(ranks: Ranks, fault: str) -> None:
    first, second = ranks(2, combine_badly, fault)
    kind, text = COMBINE_FAULTS[fault]
    with pytest.raises(kind, match=text):
        raise second
    assert isinstance(first, PeerAbortedError)
    assert first.rank == 1


def combine_other_weights(ctx: RankContext) -> str:
    case = make_case(2, tokens=(4, 4))
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    recv_x, _, weights, _, handle, _ = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=topk_weights)
    with pytest.raises(ExchangeMismatchError) as caught:
        buffer.combine(recv_x, handle, topk_weights=weights.double() if ctx.rank else weights)
    return str(caught.value)


def test_weights_that_differ_in_width_are_found_before_they_move(ranks: Ranks) -> None:
    assert all("torch.float64" in text and "torch.float32" in text for text in ranks(2, combine_other_weights))


def run_out_of_memory(ctx: RankContext, call: str) -> str:
    """Rank 1 finds no room for what it will receive: after its header, before its payload."""
    case = make_case(2, tokens=(4, 4))
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    x, topk_idx = case.x(ctx.rank), case.routing(ctx.rank)[0]
    layout = layout_of(buffer, case, ctx.rank)
    handle = buffer.dispatch(x, **layout, topk_idx=topk_idx)[4]

    def fail(*_: object) -> None:
        raise MemoryError("no room for rows")

    arguments: dict = {"handle": handle} if call == "replay" else layout
    if call == "dispatch":
        arguments = {**arguments, "topk_idx": topk_idx}
    with pytest.MonkeyPatch.context() as patch:
        if ctx.rank == 1:
            patch.setattr(buffer_torch, "_empty_rows", fail)
        with pytest.raises(MemoryError if ctx.rank == 1 else PeerAbortedError) as caught:
            buffer.dispatch(x, **arguments)
    buffer.reset()
    check_received(case, case.expected().ranks[ctx.rank], *buffer.dispatch(x, **layout, topk_idx=topk_idx)[0:5:4])
    return str(caught.value)


@pytest.mark.parametrize("call", ["dispatch", "dispatch of rows alone", "replay"])
def test_what_fails_between_header_and_payload_ends_all(ranks: Ranks, call: str) -> None:
    assert all("no room for rows" in text for text in ranks(2, run_out_of_memory, call))


def replay_badly(ctx: RankContext) -> list[str]:
    case = make_case(2, tokens=(4, 4))
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    x, topk_idx = case.x(ctx.rank), case.routing(ctx.rank)[0]
    layout = layout_of(buffer, case, ctx.rank)
    handle = buffer.dispatch(x, **layout, topk_idx=topk_idx)[4]
    texts = []
    for wrong in ({"x": x, "topk_idx": topk_idx}, {"x": x, **layout}, {"x": x[1:]}, {"x": (x, x, x)}):
        with pytest.raises(ValueError, match=r".") as caught:
            buffer.dispatch(**wrong, handle=handle)
        texts.append(str(caught.value))
    buffer.reset()
    with pytest.raises(StaleHandleError) as stale:
        buffer.dispatch(x, handle=handle)
    return [*texts, str(stale.value)]


def test_bad_replays(ranks: Ranks) -> None:
    for both, layout, rows, three, stale in ranks(2, replay_badly):
        assert "handle was given together" in both
        assert "handle was given together" in layout
        assert "x has shape [3, 8]" in rows
        assert "x is a tuple of 3" in three
        assert "reset()" in stale


def mismatched_rows(ctx: RankContext, what: str) -> str:
    case = make_case(2, tokens=(4, 4), hidden_size=16)
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    weights = topk_weights
    if ctx.rank == 1:
        x = x[:, :8].contiguous() if what == "H" else x.double() if what == "dtype" else x
        weights = None if what == "weights" else weights.double() if what == "dtype" else weights
    try:
        buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=weights)
    except ExchangeMismatchError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("what", ["H", "dtype", "weights"])
def test_ranks_that_differ_find_out_before_rows_move(ranks: Ranks, what: str) -> None:
    for text in ranks(2, mismatched_rows, what):
        assert "different exchanges" in text


def small_grant(ctx: RankContext) -> tuple[str, str]:
    buffer = Buffer(ctx.new_group(), num_nvl_bytes=1024)
    with pytest.raises(ValueError, match="num_nvl_bytes=1024.*at least") as caught:
        exchange_with(buffer, ctx)
    need = int(str(caught.value).split("at least ")[1].split()[0])
    exchange_with(Buffer(ctx.new_group(), num_nvl_bytes=need), ctx)
    try:
        Buffer(ctx.new_group(), num_nvl_bytes=2048 if ctx.rank else 4096)
    except ExchangeMismatchError as error:
        return str(caught.value), str(error)
    return str(caught.value), "accepted"


def test_a_grant_that_is_too_small_says_what_is_needed(ranks: Ranks) -> None:
    for _, mismatch in ranks(2, small_grant):
        assert "num_nvl_bytes=2048" in mismatch
        assert "num_nvl_bytes=4096" in mismatch


def test_layouts_of_too_many_experts_or_choices_are_refused() -> None:
    buffer = Buffer(None)
    with pytest.raises(ValueError, match="num_experts=4097 must be at most 4096"):
        buffer.get_dispatch_layout(torch.zeros(2, 1, dtype=torch.int64), 4097)
    with pytest.raises(ValueError, match=r"topk_idx\.shape\[1\]=65 must be at most 64"):
        buffer.get_dispatch_layout(torch.arange(65).unsqueeze(0), 128)
    assert buffer.get_dispatch_layout(torch.arange(64).unsqueeze(0), 4096)[0].tolist() == [1]


def choose_badly(ctx: RankContext) -> str:
    """One rank's router names an expert that is not there, and asks for the layout of that, as programs do."""
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    case = make_case(2, tokens=(4, 4))
    topk_idx, topk_weights = case.routing(ctx.rank)
    if ctx.rank == 1:
        topk_idx[2, 0] = case.num_experts
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.num_experts)
    try:
        buffer.dispatch(
            case.x(ctx.rank),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )
    except (ValueError, MoeEpError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_ids_that_one_rank_has_wrong_end_all(ranks: Ranks) -> None:
    first, second = ranks(2, choose_badly)
    assert second.startswith("ValueError: topk_idx")
    assert first.startswith("PeerAbortedError: rank 1 raised instead")
    assert second in first


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"num_nvl_bytes": "x"}, "num_nvl_bytes='x' must be an integer of at least 0, 0 to reserve"),
        ({"num_rdma_bytes": -1}, "num_rdma_bytes=-1 must be an integer of at least 0"),
        ({"max_tokens_per_rank": -3}, "max_tokens_per_rank=-3 must be an integer of at least 1, or None"),
        ({"ranks_per_node": 0.5}, r"ranks_per_node=0\.5 must be an integer of at least 1"),
    ],
    ids=str,
)
def test_sizes_are_integers(settings: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Buffer(None, **settings)


def test_numbers_of_calls_are_integers() -> None:
    buffer, topk_idx = Buffer(None), torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"num_experts=2\.0 must be an integer"):
        buffer.get_dispatch_layout(topk_idx, 2.0)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2)
    for name, value in (("num_worst_tokens", "4"), ("expert_alignment", 1.5), ("num_worst_tokens", -1)):
        with pytest.raises(ValueError, match=f"{name}={value!r} must be an integer"):
            buffer.dispatch(
                torch.ones(2, 8),
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=topk_idx,
                topk_weights=torch.ones(2, 1),
                **{name: value},
            )


def reserve_badly(ctx: RankContext, sizes: tuple) -> Exception | None:
    buffer = Buffer(ctx.new_group(), timeout_s=20)
    caught: Exception | None = None
    try:
        buffer.reserve(*(sizes if ctx.rank == 1 else (8, 64)))
    except (ValueError, MoeEpError) as error:
        caught = error
    assert buffer.reserve(8 + ctx.rank, 64) == buffer.memory_report(9, 64)["exchange_bytes"]
    exchange_with(buffer, ctx)
    return caught


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ((-1, 64), "max_tokens_per_rank=-1 must be a positive int"),
        ((8, 0), "row_bytes=0 must be a positive int"),
        ((8.5, 64), r"max_tokens_per_rank=8\.5 must be a positive int"),
        ((2**31, 64), "must be a positive int below"),
    ],
    ids=str,
)
def test_wrong_sizes_to_reserve_end_all(ranks: Ranks, sizes: tuple, text: str) -> None:
    first, second = ranks(2, reserve_badly, sizes)
    with pytest.raises(ValueError, match=text):
        raise second
    assert isinstance(first, PeerAbortedError)
    assert first.rank == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": torch.float32, "size": -1}, "size=-1 must be an int of 0 or more"),
        ({"dtype": torch.float32, "size": 1.5}, r"size=1\.5 must be an int"),
        ({"dtype": torch.float32, "offset": -4}, "offset=-4 must be an int of 0 or more"),
        ({"dtype": torch.float32, "offset": 2}, "offset=2.*do not lie in the buffer"),
        ({"dtype": torch.float32, "offset": 1028}, "offset=1028.*do not lie in the buffer of 1024 bytes"),
        ({"dtype": torch.uint8, "size": 1025}, "size=1025.*do not lie in the buffer"),
        ({"dtype": "float32"}, "dtype='float32' must be a torch.dtype"),
    ],
    ids=str,
)
def test_local_memory_outside_of_the_buffer_is_refused(arguments: dict, text: str) -> None:
    buffer = Buffer(None, num_nvl_bytes=1024)
    with pytest.raises(ValueError, match=text):
        buffer.get_local_buffer_tensor(**arguments)
    assert buffer.get_local_buffer_tensor(torch.float32, size=0, offset=1024).numel() == 0
