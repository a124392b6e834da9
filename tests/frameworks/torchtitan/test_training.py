"""torchtitan's DeepSeek-V3 with FSDP2 and expert parallelism: losses, recomputation, compilation, checkpoints."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from moe_ep.integrations.torchtitan import ExchangeSavingAC, MoeEpTokenDispatcher
from moe_ep.testing import RankContext
from tests.frameworks.torchtitan.models import LEARNING_RATE, SELECTIVE_AC, Run, Setup, batch_of, on_ranks, whole_model

# Experts compute in bf16 with either dispatcher. Where an output differs in its last bit, each of the at most six
# roundings to bf16 on the way to a gradient may go the other way, in each of the two runs.
GRADIENT_ERROR = 12 * torch.finfo(torch.bfloat16).eps


def allowed(setup: Setup, losses: list[float]) -> float:
    """How far the losses of two runs may be apart.

    The forward pass differs in the order of the top-3 terms of a token, each rounded to the activations' dtype. The
    gradient is clipped to norm 1, so a step moves parameters by at most lr, and an error of it, of that fraction.
    """
    forward = 4 * torch.finfo(getattr(torch, setup.dtype)).eps * max(losses)
    return forward + setup.steps * LEARNING_RATE * GRADIENT_ERROR


def dispatcher_of(run: Run) -> object:
    return run.model.layers["1"].moe.routed_experts.token_dispatcher


def losses_of(ctx: RankContext, setup: Setup, ours: bool) -> list[float]:
    run = Run(ctx, setup, ours=ours)
    assert isinstance(dispatcher_of(run), MoeEpTokenDispatcher) == ours
    if ours:
        assert len(run.replaced) == 1 + len(setup.extra_overrides)
    return run.train(ctx.rank, setup.steps)


def compare_with_stock(ctx: RankContext, setup: Setup) -> None:
    stock, ours = (
        losses_of(ctx, setup.with_(extra_overrides=() if not o else setup.extra_overrides), o) for o in (0, 1)
    )
    assert stock[0] != stock[1]
    for a, b in zip(stock, ours, strict=True):
        assert abs(a - b) <= allowed(setup, stock), f"{ours} is not {stock}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_equal_those_of_torchtitans_own_dispatcher(dtype: str):
    on_ranks(2, compare_with_stock, Setup(dtype=dtype))


@pytest.mark.parametrize(
    "setup",
    [Setup(tp=2), Setup(compile=True), Setup(ac=FullAC.Config()), Setup(ac=SelectiveAC.Config())],
    ids=["tensor parallel", "compiled", "full recomputation", "selective recomputation"],
)
def test_with_the_rest_of_torchtitan(setup: Setup):
    on_ranks(2, compare_with_stock, setup.with_(steps=2))


def test_experts_sharded_once_more_by_fsdp():
    on_ranks(4, compare_with_stock, Setup(batch=1, steps=2))


def compare_with_unsharded(ctx: RankContext, setup: Setup) -> None:
    """The same parameters on one process, both with plain gradient descent."""
    run = Run(ctx, setup, ours=True)
    alone = whole_model(setup)
    optimizers = [torch.optim.SGD(model.parameters(), lr=LEARNING_RATE) for model in (run.model, alone)]
    for step in range(setup.steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = run.loss(*batch_of(setup, ctx.rank, step))
        loss.backward()
        expected = []
        for rank in range(ctx.world_size):
            tokens, labels = batch_of(setup, rank, step)
            total = F.cross_entropy(alone(tokens).float().flatten(0, 1), labels.flatten(), reduction="sum")
            expected.append(total / (labels.numel() * ctx.world_size))
        sum(expected).backward()
        assert abs(loss.item() - expected[ctx.rank].item()) <= allowed(setup, [loss.item()])
        for (name, found), target in zip(run.model.named_parameters(), alone.parameters(), strict=True):
            grad = found.grad.full_tensor()
            assert (grad - target.grad).abs().max() <= GRADIENT_ERROR * target.grad.abs().max(), name
        for optimizer in optimizers:
            optimizer.step()


def test_losses_and_gradients_equal_the_unsharded_model():
    on_ranks(2, compare_with_unsharded, Setup())


def lose_a_choice(ctx: RankContext, setup: Setup) -> bool:
    dispatch = MoeEpTokenDispatcher.dispatch

    def lossy(self: MoeEpTokenDispatcher, x: torch.Tensor, scores: torch.Tensor, ids: torch.Tensor, *rest: object):
        ids = ids.clone()
        ids[:, -1] = -1
        return dispatch(self, x, scores, ids, *rest)

    MoeEpTokenDispatcher.dispatch = lossy
    try:
        compare_with_unsharded(ctx, setup)
    except AssertionError:
        return True
    finally:
        MoeEpTokenDispatcher.dispatch = dispatch
    return False


def test_a_planted_fault_is_caught():
    assert on_ranks(2, lose_a_choice, Setup(steps=1)) == [True, True]


def count_exchanges(ctx: RankContext, setup: Setup) -> int:
    run = Run(ctx, setup, ours=True)
    assert isinstance(run.config.activation_checkpoint, ExchangeSavingAC.Config) == bool(setup.extra_overrides)
    loss = run.loss(*batch_of(setup, ctx.rank))
    loss.backward()
    return dispatcher_of(run)._exchange.stats()["exchanges"]


@pytest.mark.parametrize(
    ("ac", "overrides", "expected"),
    [
        (None, (), 4),
        (FullAC.Config(), (), 6),
        (SelectiveAC.Config(), (), 6),
        (SelectiveAC.Config(), (SELECTIVE_AC,), 4),
    ],
    ids=["none", "full", "selective", "selective, saving exchanges"],
)
def test_exchanges_of_a_step(ac: object, overrides: tuple[str, ...], expected: int):
    assert on_ranks(2, count_exchanges, Setup(ac=ac, extra_overrides=overrides)) == [expected] * 2


def test_selective_recomputation_that_saves_exchanges():
    on_ranks(2, compare_with_stock, Setup(ac=SelectiveAC.Config(), extra_overrides=(SELECTIVE_AC,), steps=2))


def save_and_load(ctx: RankContext, setup: Setup, folder: str, saved_by_ours: bool) -> None:
    """What one saves the other loads, and goes on as if nothing had been."""
    first = Run(ctx, setup, ours=saved_by_ours)
    first.train(ctx.rank, 2)
    dcp.save({"model": first.model.state_dict(), "optimizer": first.optimizers.state_dict()}, checkpoint_id=folder)
    dist.barrier()
    second = Run(ctx, setup, ours=not saved_by_ours)
    # Fills in the optimizer's state.
    second.train(ctx.rank, 1, first=7)
    model, optimizer = second.model.state_dict(), second.optimizers.state_dict()
    assert model.keys() == first.model.state_dict().keys()
    dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    second.model.load_state_dict(model)
    second.optimizers.load_state_dict(optimizer)
    for name, value in first.model.state_dict().items():
        assert torch.equal(_local(value), _local(second.model.state_dict()[name])), name
    again = [run.train(ctx.rank, 2, first=2) for run in (first, second)]
    for a, b in zip(*again, strict=True):
        assert abs(a - b) <= allowed(setup, again[0])


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@pytest.mark.parametrize("saved_by_ours", [True, False], ids=["ours to stock", "stock to ours"])
def test_checkpoints_load_in_both_directions(tmp_path: Path, saved_by_ours: bool):
    on_ranks(2, save_and_load, Setup(), str(tmp_path), saved_by_ours)
