"""Checkpoints: what one of DeepSpeed's layer and ours saves, the other loads, and goes on as if nothing had been."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_ep.testing import RankContext
from tests.frameworks.deepspeed.models import Setup, build, engine_of, join, on_ranks, relative_bound, train


def save_and_load(ctx: RankContext, setup: Setup, folder: str, saved_by_ours: bool) -> None:
    join(ctx)
    first = engine_of(build(ctx, setup, ours=saved_by_ours), setup)
    train(ctx, first, setup)
    first.save_checkpoint(folder, tag="here")
    dist.barrier()

    model = build(ctx, setup, ours=not saved_by_ours)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    second = engine_of(model, setup)
    assert second.load_checkpoint(folder, tag="here")[0] is not None
    states = [engine.module.state_dict() for engine in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, saved in states[0].items():
        assert saved.any(), f"{name} is all zeros, so that it was loaded cannot be seen"
        assert torch.equal(saved, states[1][name]), name

    # The optimizer's momentum came along: without it the second step would differ.
    runs = [train(ctx, engine, setup, first_step=setup.steps) for engine in (first, second)]
    for a, b in zip(runs[0].losses, runs[1].losses, strict=True):
        assert abs(a - b) <= relative_bound(setup) * abs(a)
    assert runs[0].counts[0] == runs[1].counts[0]
    first.destroy()
    second.destroy()


@pytest.mark.parametrize("saved_by_ours", [True, False], ids=["ours to stock", "stock to ours"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_checkpoints_load_in_both_directions(tmp_path: Path, stage: int, saved_by_ours: bool):
    setup = Setup(stage=stage, k=1, drop=False, steps=3)
    on_ranks(2, save_and_load, setup, str(tmp_path / "fp32"), saved_by_ours)
    half = Setup(stage=stage, k=2, drop=False, dtype=torch.bfloat16, steps=2)
    on_ranks(2, save_and_load, half, str(tmp_path / "bf16"), saved_by_ours)


def test_one_file_per_expert(tmp_path: Path):
    on_ranks(2, save_and_load, Setup(stage=2, k=1), str(tmp_path), True)
    files = sorted(path.name for path in (tmp_path / "here").glob("*expert*model_states.pt"))
    assert files == [f"layer_0_expert_{number}_mp_rank_00_model_states.pt" for number in range(4)]
