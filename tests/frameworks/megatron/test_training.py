"""Losses of several optimizer steps, with Megatron's data parallelism and optimizer."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from moe_ep.testing import RankContext
from tests.frameworks.megatron.compare import Case, layer_losses
from tests.frameworks.megatron.models import layout, make_config, make_gpt
from tests.frameworks.megatron.shim import on_cpu
from tests.frameworks.megatron.training import train

Ranks = Callable[..., list]

# Adam divides by the root of second moments: where a gradient is of the size of its rounding errors, 2**-44 of the
# largest, a step may differ in the first digits. Losses see such parameters, if any, by that same small gradient.
LOSS_BOUND = 2.0**-30


@on_cpu
def losses_of_both(ctx: RankContext, dtype: torch.dtype) -> tuple[list[float], list[float]]:
    with layout(ep=2):
        config = make_config(ep=2, params_dtype=dtype)
        ours, parameters = train("moe_ep", config)
        stock, expected = train("native", config)
    for name, value in parameters.items():
        assert torch.equal(value, expected[name]), name
    return ours, stock


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_losses_are_those_of_the_stock_dispatcher(ranks: Ranks, dtype: torch.dtype) -> None:
    for ours, stock in ranks(2, losses_of_both, dtype):
        assert ours == stock
        assert ours[-1] != ours[0]


@on_cpu
def losses_against_unsharded(ctx: RankContext, changes: dict) -> tuple[list[float], list[float]]:
    with layout(ep=2):
        ours, _ = train("moe_ep", make_config(ep=2, **changes))
    with layout():
        whole, _ = train("native", make_config(**{**changes, "moe_shared_expert_overlap": False}))
    return ours, whole


CHANGES = {
    "plain": {},
    "aux losses": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01},
    "bias updates": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.01,
    },
    "shared experts": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "recomputed with attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]},
    "recomputed whole": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "drop": {"moe_expert_capacity_factor": 1.0},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_losses_are_those_of_the_unsharded_model(ranks: Ranks, changes: dict) -> None:
    for ours, whole in ranks(2, losses_against_unsharded, changes):
        assert ours == pytest.approx(whole, rel=LOSS_BOUND, abs=0)
        assert ours[-1] != ours[0]


@on_cpu
def split_experts(ctx: RankContext, etp: int) -> tuple[list[float], list[float]]:
    """Steps of one layer: Megatron's GPT needs TransformerEngine's norms for tensor parallelism."""
    case = Case(tokens=(8, 6), tp=2, ep=2, etp=etp)
    return layer_losses(case, sharded=True), layer_losses(case, sharded=False)


@pytest.mark.parametrize("etp", [1, 2])
def test_losses_with_tensor_parallelism(ranks: Ranks, etp: int) -> None:
    results = ranks(4, split_experts, etp)
    for ours, whole in results:
        assert ours == pytest.approx(whole, rel=LOSS_BOUND, abs=0)
        assert ours[-1] < ours[0]


@on_cpu
def patched_model(ctx: RankContext, when: str) -> None:
    """``patch_model`` on a model that is built gives what the spec gives, and is told by the losses."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_ep.integrations.megatron import EPTokenDispatcher, patch_model
    from tests.frameworks.megatron import training

    config = make_config(ep=2, moe_shared_expert_intermediate_size=24, moe_shared_expert_overlap=True)
    with layout(ep=2):
        expected, _ = train("native", config)

        def patch(model: torch.nn.Module) -> torch.nn.Module:
            before = list(model.state_dict())
            assert patch_model([torch.nn.Sequential(model)] if when == "in a list" else model) == 2
            assert patch_model(model) == 2
            layers = [module for module in model.modules() if isinstance(module, MoELayer)]
            assert all(isinstance(layer.token_dispatcher, EPTokenDispatcher) for layer in layers)
            assert all(layer.token_dispatcher.shared_experts is layer.shared_experts for layer in layers)
            assert list(model.state_dict()) == before
            return model

        def build(dispatcher: str, *args: object, **kwargs: object) -> torch.nn.Module:
            model = make_gpt("native", *args, **kwargs)
            return model if when == "after DDP" else patch(model)

        def wrap(model: torch.nn.Module) -> tuple:
            ddp, optimizer = wrap_unpatched(model)
            return (patch(ddp) if when == "after DDP" else ddp), optimizer

        wrap_unpatched = training.wrap
        with mock.patch.object(training, "make_gpt", build), mock.patch.object(training, "wrap", wrap):
            losses, _ = train("patched", config)
    assert losses == pytest.approx(expected, rel=LOSS_BOUND, abs=0)


@pytest.mark.parametrize("when", ["before DDP", "in a list", "after DDP"])
def test_patched_models(ranks: Ranks, when: str) -> None:
    ranks(2, patched_model, when)
