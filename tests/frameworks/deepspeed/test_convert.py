"""What ``convert`` keeps, and what it refuses by name, with a remedy."""

import copy
import json
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.utils import groups
from torch import nn

from moe_ep.integrations.deepspeed import EPMOELayer, convert
from moe_ep.integrations.versions import require
from moe_ep.testing import RankContext
from tests.frameworks.deepspeed.models import Model, Setup, build, engine_of, inputs, join, on_ranks, train

ROOT = Path(__file__).resolve().parents[3]


def fresh(**changes: object) -> Model:
    return Model(Setup(**changes))


# What stays


def test_modules_keep_their_identity():
    stock, model = fresh(), fresh()
    moe, layer, experts = model.moe, model.moe.deepspeed_moe, model.moe.deepspeed_moe.experts
    fired: list[str] = []
    layer.register_forward_hook(lambda *_: fired.append("layer"))
    experts.register_forward_hook(lambda *_: fired.append("experts"))
    before = dict(model.named_parameters())
    assert convert(model) is model
    assert convert(model) is model
    assert (model.moe, model.moe.deepspeed_moe, layer.experts) == (moe, layer, experts)
    assert isinstance(moe, MoE)
    assert isinstance(layer, EPMOELayer)
    assert isinstance(layer, MOELayer)
    assert isinstance(experts, Experts)
    assert model.state_dict().keys() == stock.state_dict().keys()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        is_expert = "deepspeed_experts" in name
        assert getattr(parameter, "allreduce", True) is not is_expert
        assert getattr(parameter, "group_name", None) == ("ep_size_2" if is_expert else None)
    for name in ("ep_size", "ep_group_name", "num_local_experts", "time_moe", "time_falltoall", "wall_clock_breakdown"):
        assert getattr(layer, name) == getattr(stock.moe.deepspeed_moe, name)


def check_engine(ctx: RankContext, setup: Setup) -> None:
    join(ctx)
    model = build(ctx, setup, ours=True)
    calls: list[str] = []
    model.moe.deepspeed_moe.experts.register_forward_hook(lambda *_: calls.append("experts"))
    engine = engine_of(model, setup, wall_clock_breakdown=True)
    assert engine.has_moe_layers
    assert engine.num_experts == [setup.num_experts]
    assert engine.moe_layers == [model.moe.deepspeed_moe]
    assert engine.gate_modules == [model.moe.deepspeed_moe.gate]
    assert any(group.get("moe") for group in engine.optimizer.param_groups)
    train(ctx, engine, setup)
    assert len(calls) == setup.steps
    layer = engine.moe_layers[0]
    assert layer.time_moe >= layer.time_falltoall + layer.time_salltoall > 0
    assert groups._get_expert_parallel_group("ep_size_2") is layer.ep_group
    assert "dispatcher" not in "".join(engine.module.state_dict())
    engine.destroy()


def test_the_engine_sees_what_it_saw():
    on_ranks(2, check_engine, Setup())


def convert_late(ctx: RankContext, setup: Setup) -> None:
    """After deepspeed.initialize, on the engine itself."""
    join(ctx)
    losses = []
    for ours, late in ((True, False), (False, True)):
        engine = engine_of(build(ctx, setup, ours=ours), setup)
        layers = list(engine.moe_layers)
        if late:
            assert convert(engine) is engine
        assert layers == [engine.module.moe.deepspeed_moe]
        assert isinstance(layers[0], EPMOELayer)
        losses.append(train(ctx, engine, setup).losses)
        engine.destroy()
    assert losses[0] == losses[1]


def test_an_engine_can_be_converted():
    on_ranks(2, convert_late, Setup(stage=2))


def copies(ctx: RankContext, setup: Setup) -> None:
    join(ctx)
    model = build(ctx, setup, ours=True)
    twin = copy.deepcopy(model)
    assert isinstance(pickle.loads(pickle.dumps(model)).moe.deepspeed_moe, EPMOELayer)
    outs = []
    for one in (model, twin):
        one.moe.set_deepspeed_parallelism()
        torch.manual_seed(0)
        outs.append(one(inputs(setup, ctx.rank)))
    assert torch.equal(*outs)


def test_copies_and_pickles():
    on_ranks(2, copies, Setup())


# What is refused


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(ValueError, match=r"Sequential without a deepspeed\.moe\.layer\.MoE: build its sparse layers"):
        convert(nn.Sequential(nn.Linear(4, 4)))


def test_zero3_is_refused_by_its_config(tmp_path: Path):
    config = {"zero_optimization": {"stage": 3}}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for one in (config, path, str(path)):
        model = fresh()
        with pytest.raises(ValueError, match=r"stage=3: .*choose zero_optimization\.stage 0, 1 or 2") as refused:
            convert(model, config=one)
        pages = re.findall(r"docs/\w+\.md", str(refused.value))
        assert pages == ["docs/fsdp.md"]
        assert (ROOT / pages[0]).is_file()
        assert type(model.moe.deepspeed_moe) is MOELayer
    convert(fresh(), config={"zero_optimization": {"stage": 2}})
    convert(fresh(), config={})


def partition(ctx: RankContext, setup: Setup) -> None:
    join(ctx)
    with deepspeed.zero.Init(
        config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    ):
        model = Model(setup)
    with pytest.raises(ValueError, match=r"first\.weight is partitioned by deepspeed\.zero\.Init: .*\.stage 0, 1 or 2"):
        convert(model)
    # Unseen by convert, it is DeepSpeed that refuses; the two must not drift apart.
    with pytest.raises(AssertionError, match="Native DeepSpeed MoE is not supported with ZeRO Stage 3"):
        engine_of(build(ctx, setup, ours=True), setup.with_(stage=3))


def test_zero3_is_refused_where_it_shows():
    on_ranks(2, partition, Setup())


def test_other_classes_are_refused_and_nothing_is_changed():
    class OtherLayer(MOELayer):
        pass

    class OtherExperts(Experts):
        pass

    for pick, cls, text in (
        (lambda moe: moe.deepspeed_moe, OtherLayer, r"1\.deepspeed_moe is a OtherLayer: .* own MOELayer"),
        (lambda moe: moe.deepspeed_moe.experts, OtherExperts, r"1\.deepspeed_moe\.experts is a OtherExperts"),
    ):
        model = nn.Sequential(fresh().moe, fresh().moe)
        pick(model[1]).__class__ = cls
        with pytest.raises(ValueError, match=text):
            convert(model)
        assert type(model[0].deepspeed_moe) is MOELayer
    model = fresh()
    model.moe.deepspeed_moe.gate = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"gate is a Linear: .* TopKGate"):
        convert(model)


def test_tutel_is_refused():
    model = fresh()
    model.moe.deepspeed_moe.use_tutel = True
    with pytest.raises(ValueError, match=r"moe was built with use_tutel=True.*build it without"):
        convert(model)


def test_sizes_that_no_exchange_carries_are_refused():
    with pytest.raises(ValueError, match=r"hidden_size=6 makes rows of 24 bytes"):
        convert(MoE(6, nn.Linear(6, 6), num_experts=2))
    with pytest.raises(ValueError, match=r"top_k=2 must be at most num_experts=1"):
        convert(MoE(8, nn.Linear(8, 8), num_experts=1, k=2))


def test_a_forward_before_the_groups_says_what_is_missing():
    with pytest.raises(RuntimeError, match=r"no expert-parallel group yet: call deepspeed\.initialize"):
        convert(fresh())(torch.zeros(2, 3, 16))


def test_tensor_parallel_models_are_refused(monkeypatch: pytest.MonkeyPatch):
    class Mpu:
        def get_tensor_model_parallel_world_size(self) -> int:
            return 2

    monkeypatch.setattr(groups, "mpu", Mpu())
    with pytest.raises(ValueError, match=r"tensor-parallel size is 2: .*moe_ep\.integrations\.megatron"):
        convert(fresh()).moe.deepspeed_moe._set_ep_group(None)


@pytest.mark.parametrize("version", ["0.18.4", "0.20.0", "1.0", "0.19.7+cu126"])
def test_other_releases_are_refused(monkeypatch: pytest.MonkeyPatch, version: str):
    monkeypatch.setattr(metadata, "version", lambda _: version)
    with pytest.raises(ImportError, match=r'deepspeed is .*pip install "deepspeed>=0\.19\.8,<0\.20"'):
        require("deepspeed", at_least="0.19.8", below="0.20")


def test_the_adapter_itself_refuses_other_releases():
    code = (
        "from importlib import metadata\n"
        "installed = metadata.version\n"
        "metadata.version = lambda name: '0.18.4' if name == 'deepspeed' else installed(name)\n"
        "import moe_ep.integrations.deepspeed\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r'ImportError: deepspeed is 0\.18\.4; .*pip install "deepspeed>=0\.19\.8,<0\.20"', done.stderr)


def test_a_missing_package_is_named():
    with pytest.raises(ImportError, match=r'no-such-package is not installed: pip install "no-such-package>=1,<2"'):
        require("no-such-package", at_least="1", below="2")
