"""The CUDA backend at the edges of what it takes: many ranks, choices, experts and tokens, short and long rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_ep import Buffer, TokenDispatcher
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext
from tests.gpu.exchange_cases import Case, make_case
from tests.gpu.stress import expected_rows
from tests.gpu.test_cuda_exchange import SMALL_GRANT, compare, compare_cases

pytestmark = pytest.mark.gpu

EDGES: dict[str, tuple[dict[str, Any], list[int], str]] = {
    # Sums of 64 terms are exact in fp32 alone.
    "64 choices of 4096 experts": (
        {"num_experts": 4096, "top_k": 64, "hidden_size": 8, "dtype": torch.float32},
        [40, 33],
        "uniform",
    ),
    "as many compact ones": (
        {
            "num_experts": 4096,
            "top_k": 64,
            "hidden_size": 8,
            "dtype": torch.float32,
            "layout": "compact",
            "weights": "experts",
        },
        [5, 70],
        "holes",
    ),
    "rows of 16 bytes": ({"num_experts": 2, "top_k": 1, "hidden_size": 8, "dtype": torch.float16}, [300, 7], "uniform"),
    "rows of 64 KiB": ({"num_experts": 4, "top_k": 2, "hidden_size": 32768, "dtype": torch.bfloat16}, [9, 21], "zipf"),
    "65536 tokens": ({"num_experts": 8, "top_k": 2, "hidden_size": 8, "dtype": torch.bfloat16}, [65536, 1], "uniform"),
    "65536 tokens to one expert": (
        {"num_experts": 8, "top_k": 1, "hidden_size": 16, "dtype": torch.bfloat16, "alignment": 128},
        [0, 65536],
        "one",
    ),
}


def compare_edge(ctx: RankContext, name: str, bulk: bool) -> None:
    settings, tokens, kind = EDGES[name]
    compare_cases(ctx, [Case(settings, tokens, kind, 1, False, False)], bulk, 0)


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("name", EDGES)
def test_equals_torch_backend(name: str, bulk: bool) -> None:
    if bulk and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("copies by the copy engine need a GPU since Hopper")
    run_ranks(2, compare_edge, name, bulk)


def compare_many_tokens(ctx: RankContext, seeds: list[int], bulk: bool, granted_bytes: int) -> None:
    """From 1024 tokens on short rows have pipes of another shape, long ones have not."""
    cases = [make_case(seed, ctx.world_size, (8, 136, 1024, 3584), (7, 1023, 1024, 2300, 2777)) for seed in seeds]
    compare_cases(ctx, cases, bulk, granted_bytes)


@pytest.mark.parametrize(
    ("num_ranks", "granted_bytes"), [(1, 0), (2, 0), (3, 0), (2, 4 * SMALL_GRANT), (3, 4 * SMALL_GRANT)]
)
def test_many_tokens(num_ranks: int, granted_bytes: int) -> None:
    bulk, first = torch.cuda.get_device_capability() >= (9, 0), 60_000 + 100 * num_ranks
    run_ranks(num_ranks, compare_many_tokens, list(range(first, first + 10)), bulk, granted_bytes, timeout=120.0)


@pytest.mark.parametrize("num_ranks", [5, 6, 7, 8])
def test_more_ranks_than_gpus(num_ranks: int) -> None:
    bulk = torch.cuda.get_device_capability() >= (9, 0)
    run_ranks(num_ranks, compare, list(range(50_000 + 10 * num_ranks, 50_004 + 10 * num_ranks)), bulk, 0)


def exchange_much(ctx: RankContext) -> None:
    """A dispatch whose rows have more elements than 32 bits count."""
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    num_tokens, hidden, top_k, size = 40_000, 8192, 8, ctx.world_size
    dispatcher = TokenDispatcher(
        ctx.group,
        num_experts=8 * size,
        hidden_size=hidden,
        top_k=top_k,
        weights="experts",
        buffer=Buffer(ctx.group, backend="cuda", timeout_s=60),
    )
    ids, xs = [], []
    for source in range(size):
        ids.append(make_routing(num_tokens, top_k, 8 * size, seed=source)[0].cuda())
        generator = torch.Generator("cuda").manual_seed(source)
        xs.append(torch.randint(-8, 9, (num_tokens, hidden), generator=generator, device="cuda").bfloat16())
    with torch.no_grad():
        weights = torch.ones(num_tokens, top_k, device="cuda")
        routed = dispatcher.dispatch(xs[ctx.rank], ids[ctx.rank], weights)
        assert routed.x.numel() > 2**31
        assert torch.equal(routed.x, expected_rows(dispatcher._settings, ctx.rank, ids, xs))
        # Eight small integers: exact in bf16.
        assert torch.equal(dispatcher.combine(routed.x, routed.handle), xs[ctx.rank] * top_k)


@pytest.mark.multi_gpu(2)
def test_offsets_beyond_32_bits() -> None:
    run_ranks(2, exchange_much, timeout=120.0)
