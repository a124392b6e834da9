"""The torch backend with tensors on GPUs, through NCCL and through gloo, against the same exchange on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.layers import MoELayer
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext

SETTINGS = {
    "expanded": {"layout": "expanded", "alignment": 8},
    "compact": {"layout": "compact", "weights": "experts"},
    "slab": {"layout": "slab", "max_tokens_per_rank": 40},
    "capacity": {"layout": "expanded", "capacity": Capacity(per_expert=48)},
}


def exchange(group: dist.ProcessGroup, device: str, name: str, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """One dispatch and combine with gradients; everything that comes out, on the CPU."""
    tokens = [33, 0, 40, 7][rank]
    num_experts = 4 * group.size()
    dispatcher = TokenDispatcher(
        group,
        num_experts=num_experts,
        hidden_size=64,
        top_k=3,
        dtype=dtype,
        backend="torch",
        **SETTINGS[name],
    )
    topk_idx, weights = make_routing(tokens, 3, num_experts, kind="holes", seed=rank)
    # Small integers: sums are exact in every dtype, so devices must agree bit for bit.
    x = torch.randint(-4, 5, (tokens, 64), generator=torch.Generator().manual_seed(rank)).to(device, dtype)
    x.requires_grad_()
    weights = torch.exp2(torch.floor(torch.log2(weights.clamp(min=0.1)))).to(device).requires_grad_()
    results = []
    for asynchronous in (False, True):
        x.grad = weights.grad = None
        if asynchronous:
            routed = dispatcher.dispatch_async(x, topk_idx.to(device), weights).wait()
        else:
            routed = dispatcher.dispatch(x, topk_idx.to(device), weights)
        y = torch.nan_to_num(routed.x)
        given = routed.weights if dispatcher.weights == "combine" else None
        if asynchronous:
            out = dispatcher.combine_async(y, routed.handle, given).wait()
        else:
            out = dispatcher.combine(y, routed.handle, given)
        (out * x.detach()).sum().backward()
        counts = routed.tokens_per_expert
        results += [out.detach(), x.grad, weights.grad, counts, routed.expert_ends]
    return [result.cpu() for result in results]


def compare(ctx: RankContext, backend: str, name: str, dtype: torch.dtype) -> None:
    torch.cuda.set_device(ctx.rank)
    group = ctx.group if backend == "gloo" else dist.new_group(backend="nccl")
    expected = exchange(ctx.group, "cpu", name, ctx.rank, dtype)
    got = exchange(group, f"cuda:{ctx.rank}", name, ctx.rank, dtype)
    for want, have in zip(expected, got, strict=True):
        assert torch.equal(want, have)
    if backend == "nccl":
        dist.destroy_process_group(group)


def layer_gradients(group: dist.ProcessGroup, device: str, rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    layer = MoELayer(
        group,
        hidden_size=64,
        intermediate_size=96,
        num_experts=8,
        top_k=2,
        shared_intermediate_size=32,
        num_chunks=2,
        late_wgrad=True,
        backend="torch",
        dtype=torch.float32,
        device=device,
    )
    x = torch.randn(37 + rank, 64, generator=torch.Generator().manual_seed(rank)).to(device).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [
        tensor.cpu() for tensor in (y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None))
    ]


def compare_layers(ctx: RankContext, backend: str) -> None:
    torch.cuda.set_device(ctx.rank)
    torch.backends.cuda.matmul.allow_tf32 = False
    group = ctx.group if backend == "gloo" else dist.new_group(backend="nccl")
    expected = layer_gradients(ctx.group, "cpu", ctx.rank)
    got = layer_gradients(group, f"cuda:{ctx.rank}", ctx.rank)
    assert len(expected) == len(got)
    for want, have in zip(expected, got, strict=True):
        # fp32 sums of at most 8 x 96 products in another order; a routing decision does not change at this distance.
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def buffer_calls(ctx: RankContext) -> None:
    device = f"cuda:{ctx.rank}"
    torch.cuda.set_device(ctx.rank)
    group = dist.new_group(backend="nccl")
    buffer = Buffer(group, backend="torch")
    topk_idx, weights = make_routing(50, 2, 4, kind="uniform", seed=ctx.rank)
    topk_idx, weights = topk_idx.to(device), weights.to(device)
    x = torch.full((50, 32), float(ctx.rank + 1), dtype=torch.bfloat16, device=device)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    recv_x, recv_idx, recv_weights, _, handle, event = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
        async_finish=True,
    )
    event.current_stream_wait()
    prefix = handle.rank_prefix_matrix[:, ctx.rank].tolist()
    for source in range(ctx.world_size):
        begin = prefix[source - 1] if source else 0
        assert torch.equal(recv_x[begin : prefix[source]], torch.full_like(recv_x[begin : prefix[source]], source + 1))
    out, weights_back, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
    assert torch.equal(out, x * in_rank.sum(1, keepdim=True))
    assert torch.equal(weights_back, weights)
    dist.destroy_process_group(group)


def exchange_behind_work(ctx: RankContext) -> None:
    """Payload waits for GPU work far longer than any poll of the host; the caller's group must live on."""
    device = f"cuda:{ctx.rank}"
    torch.cuda.set_device(ctx.rank)
    group = dist.new_group(backend="nccl")
    dispatcher = TokenDispatcher(group, num_experts=4, hidden_size=64, top_k=2, dtype=torch.float32, backend="torch")
    topk_idx, weights = make_routing(20, 2, 4, kind="uniform", seed=ctx.rank)
    x = torch.randn(20, 64, device=device)
    routed = dispatcher.dispatch(x, topk_idx.to(device), weights.to(device))
    torch.cuda._sleep(2_000_000_000 * (1 + ctx.rank))  # cycles: about one second and two
    out = dispatcher.combine(routed.x, routed.handle, routed.weights)
    torch.testing.assert_close(out, x * weights.to(device).sum(1, keepdim=True), rtol=1e-6, atol=1e-6)
    total = torch.ones(1, device=device)
    dist.all_reduce(total, group=group)
    assert total.item() == ctx.world_size
    dist.destroy_process_group(group)


@pytest.mark.multi_gpu(2)
def test_payload_waits_for_gpu_work() -> None:
    run_ranks(2, exchange_behind_work)


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_devices_agree(backend: str, name: str, dtype: torch.dtype) -> None:
    run_ranks(2, compare, backend, name, dtype)


@pytest.mark.multi_gpu(4)
@pytest.mark.parametrize("name", SETTINGS)
def test_devices_agree_on_four(name: str) -> None:
    run_ranks(4, compare, "nccl", name, torch.bfloat16)


@pytest.mark.multi_gpu(2)
@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_layers_agree(backend: str) -> None:
    run_ranks(2, compare_layers, backend)


@pytest.mark.multi_gpu(2)
def test_buffer_on_nccl() -> None:
    run_ranks(2, buffer_calls)
