"""Tiny models of every supported family, and the batches they train on."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY = 64
NUM_EXPERTS = 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK = {
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 2,
    "norm_topk_prob": True,
}
# Prefix of the classes, and what their configurations need beyond the common part.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 16, "num_local_experts": NUM_EXPERTS, "sliding_window": None}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
            "num_experts": NUM_EXPERTS,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "head_dim": 8,
            "num_experts": NUM_EXPERTS,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {**_DEEPSEEK, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "gpt_oss": (
        "GptOss",
        {"intermediate_size": 32, "num_local_experts": NUM_EXPERTS, "head_dim": 8, "sliding_window": 32},
    ),
    "olmoe": ("Olmoe", {"intermediate_size": 16, "num_experts": NUM_EXPERTS}),
    "glm4_moe": ("Glm4Moe", {**_DEEPSEEK, "head_dim": 8}),
}


def make_config(family: str, top_k: int = 2, **fields: Any) -> transformers.PretrainedConfig:
    """A configuration of two layers; ``top_k`` choices per token."""
    prefix, own = FAMILIES[family]
    return getattr(transformers, f"{prefix}Config")(**{**_COMMON, **own, "num_experts_per_tok": top_k, **fields})


def make_model(family: str, top_k: int = 2, **fields: Any) -> nn.Module:
    """The same weights in every process; router biases too, so that routing is uneven."""
    torch.manual_seed(11)
    config = make_config(family, top_k, **fields)
    model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(12)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("e_score_correction_bias", "router.bias", "proj_bias")):
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
            elif tensor.dim() >= 2 and tensor.is_floating_point():
                # The families draw from 0.02, which leaves gradients of routers in the noise.
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor.shape[-1] ** 0.5)
    return model


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moe_ep_transformers_")


@functools.cache
def saved_model(family: str, top_k: int = 2) -> str:
    """A folder with the checkpoint of :func:`make_model`, kept for the session."""
    path = Path(_folder().name) / f"{family}_{top_k}"
    make_model(family, top_k).save_pretrained(path)
    return str(path)


def make_ids(rank: int, step: int, batch: int = 2, length: int = 6) -> Tensor:
    """[batch, length] token ids of one rank and step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own mean loss over its tokens, of which the last predicts the first: none is without gradient."""
    return model(input_ids=ids, labels=ids, shift_labels=ids.roll(-1, 1), use_cache=False).loss


def whole(tensor: Tensor) -> Tensor:
    """A detached copy, gathered where it is sharded."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()
