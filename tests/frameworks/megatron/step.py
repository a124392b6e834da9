"""A training step of one MoE layer, for timing one dispatcher against another."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.frameworks.megatron.models import layout, make_config, make_layer
from tests.frameworks.megatron.shim import cpu_megatron

_SETTINGS: dict[str, dict[str, Any]] = {
    "native": {},
    "moe_ep": {},
    "deep_ep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
}


def make_step(
    dispatcher: str, tokens: int, hidden: int, top_k: int, *, num_experts: int = 16, dtype: torch.dtype = torch.float32
) -> Callable[[], float]:
    """Build a layer; the callable runs forward, backward and an optimizer step. Collective, and so is every call.

    Call it on every rank of the default group, which is the expert-parallel group.

    Args:
        dispatcher: "native", Megatron's all-to-all; "moe_ep", ours in its place; "deep_ep", Megatron's flex dispatcher
            on the module that stands in for deep_ep.
        tokens: T of each rank.
        hidden: H; the experts' inner size is the same.
        top_k: K.
        num_experts: E.
        dtype: of parameters and tokens.

    Returns:
        A callable that returns the loss.

    Raises:
        ValueError: for another ``dispatcher``.
    """
    if dispatcher not in _SETTINGS:
        raise ValueError(f"dispatcher={dispatcher!r} must be one of {', '.join(map(repr, _SETTINGS))}")
    size = dist.get_world_size()
    with cpu_megatron(), layout(ep=size):
        config = make_config(
            ep=size,
            hidden_size=hidden,
            ffn_hidden_size=hidden,
            moe_ffn_hidden_size=hidden,
            num_moe_experts=num_experts,
            moe_router_topk=top_k,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            **_SETTINGS[dispatcher],
        )
        layer = make_layer("moe_ep" if dispatcher == "moe_ep" else "native", config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(tokens, 1, hidden, generator=generator).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)

    def step() -> float:
        with cpu_megatron(), layout(ep=size):
            optimizer.zero_grad()
            out, _ = layer(x.requires_grad_())
            loss = (out.float() - 1.0).square().mean()
            loss.backward()
            optimizer.step()
            return loss.item()

    return step
