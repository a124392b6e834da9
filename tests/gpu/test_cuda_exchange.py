"""The CUDA backend against the torch backend on the CPU: rows, plans, sums and gradients, bit for bit."""

from __future__ import annotations

import pytest
import torch

from moe_ep import Buffer
from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext
from tests.checks import rounding_of_sums
from tests.gpu.exchange_cases import Case, make_case, run_case

pytestmark = pytest.mark.gpu

# Rings as small as they may be: every larger exchange goes round them several times.
SMALL_GRANT = 64 * 16384


def compare(ctx: RankContext, seeds: list[int], bulk: bool, granted_bytes: int) -> None:
    compare_cases(ctx, [make_case(seed, ctx.world_size) for seed in seeds], bulk, granted_bytes)


def compare_cases(ctx: RankContext, cases: list[Case], bulk: bool, granted_bytes: int) -> None:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    oracle = Buffer(ctx.group, backend="torch", timeout_s=20)
    buffer = Buffer(ctx.group, granted_bytes * ctx.world_size, backend="cuda", timeout_s=20)
    assert buffer.backend_name == "cuda"
    buffer.backend.settings.bulk = bulk
    for case in cases:
        expected = run_case(ctx.group, ctx.rank, "cpu", oracle, case)
        got = run_case(ctx.group, ctx.rank, "cuda", buffer, case)
        assert expected.keys() == got.keys(), (case, expected, got)
        for name, want in expected.items():
            assert torch.equal(want, got[name]), (name, case, (want != got[name]).nonzero()[:5])
    buffer.drain()


@pytest.mark.parametrize("granted_bytes", [0, SMALL_GRANT], ids=["one-lap", "laps"])
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_torch_backend(num_ranks: int, bulk: bool, granted_bytes: int) -> None:
    if bulk and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("copies by the copy engine need a GPU since Hopper")
    first = 1000 * num_ranks + 100 * bulk + 10_000 * (granted_bytes > 0)
    run_ranks(num_ranks, compare, list(range(first, first + 32)), bulk, granted_bytes)


@pytest.mark.parametrize("layout", ["expanded", "slab"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_sums_may_travel_in_fp32(num_ranks: int, layout: str) -> None:
    for out, dx in run_ranks(num_ranks, rounding_of_sums, layout, torch.bfloat16, torch.float32, "cuda"):
        assert out <= 1.001
        assert dx <= 1.001
