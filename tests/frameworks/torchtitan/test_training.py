"""torchtitan's DeepSeek-V3 with FSDP2 and expert parallelism: losses, recomputation, compilation, checkpoints."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from moe_ep.integrations.torchtitan import ExchangeSavingAC, MoeEpTokenDispatcher
from moe_ep.testing import RankContext
from tests.frameworks.torchtitan.models import (
    LEARNING_RATE,
    SELECTIVE_AC,
    Run,
    Setup,
    Trained,
    batch_of,
    on_ranks,
    whole_model,
)

# Experts compute in bf16 with either dispatcher. Where an output differs in its last bit, each of the at most six
# roundings to bf16 on the way to a gradient may go the other way, in each of the two runs. With bf16 activations some
# forty tensors lie on the longest way, from the logits to the embedding; their roundings are at most a unit apart and
# have independent signs, so they make sqrt(40), half of these twelve.
GRADIENT_ERROR = 12 * torch.finfo(torch.bfloat16).eps


def allowed(setup: Setup, loss: float, step: int) -> float:
    """How far losses of two runs may be apart after so many steps.

    The forward pass differs in the order of the top-3 terms of a token, each rounded to the activations' dtype. The
    gradient is clipped to norm 1, so a step moves parameters by at most lr, and an error of it, of that fraction.
    """
    forward = 4 * torch.finfo(getattr(torch, setup.dtype)).eps * loss
    return forward + step * LEARNING_RATE * GRADIENT_ERROR


def gradient_differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """One line for every parameter whose gradient is off, relative to its largest element."""
    assert found.keys() == expected.keys()
    lines = []
    for name, target in expected.items():
        error, largest = (found[name] - target).abs().max().item(), target.abs().max().item()
        # Written so that NaN is a difference, and no gradient at all for both.
        if not error <= GRADIENT_ERROR * largest or not largest:
            lines.append(f"gradient of {name} is off by {error}, its largest element is {largest}")
    return lines


def differences(setup: Setup, stock: Trained, ours: Trained) -> list[str]:
    """One line for every loss, and every gradient of the first step, that is not the same in both runs."""
    lines = []
    for step, (a, b) in enumerate(zip(stock.losses, ours.losses, strict=True)):
        if not abs(a - b) <= allowed(setup, a, step):
            lines.append(f"loss {step} is {b} instead of {a}")
    return lines + gradient_differences(ours.gradients, stock.gradients)


def dispatcher_of(run: Run) -> object:
    return run.model.layers["1"].moe.routed_experts.token_dispatcher


def train_one(ctx: RankContext, setup: Setup, *, ours: bool) -> Trained:
    run = Run(ctx, setup if ours else setup.with_(extra_overrides=()), ours=ours)
    assert isinstance(dispatcher_of(run), MoeEpTokenDispatcher) == ours
    if ours:
        assert len(run.replaced) == 1 + len(setup.extra_overrides)
    return run.train(ctx.rank, setup.steps)


def compare_with_stock(ctx: RankContext, setup: Setup) -> None:
    stock, ours = (train_one(ctx, setup, ours=ours) for ours in (False, True))
    assert differences(setup, stock, ours) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_equals_that_with_torchtitans_own_dispatcher(dtype: str):
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
        target = expected[ctx.rank].item()
        assert abs(loss.item() - target) <= allowed(setup, target, step)
        gradients = {name: parameter.grad for name, parameter in alone.named_parameters()}
        assert gradient_differences(run.gradients(), gradients) == []
        for optimizer in optimizers:
            optimizer.step()


def test_losses_and_gradients_equal_the_unsharded_model():
    on_ranks(2, compare_with_unsharded, Setup())


def drop_last_choice(x: Tensor, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, scores, torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], dim=1)


FAULTS_OF_DISPATCH = {
    "all choices dropped": lambda x, scores, ids: (x, scores, torch.full_like(ids, -1)),
    "last choice dropped": drop_last_choice,
    "scores of the row before": lambda x, scores, ids: (x, scores.roll(1, 0), ids),
    "scores detached": lambda x, scores, ids: (x, scores.detach(), ids),
    "rows detached": lambda x, scores, ids: (x.detach(), scores, ids),
}
FAULTS_OF_COMBINE = {
    "output doubled": lambda rows: 2 * rows,
    "experts detached": lambda rows: rows.detach(),
}
FORWARD_FAULTS = ("all choices dropped", "last choice dropped", "scores of the row before", "output doubled")


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """Our dispatcher with a fault."""
    dispatch, combine = MoeEpTokenDispatcher.dispatch, MoeEpTokenDispatcher.combine

    def faulty_dispatch(self: MoeEpTokenDispatcher, x: Tensor, scores: Tensor, ids: Tensor, counts: Tensor) -> tuple:
        return dispatch(self, *FAULTS_OF_DISPATCH[fault](x, scores, ids), counts)

    def faulty_combine(self: MoeEpTokenDispatcher, rows: Tensor, *rest: object) -> Tensor:
        return combine(self, FAULTS_OF_COMBINE[fault](rows), *rest)

    at_dispatch = fault in FAULTS_OF_DISPATCH
    name, replacement = ("dispatch", faulty_dispatch) if at_dispatch else ("combine", faulty_combine)
    with mock.patch.object(MoeEpTokenDispatcher, name, replacement):
        yield


def differences_by_fault(ctx: RankContext, setup: Setup) -> dict[str, list[str]]:
    stock = train_one(ctx, setup, ours=False)
    found = {}
    for fault in (*FAULTS_OF_DISPATCH, *FAULTS_OF_COMBINE):
        with planted(fault):
            found[fault] = differences(setup, stock, train_one(ctx, setup, ours=True))
    return found


@pytest.mark.parametrize(
    "setup", [Setup(), Setup(tp=2), Setup(dtype="bfloat16")], ids=["float32", "tensor parallel", "bfloat16"]
)
def test_planted_faults_are_caught_by_the_comparison_with_stock(setup: Setup):
    for found in on_ranks(2, differences_by_fault, setup.with_(steps=1)):
        for fault, lines in found.items():
            assert any(line.startswith("gradient of") for line in lines), fault
            # A bf16 loss is not known well enough to show any.
            if setup.dtype == "float32":
                assert any(line.startswith("loss 0 is") for line in lines) == (fault in FORWARD_FAULTS), fault


def lose_a_choice(ctx: RankContext, setup: Setup) -> bool:
    with planted("last choice dropped"):
        try:
            compare_with_unsharded(ctx, setup)
        except AssertionError:
            return True
    return False


def test_a_planted_fault_is_caught_by_the_comparison_with_the_unsharded_model():
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
    for part in ("model", "optimizers"):
        saved, loaded = (getattr(run, part).state_dict() for run in (first, second))
        assert saved.keys() == loaded.keys()
        for name, value in saved.items():
            same = torch.equal(_local(value), _local(loaded[name])) if torch.is_tensor(value) else value == loaded[name]
            assert same, name
    again = [run.train(ctx.rank, 2, first=2) for run in (first, second)]
    assert differences(setup, *again) == []


def _local(value: Tensor) -> Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


@pytest.mark.parametrize("saved_by_ours", [True, False], ids=["ours to stock", "stock to ours"])
def test_checkpoints_load_in_both_directions(tmp_path: Path, saved_by_ours: bool):
    on_ranks(2, save_and_load, Setup(), str(tmp_path), saved_by_ours)
