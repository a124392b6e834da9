"""Inputs and outputs of the plan kernels and their host twin, and the cases that both are tested on."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ep.testing import make_routing

POISON = -77

# (T, K, E, R): the edges of one warp's group and of one chunk, K = E, one local expert, and every limit.
SHAPES = [
    (0, 2, 8, 4),
    (1, 1, 1, 1),
    (31, 2, 4, 2),
    (32, 3, 6, 3),
    (33, 8, 8, 8),
    (97, 6, 6, 2),
    (257, 8, 64, 8),
    (1000, 5, 60, 4),
    (128, 64, 64, 64),
    (300, 8, 4096, 64),
    (70, 64, 4096, 1),
    (16384 + 5, 2, 16, 4),
    (65536 + 33, 1, 12, 3),
]
KINDS = ["uniform", "zipf", "one", "empty", "holes", "foreign"]


def make_topk_idx(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype = torch.int64) -> Tensor:
    """Draws [T, K] ids; kind "foreign" mixes in ids that name no expert, which count as no choice."""
    num_tokens, top_k, num_experts, _ = shape
    # Drawing without replacement costs T * E: wide shapes repeat the draw of their first tokens.
    drawn = min(num_tokens, 2048)
    topk_idx, _ = make_routing(drawn, top_k, num_experts, kind="uniform" if kind == "foreign" else kind, seed=3)
    if kind == "foreign":
        generator = torch.Generator().manual_seed(4)
        foreign = torch.randint(0, 4, topk_idx.shape, generator=generator)
        topk_idx = torch.where(foreign == 0, num_experts, torch.where(foreign == 1, -(2**31), topk_idx))
    if drawn:
        topk_idx = topk_idx[torch.arange(num_tokens) % drawn]
    return topk_idx.to(dtype).contiguous()


@dataclass(frozen=True)
class PlanArrays:
    """What a plan consists of, as tensors; every element is poisoned until it is computed."""

    choices_per_expert: Tensor
    tokens_per_rank: Tensor
    is_token_in_rank: Tensor
    idx_in_expert: Tensor
    idx_in_rank: Tensor

    @classmethod
    def poisoned(cls, topk_idx: Tensor, num_experts: int, num_ranks: int) -> "PlanArrays":
        """Allocates the outputs on the device of ``topk_idx`` [T, K]."""
        num_tokens, top_k = topk_idx.shape

        def full(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(
                shape, POISON % 256 if dtype is torch.uint8 else POISON, dtype=dtype, device=topk_idx.device
            )

        return cls(
            choices_per_expert=full(num_experts),
            tokens_per_rank=full(num_ranks),
            is_token_in_rank=full(num_tokens, num_ranks, dtype=torch.uint8),
            idx_in_expert=full(num_tokens, top_k),
            idx_in_rank=full(num_tokens, num_ranks),
        )

    def arguments(self, topk_idx: Tensor) -> dict[str, Any]:
        """Returns the keyword arguments of ``_C.PlanParams``."""
        num_tokens, top_k = topk_idx.shape
        return {
            "topk_idx": topk_idx.data_ptr(),
            "index_bytes": topk_idx.element_size(),
            "num_tokens": num_tokens,
            "top_k": top_k,
            "num_experts": self.choices_per_expert.numel(),
            "num_ranks": self.tokens_per_rank.numel(),
            **{name: tensor.data_ptr() for name, tensor in vars(self).items()},
        }

    def assert_equal(self, expected: "PlanArrays") -> None:
        """Compares every element."""
        for name, tensor in vars(self).items():
            assert torch.equal(tensor.cpu(), getattr(expected, name).cpu()), name
