"""What is measured: shapes, targets, and how they are written on the command line."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moe_ep.config import ExchangeSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Hidden size H, choices per token K and experts in all E of one MoE layer."""

    hidden: int
    top_k: int
    experts: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Read ``H:K:E``, for example ``1024:8:64``.

        Raises:
            ValueError: not three positive numbers, or K > E.
        """
        parts = text.split(":")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise ValueError(f"shape={text!r} must be H:K:E with positive whole numbers, for example 1024:8:64")
        hidden, top_k, experts = (int(part) for part in parts)
        if top_k > experts:
            raise ValueError(f"shape={text!r} asks for K={top_k} of E={experts} experts; K must not exceed E")
        return cls(hidden=hidden, top_k=top_k, experts=experts)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measured point: ``tokens`` per rank, on ``ranks`` ranks."""

    ranks: int
    tokens: int
    shape: Shape
    dtype: str
    routing: str
    seed: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


DEFAULT_SHAPES = ("1024:8:64", "512:4:64", "512:2:16")
DEFAULT_TOKENS = (256, 1024, 4096)
DEFAULT_RANKS = (2, 4)
DEFAULT_PAIRS = 30
# The quick run reaches every code path in seconds; its figures mean little.
QUICK_TOKENS = (256,)
QUICK_RANKS = (2,)
QUICK_PAIRS = 5

# One process, a layer whose GEMMs weigh enough to hide nothing and little enough to run 60 times in a minute.
LAYER_SHAPE = "512:4:16"
LAYER_TOKENS = 512
QUICK_LAYER_TOKENS = 64

# Upper ends of the 95 % interval of ours / baseline that must not be exceeded, on CPU, by (H, K).
EXCHANGE_TARGETS = {(1024, 8): 1.0, (512, 4): 1.05, (512, 2): 1.10}
LAYER_TARGET = 1.05


def check_shape(shape: Shape, *, ranks: int, dtype: torch.dtype) -> None:
    """Raise ValueError for a shape that no dispatcher over ``ranks`` ranks takes, before processes are started."""
    spec = ExchangeSpec(
        num_experts=shape.experts, hidden_size=shape.hidden, top_k=shape.top_k, num_ranks=ranks, dtype=dtype
    )
    try:
        spec.check()
    except ValueError as error:
        raise ValueError(f"shape={shape.hidden}:{shape.top_k}:{shape.experts}: {error}") from error


def exchange_cases(
    ranks: int, tokens: Sequence[int], shapes: Sequence[Shape], *, dtype: str, routing: str
) -> Iterator[Case]:
    """Every combination of tokens and shapes at one number of ranks.

    Raises:
        ValueError: a shape that no dispatcher over ``ranks`` ranks takes.
    """
    for shape, count in itertools.product(shapes, tokens):
        check_shape(shape, ranks=ranks, dtype=DTYPES[dtype])
        yield Case(ranks=ranks, tokens=count, shape=shape, dtype=dtype, routing=routing)
