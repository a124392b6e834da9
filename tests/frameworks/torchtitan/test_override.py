"""What ``--override.imports`` replaces, and what it refuses by name, with a remedy."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import spmd_types as spmd
import torch
from torchtitan.config import ConfigManager, OverrideConfig, apply_overrides, override
from torchtitan.config.override import parse_cli_imports
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.models.common.config_utils import make_token_dispatcher_config
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    TorchAOTokenDispatcher,
)
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel

from moe_ep.integrations import torchtitan as adapter
from tests.frameworks.torchtitan.blocks import Block, config_of, moe_of, rows_of
from tests.frameworks.torchtitan.models import OVERRIDE, SELECTIVE_AC

ROOT = Path(__file__).resolve().parents[3]


def config_with(token_dispatcher: BaseEPTokenDispatcher.Config) -> object:
    config = config_of(Block())
    config.routed_experts.token_dispatcher = token_dispatcher
    return config


def apply(config: object, settings: str = "") -> list[str]:
    """As the command line gives it."""
    return apply_overrides(OverrideConfig(imports=parse_cli_imports([OVERRIDE + settings])), config)


def test_every_moe_layer_of_a_trainer_config_is_replaced():
    config = deepseek_v3_debugmodel()
    assert len(apply(config, '={"timeout_s": 20, "validate": false}')) == 5
    layers = [layer for layer in config.model_spec.model.layers if layer.moe is not None]
    assert len(layers) == 5
    for layer in layers:
        found = layer.moe.routed_experts.token_dispatcher
        assert found == adapter.MoeEpTokenDispatcher.Config(num_experts=8, top_k=3, timeout_s=20, validate=False)


def test_selective_ac_of_a_trainer_config_is_replaced():
    config = deepseek_v3_debugmodel()
    before = config.activation_checkpoint
    before.force_recompute_mm_shapes_by_fqns = ["here"]
    apply_overrides(OverrideConfig(imports=[SELECTIVE_AC]), config)
    assert isinstance(config.activation_checkpoint, SelectiveAC.Config)
    assert config.activation_checkpoint.force_recompute_mm_shapes_by_fqns == ["here"]
    saved = config.activation_checkpoint.build().get_save_ops()
    assert saved == before.build().get_save_ops() | {
        torch.ops.moe_ep.dispatch.default,
        torch.ops.moe_ep.combine.default,
    }


@pytest.mark.parametrize("backend", ["standard", "deepep", "hybridep", "minimal_async_ep"])
def test_dispatchers_of_all_backends_are_replaced(backend: str):
    config = config_with(make_token_dispatcher_config(num_experts=8, top_k=3, comm_backend=backend, hidden_dim=32))
    apply(config)
    found = config.routed_experts.token_dispatcher
    assert found == adapter.MoeEpTokenDispatcher.Config(num_experts=8, top_k=3)


def test_padding_for_quantized_experts_is_kept():
    config = config_with(TorchAOTokenDispatcher.Config(num_experts=8, top_k=3, pad_multiple=32))
    apply(config)
    assert config.routed_experts.token_dispatcher.pad_multiple == 32


def test_static_shapes_are_refused():
    config = make_token_dispatcher_config(num_experts=8, top_k=3, comm_backend="deepep", cudagraphable=True)
    with pytest.raises(ValueError, match=r"cudagraphable=True cannot be kept: .*build the model without it"):
        apply(config_with(config))
    config = make_token_dispatcher_config(
        num_experts=8, top_k=3, comm_backend="hybridep", non_blocking_capacity_factor=0.5
    )
    with pytest.raises(ValueError, match=r"non_blocking_capacity_factor=0\.5 cannot be kept: .*leave it None"):
        apply(config_with(config))


def test_dispatchers_of_others_are_refused():
    class OtherDispatcher(AllToAllTokenDispatcher):
        @dataclass(kw_only=True, slots=True)
        class Config(AllToAllTokenDispatcher.Config):
            drop: float = 0.5

    with pytest.raises(ValueError, match=r"OtherDispatcher\.Config is not one of torchtitan's own dispatchers"):
        apply(config_with(OtherDispatcher.Config(num_experts=8, top_k=3)))


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match=r"fields not on MoeEpTokenDispatcher\.Config: \['capacity'\]"):
        apply(config_of(Block()), '={"capacity": 3}')


def test_a_backend_that_is_missing_is_refused():
    moe = moe_of(Block(), ours=True, settings={"backend": "best"})
    with pytest.raises(ValueError, match="backend='best'"):
        moe(rows_of(Block(), 0))


def test_two_overrides_of_one_layer_are_refused():
    @override(target=AllToAllTokenDispatcher.Config)
    def another(cfg: AllToAllTokenDispatcher.Config) -> AllToAllTokenDispatcher.Config:
        return cfg

    # The module is this one already; torchtitan finds it by name.
    target = f"{another.__module__}.another"
    assert another.__module__ in sys.modules
    with pytest.raises(ValueError, match=r"both claim node"):
        apply_overrides(OverrideConfig(imports=[OVERRIDE, target]), config_of(Block()))


def test_spmd_typechecking_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spmd, "is_type_checking", lambda: True)
    with pytest.raises(ValueError, match=r"debug\.spmd_typechecking is on: .*then train without the check"):
        moe_of(Block(), ours=True)(rows_of(Block(), 0))


def test_the_adapter_itself_refuses_other_releases():
    code = (
        "from importlib import metadata\n"
        "from tests.frameworks.torchtitan import cpu\n"
        "installed = metadata.version\n"
        "metadata.version = lambda name: '0.2.1' if name == 'torchtitan' else installed(name)\n"
        "import moe_ep.integrations.torchtitan\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=170, cwd=ROOT)
    assert done.returncode == 1
    assert re.search(r'ImportError: torchtitan is 0\.2\.1; .*pip install "torchtitan>=0\.3\.0,<0\.4"', done.stderr)


def test_the_command_line():
    arguments = ["--module", "deepseek_v3", "--config", "deepseek_v3_debugmodel", "--override.imports"]
    config = ConfigManager().parse_args([*arguments, OVERRIDE, f"{SELECTIVE_AC}={{}}"])
    assert len(apply_overrides(config.override, config)) == 6
