"""Buffer: the tuple interface, position by position, against the brute-force oracle."""

import gc
import importlib
import importlib.util
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_ep import Buffer, Config, EventOverlap
from moe_ep.backends.cuda import why_not_by_itself
from moe_ep.errors import (
    CapacityError,
    MoeEpError,
    NotBuiltError,
)
from moe_ep.testing import RankContext, make_routing
from tests.buffer_checks import check_handle, check_received, exchange_in, exchange_with, layout_of, make_case, visits
from tests.checks import Case

Ranks = Callable[..., list]


def exchange(ctx: RankContext, case: Case, asynchronous: bool) -> None:
    buffer = Buffer.for_group(ctx.group)
    mine = case.expected().ranks[ctx.rank]
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    topk_weights = topk_weights.float()
    flags: dict = {}
    if asynchronous:
        flags = {"previous_event": Buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}
    recv_x, recv_idx, recv_weights, counts, handle, event = buffer.dispatch(
        x,
        **layout_of(buffer, case, ctx.rank),
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_alignment=4,
        config=Buffer.get_dispatch_config(case.num_ranks),
        **flags,
    )
    assert isinstance(event, EventOverlap)
    with event:
        assert counts == [(n + 3) // 4 * 4 for n in mine.tokens_per_expert]
    check_received(case, mine, recv_x, handle)
    check_handle(case, ctx.rank, handle)
    assert (recv_idx.dtype, recv_weights.dtype) == (torch.int64, torch.float32)
    assert recv_idx.tolist() == mine.local_ids
    for row, (source, token, _) in enumerate(mine.rows.values()):
        here = recv_idx[row] >= 0
        assert torch.equal(recv_weights[row][here], case.routing(source)[1][token][here].float())
        assert not recv_weights[row][~here].any()

    combined, weights, event = buffer.combine(recv_x * 2, handle, topk_weights=recv_weights, **flags)
    event.current_stream_wait()
    # At most four equal copies: every partial sum is exact in fp32, and the result is rounded once.
    assert torch.equal(combined, (x.double() * 2 * visits(case, ctx.rank)).to(case.dtype))
    assert weights.dtype == torch.float32
    assert torch.equal(weights, topk_weights.masked_fill(topk_idx < 0, 0.0))

    again, *nothing, event = buffer.dispatch(x * 4, handle=handle, **flags)
    event.current_stream_wait()
    assert nothing == [None, None, None, None]
    assert torch.equal(again, recv_x * 4)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_dispatch_combine_and_replay(ranks: Ranks, num_ranks: int, asynchronous: bool) -> None:
    ranks(num_ranks, exchange, make_case(num_ranks), asynchronous)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype(ranks: Ranks, dtype: torch.dtype) -> None:
    # Weights of an exchange stay fp32 here, whatever the rows are.
    ranks(2, exchange_in, make_case(2, dtype=dtype))


@pytest.mark.parametrize("kind", ["uniform", "one", "empty"])
def test_edges(ranks: Ranks, kind: str) -> None:
    ranks(3, exchange, make_case(3, kind=kind), False)
    ranks(3, exchange, make_case(3, kind=kind, tokens=(0, 0, 0)), False)
    ranks(3, exchange, make_case(3, kind=kind, num_experts=3, top_k=3), False)


def rows_only(ctx: RankContext, case: Case) -> None:
    buffer = Buffer.for_group(ctx.group)
    mine = case.expected().ranks[ctx.rank]
    x, layout = case.x(ctx.rank), layout_of(buffer, case, ctx.rank)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(x, **layout, expert_alignment=2)
    assert recv_idx is None
    assert recv_weights is None
    assert counts == [(n + 1) // 2 * 2 for n in mine.tokens_per_expert]
    check_received(case, mine, recv_x, handle)
    check_handle(case, ctx.rank, handle)
    combined, _, _ = buffer.combine(recv_x, handle)
    assert torch.equal(combined, (x.double() * visits(case, ctx.rank)).to(case.dtype))


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_dispatch_without_choices_moves_rows(ranks: Ranks, num_ranks: int) -> None:
    ranks(num_ranks, rows_only, make_case(num_ranks))


def worst_case_rows(ctx: RankContext, case: Case, num_worst_tokens: int) -> None:
    buffer = Buffer.for_group(ctx.group)
    mine = case.expected().ranks[ctx.rank]
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        x, **layout, topk_idx=topk_idx, topk_weights=topk_weights, num_worst_tokens=num_worst_tokens
    )
    valid = len(mine.rows)
    assert recv_x.shape[0] == recv_idx.shape[0] == recv_weights.shape[0] == num_worst_tokens
    assert counts == []
    assert handle.num_recv_tokens.dim() == 0
    assert int(handle.num_recv_tokens) == valid
    check_received(case, mine, recv_x, handle)
    assert recv_idx[:valid].tolist() == mine.local_ids
    assert bool((recv_idx[valid:] == -1).all())
    y = recv_x.clone()
    y[valid:] = float("nan")
    combined, _, _ = buffer.combine(y, handle)
    assert torch.equal(combined, (x.double() * visits(case, ctx.rank)).to(case.dtype))
    again = buffer.dispatch(x * 2, handle=handle)[0]
    assert torch.equal(again[:valid], recv_x[:valid] * 2)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_worst_case_rows(ranks: Ranks, num_ranks: int) -> None:
    ranks(num_ranks, worst_case_rows, make_case(num_ranks), 40)


def too_few_rows(ctx: RankContext) -> tuple[int, int, int]:
    # Six tokens of each rank choose expert 0 alone: rank 0 receives 12 rows, rank 1 none.
    case = make_case(2, tokens=(6, 6), kind="one", top_k=1, num_experts=4)
    buffer = Buffer.for_group(ctx.new_group())
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    layout = layout_of(buffer, case, ctx.rank)
    recv_x, *_, handle, _ = buffer.dispatch(
        x, **layout, topk_idx=topk_idx, topk_weights=topk_weights, num_worst_tokens=10
    )
    assert recv_x.shape == (10, 8)
    with pytest.raises(CapacityError, match="12 rows.*num_worst_tokens=10") as caught:
        buffer.combine(recv_x, handle)
    exchange_in(RankContext(ctx.rank, 2, buffer.group), replace(case, kind="uniform"))
    return caught.value.rank, caught.value.needed, caught.value.given


def test_too_few_worst_case_rows_raise_on_all_ranks(ranks: Ranks) -> None:
    assert ranks(2, too_few_rows) == [(0, 12, 10)] * 2


def fp8_rows(ctx: RankContext, order: str, scale_dtype: torch.dtype) -> None:
    case = make_case(2, hidden_size=256)
    buffer = Buffer.for_group(ctx.group)
    mine = case.expected().ranks[ctx.rank]

    def quantized(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = case.x(rank).to(torch.float8_e4m3fn)
        scales = torch.arange(case.tokens[rank] * 2).reshape(-1, 2) + 1000 * rank
        return rows, scales.to(scale_dtype)

    rows, scales = quantized(ctx.rank)
    if order == "column-major":
        scales = scales.t().contiguous().t()
    elif order == "padded":
        scales = torch.cat([scales, scales], dim=1)[:, :2]
    topk_idx, topk_weights = case.routing(ctx.rank)
    (recv_rows, recv_scales), recv_idx, _, _, handle, _ = buffer.dispatch(
        (rows, scales), **layout_of(buffer, case, ctx.rank), topk_idx=topk_idx, topk_weights=topk_weights
    )
    assert recv_idx.tolist() == mine.local_ids
    everyone = [quantized(rank) for rank in range(2)]
    assert (recv_rows.dtype, recv_scales.dtype) == (torch.float8_e4m3fn, scale_dtype)
    assert recv_scales.is_contiguous()
    assert recv_scales.shape == (len(mine.rows), 2)
    for row, (source, token, _) in mine.rows.items():
        assert torch.equal(recv_rows[row].view(torch.uint8), everyone[source][0][token].view(torch.uint8))
        assert torch.equal(recv_scales[row], everyone[source][1][token])
    again, again_scales = buffer.dispatch((rows, scales * 2), handle=handle)[0]
    assert torch.equal(again.view(torch.uint8), recv_rows.view(torch.uint8))
    assert torch.equal(again_scales, recv_scales * 2)
    # Experts answer in bf16.
    combined = buffer.combine(recv_rows.bfloat16(), handle)[0]
    target = (rows.double() * visits(case, ctx.rank)).bfloat16()
    assert torch.equal(combined, target)


@pytest.mark.parametrize("order", ["row-major", "column-major", "padded"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32])
def test_fp8_rows_travel_as_they_are(ranks: Ranks, order: str, scale_dtype: torch.dtype) -> None:
    ranks(2, fp8_rows, order, scale_dtype)


def biased(ctx: RankContext, dtype: torch.dtype, num_biases: int) -> None:
    case = make_case(3, dtype=dtype)
    buffer = Buffer.for_group(ctx.group)
    x, (topk_idx, _) = case.x(ctx.rank), case.routing(ctx.rank)
    recv_x, *_, handle, _ = buffer.dispatch(x, **layout_of(buffer, case, ctx.rank), topk_idx=topk_idx)
    biases = tuple(replace(case, seed=5 + i).x(ctx.rank) for i in range(num_biases))
    combined = buffer.combine(recv_x, handle, bias=biases if num_biases > 1 else biases[0])[0]
    terms = [x.double() * visits(case, ctx.rank), *(bias.double() for bias in biases)]
    # One rounding to the dtype, and at most R + 1 = 4 additions in fp32 (fp64), relative to the sum of magnitudes.
    accumulate = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    scale = sum(term.abs() for term in terms)
    bound = (torch.finfo(dtype).eps / 2 + 4 * accumulate) * 1.01 * scale
    assert bool(((combined.double() - sum(terms)).abs() <= bound).all())
    assert combined.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_biases", [1, 2])
def test_bias_is_added_before_rounding(ranks: Ranks, dtype: torch.dtype, num_biases: int) -> None:
    ranks(3, biased, dtype, num_biases)


def two_exchanges(ctx: RankContext) -> None:
    # Both are in flight at once, and their handles are replayed crosswise afterwards.
    buffer = Buffer.for_group(ctx.group)
    cases = [make_case(2, seed=1), make_case(2, seed=2, hidden_size=16)]
    results = []
    for case in cases:
        layout = layout_of(buffer, case, ctx.rank)
        results.append(
            buffer.dispatch(case.x(ctx.rank), **layout, topk_idx=case.routing(ctx.rank)[0], async_finish=True)
        )
    for case, (recv_x, _, _, _, handle, event) in reversed(list(zip(cases, results, strict=True))):
        event.current_stream_wait()
        check_received(case, case.expected().ranks[ctx.rank], recv_x, handle)
    for case, (recv_x, *_, handle, _) in zip(cases, results, strict=True):
        combined, _, event = buffer.combine(recv_x, handle, async_finish=True)
        event.current_stream_wait()
        assert torch.equal(combined, (case.x(ctx.rank).double() * visits(case, ctx.rank)).to(case.dtype))


def test_exchanges_may_overlap(ranks: Ranks) -> None:
    ranks(2, two_exchanges)


def keep_no_tensors(ctx: RankContext) -> list[bool]:
    # A dropped result leaves nothing behind once its exchange is complete.
    buffer = Buffer.for_group(ctx.group)
    case = make_case(2)
    x = case.x(ctx.rank)
    result = buffer.dispatch(
        x, **layout_of(buffer, case, ctx.rank), topk_idx=case.routing(ctx.rank)[0], async_finish=True
    )
    refs = [weakref.ref(x), weakref.ref(result[0])]
    result[-1].current_stream_wait()
    exchange_in(ctx, case)
    del x, result
    gc.collect()
    return [ref() is None for ref in refs]


def test_nothing_is_kept_alive_after_an_exchange(ranks: Ranks) -> None:
    assert ranks(2, keep_no_tensors) == [[True, True]] * 2


def life_cycle(ctx: RankContext) -> None:
    group = ctx.new_group()
    assert Buffer.for_group(group) is Buffer.for_group(group)
    assert Buffer.for_group(group) is not Buffer.for_group(ctx.group)
    kept = Buffer(group)
    with pytest.raises(ValueError, match="explicitly_destroy=True"):
        kept.destroy()
    buffer = Buffer(group, 2**20, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size, buffer.group) == (ctx.rank, ctx.world_size, group)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (2**20, 0)
    assert not buffer.low_latency_mode
    assert buffer.explicitly_destroy
    first = buffer.memory_report(max_tokens_per_rank=64, row_bytes=128)
    assert first["arena_bytes"] == 2**20
    assert buffer.reserve(32 + ctx.rank, 128) == buffer.memory_report(32 + ctx.world_size - 1, 128)["exchange_bytes"]
    buffer.destroy()
    with pytest.raises(MoeEpError, match="destroyed"):
        exchange_with(buffer, ctx)


def test_life_cycle(ranks: Ranks) -> None:
    ranks(2, life_cycle)


def share_and_forget(ctx: RankContext) -> bool:
    group = dist.new_group(list(range(ctx.world_size)))
    alive = weakref.ref(Buffer.for_group(group))
    exchange_with(Buffer.for_group(group), ctx)
    dist.destroy_process_group(group)
    del group
    gc.collect()
    return alive() is None


def test_the_shared_buffer_goes_away_with_its_group(ranks: Ranks) -> None:
    assert ranks(2, share_and_forget) == [True, True]


def test_without_a_group() -> None:
    buffer = Buffer(None)
    topk_idx, topk_weights = make_routing(5, 2, 4, kind="holes")
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    x = torch.randn(5, 8)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    recv_x, _, _, counts, handle, _ = buffer.dispatch(x, **layout, topk_idx=topk_idx, topk_weights=topk_weights)
    assert torch.equal(recv_x, x[(topk_idx >= 0).any(1)])
    assert counts == per_expert.tolist()
    assert torch.equal(buffer.combine(recv_x, handle)[0], x * (topk_idx >= 0).any(1, keepdim=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 16])
def test_configs_exist_for_any_number_of_ranks(num_ranks: int) -> None:
    assert isinstance(Buffer.get_dispatch_config(num_ranks), Config)
    assert isinstance(Buffer.get_combine_config(num_ranks), Config)
    with pytest.raises(ValueError, match="num_ranks=0"):
        Buffer.get_dispatch_config(0)


def test_helpers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "num_sms", None)
    Buffer.set_num_sms(20)
    assert Buffer.num_sms == 20
    with pytest.raises(ValueError, match="num_sms=3"):
        Buffer.set_num_sms(3)
    assert isinstance(Buffer.capture(), EventOverlap)
    built = importlib.util.find_spec("moe_ep._C") and importlib.import_module("moe_ep._C").build_info()["cuda_archs"]
    assert Buffer.is_sm90_compiled() == any(arch.startswith("90") for arch in built or [])


def test_runtime_and_local_memory() -> None:
    buffer = Buffer(None, num_nvl_bytes=2**20)
    runtime = buffer.runtime
    assert runtime.is_available()
    assert runtime.is_internode_available() in (False, True)
    assert (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank(), runtime.get_root_rdma_rank(True)) == (1, 0, 0)
    assert isinstance(runtime.get_local_device_id(), int)
    whole = buffer.get_local_buffer_tensor(torch.float32)
    assert (whole.dtype, whole.numel()) == (torch.float32, 2**18)
    part = buffer.get_local_buffer_tensor(torch.uint8, size=64, offset=128)
    assert part.numel() == 64
    part.fill_(7)
    assert bool((whole.view(torch.uint8)[128:192] == 7).all())


def exchange_in_inference_mode(ctx: RankContext) -> None:
    with torch.inference_mode():
        exchange(ctx, make_case(2), True)
    exchange(ctx, make_case(2), True)


def test_inference_mode(ranks: Ranks) -> None:
    ranks(2, exchange_in_inference_mode)


def rows_before(ctx: RankContext) -> None:
    case = make_case(4)
    buffer = Buffer(ctx.new_group(), ranks_per_node=2)
    topk_idx = case.routing(ctx.rank)[0]
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.num_experts)
    assert per_node.tolist() == in_rank.view(-1, 2, 2).any(2).sum(0).tolist()
    handle = buffer.dispatch(
        case.x(ctx.rank),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
    )[4]
    check_handle(case, ctx.rank, handle)
    sources = [source for source, _, _ in case.expected().ranks[ctx.rank].rows.values()]
    assert handle[-4].dtype == torch.int32
    assert handle[-4].tolist() == [sum(source <= rank for source in sources) for rank in range(4)]


def test_handles_on_several_nodes_tell_the_rows_before_each_source(ranks: Ranks) -> None:
    ranks(4, rows_before)


def choose_by_itself(ctx: RankContext) -> tuple[str | None, str]:
    # As on a machine with GPUs, whatever this one has.
    module = importlib.import_module("moe_ep.buffer")
    known, module.why_not_cuda = module.why_not_cuda, lambda: None
    try:
        buffer = Buffer(ctx.group)
        return buffer.backend_name, buffer.backend_reason
    finally:
        module.why_not_cuda = known


def test_auto_takes_torch_where_nothing_says_that_rows_are_on_gpus(ranks: Ranks) -> None:
    for name, reason in ranks(2, choose_by_itself):
        assert name == "torch"
        assert "by gloo, not by nccl" in reason
        assert 'ask for backend="cuda"' in reason
    assert "without a process group" in (why_not_by_itself(None) or "")


def test_auto_tells_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    importlib.import_module("moe_ep.buffer")._tell_choice.cache_clear()
    with caplog.at_level("INFO", logger="moe_ep"):
        for _ in range(3):
            Buffer(None)
        Buffer(None, backend="torch")
    told = [record.getMessage() for record in caplog.records if "auto" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith('backend="auto" chose torch: ')


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(NotBuiltError, match="cuda"):
        Buffer(None, backend="cuda")
    with pytest.raises(ValueError, match="backend='rccl'"):
        Buffer(None, backend="rccl")


def plant(ctx: RankContext, faulty_call: int) -> bool:
    """Whether the checks above notice that one exchange of payload loses a row."""
    case = make_case(2, kind="uniform", tokens=(6, 6))
    buffer = Buffer(ctx.new_group())
    real, calls = buffer.backend.transport._all_to_all, []

    def faulty(out: torch.Tensor, *rest: object) -> None:
        real(out, *rest)
        if len(calls) == faulty_call:
            out[0] = 0
        calls.append(out)

    buffer.backend.transport._all_to_all = faulty
    try:
        x, topk_idx = case.x(ctx.rank), case.routing(ctx.rank)[0]
        recv_x, *_, handle, _ = buffer.dispatch(x, **layout_of(buffer, case, ctx.rank), topk_idx=topk_idx)
        combined = buffer.combine(recv_x.clone(), handle)[0]
        check_received(case, case.expected().ranks[ctx.rank], recv_x, handle)
        assert torch.equal(combined, (x.double() * visits(case, ctx.rank)).to(case.dtype))
    except AssertionError:
        return True
    finally:
        assert len(calls) == 2
    return False


@pytest.mark.parametrize(("faulty_call", "found"), [(-1, False), (0, True), (1, True)])
def test_a_lost_row_is_found(ranks: Ranks, faulty_call: int, found: bool) -> None:
    assert ranks(2, plant, faulty_call) == [found] * 2
