"""MoE layers on the CUDA backend: gradients against the CPU, captured graphs, chunks, checkpoints, precisions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.errors import CapacityError
from moe_ep.layers import MoELayer
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext

pytestmark = pytest.mark.gpu

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared-late": {"shared_intermediate_size": 32, "late_wgrad": True},
    "chunks": {"num_chunks": 3, "shared_intermediate_size": 32},
    "capacity": {"capacity": Capacity(per_expert=256), "max_tokens_per_rank": 64},
    "capacity-chunks": {"capacity": Capacity(per_expert=256), "max_tokens_per_rank": 64, "num_chunks": 2},
}


def layer_gradients(group: dist.ProcessGroup, device: str, backend: str, rank: int, name: str) -> list[torch.Tensor]:
    layer = MoELayer(
        group,
        hidden_size=64,
        intermediate_size=96,
        num_experts=12,
        top_k=2,
        dtype=torch.float32,
        device=device,
        backend=backend,
        **VARIANTS[name],
    )
    results = []
    for step, tokens in enumerate((37 + rank, 0 if rank == 0 else 11, 64)):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(tokens, 64, generator=generator).to(device).requires_grad_()
        run = layer if step < 2 else lambda given: checkpoint(layer, given, use_reentrant=False)
        run(x).square().sum().backward()
        assert x.grad is not None
        results.append(x.grad)
    return [tensor.cpu() for tensor in (*results, *(p.grad for p in layer.parameters() if p.grad is not None))]


def compare_layers(ctx: RankContext, name: str) -> None:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = layer_gradients(ctx.group, "cpu", "torch", ctx.rank, name)
    got = layer_gradients(ctx.group, "cuda", "cuda", ctx.rank, name)
    assert len(expected) == len(got)
    for want, have in zip(expected, got, strict=True):
        # fp32 sums of at most 8 x 96 products in another order; a routing decision does not change at this distance.
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * float(want.abs().amax() if want.numel() else 0))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_layer_equals_cpu(num_ranks: int, name: str) -> None:
    run_ranks(num_ranks, compare_layers, name)


def train_captured(ctx: RankContext) -> None:
    """Replays of one graph, mixed with eager calls, equal eager calls on the same input."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    tokens, hidden = 48, 128
    settings: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_experts": 4 * ctx.world_size,
        "top_k": 3,
        "dtype": torch.bfloat16,
        "device": "cuda",
        "backend": "cuda",
        "capacity": Capacity(per_expert=ctx.world_size * tokens),
        "max_tokens_per_rank": tokens,
        "shared_intermediate_size": 64,
    }
    layer = MoELayer(ctx.group, **settings)
    static_x = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    static_x.grad = torch.zeros_like(static_x)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step() -> torch.Tensor:
        static_x.grad.zero_()
        for parameter in layer.parameters():
            parameter.grad.zero_()
        out = layer(static_x)
        out.float().square().sum().backward()
        return out

    def fresh(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 7 + ctx.rank)
        return torch.randn(tokens, hidden, generator=generator).to(torch.bfloat16).cuda()

    def load(value: torch.Tensor) -> None:
        with torch.no_grad():
            static_x.copy_(value)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            load(fresh(seed))
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(20):
        load(fresh(seed))
        graph.replay()
        # NOTE: copies, since the eager call below uses the same gradients.
        replayed = [tensor.clone() for tensor in (out, static_x.grad, *(p.grad for p in layer.parameters()))]
        eager_out = step()
        eager = [eager_out, static_x.grad, *(p.grad for p in layer.parameters())]
        for have, want in zip(replayed, eager, strict=True):
            assert torch.equal(have, want), seed
    torch.cuda.synchronize()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_captured_layer_equals_eager(num_ranks: int) -> None:
    run_ranks(num_ranks, train_captured)


def overflow_in_graph(ctx: RankContext) -> list[tuple[int, int, int] | None]:
    """A graph whose routing changes: overflow is flagged on all ranks, poisons outputs, and is raised once."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    dispatcher = TokenDispatcher(
        ctx.group,
        num_experts=2 * ctx.world_size,
        hidden_size=16,
        top_k=1,
        dtype=torch.float32,
        backend="cuda",
        capacity=Capacity(per_expert=8),
        max_tokens_per_rank=16,
    )
    x = torch.ones(16, 16, device="cuda")
    even = (torch.arange(16, device="cuda") % dispatcher.num_experts).unsqueeze(1)
    topk_idx, weights = even.clone(), torch.ones(16, 1, device="cuda")

    def exchange() -> torch.Tensor:
        routed = dispatcher.dispatch(x, topk_idx, weights)
        return dispatcher.combine(routed.x, routed.handle, routed.weights)

    with torch.no_grad():
        exchange()
        dispatcher.check()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = exchange()
    raised = []
    for skewed in (False, True, False):
        topk_idx.copy_(torch.zeros_like(even) if skewed else even)
        graph.replay()
        torch.cuda.synchronize()
        assert bool(torch.isnan(out).all()) == skewed
        try:
            dispatcher.check()
        except CapacityError as error:
            raised.append((error.rank, error.needed, error.given))
        else:
            raised.append(None)
    return raised


def test_overflow_in_a_graph_is_raised_on_all_ranks() -> None:
    assert run_ranks(2, overflow_in_graph) == [[None, (0, 32, 8), None]] * 2


def repeat(ctx: RankContext, times: int) -> None:
    """The same input gives the same bits, every time."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    dispatcher = TokenDispatcher(
        ctx.group,
        num_experts=8 * ctx.world_size,
        hidden_size=256,
        top_k=4,
        buffer=Buffer(ctx.group, backend="cuda"),
        capacity=Capacity(factor=4.0),
        max_tokens_per_rank=64,
    )
    topk_idx, weights = make_routing(64, 4, dispatcher.num_experts, kind="zipf", seed=ctx.rank)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(ctx.rank)).to(torch.bfloat16).cuda()
    topk_idx, weights = topk_idx.cuda(), weights.cuda()
    first = None
    with torch.no_grad():
        for _ in range(times):
            routed = dispatcher.dispatch(x, topk_idx, weights)
            out = dispatcher.combine(routed.x, routed.handle, routed.weights)
            if first is None:
                first = out.clone()
            assert torch.equal(first, out)


def test_repeats_give_the_same_bits() -> None:
    run_ranks(2, repeat, 1000)
