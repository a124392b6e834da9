"""``dist_checkpointing`` between Megatron's layer and ours, and between numbers of expert-parallel ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_ep.testing import RankContext
from tests.frameworks.megatron.models import layout, make_config, make_gpt, named
from tests.frameworks.megatron.shim import on_cpu

Ranks = Callable[..., list]


@on_cpu
def save_and_load(ctx: RankContext, folder: str, saved: tuple[str, dict], loaded: tuple[str, dict]) -> None:
    from megatron.core import dist_checkpointing

    def build(dispatcher: str, parallel: dict) -> torch.nn.Module:
        config = make_config(**parallel, sequence_parallel=False, moe_shared_expert_intermediate_size=24)
        return make_gpt(dispatcher, config)

    with layout(**saved[1]):
        model = build(*saved)
        keys = set(model.sharded_state_dict())
        dist_checkpointing.save(model.sharded_state_dict(), folder)
    with layout(**loaded[1]):
        model = build(*loaded)
        expected = {name: parameter.detach().clone() for name, parameter in named(model).items()}
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        state = dist_checkpointing.load(model.sharded_state_dict(), folder)
        model.load_state_dict(state)
        # Values follow from global names, so that what was built and what is loaded are the same.
        for name, parameter in named(model).items():
            assert torch.equal(parameter, expected[name]), name
    assert any("experts.local_experts" in key for key in keys)
    assert not any("dispatcher" in key for key in keys)


EP2, EP1, SPLIT = {"ep": 2}, {"ep": 1}, {"tp": 2, "ep": 1, "etp": 2}


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        (("moe_ep", EP2), ("native", EP2)),
        (("native", EP2), ("moe_ep", EP2)),
        (("moe_ep", EP2), ("native", EP1)),
        (("native", EP1), ("moe_ep", EP2)),
        (("native", EP1), ("moe_ep", SPLIT)),
        (("moe_ep", SPLIT), ("native", EP2)),
    ],
)
def test_checkpoints_are_those_of_the_stock_layer(ranks: Ranks, tmp_path: Path, saved: tuple, loaded: tuple) -> None:
    ranks(2, save_and_load, str(tmp_path), saved, loaded)
