"""wrap_ddp: training equals the unsharded model's."""

import contextlib

import pytest
import torch

from moe_ep.integrations.fsdp import clip_grad_norm_, wrap_ddp
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import EXACT, Model, Ranks, batch, check_training, loss_of, make_mesh, whole

MESHES = [((4,), ("ep",)), ((2, 2), ("replicate", "ep")), ((4, 1), ("replicate", "ep"))]


def make(mesh: tuple, unsharded_first: bool = False) -> torch.nn.Module:
    mesh = make_mesh(*mesh)
    return wrap_ddp(Model(None if unsharded_first else mesh["ep"]), mesh)


def train(ctx: RankContext, mesh: tuple, unsharded_first: bool) -> None:
    check_training(ctx, make(mesh, unsharded_first), lambda model: clip_grad_norm_(model.parameters(), 0.5))


@pytest.mark.parametrize("unsharded_first", [False, True])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_training_equals_the_unsharded_model(ranks: Ranks, mesh: tuple, unsharded_first: bool) -> None:
    ranks(4, train, mesh, unsharded_first)


def accumulate(ctx: RankContext, mesh: tuple) -> None:
    model, plain = make(mesh), Model()
    for step in range(2):
        with model.no_sync() if step == 0 else contextlib.nullcontext():
            loss_of(model(batch(ctx.rank, step))).backward()
        for rank in range(ctx.world_size):
            (loss_of(plain(batch(rank, step))) / ctx.world_size).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(whole(ours.grad), theirs.grad, **EXACT)


@pytest.mark.parametrize("mesh", MESHES[:2], ids=str)
def test_gradients_accumulate(ranks: Ranks, mesh: tuple) -> None:
    ranks(4, accumulate, mesh)


def first_values_hold(ctx: RankContext) -> None:
    mesh = make_mesh((2, 2), ("replicate", "ep"))
    model = Model(mesh["ep"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(ctx.rank // 2)
    wrapped = wrap_ddp(model, mesh)
    for ours, theirs in zip(wrapped.parameters(), Model().parameters(), strict=True):
        assert torch.equal(whole(ours.detach()), theirs)


def test_copies_start_from_the_first_of_them(ranks: Ranks) -> None:
    ranks(4, first_values_hold)


def train_with_fault(ctx: RankContext) -> str:
    model = make(MESHES[0])
    for layer in model.module.moe:
        layer.experts.gradient_scale = 1.0
    try:
        check_training(ctx, model, lambda m: clip_grad_norm_(m.parameters(), 0.5), steps=1)
    except AssertionError as error:
        return str(error)
    return ""


def test_a_planted_fault_is_caught(ranks: Ranks) -> None:
    assert all(ranks(4, train_with_fault))
