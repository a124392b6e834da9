"""Where a rank's tokens go, counted by kernels, and the opening of an exchange with those counts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_link import CudaLink, pointer
from moe_ep.backends.cuda_outputs import WORD_BYTES, Counts
from moe_ep.backends.cuda_plan import table_layout
from moe_ep.config import ExchangeSpec
from moe_ep.handle import LAYOUT_CODES

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


class Counting:
    """The first part of a dispatch: plan a set of tokens, and open an exchange with their counts.

    Memory is allocated here, on the current stream; :meth:`open` launches, on the communication stream.

    Args:
        link: of the backend.
        plan: of the tokens.
        topk_idx: [T, K] of the choices that travel; not the plan's own for rows that go by a mask.
        spec: the settings.
        idx_pointer: address of int32 [T, K], places of these choices.
        told: int32 [E] choices of this rank's tokens, as the caller counts them; None for the plan's own.
    """

    def __init__(
        self,
        link: CudaLink,
        plan: TokenPlan,
        topk_idx: Tensor,
        spec: ExchangeSpec,
        idx_pointer: int,
        told: Tensor | None = None,
    ) -> None:
        self._link = link
        self._plan = plan
        self._spec = spec
        self._told = plan.choices_pointer if told is None else told.data_ptr()
        self.counts = Counts(
            topk_idx=topk_idx,
            idx_in_expert=idx_pointer,
            idx_in_rank=plan.idx_in_rank,
            token_ranks=plan.token_ranks,
            table=_new_table(topk_idx.device, spec),
            num_local_experts=spec.num_local_experts,
            ticket=0,
            sizes=None,
            host_counts=None,
            keep=(plan, told),
        )

    def open(
        self, header: list[int], max_tokens: int = 0, limits: tuple[int, int] = (0, 0), totals: Tensor | None = None
    ) -> None:
        """Launch it; arguments as in ``CudaBackend.count``.

        Args:
            limits: rows of this rank's output and rows of every group; 0 where not limited or fixed.
        """
        drop = self._spec.capacity is not None and self._spec.on_overflow == "drop"
        if drop:
            self._plan.run(self._link.queue)
            self._open(header, max_tokens, limits, None, drop)
            self._drop()
        self._plan.run(self._link.queue)
        self.counts.ticket = self._open(header, max_tokens, limits, totals, drop)

    def _drop(self) -> None:
        """Take away the choices that their experts have no room for."""
        plan, spec, table = self._plan, self._spec, self.counts.table
        kept = table_layout(spec.num_ranks, spec.num_experts)["keep_choices"]
        self._link.channel.drop(
            topk_idx=plan.topk_idx.data_ptr(),
            index_bytes=plan.topk_idx.itemsize,
            idx_in_expert=plan.idx_pointer,
            keep_choices=table.data_ptr() + WORD_BYTES * kept,
            num_choices=plan.topk_idx.numel(),
            num_experts=spec.num_experts,
            stream=self._link.queue,
        )

    def _open(
        self, header: list[int], max_tokens: int, limits: tuple[int, int], totals: Tensor | None, drop: bool
    ) -> int:
        spec = self._spec
        return int(
            self._link.channel.open_dispatch(
                header=header,
                choices_per_expert=self._told,
                tokens_per_rank=self._plan.tokens_pointer,
                num_tokens=self._plan.topk_idx.shape[0],
                max_tokens=max_tokens,
                num_experts=spec.num_experts,
                alignment=spec.alignment,
                layout=LAYOUT_CODES[spec.layout],
                capacity_rows=limits[0],
                capacity_per_expert=limits[1],
                drop=drop,
                table=self.counts.table.data_ptr(),
                received_total=pointer(totals),
                tell_sizes=max_tokens == 0,
                stream=self._link.queue,
            )
        )


def count_choices(link: CudaLink, topk_idx: Tensor, spec: ExchangeSpec) -> Counting:
    """Get ready to count choices int64 [T, K] of physical ids, -1 = no choice."""
    if spec.capacity is not None and spec.on_overflow == "drop":
        topk_idx = topk_idx.clone()
    plan = TokenPlan(topk_idx, spec.num_experts, spec.num_ranks)
    return Counting(link, plan, topk_idx, spec, plan.idx_pointer)


def count_rows(link: CudaLink, choices: Tensor, told: Tensor, spec: ExchangeSpec) -> Counting:
    """Get ready to count rows that go by a mask alone.

    Args:
        link: of the backend.
        choices: of :func:`choices_of_mask`.
        told: int32 [E] choices of this rank's tokens, as the caller counts them.
        spec: the settings; compact rows, ``top_k=0``.
    """
    plan = TokenPlan(choices, spec.num_ranks, spec.num_ranks)
    none = torch.empty(choices.shape[0], 0, dtype=torch.int64, device=choices.device)
    return Counting(link, plan, none, spec, 0, told)


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(num_tokens: int, top_k: int, num_experts: int, num_ranks: int) -> int:
    return int(
        load_extension().plan_workspace_bytes(
            num_tokens=num_tokens, top_k=top_k, num_experts=num_experts, num_ranks=num_ranks
        )
    )


def _new_table(device: torch.device, spec: ExchangeSpec) -> Tensor:
    return _int32(device, table_layout(spec.num_ranks, spec.num_experts)["num_words"])


def _int32(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int32, device=device)
