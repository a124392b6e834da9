"""What a dispatch on the CUDA backend writes at its destination."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_counting import WORD_BYTES, Counts
from moe_ep.backends.cuda_link import pointer
from moe_ep.backends.types import Dispatch
from moe_ep.config import ExchangeSpec
from moe_ep.handle import LAYOUT_CODES, CudaPlan


class HostGroups(NamedTuple):
    """What the host knows of this rank's groups.

    Attributes:
        counts: [e] rows of each local expert; None with a capacity.
    """

    counts: list[int] | None


@functools.lru_cache(maxsize=1024)
def max_chunks(max_tokens: int) -> int:
    """Groups that the rows of each source have room for in a plan, where no rank sends more than ``max_tokens``."""
    return -(-max_tokens // load_extension().CHUNK_TOKENS)


def received_words(max_tokens: int, num_received: int, num_ranks: int, top_k: int) -> int:
    """Int32 words of the destination's half of a plan.

    Args:
        max_tokens: largest T of any rank.
        num_received: rows that arrive, at most.
        num_ranks: R.
        top_k: K.
    """
    return int(load_extension().received_plan_words(num_ranks, max_chunks(max_tokens), num_received, top_k))


def outputs_of(result: Dispatch) -> tuple[Tensor | None, ...]:
    """All tensors that a dispatch wrote, its plan's too."""
    plan = result.plan
    assert isinstance(plan, CudaPlan)
    # Memory of the arena is not the allocator's.
    rows = (
        None if result.in_arena else result.rows,
        result.scales,
        result.row_weights,
        result.topk_idx,
        result.recv_src_idx,
    )
    counts = (result.tokens_per_expert, result.expert_ends, result.overflow)
    return (*rows, *counts, plan.source, plan.received)


class Outputs:
    """What a dispatch writes on its destination, allocated once sizes are known.

    Args:
        spec: the settings.
        like: rows, scales and weights that are sent.
        counts: of the tokens.
        identity: owner, incarnation and serial number of the plan.
        with_source: whether each received row's token is told.
        take: gives memory for rows that may stay in the arena, by x and the sizes of ``allocate`` but the second.

    Attributes:
        in_arena: whether they do, once allocated.
    """

    def __init__(
        self,
        spec: ExchangeSpec,
        like: tuple[Tensor, Tensor | None, Tensor | None],
        counts: Counts,
        identity: tuple[int, int, int],
        with_source: bool,
        take: Callable[[Tensor, int, int, int], Tensor | None] | None = None,
    ) -> None:
        self._spec = spec
        self._like = like
        self._counts = counts
        self._identity = identity
        self._with_source = with_source
        self._take = take
        self._sizes = (0, 0)
        self.in_arena = False

    def allocate(self, num_rows: int, num_received: int, max_tokens: int, most_rows: int = 0) -> None:
        """Allocate on the current stream and tell the call.

        Args:
            num_rows: layout rows.
            num_received: rows that arrive, at most.
            max_tokens: largest T of any rank.
            most_rows: layout rows of the rank with most; only asked for where rows may stay in the arena.
        """
        spec, counts = self._spec, self._counts
        x, scales, topk_weights = self._like
        top_k, compact, chunks = spec.top_k, spec.layout == "compact", max_chunks(max_tokens)
        kept = None if self._take is None else self._take(x, num_rows, max_tokens, most_rows)
        self.in_arena = kept is not None
        self.rows = x.new_empty(num_rows, x.shape[1]) if kept is None else kept
        self.received = counts.source.new_empty(received_words(max_tokens, num_received, spec.num_ranks, top_k))
        self.scales = None if scales is None else scales.new_empty(num_rows, scales.shape[1])
        self.weights = self.topk_idx = self.recv_src_idx = None
        if topk_weights is not None:
            self.weights = topk_weights.new_empty((num_rows, top_k) if compact else (num_rows,))
        if compact:
            # By a mask no ids travel.
            self.topk_idx = counts.topk_idx.new_empty(num_rows, top_k)
        if self._with_source:
            self.recv_src_idx = counts.source.new_empty(num_rows if compact else num_received)
        self._sizes = (num_rows, chunks)
        counts.call.set_output(
            self.received.data_ptr(),
            chunks,
            num_received,
            self.rows.data_ptr(),
            num_rows,
            pointer(self.weights),
            pointer(self.scales),
            pointer(self.topk_idx),
            pointer(self.recv_src_idx),
        )

    def result(self) -> Dispatch:
        """What was allocated, as a result."""
        spec, counts = self._spec, self._counts
        topk_weights = self._like[2]
        plan = CudaPlan(
            *self._identity,
            self._like[0].shape[0],
            spec.top_k,
            spec.num_experts,
            *self._sizes,
            LAYOUT_CODES[spec.layout],
            spec.layout == "expanded",
            WORD_BYTES if topk_weights is None else topk_weights.itemsize,
            counts.source,
            self.received,
        )
        return Dispatch(
            rows=self.rows,
            scales=self.scales,
            row_weights=self.weights,
            topk_idx=self.topk_idx,
            recv_src_idx=self.recv_src_idx,
            tokens_per_expert=counts.tokens_per_expert,
            expert_ends=counts.expert_ends,
            overflow=counts.overflow,
            plan=plan,
            groups=HostGroups(counts.host_counts),
            in_arena=self.in_arena,
        )
