"""The demo's language model: rotary causal attention and a MoE layer with a shared expert in each block."""

import zlib
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from moe_ep.cli.demo.options import Backend, ModelOptions
from moe_ep.layers import MoELayer, expert_parameters

VOCABULARY = 256
AUX_LOSS_COEF = 0.01
_ROPE_BASE = 10_000.0


class Attention(nn.Module):
    """Causal self-attention with rotary position embeddings: x [b, s, H] -> [b, s, H]."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, hidden: int, heads: int, *, seq: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False, device=device, dtype=dtype)
        self.out = nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)
        half = hidden // heads // 2
        frequency = _ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(seq, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().to(device, dtype), persistent=False)
        self.register_buffer("sin", angle.sin().to(device, dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.heads)
        q, k = self._rotate(q).to(v.dtype), self._rotate(k).to(v.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(rearrange(y, "b h s d -> b s (h d)"))

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Block(nn.Module):
    """Attention, then the MoE layer, each behind a norm and added to the residual stream."""

    def __init__(
        self,
        options: ModelOptions,
        layer_idx: int,
        group: dist.ProcessGroup | None,
        *,
        backend: Backend,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attention_norm = nn.RMSNorm(options.hidden, **placed)
        self.attention = Attention(options.hidden, options.heads, seq=options.seq, **placed)
        self.moe_norm = nn.RMSNorm(options.hidden, **placed)
        self.moe = MoELayer(
            group,
            hidden_size=options.hidden,
            intermediate_size=options.expert_hidden,
            num_experts=options.experts,
            top_k=options.top_k,
            shared_intermediate_size=options.expert_hidden,
            backend=backend,
            seed=seed,
            layer_idx=layer_idx,
            aux_loss_coef=AUX_LOSS_COEF,
            scope="group",
            **placed,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class LanguageModel(nn.Module):
    """A byte-level decoder: tokens int64 [b, s] in 0..255, s <= ``options.seq`` -> logits [b, s, 256].

    The parameters are the same for every number of ranks: the MoE layers see to theirs, the others are drawn from
    generators seeded by (seed, name). With a group, each rank holds its slice of the experts.
    """

    def __init__(
        self,
        options: ModelOptions,
        group: dist.ProcessGroup | None,
        *,
        seed: int,
        device: torch.device,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.options = options
        dtype = torch.float64 if options.dtype == "float64" else torch.float32
        self.embedding = nn.Embedding(VOCABULARY, options.hidden, device=device, dtype=dtype)
        blocks = [
            Block(options, i, group, backend=backend, seed=seed, device=device, dtype=dtype)
            for i in range(options.layers)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(options.hidden, device=device, dtype=dtype)
        self.head = nn.Linear(options.hidden, VOCABULARY, bias=False, device=device, dtype=dtype)
        self._draw_dense_parameters(seed)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with self.autocast():
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    def autocast(self) -> torch.autocast:
        """The autocast region of the model's dtype: on for bfloat16 only."""
        enabled = self.options.dtype == "bfloat16"
        return torch.autocast(self.embedding.weight.device.type, dtype=torch.bfloat16, enabled=enabled)

    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first to last."""
        return [cast(Block, block).moe for block in self.blocks]

    def expert_parameters(self) -> list[nn.Parameter]:
        """Parameters of which this rank holds a slice: dimension 0 counts its experts."""
        return [parameter for _, parameter in expert_parameters(self)]

    def dense_parameters(self) -> list[nn.Parameter]:
        """Parameters that every rank holds whole."""
        sharded = {name for name, _ in expert_parameters(self)}
        return [parameter for name, parameter in self.named_parameters() if name not in sharded]

    @torch.no_grad()
    def _draw_dense_parameters(self, seed: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or ".moe." in name:
                continue
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(name.encode()))
            std = 0.02 if "embedding" in name or "head" in name else parameter.shape[-1] ** -0.5
            # Writers to the residual stream start small, so that the depth does not inflate it.
            std = std * (2 * self.options.layers) ** -0.5 if name.endswith("attention.out.weight") else std
            drawn = torch.empty(parameter.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)
