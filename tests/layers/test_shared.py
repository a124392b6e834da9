import pytest
import torch
import torch.nn.functional as F

from moe_ep.layers import SharedExpert
from tests.layers.reference import gated_mlp

H, WIDTH = 16, 24


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_shared_expert_equals_its_formula(activation, gate):
    shared = SharedExpert(H, WIDTH, gate=gate, activation=activation, dtype=torch.float64)
    x = torch.randn(6, H, dtype=torch.float64, requires_grad=True)
    expected = gated_mlp(x, shared.w_gate_up, shared.w_down, F.silu if activation == "swiglu" else F.gelu)
    if gate:
        expected = expected * torch.sigmoid(x @ shared.w_gate.T)
    out = shared(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    inputs = (x, *shared.parameters())
    for a, b in zip(*(torch.autograd.grad(y.pow(2).sum(), inputs) for y in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_tokens():
    shared = SharedExpert(H, WIDTH, gate=True)
    shared(torch.zeros(0, H)).sum().backward()
    assert all((p.grad == 0).all() for p in shared.parameters())


def test_autocast_and_parameters_below_fp32():
    shared, x = SharedExpert(H, WIDTH, gate=True), torch.randn(4, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = shared(x)
    assert out.dtype == torch.bfloat16
    # Five tensors on the way are rounded to 2^-9; values below 4.
    torch.testing.assert_close(out.float(), shared(x), rtol=0, atol=5 * 4 * 2**-9)
    out.float().sum().backward()
    assert shared.w_gate_up.grad.dtype == torch.float32


def test_parameters_depend_on_seed_and_layer_alone():
    first = SharedExpert(H, WIDTH, gate=True, seed=1, layer_idx=2)
    torch.manual_seed(3)
    again = SharedExpert(H, WIDTH, gate=True, seed=1, layer_idx=2, device="meta").to_empty(device="cpu")
    again.reset_parameters()
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    other = SharedExpert(H, WIDTH, gate=True, seed=2, layer_idx=2)
    assert not torch.equal(first.w_down, other.w_down)
