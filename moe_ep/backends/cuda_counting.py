"""Where a rank's tokens go, counted by kernels, by themselves or at the opening of a dispatch."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_link import CudaLink
from moe_ep.config import ExchangeSpec
from moe_ep.handle import LAYOUT_CODES

WORD_BYTES = 4
# Parts of a block begin at multiples of 16 bytes.
_PART_WORDS = 4


class TokenPlan:
    """Outputs of the plan kernels for one set of tokens; allocated on the current stream, undefined before :meth:`run`.

    Args:
        topk_idx: integers [T, K], contiguous; -1, or anything outside 0 .. E - 1, is no choice.
        num_experts: E.
        num_ranks: R, at most 32.

    Attributes:
        topk_idx: as given.
        choices_pointer: address of int32 [E], choices of each expert.
        tokens_pointer: address of int32 [R], tokens of each rank.
        idx_pointer: address of int32 [T, K], each choice's place among those of its expert.
        idx_in_rank: int32 [T, R], place among the tokens of that rank.
        token_ranks: int32 [T], bit r says whether the token goes to rank r.
    """

    def __init__(self, topk_idx: Tensor, num_experts: int, num_ranks: int) -> None:
        num_tokens, top_k = topk_idx.shape
        device = topk_idx.device
        self._extension = load_extension()
        self.topk_idx = topk_idx
        self._sizes = (num_experts, num_ranks)
        self.idx_in_rank = _int32(device, num_tokens, num_ranks)
        self.token_ranks = _int32(device, num_tokens)
        # What few callers read lies in one block, since each allocation takes longer than a launch.
        parts = (num_experts, num_ranks, num_tokens * top_k, -(-num_tokens * num_ranks // WORD_BYTES))
        self._starts = [0]
        for words in parts:
            self._starts.append(self._starts[-1] + -(-words // _PART_WORDS) * _PART_WORDS)
        space = _workspace_bytes(num_tokens, top_k, num_experts, num_ranks)
        self._block = _int32(device, self._starts[-1] + -(-space // WORD_BYTES))
        places = [self._block.data_ptr() + WORD_BYTES * start for start in self._starts]
        self.choices_pointer, self.tokens_pointer, self.idx_pointer, self._mask_pointer, self._workspace = places
        self._workspace_bytes = space
        self._params = self._extension.PlanParams(
            topk_idx=topk_idx.data_ptr(),
            index_bytes=topk_idx.itemsize,
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
            num_ranks=num_ranks,
            choices_per_expert=self.choices_pointer,
            tokens_per_rank=self.tokens_pointer,
            is_token_in_rank=self._mask_pointer,
            idx_in_expert=self.idx_pointer,
            idx_in_rank=self.idx_in_rank.data_ptr(),
            token_ranks=self.token_ranks.data_ptr(),
        )

    @property
    def choices_per_expert(self) -> Tensor:
        """Int32 [E]."""
        return self._part(0, self._sizes[0])

    @property
    def tokens_per_rank(self) -> Tensor:
        """Int32 [R]."""
        return self._part(1, self._sizes[1])

    @property
    def idx_in_expert(self) -> Tensor:
        """Int32 [T, K]."""
        return self._part(2, self.topk_idx.numel()).view(self.topk_idx.shape)

    @property
    def is_token_in_rank(self) -> Tensor:
        """Bool [T, R]."""
        num_tokens, num_ranks = self.idx_in_rank.shape
        mask = self._part(3, -(-num_tokens * num_ranks // WORD_BYTES)).view(torch.bool)
        return mask[: num_tokens * num_ranks].view(num_tokens, num_ranks)

    def _part(self, idx: int, words: int) -> Tensor:
        return self._block[self._starts[idx] : self._starts[idx] + words]

    def run(self, stream: int) -> None:
        """Enqueue the kernels."""
        self._extension.plan_cuda(
            self._params, workspace=self._workspace, workspace_bytes=self._workspace_bytes, stream=stream
        )


def choices_of_mask(in_rank: Tensor) -> Tensor:
    """Ranks of each token as choices among R experts, one per rank: bool [T, R] to int32 [T, R], -1 where it is not.

    The plan of these choices is that of rows which go to the ranks of a mask, whatever made it.
    """
    ranks = torch.arange(in_rank.shape[1], dtype=torch.int32, device=in_rank.device)
    return torch.where(in_rank, ranks, -1)


@dataclasses.dataclass(eq=False, slots=True)
class Counts:
    """A set of tokens whose counts are exchanged when its call is launched: what follows from ``topk_idx`` alone.

    Attributes:
        topk_idx: int64 [T, K] physical ids, after drops; a mask's ranks for rows that go by one.
        source: int32, of the plan.
        tokens_per_expert: int32 [e] received choices.
        expert_ends: int32 [e].
        overflow: bool 0-dim.
        call: the extension's half.
        told: int32 [E] choices as the caller counts them, or None.
        sizes: (layout rows, received rows, largest T, most layout rows of any rank), once the host knows them.
        host_counts: [e] received choices of each local expert, once the host knows them.
    """

    topk_idx: Tensor
    source: Tensor
    tokens_per_expert: Tensor
    expert_ends: Tensor
    overflow: Tensor
    call: Any
    told: Tensor | None = None
    sizes: tuple[int, int, int, int] | None = None
    host_counts: list[int] | None = None


def get_ready(link: CudaLink, topk_idx: Tensor, spec: ExchangeSpec, told: Tensor | None = None) -> Counts:
    """Allocate, on the current stream, what counting a set of tokens takes; launches nothing but a copy.

    Args:
        link: of the backend.
        topk_idx: int64 [T, K] physical ids, -1 = no choice; of :func:`choices_of_mask` for rows that go by a mask.
        spec: the settings; compact rows and ``top_k=0`` for rows that go by a mask.
        told: int32 [E] choices of this rank's tokens as the caller counts them, for such rows.
    """
    settings = _settings_of(spec, topk_idx.itemsize, told is not None)
    if spec.capacity is not None and spec.on_overflow == "drop":
        # Choices that are dropped are taken out of it.
        topk_idx = topk_idx.clone()
    num_tokens, new, local = topk_idx.shape[0], link.words.new_empty, spec.num_local_experts
    source = new(source_words(num_tokens, spec.top_k, spec.num_experts, spec.num_ranks, told is not None))
    tokens_per_expert, expert_ends, overflow = new(local), new(local), new((), dtype=torch.bool)
    call = link.extension.DispatchCall(
        settings,
        num_tokens,
        topk_idx.data_ptr(),
        source.data_ptr(),
        0 if told is None else told.data_ptr(),
        tokens_per_expert.data_ptr(),
        expert_ends.data_ptr(),
        overflow.data_ptr(),
    )
    return Counts(topk_idx, source, tokens_per_expert, expert_ends, overflow, call, told)


@functools.lru_cache(maxsize=256)
def _settings_of(spec: ExchangeSpec, index_bytes: int, by_mask: bool) -> Any:  # noqa: ANN401
    return load_extension().CountSettings(
        num_ranks=spec.num_ranks,
        top_k=spec.top_k,
        num_experts=spec.num_experts,
        index_bytes=index_bytes,
        alignment=spec.alignment,
        layout=LAYOUT_CODES[spec.layout],
        drop=spec.capacity is not None and spec.on_overflow == "drop",
        by_mask=by_mask,
    )


def source_words(num_tokens: Any, top_k: int, num_experts: int, num_ranks: int, by_mask: bool = False) -> Any:
    """Int32 words of the source's half of a plan; ``num_tokens``, and then these, may be a symbol of a tracer."""
    fixed, token_bytes, block_words, block_tokens, max_blocks = _source_room(top_k, num_experts, num_ranks, by_mask)
    blocks, known = 1 + num_tokens // block_tokens, isinstance(num_tokens, int)
    blocks = min(blocks, max_blocks) if known else torch.sym_min(blocks, max_blocks)
    return fixed + (num_tokens * token_bytes + WORD_BYTES - 1) // WORD_BYTES + blocks * block_words


@functools.lru_cache(maxsize=256)
def _source_room(top_k: int, num_experts: int, num_ranks: int, by_mask: bool) -> tuple[int, int, int, int, int]:
    return load_extension().source_plan_room(top_k, num_experts, num_ranks, by_mask)


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(num_tokens: int, top_k: int, num_experts: int, num_ranks: int) -> int:
    return int(
        load_extension().plan_workspace_bytes(
            num_tokens=num_tokens, top_k=top_k, num_experts=num_experts, num_ranks=num_ranks
        )
    )


def _int32(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int32, device=device)
