"""Where a rank's tokens go, counted by kernels, and the opening of an exchange with those counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_link import CudaLink, pointer
from moe_ep.backends.cuda_outputs import WORD_BYTES, Counts
from moe_ep.backends.cuda_plan import table_layout
from moe_ep.config import ExchangeSpec
from moe_ep.handle import LAYOUT_CODES


class TokenPlan:
    """Outputs of the plan kernels for one set of tokens; allocated on the current stream, undefined before :meth:`run`.

    Args:
        topk_idx: integers [T, K], contiguous; -1, or anything outside 0 .. E - 1, is no choice.
        num_experts: E.
        num_ranks: R, at most 32.

    Attributes:
        topk_idx: as given.
        choices_per_expert: int32 [E].
        tokens_per_rank: int32 [R].
        is_token_in_rank: bool [T, R].
        idx_in_expert: int32 [T, K], place among the choices of that expert.
        idx_in_rank: int32 [T, R], place among the tokens of that rank.
        token_ranks: int32 [T], bit r says whether the token goes to rank r.
    """

    def __init__(self, topk_idx: Tensor, num_experts: int, num_ranks: int) -> None:
        num_tokens, top_k = topk_idx.shape
        device = topk_idx.device
        self._extension = load_extension()
        self.topk_idx = topk_idx
        self.choices_per_expert = _int32(device, num_experts)
        self.tokens_per_rank = _int32(device, num_ranks)
        self.is_token_in_rank = torch.empty(num_tokens, num_ranks, dtype=torch.bool, device=device)
        self.idx_in_expert = _int32(device, num_tokens, top_k)
        self.idx_in_rank = _int32(device, num_tokens, num_ranks)
        self.token_ranks = _int32(device, num_tokens)
        self._params = self._extension.PlanParams(
            topk_idx=topk_idx.data_ptr(),
            index_bytes=topk_idx.itemsize,
            num_tokens=num_tokens,
            top_k=top_k,
            num_experts=num_experts,
            num_ranks=num_ranks,
            choices_per_expert=self.choices_per_expert.data_ptr(),
            tokens_per_rank=self.tokens_per_rank.data_ptr(),
            is_token_in_rank=self.is_token_in_rank.data_ptr(),
            idx_in_expert=self.idx_in_expert.data_ptr(),
            idx_in_rank=self.idx_in_rank.data_ptr(),
            token_ranks=self.token_ranks.data_ptr(),
        )
        self._workspace = torch.empty(self._params.workspace_bytes, dtype=torch.uint8, device=device)

    def run(self, stream: int) -> None:
        """Enqueue the kernels."""
        self._extension.plan_cuda(
            self._params, workspace=self._workspace.data_ptr(), workspace_bytes=self._workspace.numel(), stream=stream
        )


def choices_of_mask(in_rank: Tensor) -> Tensor:
    """Ranks of each token as choices among R experts, one per rank: bool [T, R] to int32 [T, R], -1 where it is not.

    The plan of these choices is that of rows which go to the ranks of a mask, whatever made it.
    """
    ranks = torch.arange(in_rank.shape[1], dtype=torch.int32, device=in_rank.device)
    return torch.where(in_rank, ranks, -1)


def count_choices(
    link: CudaLink,
    topk_idx: Tensor,
    spec: ExchangeSpec,
    header: list[int],
    max_tokens: int,
    limits: tuple[int, int],
    totals: Tensor | None,
) -> Counts:
    """Plan a set of tokens and open an exchange with their counts; arguments as in ``CudaBackend.count``.

    Args:
        limits: rows of this rank's output and rows of every group; 0 where not limited or fixed.
    """
    drop = spec.capacity is not None and spec.on_overflow == "drop"
    if drop:
        topk_idx = topk_idx.clone()
        # The clone was made on the current stream.
        link.stream.wait_stream(torch.cuda.current_stream(topk_idx.device))
    plan = TokenPlan(topk_idx, spec.num_experts, spec.num_ranks)
    stream = link.stream.cuda_stream
    table, ticket = _new_table(topk_idx.device, spec), 0
    for dropping in (True, False) if drop else (False,):
        plan.run(stream)
        ticket = _open(
            link,
            spec,
            header,
            table,
            plan.choices_per_expert,
            plan,
            max_tokens=max_tokens,
            capacity_rows=limits[0],
            capacity_per_expert=limits[1],
            drop=drop,
            received_total=0 if dropping else pointer(totals),
        )
        if dropping:
            kept = table_layout(spec.num_ranks, spec.num_experts)["keep_choices"]
            link.channel.drop(
                topk_idx=topk_idx.data_ptr(),
                index_bytes=topk_idx.itemsize,
                idx_in_expert=plan.idx_in_expert.data_ptr(),
                keep_choices=table.data_ptr() + WORD_BYTES * kept,
                num_choices=topk_idx.numel(),
                num_experts=spec.num_experts,
                stream=stream,
            )
    return _counts(topk_idx, plan.idx_in_expert, plan, table, spec, ticket, plan)


def count_rows(
    link: CudaLink, choices: Tensor, choices_per_expert: Tensor, spec: ExchangeSpec, header: list[int]
) -> Counts:
    """Plan rows by a mask alone and open an exchange with their counts.

    Args:
        link: of the backend.
        choices: of :func:`choices_of_mask`.
        choices_per_expert: int32 [E] choices of this rank's tokens, as the caller counts them.
        spec: the settings; compact rows, ``top_k=0``.
        header: compared on all ranks.
    """
    plan = TokenPlan(choices, spec.num_ranks, spec.num_ranks)
    plan.run(link.stream.cuda_stream)
    table = _new_table(choices.device, spec)
    ticket = _open(link, spec, header, table, choices_per_expert, plan)
    none = choices.new_empty(choices.shape[0], 0)
    return _counts(none.to(torch.int64), none, plan, table, spec, ticket, (plan, choices_per_expert))


def _open(
    link: CudaLink,
    spec: ExchangeSpec,
    header: list[int],
    table: Tensor,
    choices_per_expert: Tensor,
    plan: TokenPlan,
    *,
    max_tokens: int = 0,
    capacity_rows: int = 0,
    capacity_per_expert: int = 0,
    drop: bool = False,
    received_total: int = 0,
) -> int:
    return link.channel.open_dispatch(
        header=header,
        choices_per_expert=choices_per_expert.data_ptr(),
        tokens_per_rank=plan.tokens_per_rank.data_ptr(),
        num_tokens=plan.topk_idx.shape[0],
        max_tokens=max_tokens,
        num_experts=spec.num_experts,
        alignment=spec.alignment,
        layout=LAYOUT_CODES[spec.layout],
        capacity_rows=capacity_rows,
        capacity_per_expert=capacity_per_expert,
        drop=drop,
        table=table.data_ptr(),
        received_total=received_total,
        tell_sizes=max_tokens == 0,
        stream=link.stream.cuda_stream,
    )


def _counts(
    topk_idx: Tensor, idx_in_expert: Tensor, plan: TokenPlan, table: Tensor, spec: ExchangeSpec, ticket: int, keep: Any
) -> Counts:
    return Counts(
        topk_idx=topk_idx,
        idx_in_expert=idx_in_expert,
        idx_in_rank=plan.idx_in_rank,
        token_ranks=plan.token_ranks,
        table=table,
        num_local_experts=spec.num_local_experts,
        ticket=ticket,
        sizes=None,
        host_counts=None,
        keep=(keep,),
    )


def _new_table(device: torch.device, spec: ExchangeSpec) -> Tensor:
    return _int32(device, table_layout(spec.num_ranks, spec.num_experts)["num_words"])


def _int32(device: torch.device, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=torch.int32, device=device)
