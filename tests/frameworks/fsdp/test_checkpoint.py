"""torch.distributed.checkpoint: what one mesh saves, another loads, bit for bit, optimizer states included."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from moe_ep.integrations.fsdp import wrap_ddp
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import Model, Ranks, batch, loss_of, make_mesh, optimizer_of, sharded, whole

PLACES = {
    "ep2 efsdp2": ((2, 2), ("efsdp", "ep")),
    "ep4": ((4,), ("ep",)),
    "ep1 efsdp4": ((4, 1), ("efsdp", "ep")),
    "ep2 replicate2": ((2, 2), ("replicate", "ep")),
    "ddp ep4": ((4,), ("ep",)),
    "ddp ep2": ((2, 2), ("replicate", "ep")),
}

SAVED_LR = 3e-3
# FSDP2 and DDP have different parameter groups.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def make(place: str, seed: int = 0) -> nn.Module:
    mesh = make_mesh(*PLACES[place])
    return wrap_ddp(Model(None, seed=seed), mesh) if place.startswith("ddp") else sharded(mesh, seed=seed)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Whole parameters and moments by the unsharded model's names."""
    found = {}
    names = {p: name.removeprefix("module.") for name, p in model.named_parameters()}
    for parameter, name in names.items():
        found[name] = whole(parameter.detach())
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind} of {name}"] = whole(optimizer.state[parameter][kind])
    return {name: value.clone() for name, value in found.items()}


def save(ctx: RankContext, place: str, folder: Path) -> dict[str, torch.Tensor]:
    model = make(place)
    optimizer = optimizer_of(model)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model(batch(ctx.rank, step))).backward()
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = SAVED_LR
    model_state, optimizer_state = get_state_dict(model, optimizer, options=BY_NAME)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return states(model, optimizer)


def load(ctx: RankContext, place: str, folder: Path) -> dict[str, torch.Tensor]:
    model = make(place, seed=7)
    optimizer = optimizer_of(model)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=BY_NAME)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state, options=BY_NAME)
    assert [group["lr"] for group in optimizer.param_groups] == [SAVED_LR] * len(optimizer.param_groups)
    found = states(model, optimizer)
    # It goes on from there.
    loss_of(model(batch(ctx.rank, 2))).backward()
    optimizer.step()
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return {}


def saved_by(ranks: Ranks, saved: dict, place: str, factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    if place not in saved:
        folder = factory.mktemp("saved")
        saved[place] = folder, ranks(4, save, place, folder)[0]
    return saved[place]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        *(("ep2 efsdp2", target) for target in PLACES),
        ("ep4", "ep2 efsdp2"),
        ("ddp ep4", "ep2 efsdp2"),
        ("ddp ep2", "ddp ep4"),
        ("ep1 efsdp4", "ep4"),
    ],
)
def test_meshes_change_between_saving_and_loading(
    ranks: Ranks, saved: dict, source: str, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, expected = saved_by(ranks, saved, source, tmp_path_factory)
    for found in ranks(4, load, target, folder):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("source", ["ep2 efsdp2", "ddp ep2"])
def test_one_process_loads_the_whole(
    ranks: Ranks, saved: dict, source: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, expected = saved_by(ranks, saved, source, tmp_path_factory)
    model = Model(seed=7)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    model.load_state_dict(state["model"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def save_whole(ctx: RankContext, folder: Path) -> None:
    dcp.save({"model": Model().state_dict()}, checkpoint_id=folder)


def load_model(ctx: RankContext, place: str, folder: Path) -> None:
    model = make(place, seed=7)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    for ours, theirs in zip(model.parameters(), Model().parameters(), strict=True):
        assert torch.equal(whole(ours.detach()), theirs)


def test_what_one_process_saved_is_loaded_in_shards(ranks: Ranks, tmp_path: Path) -> None:
    dcp.save({"model": Model().state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for place in ("ep2 efsdp2", "ep4"):
        ranks(4, load_model, place, tmp_path)
