"""Buffer's tuple calls on the CUDA backend: bit for bit those of the torch backend on the CPU; graphs, errors."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from moe_ep import Buffer
from moe_ep.config import record_bytes
from moe_ep.errors import CapacityError, ExchangeMismatchError, MoeEpError, PeerAbortedError, StaleHandleError
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext
from tests.gpu.buffer_cases import ORDERS, Case, flags, layout_of, make_case, run_case, small_integers

pytestmark = pytest.mark.gpu


def make_buffer(ctx: RankContext, **settings: object) -> Buffer:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    buffer = Buffer(ctx.new_group(), backend="cuda", timeout_s=20, **settings)
    assert buffer.backend_name == "cuda"
    return buffer


def one_case(ctx: RankContext, **fields: object) -> Case:
    """A plain case of bf16 rows."""
    case = make_case(1, ctx.world_size)
    plain = {
        "mode": "exact",
        "num_experts": 4 * ctx.world_size,
        "top_k": 3,
        "hidden": 128,
        "tokens": [24] * ctx.world_size,
        "kind": "holes",
        "rows": torch.bfloat16,
        "weighted": True,
        "num_sms": None,
        "num_biases": 0,
        "order": "plain",
        "wide_counts": False,
        "worst": 24 * ctx.world_size,
    }
    return dataclasses.replace(case, **{**plain, **fields})


def assert_works(buffer: Buffer, ctx: RankContext) -> None:
    case = one_case(ctx)
    got = run_case(ctx.rank, "cuda", buffer, case)
    assert got["listed"].tolist()


def choose_by_itself(ctx: RankContext) -> list[str]:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    nccl, both = dist.new_group(backend="nccl"), dist.new_group(backend="cpu:gloo,cuda:nccl")
    return [Buffer(group, timeout_s=20).backend_name for group in (ctx.group, nccl, both)]


@pytest.mark.multi_gpu(2)
def test_auto_takes_cuda_for_groups_of_nccl() -> None:
    assert run_ranks(2, choose_by_itself) == [["torch", "cuda", "cuda"]] * 2


def compare(ctx: RankContext, seeds: list[int], bulk: bool, granted_row: int, nodes: int) -> None:
    settings = {"ranks_per_node": ctx.world_size // nodes}
    # The least that may be granted: every larger exchange goes round the rings several times.
    granted_bytes = 64 * record_bytes(granted_row) * ctx.world_size if granted_row else 0
    buffer = make_buffer(ctx, num_nvl_bytes=granted_bytes, **settings)
    oracle = Buffer(ctx.group, backend="torch", timeout_s=20, **settings)
    buffer.backend.settings.bulk = bulk
    for seed in seeds:
        case = make_case(seed, ctx.world_size, granted_row or 1 << 16)
        expected = run_case(ctx.rank, "cpu", oracle, case)
        got = run_case(ctx.rank, "cuda", buffer, case)
        assert expected.keys() == got.keys(), (case, expected, got)
        for name, want in expected.items():
            assert want.dtype == got[name].dtype, (name, case)
            assert torch.equal(want, got[name]), (name, case, want, got[name])
    buffer.drain()


@pytest.mark.parametrize("granted_row", [0, 512, 16384], ids=["one-lap", "laps-of-short-rows", "laps"])
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_torch_backend(num_ranks: int, bulk: bool, granted_row: int) -> None:
    if bulk and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("copies by the copy engine need a GPU since Hopper")
    first = 1000 * num_ranks + 100 * bulk + 10_000 * granted_row
    run_ranks(num_ranks, compare, list(range(first, first + 32)), bulk, granted_row, 1)


def test_counts_of_nodes_and_their_handles() -> None:
    run_ranks(4, compare, list(range(8)), False, 0, 2)


def replay_graph(ctx: RankContext, order: str) -> None:
    """One graph of layout, dispatch and combine, whose replays equal the torch backend on other tokens."""
    buffer, oracle = make_buffer(ctx), Buffer(ctx.group, backend="torch", timeout_s=20)
    case = one_case(ctx, mode="worst", order=order)
    num_tokens = case.tokens[ctx.rank]
    x = torch.zeros(num_tokens, case.hidden, dtype=torch.bfloat16, device="cuda")
    topk_idx = torch.zeros(num_tokens, case.top_k, dtype=torch.int64, device="cuda")
    topk_weights = torch.zeros(num_tokens, case.top_k, device="cuda")

    def load(seed: int, kind: str) -> None:
        ids, weights = make_routing(num_tokens, case.top_k, case.num_experts, kind=kind, seed=seed * 3 + ctx.rank)
        topk_idx.copy_(ids)
        topk_weights.copy_(weights)
        x.copy_(small_integers((num_tokens, case.hidden), seed * 5 + ctx.rank, torch.bfloat16, "cuda"))

    def step(buffer: Buffer, *inputs: torch.Tensor) -> list[torch.Tensor]:
        x, topk_idx, topk_weights = inputs
        recv_x, recv_idx, recv_weights, listed, handle, event = buffer.dispatch(
            x,
            **layout_of(buffer, topk_idx, case),
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            num_worst_tokens=case.worst,
            **flags(order),
        )
        assert listed == []
        event.current_stream_wait()
        y = torch.where((recv_idx >= 0).any(1, keepdim=True), recv_x * 2, float("nan"))
        out, weights, event = buffer.combine(y, handle, topk_weights=recv_weights, **flags(order))
        event.current_stream_wait()
        return [recv_x, recv_idx, recv_weights, out, weights, handle[0], handle.num_recv_tokens]

    load(0, "uniform")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(buffer, x, topk_idx, topk_weights)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(buffer, x, topk_idx, topk_weights)
    for seed, kind in enumerate(("uniform", "holes", "empty", "one", "zipf") * 2):
        load(seed, kind)
        graph.replay()
        want = step(oracle, x.cpu(), topk_idx.cpu(), topk_weights.cpu())
        got = [tensor.cpu() for tensor in captured]
        received = int(want[-1])
        for which in range(3):
            assert torch.equal(got[which][:received], want[which][:received]), (kind, which)
        assert bool((got[1][received:] == -1).all())
        assert not got[2][received:].any()
        for which in range(3, 7):
            assert torch.equal(got[which], want[which]), (kind, which)
    buffer.check_overflow()
    torch.cuda.synchronize()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_captured_exchange_equals_torch_backend(num_ranks: int, order: str) -> None:
    run_ranks(num_ranks, replay_graph, order)


def too_few_rows(ctx: RankContext) -> tuple[int, int, int]:
    # Six tokens of each rank choose expert 0 alone: rank 0 receives 12 rows, rank 1 none.
    buffer = make_buffer(ctx)
    case = one_case(ctx, tokens=[6, 6], top_k=1)
    topk_idx = torch.zeros(6, 1, dtype=torch.int64, device="cuda")
    x = torch.ones(6, case.hidden, dtype=torch.bfloat16, device="cuda")
    weights = torch.ones(6, 1, device="cuda")
    layout = layout_of(buffer, topk_idx, case)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.dispatch(
        x, **layout, topk_idx=topk_idx, topk_weights=weights, num_worst_tokens=10
    )
    torch.cuda.synchronize()
    assert bool(recv_x.isnan().all())
    assert bool(recv_weights.isnan().all())
    assert bool((recv_idx == -1).all())
    with pytest.raises(CapacityError, match=r"12 rows.*num_worst_tokens=10") as caught:
        buffer.dispatch(x, handle=handle)
    assert_works(buffer, ctx)
    return caught.value.rank, caught.value.needed, caught.value.given


def test_too_few_worst_case_rows_raise_on_all_ranks() -> None:
    assert run_ranks(2, too_few_rows) == [(0, 12, 10)] * 2


def overlap(ctx: RankContext) -> None:
    """An exchange after an event runs beside what the current stream does after it."""
    buffer = make_buffer(ctx)
    case = one_case(ctx, mode="worst")
    topk_idx, _ = make_routing(24, case.top_k, case.num_experts, seed=ctx.rank)
    topk_idx = topk_idx.cuda()
    x = torch.ones(24, case.hidden, dtype=torch.bfloat16, device="cuda")
    layout = layout_of(buffer, topk_idx, case)
    rest = {**layout, "topk_idx": topk_idx, "num_worst_tokens": case.worst}
    expected = buffer.dispatch(x, **rest)
    torch.cuda.synchronize()
    for order in ("after on comm", "async"):
        chosen = flags(order)
        torch.cuda._sleep(4_000_000_000)
        recv_x, _, _, _, handle, event = buffer.dispatch(x, **rest, **chosen)
        if order == "after on comm":
            buffer.get_comm_stream().synchronize()
            assert not torch.cuda.current_stream().query()
        event.current_stream_wait()
        received = int(handle.num_recv_tokens)
        assert torch.equal(recv_x[:received], expected[0][:received])
        combined, _, event = buffer.combine(recv_x, handle, previous_event=event, async_finish=True)
        # As often as wanted, on any stream.
        with torch.cuda.stream(torch.cuda.Stream()):
            event.current_stream_wait()
        event.current_stream_wait()
        assert bool((combined >= 0).all())
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_exchanges_run_beside_the_current_stream(num_ranks: int) -> None:
    run_ranks(num_ranks, overlap)


def count_sms(ctx: RankContext) -> list[int | None]:
    buffer = make_buffer(ctx)
    split, seen = buffer.backend.settings.split, []
    buffer.backend.settings.split = lambda what, num_sms, *laps: seen.append(num_sms) or split(what, num_sms, *laps)
    try:
        run_case(ctx.rank, "cuda", buffer, one_case(ctx, num_sms=6))
        Buffer.set_num_sms(10)
        run_case(ctx.rank, "cuda", buffer, one_case(ctx, num_sms=6))
    finally:
        Buffer.num_sms = None
    return seen


def test_number_of_sms_is_the_classes_or_the_configs() -> None:
    assert run_ranks(2, count_sms) == [[6] * 3 + [10] * 3] * 2


FAULTS = {
    "x int": r"x has dtype torch\.int32",
    "x on the CPU": r"on cpu",
    "odd rows": r"x\.shape\[1\]=3.*16 bytes",
    "ids int32": r"topk_idx.*torch\.int32.*torch\.int64",
    "layout missing": r"is_token_in_rank is NoneType",
    "weights without ids": r"topk_weights.*topk_idx",
    "alignment": r"expert_alignment=0",
    "flags": r"allocate_on_comm_stream=True needs",
    "no handle": r"handle is NoneType",
    "rows missing": r"x has shape",
}


def call_badly(ctx: RankContext, fault: str, warm: bool) -> str:
    buffer = make_buffer(ctx)
    case = one_case(ctx)
    topk_idx, weights = (tensor.cuda() for tensor in make_routing(24, 3, case.num_experts, seed=ctx.rank))
    layout = layout_of(buffer, topk_idx, case)
    arguments: dict = {"x": torch.ones(24, 128, dtype=torch.bfloat16, device="cuda"), **layout}
    arguments |= {"topk_idx": topk_idx, "topk_weights": weights}
    combines = fault in ("no handle", "rows missing")
    call = buffer.combine if combines else buffer.dispatch
    if warm or combines:
        got = buffer.dispatch(**arguments)
        if combines:
            arguments = {"x": got[0], "handle": got[4]}
    changes = {
        "x int": lambda: {"x": arguments["x"].int()},
        "x on the CPU": lambda: {"x": arguments["x"].cpu()},
        "odd rows": lambda: {"x": arguments["x"][:, :3].contiguous()},
        "ids int32": lambda: {"topk_idx": topk_idx.int()},
        "layout missing": lambda: {"is_token_in_rank": None},
        "weights without ids": lambda: {"topk_idx": None},
        "alignment": lambda: {"expert_alignment": 0},
        "flags": lambda: {"allocate_on_comm_stream": True},
        "no handle": lambda: {"handle": None},
        "rows missing": lambda: {"x": arguments["x"][1:]},
    }
    if ctx.rank == 1:
        arguments |= changes[fault]()
    text = "accepted"
    try:
        call(**arguments)
        torch.cuda.synchronize()
        buffer.check_overflow()
    except (ValueError, MoeEpError) as error:
        text = f"{type(error).__name__}: {error}"
    if warm or combines:
        with pytest.raises(MoeEpError, match=r"reset\(\)"):
            buffer.check_overflow()
        buffer.reset()
    # Before the first exchange ranks agree over the control plane, which an error leaves in step.
    assert_works(buffer, ctx)
    return text


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_of_one_rank_reaches_the_others(fault: str, warm: bool) -> None:
    first, second = run_ranks(2, call_badly, fault, warm)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        raise ValueError(second)
    assert second.startswith("ValueError")
    assert first.startswith("PeerAbortedError: rank 1 raised instead"), first


def differ(ctx: RankContext, what: str, warm: bool) -> str:
    buffer = make_buffer(ctx)
    if warm:
        assert_works(buffer, ctx)
    case = one_case(ctx, hidden=256 if what == "H" and ctx.rank == 1 else 128)
    case = dataclasses.replace(case, rows=torch.float16 if what == "dtype" and ctx.rank == 1 else case.rows)
    case = dataclasses.replace(case, weighted=not (what == "weights" and ctx.rank == 1))
    with pytest.raises(ExchangeMismatchError) as caught:
        run_case(ctx.rank, "cuda", buffer, case)
    buffer.reset()
    assert_works(buffer, ctx)
    return str(caught.value)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("what", ["dtype", "weights", "H"])
def test_ranks_that_differ_find_out_before_rows_move(what: str, warm: bool) -> None:
    if warm and what == "H":
        pytest.skip("only one of them would have to make its rings larger, and waits for the others there")
    for text in run_ranks(2, differ, what, warm):
        assert "different exchanges" in text


def use_stale_handles(ctx: RankContext) -> None:
    buffer, other = make_buffer(ctx), make_buffer(ctx)
    case = one_case(ctx)
    topk_idx = make_routing(24, 3, case.num_experts, seed=ctx.rank)[0].cuda()
    x = torch.ones(24, 128, dtype=torch.bfloat16, device="cuda")
    layout = layout_of(buffer, topk_idx, case)
    handle = buffer.dispatch(x, **layout, topk_idx=topk_idx)[4]
    other.dispatch(x, **layout, topk_idx=topk_idx)
    with pytest.raises((StaleHandleError, PeerAbortedError), match="another Buffer"):
        other.combine(x, handle)
    buffer.reset()
    with pytest.raises((StaleHandleError, PeerAbortedError), match=r"reset\(\)"):
        buffer.dispatch(x, handle=handle)
    buffer.reset()
    assert_works(buffer, ctx)


def test_stale_handles() -> None:
    run_ranks(2, use_stale_handles)


def use_helpers(ctx: RankContext) -> None:
    buffer = make_buffer(ctx, num_nvl_bytes=2**20 * ctx.world_size, explicitly_destroy=True)
    with pytest.raises(ValueError, match="num_nvl_bytes="):
        Buffer(ctx.new_group(), 1024, backend="cuda", timeout_s=20).dispatch(
            torch.ones(1, 128, device="cuda"),
            num_tokens_per_rank=torch.ones(ctx.world_size, dtype=torch.int32, device="cuda"),
            is_token_in_rank=torch.ones(1, ctx.world_size, dtype=torch.bool, device="cuda"),
            num_tokens_per_expert=torch.ones(ctx.world_size, dtype=torch.int32, device="cuda"),
        )
    runtime = buffer.runtime
    assert runtime.is_available()
    nodes = (runtime.get_num_rdma_ranks(), runtime.get_rdma_rank(), runtime.get_root_rdma_rank(True))
    assert nodes == (1, 0, 0)
    assert runtime.get_local_device_id() == torch.cuda.current_device()
    assert isinstance(runtime.get_local_ipc_handle(), bytes)
    assert runtime.get_local_nvshmem_unique_id() == b""
    runtime.sync([0], [b""], b"")
    stream = buffer.get_comm_stream()
    assert isinstance(stream, torch.cuda.Stream)
    assert stream == buffer.backend.link.stream
    whole = buffer.get_local_buffer_tensor(torch.float32)
    assert whole.is_cuda
    assert whole.numel() == 2**18 * ctx.world_size
    part = buffer.get_local_buffer_tensor(torch.uint8, size=64, offset=128)
    part.fill_(7)
    assert bool((whole.view(torch.uint8)[128:192] == 7).all())
    with pytest.raises(ValueError, match="do not lie in the buffer"):
        buffer.get_local_buffer_tensor(torch.float32, offset=2)
    assert buffer.memory_report()["arena_bytes"] >= 2**20 * ctx.world_size
    del whole, part
    assert_works(buffer, ctx)
    buffer.drain()
    dist.barrier(ctx.group)
    buffer.destroy()
    assert not runtime.is_available()
    with pytest.raises(MoeEpError, match="destroyed"):
        assert_works(buffer, ctx)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_helpers_and_runtime(num_ranks: int) -> None:
    run_ranks(num_ranks, use_helpers)
