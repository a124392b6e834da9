"""LoRA of PEFT on experts that are spread over ranks."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_ep.integrations.transformers import expert_parameters, gather_state_dict, parallelize, save_pretrained
from moe_ep.integrations.transformers.versions import has_ep_registry
from moe_ep.testing import RankContext
from tests.frameworks.transformers.models import loss_of, make_model, saved_model
from tests.frameworks.transformers.spread import gather_of, spread_model
from tests.frameworks.transformers.training import CLOSE, Run, assert_same, ids_of, load, train, unsharded

ON_EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def adapt(model: nn.Module, **fields: object) -> nn.Module:
    """LoRA on attention and, by default, on experts; B is not zero, so that every factor has a gradient at once."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **ON_EXPERTS, **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(21)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 8
            parameter.data = values.to(parameter.dtype)
    return adapted


def check_unsharded(ctx: RankContext, theirs: list[Run], path: str, num_ranks: int) -> None:
    model = adapt(load(path))
    ddp = spread_model(ctx, model, num_ranks)
    run = train(model, lambda step: ids_of(ctx.rank, step), forward=ddp, gather=gather_of(model))
    assert all("lora_" in name for name in run.grads)
    assert any("experts" in name for name in run.grads)
    assert_same(run, theirs[ctx.rank], **CLOSE)


@pytest.mark.parametrize(
    ("family", "world", "num_ranks"), [("mixtral", 2, 2), ("gpt_oss", 2, 2), ("qwen2_moe", 4, 2), ("qwen3_moe", 4, 4)]
)
def test_steps_equal_those_of_the_unsharded_model(ranks, family: str, world: int, num_ranks: int) -> None:
    path = saved_model(family, 3)
    ranks(world, check_unsharded, unsharded(adapt(load(path)), world), path, num_ranks)


def test_one_expert_on_each_rank(ranks) -> None:
    options = {"num_local_experts": 2, "experts_implementation": "eager"}
    ranks(2, one_expert_each, options, unsharded(adapt(make_model("mixtral", 1, **options).double()), 2))


def one_expert_each(ctx: RankContext, options: dict, theirs: list[Run]) -> None:
    model = adapt(make_model("mixtral", 1, **options).double())
    ddp = spread_model(ctx, model)
    run = train(model, lambda step: ids_of(ctx.rank, step), forward=ddp, gather=gather_of(model))
    assert_same(run, theirs[ctx.rank], **CLOSE)


def reload_adapters(path: str, folder: str) -> nn.Module:
    """A saved model with saved adapters, on one rank."""
    model = load(path, torch.float32)
    if has_ep_registry():
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    # PEFT 0.21 converts names of adapters by a call that transformers 5.0 does not know.
    config = peft.PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    model = peft.get_peft_model(model, config)
    saved = load_file(f"{folder}/adapter_model.safetensors")
    named = {name.removesuffix("weight") + "default.weight": value for name, value in saved.items()}
    assert not model.load_state_dict(named, strict=False).unexpected_keys
    return model


def save_and_reload(ctx: RankContext, path: str, folder: str) -> None:
    model = adapt(load(path, torch.float32))
    ddp = spread_model(ctx, model)
    train(model, lambda step: ids_of(ctx.rank, step), 1, forward=ddp, gather=gather_of(model))
    with pytest.raises(ValueError, match="slice of the experts"):
        model.save_pretrained(folder)
    save_pretrained(ddp, folder)
    whole = gather_state_dict(ddp, everywhere=True)
    assert not any(name.endswith(("experts.down_proj", "base_layer.down_proj")) for name in whole)
    again = reload_adapters(path, folder)
    reloaded = {name: value for name, value in again.state_dict().items() if "lora_" in name}
    assert len(reloaded) == 2 * 2 * (2 + 2)
    for name, value in reloaded.items():
        assert torch.equal(value, whole[name]), name
    # On with it, spread again.
    left, right = (loss_of(one, ids_of(ctx.rank, 1)).item() for one in (ddp, spread_model(ctx, again)))
    assert left == right
    # Merged into each rank's experts, the base model is saved whole.
    merged = model.merge_and_unload()
    assert abs(loss_of(merged, ids_of(ctx.rank, 1)).item() - left) < 1e-4 * left
    save_pretrained(merged, f"{folder}/merged")
    plain = load(f"{folder}/merged", torch.float32)
    expected = reload_adapters(path, folder).merge_and_unload().state_dict()
    for name, value in plain.state_dict().items():
        # One product of rank two, scaled and added, in another order.
        torch.testing.assert_close(value, expected[name], rtol=0, atol=8 * 2**-24, msg=name)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_saved_adapters_load_without_ranks(ranks, tmp_path: Path, family: str) -> None:
    ranks(2, save_and_reload, saved_model(family), str(tmp_path))


def attention_alone(ctx: RankContext, theirs: list[Run], path: str) -> None:
    model = adapt(load(path), target_parameters=None)
    ddp = spread_model(ctx, model)
    run = train(model, lambda step: ids_of(ctx.rank, step), forward=ddp, gather=gather_of(model))
    assert_same(run, theirs[ctx.rank], **CLOSE)


def test_lora_on_attention_alone(ranks) -> None:
    path = saved_model("olmoe", 3)
    theirs = unsharded(adapt(load(path), target_parameters=None), 2)
    ranks(2, attention_alone, theirs, path)


def refuse(ctx: RankContext) -> None:
    late = adapt(parallelize(make_model("mixtral")), target_modules=None)
    with pytest.raises(ValueError, match=r"averages .*experts.*parallelize the outermost"):
        loss_of(DistributedDataParallel(late), ids_of(ctx.rank, 0))
    model = parallelize(adapt(make_model("mixtral")))
    model.add_adapter("second", peft.LoraConfig(r=2, **ON_EXPERTS))
    with pytest.raises(ValueError, match="add LoRA adapters before parallelize"):
        loss_of(model, ids_of(ctx.rank, 0))
    with pytest.raises(ValueError, match="one expert per rank.*use a group of fewer ranks"):
        parallelize(adapt(make_model("gpt_oss", 1, num_local_experts=2)))


def test_refusals_name_the_remedy(ranks) -> None:
    ranks(2, refuse)


def tagged(ctx: RankContext) -> list[str]:
    model = parallelize(adapt(make_model("mixtral")))
    own = dict(expert_parameters(model))
    assert all(parameter.allreduce is False for parameter in own.values())
    return sorted(name for name in own if "layers.0" in name)


def test_what_belongs_to_one_rank(ranks) -> None:
    names = ranks(2, tagged)[0]
    assert len(names) == 2 + 4
    assert sum("lora_" in name for name in names) == 4
