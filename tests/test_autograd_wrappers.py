"""Dispatchers inside what training puts around a module: autocast, loss scaling, DDP, FSDP2, copies and files."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moe_ep
from moe_ep.errors import StaleHandleError
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import (
    EXACT,
    MODES,
    Ranks,
    check_against_unsharded,
    check_grads,
    make_case,
    make_leaves,
    probe,
    run_layer,
    unsharded,
)


class Block(nn.Module):
    """A dense layer in front of a dispatcher whose experts take the hyperbolic tangent; all parameters are dense."""

    def __init__(self, case: Case, group: object) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.dense = nn.Linear(case.hidden_size, case.hidden_size, dtype=case.dtype)
        self.scores = nn.Linear(case.hidden_size, case.top_k, dtype=case.dtype)
        self.dispatcher = case.dispatcher(group)

    def forward(self, x: Tensor, topk_idx: Tensor) -> Tensor:
        hidden, weights = self.dense(x), self.scores(x).to(x.dtype).sigmoid()
        routed = self.dispatcher.dispatch(hidden, topk_idx, weights)
        return self.dispatcher.combine(torch.tanh(routed.x), routed.handle, routed.weights)

    def reference(self, x: Tensor, topk_idx: Tensor) -> Tensor:
        """The same without a dispatcher."""
        weights = torch.where(topk_idx >= 0, self.scores(x).sigmoid(), 0.0)
        return torch.tanh(self.dense(x)) * weights.sum(1, keepdim=True)


def parameter_grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in module.parameters()]


def reference_grads(case: Case, module: Block) -> list[Tensor]:
    """Gradients of the mean over ranks of each rank's loss."""
    module = copy.deepcopy(module)
    for rank in range(case.num_ranks):
        loss = (module.reference(case.x(rank), case.routing(rank)[0]) * probe(case, rank)).sum() / case.num_ranks
        loss.backward()
    return [p.grad for p in module.parameters()]


def under_wrapper(ctx: RankContext, how: str) -> None:
    case = make_case(ctx.world_size)
    block = Block(case, ctx.group)
    expected = reference_grads(case, block)
    if how == "ddp":
        run: nn.Module = DistributedDataParallel(block, process_group=ctx.group)
    else:
        run = fully_shard(block, mesh=DeviceMesh.from_group(ctx.group, "cpu"))
    for _ in range(2):
        run.zero_grad()
        before = block.dispatcher.stats()["exchanges"]
        (run(case.x(ctx.rank), case.routing(ctx.rank)[0]) * probe(case, ctx.rank)).sum().backward()
        assert block.dispatcher.stats()["exchanges"] == before + 4
        for ours, theirs in zip(parameter_grads(run), expected, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_dense_gradients_are_averaged_around_a_dispatcher(ranks: Ranks, num_ranks: int, how: str) -> None:
    ranks(num_ranks, under_wrapper, how)


def round_trip(
    dispatcher: moe_ep.TokenDispatcher, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, use_async: bool
) -> tuple[moe_ep.Dispatched, Tensor]:
    """Every row doubled, the weights in their place."""
    if use_async:
        routed = dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
    else:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    y, weights = 2 * routed.x, routed.weights
    if dispatcher.weights == "experts":
        y, weights = (y * weights.sum(1, keepdim=True)).to(y.dtype), None
    if use_async:
        return routed, dispatcher.combine_async(y, routed.handle, weights).wait()
    return routed, dispatcher.combine(y, routed.handle, weights)


def check_rounded(ours: Tensor, exact: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    # Rounded to 16 bits: the product by the expert, one partial sum per rank and the result, each by half a unit of
    # the sum of magnitudes; twice that for what they add up to.
    bound = 6 * torch.finfo(dtype).eps / 2 * scale + torch.finfo(dtype).smallest_normal
    assert ((ours.double() - exact).abs() <= bound).all()


def under_autocast(ctx: RankContext, dtype: torch.dtype, mode: str, use_async: bool) -> None:
    case = make_case(ctx.world_size, dtype=torch.float32, **MODES[mode])
    dispatcher = case.dispatcher(ctx.group)
    topk_idx, topk_weights = case.routing(ctx.rank)
    # Inputs that 16 bits hold, so that rounding begins inside.
    x, v = (t.to(dtype).float() for t in (case.x(ctx.rank), probe(case, ctx.rank)))
    x.requires_grad_()
    topk_weights.requires_grad_()
    with torch.autocast("cpu", dtype):
        routed, out = round_trip(dispatcher, x, topk_idx, topk_weights, use_async)
    assert (routed.x.dtype, routed.weights.dtype, out.dtype) == (dtype, torch.float32, dtype)
    # Backward runs outside of autocast, as it should.
    (out.float() * v).sum().backward()
    assert (x.grad.dtype, topk_weights.grad.dtype) == (torch.float32, torch.float32)
    chosen = (topk_idx >= 0).double()
    w = torch.where(topk_idx >= 0, topk_weights, 0.0).detach().double()
    total, x64, v64 = w.sum(1, keepdim=True), x.detach().double(), v.double()
    check_rounded(out, 2 * x64 * total, 2 * x64.abs() * total, dtype)
    check_rounded(x.grad, 2 * v64 * total, 2 * v64.abs() * total, dtype)
    dots, magnitudes = (2 * t.sum(1, keepdim=True) * chosen for t in (x64 * v64, (x64 * v64).abs()))
    check_rounded(topk_weights.grad, dots, magnitudes, dtype)
    # Outside of autocast rows travel in the dispatcher's own dtype again.
    assert round_trip(dispatcher, x, topk_idx, topk_weights, use_async)[1].dtype == torch.float32


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize(("dtype", "mode"), [(torch.bfloat16, "expanded"), (torch.float16, "compact")])
def test_autocast_takes_rows_and_leaves_weights(ranks: Ranks, dtype: torch.dtype, mode: str, use_async: bool) -> None:
    ranks(2, under_autocast, dtype, mode, use_async)


def under_scaling(ctx: RankContext) -> list[bool]:
    case = make_case(ctx.world_size, dtype=torch.float32)
    block = Block(case, ctx.group)
    run = DistributedDataParallel(block, process_group=ctx.group)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    found, stepped = [], []
    for scale in (1.0, 2.0**8, 2.0**40):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.zero_grad()
        before = [p.detach().clone() for p in block.parameters()]
        with torch.autocast("cpu", torch.float16):
            out = run(case.x(ctx.rank), case.routing(ctx.rank)[0])
        scaler.scale((out.float() * probe(case, ctx.rank)).sum()).backward()
        scaler.unscale_(optimizer)
        found.append([p.grad.clone() for p in block.parameters()])
        scaler.step(optimizer)
        scaler.update()
        stepped.append(any(not torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)))
        stepped.append(scaler.get_scale() < scale)
        with torch.no_grad():
            for p, value in zip(block.parameters(), before, strict=True):
                p.copy_(value)
    # A power of two moves no bit but those of subnormal halves, 6e-8 each, in sums over 7 tokens of |x| < 4.
    for plain, scaled in zip(found[0], found[1], strict=True):
        torch.testing.assert_close(plain, scaled, rtol=1e-5, atol=7 * 4 * 6e-8)
    return stepped


def test_loss_scaling_in_half_precision(ranks: Ranks) -> None:
    # An overflow on the one rank that has tokens is seen on both: the step is left out and the scale falls.
    assert ranks(2, under_scaling) == [[True, False, True, False, False, True]] * 2


def copies_and_files(ctx: RankContext) -> str:
    case = make_case(ctx.world_size, weights="experts", alignment=4)
    dispatcher = case.dispatcher(ctx.group)
    dispatcher.register_hook("dispatch_ready", lambda event: None)
    leaves = make_leaves(case, ctx.rank)
    out = run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0])
    twin = copy.deepcopy(dispatcher)
    twin.set_group(ctx.group)
    check_against_unsharded(ctx, case, twin)
    file = io.BytesIO()
    torch.save(nn.Sequential(dispatcher), file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=False)
    text = ""
    try:
        loaded.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    except StaleHandleError as error:
        text = str(error)
    loaded.set_group(ctx.group)
    for use_async in (False, True):
        check_against_unsharded(ctx, case, loaded, use_async=use_async)
    # The first one's graph is untouched by all of this.
    out.backward(probe(case, ctx.rank))
    check_grads(leaves.grads(), unsharded(case)[1][ctx.rank])
    return text


def test_copies_and_files_keep_gradients(ranks: Ranks) -> None:
    assert all("set_group" in text for text in ranks(2, copies_and_files))


def outlive(ctx: RankContext) -> str:
    """Backward after the dispatcher is gone: an error that says so, on all ranks, and no crash."""
    case = make_case(ctx.world_size)
    leaves = make_leaves(case, ctx.rank)
    out = run_layer(case, case.dispatcher(ctx.group), leaves, case.routing(ctx.rank)[0])
    try:
        out.sum().backward()
    except StaleHandleError as error:
        return str(error)
    return ""


def test_backward_needs_its_dispatcher(ranks: Ranks) -> None:
    assert all("keep it alive" in text for text in ranks(2, outlive))
