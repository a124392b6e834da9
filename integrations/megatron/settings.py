"""What of Megatron's configuration concerns the dispatcher, and what cannot work with it."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

from moe_ep.config import MAX_TOP_K

# Parts of a captured CUDA graph that end before tokens travel.
_SCOPES_WITHOUT_EXCHANGE = {"attn", "mlp", "mamba", "moe_router", "moe_preprocess"}


def check_config(config: Any) -> None:
    """Raise ValueError, naming the remedy, for settings that this adapter cannot honour.

    Args:
        config: a ``TransformerConfig``.
    """
    kind = config.moe_token_dispatcher_type
    if kind != "alltoall":
        also = ""
        if kind == "flex":
            also = ", or keep flex and call moe_ep.integrations.deep_ep.install() before megatron is imported"
        raise ValueError(
            f'moe_token_dispatcher_type="{kind}" must be "alltoall": schedules and checks of Megatron then treat the '
            f"tensors between stages as this dispatcher needs it: set it{also}"
        )
    _check_cuda_graphs(config)


def _check_cuda_graphs(config: Any) -> None:
    if getattr(config, "cuda_graph_impl", "none") == "none":
        return
    # 0.16 names them cuda_graph_scope, later releases cuda_graph_modules; nothing named captures whole layers.
    scopes = getattr(config, "cuda_graph_modules", None) or getattr(config, "cuda_graph_scope", None)
    names = {getattr(scope, "name", str(scope)) for scope in scopes or ("whole layers",)}
    captured = sorted(names - _SCOPES_WITHOUT_EXCHANGE)
    if captured:
        raise ValueError(
            f"cuda_graph_scope={', '.join(captured)} would capture the exchange of tokens, which waits for the host: "
            'use cuda_graph_scope=["attn", "moe_router", "moe_preprocess"] or parts of it, or cuda_graph_impl="none"'
        )


def check_choices(top_k: int, tp_size: int) -> None:
    """Raise ValueError when a token makes more choices than an exchange carries."""
    if top_k * tp_size > MAX_TOP_K:
        raise ValueError(
            f"moe_router_topk={top_k} with expert_tensor_parallel_size={tp_size} makes {top_k * tp_size} choices per "
            f"token, of which an exchange carries {MAX_TOP_K}: lower expert_tensor_parallel_size"
        )


def hidden_size(config: Any) -> int:
    """H of the rows that travel: with latent experts that of the latent space."""
    return getattr(config, "moe_latent_size", None) or config.hidden_size


def alignment(config: Any) -> int:
    """Multiple to which the rows of an expert are padded."""
    return get_align_size_for_quantization(config) if config.moe_router_padding_for_quantization else 1


def padded_rows(config: Any, num_tokens: int, capacity_factor: float, num_ranks: int) -> int:
    """Rows of each expert with ``moe_pad_expert_input_to_capacity``: its capacity for each source rank.

    Args:
        config: a ``TransformerConfig``.
        num_tokens: T, equal on all ranks.
        capacity_factor: ``moe_expert_capacity_factor``.
        num_ranks: source ranks.
    """
    even = num_tokens * config.moe_router_topk / config.num_moe_experts
    step = alignment(config)
    return max(1, -(-math.ceil(even * capacity_factor) * num_ranks // step)) * step


def weight_dtype(rows: torch.dtype) -> torch.dtype:
    """In which router probabilities travel."""
    return torch.float64 if rows == torch.float64 else torch.float32
