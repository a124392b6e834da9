"""Where the parts of a CUDA plan's table lie; the kernels' own layout says so."""

from __future__ import annotations

import functools

from torch import Tensor

from moe_ep.backends.cuda import load_extension


@functools.lru_cache(maxsize=64)
def table_layout(num_ranks: int, num_experts: int) -> dict[str, int]:
    """First word of each part of a plan's table, and ``num_words``."""
    return load_extension().table_layout(num_ranks=num_ranks, num_experts=num_experts)


def table_part(table: Tensor, name: str, num_ranks: int, num_experts: int, count: int) -> Tensor:
    """A view of one part of a plan's table: int32 [count]."""
    first = table_layout(num_ranks, num_experts)[name]
    return table[first : first + count]
