"""One layer without an engine: gradients, recomputation, and what passes through it bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_ep.dispatcher import TokenDispatcher
from moe_ep.integrations.deepspeed import EPExperts, EPMOELayer
from moe_ep.testing import RankContext
from tests.frameworks.deepspeed.models import (
    AUX,
    HIDDEN,
    Model,
    Setup,
    Unsharded,
    build,
    inputs,
    join,
    on_ranks,
    relative_bound,
)

EVEN = Setup(k=3, use_rts=False, sample_second=False)
UNEVEN = EVEN.with_(tokens=((4, 6), (1, 3)), min_capacity=4)
EMPTY = EVEN.with_(tokens=((0, 7), (3, 5)), min_capacity=4)


class Scale(nn.Module):
    """An expert whose every output element depends on one input element: nothing is summed that could be reordered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def layer_of(ctx: RankContext, setup: Setup, *, ours: bool, one_expert: nn.Module | None = None) -> Model:
    """The model with groups set, as an engine would set them."""
    join(ctx)
    model = build(ctx, setup, ours=ours, one_expert=one_expert)
    model.moe.set_deepspeed_parallelism()
    return model


def check_close(name: str, found: Tensor, expected: Tensor, setup: Setup) -> None:
    """Within the bound, relative to the largest element: sums of terms of both signs may cancel."""
    error = (found.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= relative_bound(setup) * expected.abs().max().item() if expected.numel() else True, (
        f"{name} is off by {error}, its largest element is {expected.abs().max().item()}"
    )


def check_gradients(ctx: RankContext, setup: Setup) -> None:
    """Loss, and gradients of inputs, gate, experts and dense layers, against all ranks' batches on one process."""
    model, alone = layer_of(ctx, setup, ours=True), Unsharded(ctx, setup)
    xs = [inputs(setup, rank).requires_grad_() for rank in range(ctx.world_size)]
    loss = model(xs[ctx.rank])
    loss.backward()
    mine = xs[ctx.rank].grad
    assert mine is not None
    xs[ctx.rank].grad = None
    expected = [alone(x) for x in xs]
    sum(expected).backward()

    check_close("loss", loss, expected[ctx.rank], setup)
    check_close("gradient of inputs", mine, xs[ctx.rank].grad, setup)
    for name, dense in (("first", alone.first), ("last", alone.last)):
        for found, target in zip(getattr(model, name).parameters(), dense.parameters(), strict=True):
            dist.all_reduce(found.grad)
            check_close(f"gradient of {name}", found.grad, target.grad, setup)
    gate = model.moe.deepspeed_moe.gate.wg.weight.grad
    assert gate is not None
    dist.all_reduce(gate)
    check_close("gradient of the gate", gate, alone.gate.wg.weight.grad, setup)
    local = model.moe.deepspeed_moe.experts.deepspeed_experts
    first = (ctx.rank % setup.ep_size) * len(local)
    for number, one in enumerate(local):
        for found, target in zip(one.parameters(), alone.experts[first + number].parameters(), strict=True):
            # An expert that nobody chose has a gradient all the same.
            target_grad = torch.zeros_like(target) if target.grad is None else target.grad
            check_close(f"gradient of expert {first + number}", found.grad, target_grad, setup)


@pytest.mark.parametrize("setup", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty rank"])
@pytest.mark.parametrize(("k", "drop"), [(1, True), (1, False), (2, True), (2, False), (3, True), (3, False)])
def test_gradients_equal_the_unsharded_model(setup: Setup, k: int, drop: bool):
    on_ranks(2, check_gradients, setup.with_(k=k, drop=drop))


def test_experts_that_nobody_chose_have_gradients():
    setup = EVEN.with_(tokens=((1, 1), (1, 2)), k=1, drop=False, min_capacity=0)
    on_ranks(2, check_gradients, setup)


def lose_rows(ctx: RankContext, setup: Setup) -> bool:
    route = EPMOELayer._route

    def lossy(*args: object) -> tuple[Tensor, Tensor]:
        topk_idx, topk_weights = route(*args)
        topk_idx[:1, -1:] = -1
        return topk_idx, topk_weights

    EPMOELayer._route = lossy
    try:
        check_gradients(ctx, setup)
    except AssertionError as error:
        return " is off by " in str(error)
    finally:
        EPMOELayer._route = route
    return False


@pytest.mark.parametrize("k", [2, 3])
def test_one_lost_row_is_caught(k: int):
    assert on_ranks(2, lose_rows, EVEN.with_(k=k, drop=False)) == [True, True]


def compare_bits(ctx: RankContext, setup: Setup) -> None:
    results = []
    for ours in (False, True):
        moe = layer_of(ctx, setup, ours=ours, one_expert=Scale()).moe.to(setup.dtype)
        torch.manual_seed(7)
        out, l_aux, counts = moe(inputs(setup, ctx.rank).to(setup.dtype))
        out.float().sum().backward()
        results.append((out, l_aux, counts))
        results[-1] += tuple(one.weight.grad for one in moe.deepspeed_moe.experts.deepspeed_experts)
    assert results[1][0].dtype == setup.dtype
    for stock, ours in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.equal(stock, ours)
    for stock, ours in zip(results[0][3:], results[1][3:], strict=True):
        # Sums over an expert's rows, which padding moves apart in one of the two.
        rows = sum(batch * length for batch, length in setup.tokens)
        bound = rows * torch.finfo(setup.dtype).eps * stock.abs().max().item()
        assert torch.allclose(stock, ours, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("drop", [True, False])
def test_one_choice_per_token_gives_the_same_bits(dtype: torch.dtype, drop: bool):
    on_ranks(2, compare_bits, Setup(k=1, drop=drop, dtype=dtype))


def bf16_results(ctx: RankContext, setup: Setup, *, ours: bool) -> dict[str, Tensor]:
    """Output and gradients of one bf16 layer; what comes from above is noise, the same for both layers."""
    moe = layer_of(ctx, setup, ours=ours).moe.to(torch.bfloat16)
    x = inputs(setup, ctx.rank).bfloat16().requires_grad_()
    out, l_aux, _ = moe(x)
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(70 + ctx.rank)).bfloat16()
    torch.autograd.backward([out, AUX * l_aux], [noise, torch.ones_like(l_aux)])
    gradients = {"inputs": x, "gate": moe.deepspeed_moe.gate.wg.weight}
    for number, one in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
        gradients |= {f"expert {number}: {name}": parameter for name, parameter in one.named_parameters()}
    results = {
        f"gradient of {name}": torch.zeros_like(p) if p.grad is None else p.grad for name, p in gradients.items()
    }
    return {"output": out.detach(), **results}


def bf16_roundings(name: str, k: int) -> int:
    """Tensors rounded to bf16 on the way to a result, forward and backward."""
    forward = {"hidden": 1, "activation": 1, "y": 1}
    if name == "output":
        # Rows of experts, then their sum: here rounded as partial sums on the wire, and once.
        return sum(forward.values()) + k + 1
    if name == "gradient of gate":
        # Scores are fp32, and so is the product of y with what comes from above.
        return sum(forward.values()) + 1
    # Of y, of the activation, of hidden; the last one depends on the stored hidden values.
    backward = 3 + forward["hidden"]
    if name == "gradient of inputs":
        # Rows of k choices, their sum, term by term in DeepSpeed; the gate's part, and the two added.
        return backward + 1 + k + 2
    # One more for the gradient itself, one for the stored activation.
    return backward + 2


def bf16_differences(found: dict[str, Tensor], expected: dict[str, Tensor], k: int) -> list[str]:
    """Results that are apart by more than the roundings on the way to them, a unit each, relative to their norm.

    A rounding moves each element of a tensor by half a unit of it at most, in each of the two runs, and so the norm of
    the tensor by that fraction. Terms of the sums that follow have independent signs, because what comes from above is
    noise, and errors have too: both grow alike.
    """
    lines = []
    for name, target in expected.items():
        error, norm = (found[name].double() - target.double()).norm().item(), target.double().norm().item()
        allowed = bf16_roundings(name, k) * torch.finfo(torch.bfloat16).eps * norm
        if not error <= allowed:
            lines.append(f"{name} is off by {error} of at most {allowed}")
    return lines


def compare_bf16(ctx: RankContext, setup: Setup) -> None:
    stock, ours = (bf16_results(ctx, setup, ours=ours) for ours in (False, True))
    assert all(bool(value.any()) for value in stock.values())
    assert bf16_differences(ours, stock, setup.k) == []


BF16 = EVEN.with_(drop=False)


@pytest.mark.parametrize("k", [1, 2])
def test_bf16_gradients_equal_those_of_deepspeeds_own_exchange(k: int):
    on_ranks(2, compare_bf16, BF16.with_(k=k))


def _last_choice_dropped(topk_idx: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    topk_idx = topk_idx.clone()
    topk_idx[0, -1] = -1
    return topk_idx, topk_weights


BACKWARD_FAULTS = {
    "weights detached": (EPMOELayer, "_route", lambda routes: (routes[0], routes[1].detach())),
    "one choice dropped": (EPMOELayer, "_route", lambda routes: _last_choice_dropped(*routes)),
    "experts detached": (EPExperts, "forward", lambda out: out.detach()),
    "half of the gradient": (EPExperts, "forward", lambda out: (out + out.detach()) / 2),
    "rows detached": (TokenDispatcher, "dispatch", lambda routed: replace(routed, x=routed.x.detach())),
}


def bf16_differences_by_fault(ctx: RankContext, setup: Setup) -> dict[str, list[str]]:
    stock = bf16_results(ctx, setup, ours=False)
    found = {}
    for fault, (owner, method, spoil) in BACKWARD_FAULTS.items():
        real = getattr(owner, method)

        def faulty(*args: object, real: Callable = real, spoil: Callable = spoil) -> object:
            return spoil(real(*args))

        with mock.patch.object(owner, method, faulty):
            found[fault] = bf16_differences(bf16_results(ctx, setup, ours=True), stock, setup.k)
    return found


@pytest.mark.parametrize("k", [1, 2])
def test_planted_faults_of_bf16_gradients_are_caught(k: int):
    for found in on_ranks(2, bf16_differences_by_fault, BF16.with_(k=k)):
        for fault, lines in found.items():
            assert any(line.startswith("gradient of") for line in lines), fault


def recompute(ctx: RankContext, setup: Setup, how: str) -> None:
    """Recomputing changes no bit: the gate draws the same tokens, and the exchange keeps its order."""
    ways: dict[str, Callable[[MoE, Tensor], tuple[Tensor, ...]]] = {
        "reentrant": lambda moe, x: checkpoint(moe, x, use_reentrant=True),
        "non-reentrant": lambda moe, x: checkpoint(moe, x, use_reentrant=False),
        "deepspeed": lambda moe, x: deepspeed.checkpointing.checkpoint(moe, x),
    }
    results = []
    for way in (lambda moe, x: moe(x), ways[how]):
        model = layer_of(ctx, setup, ours=True)
        x = inputs(setup, ctx.rank).requires_grad_()
        torch.manual_seed(11)
        out, l_aux, _ = way(model.moe, model.first(x))
        (out.square().sum() + l_aux).backward()
        results.append([x.grad, *(parameter.grad for parameter in model.moe.parameters())])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "deepspeed"])
def test_recomputation(how: str):
    on_ranks(2, recompute, Setup(k=1), how)
    on_ranks(2, recompute, Setup(k=3, drop=False, tokens=((2, 5), (1, 2))), how)


def mask_tokens(ctx: RankContext, setup: Setup) -> None:
    x, used = inputs(setup, ctx.rank), torch.arange(24) % 3 > 0
    outs = [layer_of(ctx, setup, ours=ours).moe(x, used.long()) for ours in (False, True)]
    for stock, ours in zip(*outs, strict=True):
        check_close("with used_token", ours, stock, setup)
    assert not outs[1][0].reshape(24, HIDDEN)[~used].any()


def test_used_token():
    on_ranks(2, mask_tokens, Setup(k=1, drop=False))


def evaluate(ctx: RankContext, setup: Setup) -> None:
    """Under no_grad and autocast, and with frozen experts."""
    model = layer_of(ctx, setup, ours=True).eval()
    x = inputs(setup, ctx.rank)
    with torch.no_grad():
        alone = model(x)
    model.moe.deepspeed_moe.experts.requires_grad_(False)
    x.requires_grad_()
    loss = model(x)
    loss.backward()
    assert torch.equal(alone, loss)
    assert x.grad is not None
    assert bool(x.grad.any())
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(model(x).item() - alone.item()) < relative_bound(setup, [torch.bfloat16]) * alone.item()
    model.moe.double()
    assert model.moe(x.double().detach())[0].dtype == torch.float64


def test_evaluation_autocast_and_frozen_experts():
    on_ranks(2, evaluate, EVEN)
