"""Tiny Megatron models whose parameters depend on their global names alone, however experts are spread."""

import contextlib
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The worker's process groups for each layout: gloo groups are costly, and Buffers live with them.
_LAYOUTS: dict[tuple[int, int, int], dict[str, Any]] = {}


@contextlib.contextmanager
def layout(*, tp: int = 1, ep: int = 1, etp: int = 1) -> Iterator[None]:
    """Megatron's ``parallel_state`` for sizes of tensor, expert and expert tensor parallelism over all ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    before = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
    key = (tp, ep, etp)
    if key in _LAYOUTS:
        vars(parallel_state).update(_LAYOUTS[key])
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
        )
        now = {name: value for name, value in vars(parallel_state).items() if name.startswith("_")}
        _LAYOUTS[key] = {name: value for name, value in now.items() if value is not before.get(name)}
    model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def make_config(*, tp: int = 1, ep: int = 1, etp: int = 1, **changes: Any) -> Any:
    """A ``TransformerConfig`` of a tiny MoE model in fp64; ``changes`` override it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24,
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float64,
        "use_cpu_initialization": True,
        "sequence_parallel": tp > 1,
        **changes,
    }
    return TransformerConfig(
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        **settings,
    )


def layer_class(dispatcher: str) -> type:
    """``MoELayer`` for "native", ``EPMoELayer`` for "moe_ep"."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_ep.integrations.megatron import EPMoELayer

    return {"native": MoELayer, "moe_ep": EPMoELayer}[dispatcher]


def layer_spec(config: Any) -> Any:
    """The spec of a transformer layer that needs nothing but torch."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    return get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False)


def make_layer(dispatcher: str, config: Any) -> torch.nn.Module:
    """One MoE layer with filled parameters."""
    layer = layer_class(dispatcher)(config, layer_spec(config).submodules.mlp.submodules, layer_number=1)
    layer.set_layer_number(1)
    fill(layer)
    return layer


def make_gpt(dispatcher: str, config: Any, *, vocab_size: int = 32, length: int = 16) -> torch.nn.Module:
    """A GPT model with filled parameters."""
    from megatron.core.models.gpt.gpt_model import GPTModel

    from moe_ep.integrations.megatron import patch_spec

    spec = layer_spec(config)
    model = GPTModel(
        config=config,
        transformer_layer_spec=patch_spec(spec) if dispatcher == "moe_ep" else spec,
        vocab_size=vocab_size,
        max_sequence_length=length,
        position_embedding_type="rope",
    )
    for parameter in model.parameters():
        # Norms that need nothing but torch are made in fp32.
        parameter.data = parameter.data.to(config.params_dtype)
    fill(model)
    return model


def global_name(name: str, first_expert: int) -> str:
    """The name of a parameter with the number of its expert in the whole model."""
    return re.sub(r"(local_experts\.)(\d+)", lambda found: f"{found[1]}{first_expert + int(found[2])}", name)


def first_experts(model: torch.nn.Module) -> int:
    """Global id of this rank's first expert."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return next(module.local_expert_indices[0] for module in model.modules() if isinstance(module, MoELayer))


def named(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by global name."""
    first = first_experts(model)
    return {global_name(name, first): parameter for name, parameter in model.named_parameters()}


def fill(model: torch.nn.Module) -> None:
    """Values from the global name: the same for an expert wherever it lives, parts of a whole where it is split."""
    for name, parameter in named(model).items():
        shape, dim, parts, part = _whole(name, parameter)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5
        parameter.data.copy_(slice_of(name, whole, dim, parts, part))


def slice_of(name: str, whole: Tensor, dim: int, parts: int, part: int) -> Tensor:
    """This rank's part of a tensor-parallel parameter; the gate and the value of a SwiGLU are split each by itself."""
    if "linear_fc1" in name:
        halves = [half.chunk(parts, dim)[part] for half in whole.chunk(2, dim)]
        return torch.cat(halves, dim)
    return whole.chunk(parts, dim)[part]


def _whole(name: str, parameter: Tensor) -> tuple[list[int], int, int, int]:
    from megatron.core import parallel_state as state

    shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
    if not getattr(parameter, "tensor_model_parallel", False):
        return shape, 0, 1, 0
    if "local_experts" in name:
        parts, part = state.get_expert_tensor_parallel_world_size(), state.get_expert_tensor_parallel_rank()
    else:
        parts, part = state.get_tensor_model_parallel_world_size(), state.get_tensor_model_parallel_rank()
    shape[dim] *= parts
    return shape, dim, parts, part


def part_of(name: str, parameter: Tensor, whole: Tensor) -> Tensor:
    """What of an unsharded tensor belongs to this rank's parameter."""
    _, dim, parts, part = _whole(name, parameter)
    return slice_of(name, whole, dim, parts, part)


def make_x(
    rank: int, num_tokens: int, hidden_size: int, *, batch: int = 2, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[num_tokens, batch, H] of a rank; the first channel is 1, so that a router's weights there are its bias."""
    generator = torch.Generator().manual_seed(1000 + rank)
    x = torch.randn(num_tokens, batch, hidden_size, generator=generator, dtype=torch.float64)
    x[..., 0] = 1.0
    return x.to(dtype)
