"""What is refused, with the remedy, and what later releases of Megatron-Core expect."""

import functools
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from moe_ep.errors import NotBuiltError
from moe_ep.testing import RankContext
from tests.frameworks.megatron.models import layer_spec, layout, make_config, make_gpt, make_layer
from tests.frameworks.megatron.shim import cpu_megatron, on_cpu

Ranks = Callable[..., list]


@on_cpu
def refused(ctx: RankContext, changes: dict, later: dict, match: str) -> None:
    """Settings are refused by the layer, and by ``patch_model`` for a model that was built with them."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_ep.integrations.megatron import patch_model

    with layout(ep=2):
        config = make_config(ep=2, **changes)
        model = make_layer("native", config)
        before = model.token_dispatcher
        for name, value in later.items():
            setattr(config, name, value)
        with pytest.raises(ValueError, match=match):
            make_layer("moe_ep", config)
        with pytest.raises(ValueError, match=match):
            patch_model(model)
        assert isinstance(model, MoELayer)
        assert model.token_dispatcher is before


@pytest.mark.parametrize(
    ("changes", "later", "match"),
    [
        (
            {"moe_token_dispatcher_type": "allgather"},
            {},
            r'moe_token_dispatcher_type="allgather" must be "alltoall".*: set it$',
        ),
        (
            {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
            {},
            r'"flex" must be "alltoall".*moe_ep.integrations.deep_ep.install\(\)',
        ),
        ({}, {"cuda_graph_impl": "local", "cuda_graph_scope": []}, r"cuda_graph_scope=whole layers .*moe_router"),
        (
            {},
            {"cuda_graph_impl": "local", "cuda_graph_scope": [SimpleNamespace(name="full_iteration")]},
            r'cuda_graph_scope=full_iteration .*cuda_graph_impl="none"',
        ),
        ({"num_moe_experts": 80}, {"moe_router_topk": 70}, r"moe_router_topk=70 .* 70 choices .* carries 64"),
    ],
)
def test_settings_that_cannot_work(ranks: Ranks, changes: dict, later: dict, match: str) -> None:
    ranks(2, refused, changes, later, match)


@on_cpu
def too_many_parts(ctx: RankContext) -> None:
    with layout(tp=2, etp=2):
        with pytest.raises(ValueError, match=r"moe_router_topk=40 with expert_tensor_parallel_size=2 makes 80"):
            make_layer("moe_ep", make_config(tp=2, etp=2, num_moe_experts=48, moe_router_topk=40))
        make_layer("moe_ep", make_config(tp=2, etp=2, num_moe_experts=48, moe_router_topk=32))


def test_choices_over_tensor_parallel_ranks(ranks: Ranks) -> None:
    ranks(2, too_many_parts)


@on_cpu
def partial_graphs(ctx: RankContext) -> None:
    with layout(ep=2):
        config = make_config(ep=2)
        config.cuda_graph_impl = "transformer_engine"
        config.cuda_graph_scope = [SimpleNamespace(name=name) for name in ("attn", "moe_router", "moe_preprocess")]
        dispatcher = make_layer("moe_ep", config).token_dispatcher
        hidden, routing = torch.randn(3, 1, 16), torch.tensor([[True, False, True, False]]).expand(3, 4)
        dispatcher.dispatch_preprocess(hidden, routing, torch.rand(3, 4))
        # What a captured preprocess hands to the stages behind it, by name.
        assert all(isinstance(getattr(dispatcher, name), torch.Tensor) for name in dispatcher.cudagraph_attrs)


def test_graphs_that_end_before_the_exchange(ranks: Ranks) -> None:
    ranks(2, partial_graphs)


@on_cpu
def nothing_to_patch(ctx: RankContext) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from moe_ep.integrations.megatron import patch_model, patch_spec

    with pytest.raises(ValueError, match="model has no megatron.core MoELayer: build it with num_moe_experts"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"builds no MoELayer.*num_experts=8"):
        patch_spec(get_gpt_layer_local_spec())


def test_models_without_experts(ranks: Ranks) -> None:
    ranks(2, nothing_to_patch)


@on_cpu
def specs(ctx: RankContext) -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_ep.integrations.megatron import EPMoELayer, patch_spec

    with layout(ep=2):
        config = make_config(ep=2, moe_layer_freq=[0, 1])
        spec = layer_spec(config)
        patched = patch_spec(spec)
        assert (spec.submodules.mlp.module, patched.submodules.mlp.module) == (MoELayer, EPMoELayer)
        assert patched.submodules.mlp.submodules.experts.module is spec.submodules.mlp.submodules.experts.module
        block = patch_spec(get_gpt_decoder_block_spec(config, use_transformer_engine=False))
        assert block.layer_specs[1].submodules.mlp.module is EPMoELayer
        # As later releases build it.
        later = SimpleNamespace(mlp=functools.partial(MoELayer, submodules=spec.submodules.mlp.submodules))
        layer = patch_spec(later).mlp(config=config, layer_number=1, pg_collection=None)
        assert isinstance(layer, EPMoELayer)
        kinds = [type(layer.mlp) for layer in make_gpt("moe_ep", make_config(ep=2)).decoder.layers]
        assert kinds == [EPMoELayer, EPMoELayer]


def test_specs(ranks: Ranks) -> None:
    ranks(2, specs)


@on_cpu
def named_backends(ctx: RankContext) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import build_module

    from moe_ep.integrations.megatron import patch_model, patch_spec

    with layout(ep=2):
        config = make_config(ep=2)
        spec = layer_spec(config).submodules.mlp
        later = SimpleNamespace(mlp=functools.partial(MoELayer, submodules=spec.submodules))
        with pytest.raises(NotBuiltError, match='backend="cuda"'):
            patch_model(make_layer("native", config), backend="cuda")
        with pytest.raises(NotBuiltError, match='backend="cuda"'):
            build_module(patch_spec(spec, backend="cuda"), config=config)
        with pytest.raises(NotBuiltError, match='backend="cuda"'):
            patch_spec(later, backend="cuda").mlp(config=config)
        model = make_layer("native", config)
        patch_model(model, backend="torch")
        assert model.token_dispatcher.backend == "torch"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where the backend is missing")
def test_the_named_backend_is_used(ranks: Ranks) -> None:
    ranks(2, named_backends)


@on_cpu
def later_members(ctx: RankContext) -> None:
    with layout(ep=2):
        dispatcher = make_layer("moe_ep", make_config(ep=2)).token_dispatcher
    assert dispatcher.get_expert_zero_copy_buffers() == (None, None)
    assert dispatcher.check_over_budget() is None
    assert dispatcher.use_nccl_stream is False
    assert dispatcher.ep_rank == ctx.rank
    assert dispatcher.valid_cudagraph_attrs is None


def test_members_of_later_releases(ranks: Ranks) -> None:
    ranks(2, later_members)


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.15.3", False), ("0.16.0", True), ("0.16.1", True), ("0.20.0rc0", True), ("0.21.0", False), ("unknown", False)],
)
def test_versions(version: str, supported: bool) -> None:
    with cpu_megatron():
        from moe_ep.integrations.megatron.versions import check_version

        if supported:
            check_version(version)
        else:
            with pytest.raises(ImportError, match=rf"megatron-core {version} .*pip install megatron-core==0\.16\.1"):
                check_version(version)


def test_without_megatron() -> None:
    script = "import sys; sys.modules['megatron'] = None; import moe_ep.integrations.megatron"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "needs Megatron-Core: pip install --no-deps megatron-core==0.16.1" in done.stderr
