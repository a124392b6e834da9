"""The kernel that gives gradients of rows and of their weights, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import moe_ep.ops  # noqa: F401 - registers the operator
from moe_ep.backends import weighing

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Rows of one vector, of less than a warp's, of several turns with a rest, and a large one.
SHAPES = [(0, 64), (1, 8), (3, 104), (129, 2048), (1000, 7168), (70000, 64)]


def make(num_rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(num_rows + hidden)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grads, rows = (torch.randn(num_rows, hidden, device="cuda", generator=generator).to(dtype) for _ in range(2))
    return grads, rows, torch.rand(num_rows, device="cuda", dtype=wide, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    grads, rows, weights = make(*shape, dtype)
    assert weighing._has_kernel(grads, rows, weights)
    got_rows, got_weights = torch.ops.moe_ep.weigh_grads(grads, rows, weights)
    # One product and one rounding: the same bits.
    assert torch.equal(got_rows, (grads * weights.unsqueeze(-1)).to(dtype))
    exact = (grads.double() * rows.double()).sum(-1)
    # Each of H sums may round by half a unit of the largest partial sum, which the sum of sizes bounds.
    unit = torch.finfo(weights.dtype).eps
    bound = shape[1] * unit * (grads.double() * rows.double()).abs().sum(-1)
    assert bool(((got_weights.double() - exact).abs() <= bound).all())
    again = torch.ops.moe_ep.weigh_grads(grads, rows, weights)
    assert torch.equal(again[1], got_weights)


def test_slabs_and_strange_memory() -> None:
    grads, rows, weights = make(24, 64, torch.bfloat16)
    slabs = [grads.view(2, 12, 64), rows.view(2, 12, 64), weights.view(2, 12)]
    got = torch.ops.moe_ep.weigh_grads(*slabs)
    want = torch.ops.moe_ep.weigh_grads(grads, rows, weights)
    assert torch.equal(got[0].view(24, 64), want[0])
    assert torch.equal(got[1].view(24), want[1])
    # Rows that begin elsewhere than at a multiple of 16 bytes go another way.
    shifted = torch.empty(24 * 64 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(24, 64)
    shifted.copy_(grads)
    assert not weighing._has_kernel(shifted, rows, weights)
    assert torch.equal(torch.ops.moe_ep.weigh_grads(shifted, rows, weights)[0], want[0])


def test_operator_passes_opcheck() -> None:
    grads, rows, weights = make(12, 64, torch.float32)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.moe_ep.weigh_grads.default, (grads, rows, weights), test_utils=tests)
