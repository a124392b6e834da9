"""Exchanges of the CUDA backend in compiled graphs, forward and backward, against layers that exchange nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from moe_ep import Capacity
from moe_ep.layers import MoELayer
from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext
from tests.sharded import make_case, make_leaves, probe
from tests.test_compile import (
    COMPILED,
    checkpoint_selectively,
    compile_side_by_side,
    operator_inputs,
    run_steps,
)

pytestmark = pytest.mark.gpu

# Ranks compile at the same time, on as many cores as there are; no timing is tested.
TIMEOUT_S = 300.0
CUDA: dict[str, Any] = {"device": "cuda", "backend": "cuda"}


def take_device(ctx: RankContext) -> None:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())


def compile_steps(ctx: RankContext, mode: str, compiler: str) -> int:
    """Forward and backward of steps with changing sizes; how often something was compiled."""
    take_device(ctx)
    case = make_case(ctx.world_size, **COMPILED[mode])
    settings: dict[str, Any] = {}
    if case.capacity is not None and case.max_tokens_per_rank is None:
        # Sizes are fixed by the first exchange, and later steps have more tokens.
        settings["max_tokens_per_rank"] = 12
    count = run_steps(ctx.rank, ctx.group, ctx.world_size, mode, compiler, backend="cuda", device="cuda", **settings)
    torch.cuda.synchronize()
    return count


@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_compiles_into_one_graph(num_ranks: int, mode: str) -> None:
    # Sizes 0 and 1 are special to the compiler; the others share one graph.
    assert max(run_ranks(num_ranks, compile_steps, mode, "aot_eager", timeout=TIMEOUT_S)) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["expanded", "compact", "per expert"])
def test_inductor(mode: str) -> None:
    assert max(run_ranks(2, compile_steps, mode, "inductor", timeout=TIMEOUT_S)) <= 3


def order_exchanges(ctx: RankContext) -> list[int]:
    take_device(ctx)
    return compile_side_by_side(ctx, **CUDA)


def test_independent_layers_keep_their_order_on_all_ranks() -> None:
    assert run_ranks(2, order_exchanges, timeout=TIMEOUT_S) == [[4, 4, 4]] * 2


def keep_exchanges(ctx: RankContext) -> None:
    take_device(ctx)
    checkpoint_selectively(ctx.rank, ctx.group, ctx.world_size, **CUDA)


def test_selective_checkpoint_in_a_compiled_graph() -> None:
    run_ranks(2, keep_exchanges, timeout=TIMEOUT_S)


def count_host_waits(ctx: RankContext, mode: str) -> tuple[int, int]:
    """Times that the host waits for sizes in forward and backward; any wait of torch for the device is an error."""
    take_device(ctx)
    torch._dynamo.reset()
    case = make_case(ctx.world_size, tokens=(6, 4), **COMPILED[mode])
    dispatcher = case.dispatcher(ctx.group, timeout_s=90, backend="cuda")

    def layer(x: Tensor, topk_weights: Tensor, topk_idx: Tensor) -> Tensor:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        given = routed.weights if case.weights == "combine" else None
        return dispatcher.combine(torch.tanh(routed.x), routed.handle, given)

    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, topk_weights, _ = make_leaves(case, ctx.rank).on("cuda")
    topk_idx, grad = case.routing(ctx.rank)[0].cuda(), probe(case, ctx.rank).cuda()
    for _ in range(2):
        run(x, topk_weights, topk_idx).backward(grad)
    link = dispatcher.buffer.backend.link
    wait_sizes, waits = link.wait_sizes, []

    def wait_and_count(ticket: int) -> tuple[int, int, int]:
        waits.append(ticket)
        return wait_sizes(ticket)

    link.wait_sizes = wait_and_count
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = run(x, topk_weights, topk_idx)
        forward = len(waits)
        out.backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        del link.wait_sizes
    torch.cuda.synchronize()
    return forward, len(waits) - forward


@pytest.mark.parametrize("mode", ["expanded", "compact", "rows", "per expert", "factor", "slab"])
def test_the_host_waits_once_for_exact_sizes_and_never_otherwise(mode: str) -> None:
    expected = (1, 0) if mode in ("expanded", "compact") else (0, 0)
    assert run_ranks(2, count_host_waits, mode, timeout=TIMEOUT_S) == [expected] * 2


LAYERS: dict[str, dict[str, Any]] = {
    "exact": {"dtype": torch.float32, "shared_intermediate_size": 32},
    "bf16": {"dtype": torch.bfloat16},
    "compact": {"dtype": torch.float32, "layout": "compact"},
    "combine": {"dtype": torch.float32, "weights": "combine"},
    "capacity": {"dtype": torch.float32, "capacity": Capacity(per_expert=256), "max_tokens_per_rank": 64},
    "rows": {"dtype": torch.bfloat16, "capacity": Capacity(rows=256), "max_tokens_per_rank": 64},
}


def compile_layer(ctx: RankContext, name: str) -> None:
    """A compiled MoELayer against the same layer without a compiler."""
    take_device(ctx)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    layer = MoELayer(
        ctx.group,
        hidden_size=64,
        intermediate_size=96,
        num_experts=12,
        top_k=2,
        timeout_s=90,
        **{**CUDA, **LAYERS[name]},
    )
    run = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    # Half an ulp of either precision times the roundings of three products of sums of at most 96 terms.
    tolerance = 3e-2 if LAYERS[name]["dtype"] == torch.bfloat16 else 1e-4
    for step, tokens in enumerate((37 + ctx.rank, 64, 50 - ctx.rank)):
        generator = torch.Generator().manual_seed(100 * step + ctx.rank)
        x = torch.randn(tokens, 64, generator=generator).to("cuda", LAYERS[name]["dtype"])
        results = []
        for forward in (layer, run):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            out = forward(leaf)
            out.square().sum().backward()
            grads = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
            results.append([out.detach(), leaf.grad, *(grad.clone() for grad in grads)])
        assert len(results[0]) == len(results[1])
        for want, have in zip(*results, strict=True):
            torch.testing.assert_close(have, want, rtol=tolerance, atol=tolerance * float(want.abs().amax()))
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_equals_itself(name: str) -> None:
    run_ranks(2, compile_layer, name, timeout=TIMEOUT_S)


def check_operators(ctx: RankContext, mode: str, name: str) -> None:
    take_device(ctx)
    # The rest compares two calls, whose plans have different numbers.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(getattr(torch.ops.moe_ep, name).default, operator_inputs(mode, name, **CUDA), test_utils=tests)


@pytest.mark.parametrize("name", ["dispatch", "combine", "dispatch_replay", "combine_grads"])
@pytest.mark.parametrize("mode", ["expanded", "compact", "per expert", "slab"])
def test_operators_pass_opcheck(mode: str, name: str) -> None:
    run_ranks(1, check_operators, mode, name, timeout=TIMEOUT_S)
