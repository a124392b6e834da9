"""What a dispatch on the CUDA backend knows of its tokens, and what it writes at their destination."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_link import pointer
from moe_ep.backends.cuda_plan import table_part
from moe_ep.backends.types import Dispatch
from moe_ep.config import ExchangeSpec
from moe_ep.handle import LAYOUT_CODES, CudaPlan

WORD_BYTES = 4


@dataclasses.dataclass
class Counts:
    """A set of tokens whose counts are on their way: what follows from ``topk_idx`` and all ranks' counts.

    Attributes:
        topk_idx: int64 [T, K] physical ids, after drops.
        idx_in_expert: address of int32 [T, K], places of the choices; 0 without choices.
        idx_in_rank: int32 [T, R].
        token_ranks: int32 [T].
        table: int32, of the plan.
        num_local_experts: e.
        ticket: of the sizes; 0 with a capacity.
        sizes: (layout rows, received rows, largest T), once the host knows them.
        host_counts: [e] received choices of each local expert, once the host knows them.
        keep: temporaries that outlive the launch.
    """

    topk_idx: Tensor
    idx_in_expert: int
    idx_in_rank: Tensor
    token_ranks: Tensor
    table: Tensor
    num_local_experts: int
    ticket: int
    sizes: tuple[int, int, int] | None
    host_counts: list[int] | None
    keep: tuple[Any, ...]


class HostGroups(NamedTuple):
    """What the host knows of this rank's groups.

    Attributes:
        counts: [e] rows of each local expert; None with a capacity.
    """

    counts: list[int] | None


def max_chunks(max_tokens: int) -> int:
    """Groups that the rows of each source have room for in a plan, where no rank sends more than ``max_tokens``."""
    return -(-max_tokens // load_extension().CHUNK_TOKENS)


def outputs_of(result: Dispatch) -> tuple[Tensor | None, ...]:
    """All tensors that a dispatch wrote, its plan's too; views of the table count as the table."""
    plan = result.plan
    assert isinstance(plan, CudaPlan)
    rows = (result.rows, result.scales, result.row_weights, result.topk_idx, result.recv_src_idx)
    return (*rows, plan.table, plan.groups, plan.positions, plan.token_ranks, plan.idx_in_rank)


class Outputs:
    """What a dispatch writes on its destination, allocated once sizes are known."""

    def __init__(
        self,
        incarnation: int,
        spec: ExchangeSpec,
        like: tuple[Tensor, Tensor | None, Tensor | None],
        counts: Counts,
        owner: int,
        serial: int,
        arguments: Any,
        with_source: bool,
    ) -> None:
        self._incarnation = incarnation
        self._spec = spec
        self._like = like
        self._counts = counts
        self._owner = owner
        self._serial = serial
        self._arguments = arguments
        self._with_source = with_source

    def allocate(self, num_rows: int, num_received: int, max_tokens: int) -> Dispatch:
        """Allocate on the current stream and tell the kernel.

        Args:
            num_rows: layout rows.
            num_received: rows that arrive, at most.
            max_tokens: largest T of any rank.
        """
        spec, counts = self._spec, self._counts
        x, scales, topk_weights = self._like
        num_ranks, local, compact = spec.num_ranks, spec.num_local_experts, spec.layout == "compact"
        num_chunks = max_chunks(max_tokens)
        groups = counts.table.new_empty(num_ranks, num_chunks, 2)
        positions = counts.table.new_empty(num_received, spec.top_k)
        rows = x.new_empty(num_rows, x.shape[1])
        out_scales = None if scales is None else scales.new_empty(num_rows, scales.shape[1])
        weights = topk_idx = source = None
        if topk_weights is not None:
            weights = topk_weights.new_empty((num_rows, spec.top_k) if compact else (num_rows,))
        if compact:
            topk_idx = counts.topk_idx.new_empty(num_rows, spec.top_k)
        if self._with_source:
            source = counts.table.new_empty(num_rows if compact else num_received)
        padded = not compact and spec.layout != "slab"
        self._arguments.set_output(
            max_chunks=num_chunks,
            groups=groups.data_ptr(),
            positions=positions.data_ptr(),
            out=rows.data_ptr(),
            num_rows=num_rows,
            out_weights=pointer(weights),
            out_scales=pointer(out_scales),
            out_topk_idx=pointer(topk_idx),
            out_source=pointer(source),
            zero_padding=padded,
        )
        plan = CudaPlan(
            owner=self._owner,
            incarnation=self._incarnation,
            serial=self._serial,
            num_tokens=x.shape[0],
            top_k=spec.top_k,
            num_experts=spec.num_experts,
            num_rows=num_rows,
            max_chunks=num_chunks,
            layout=LAYOUT_CODES[spec.layout],
            zero_padding=padded,
            weight_bytes=WORD_BYTES if topk_weights is None else topk_weights.itemsize,
            table=counts.table,
            groups=groups,
            positions=positions,
            token_ranks=counts.token_ranks,
            idx_in_rank=counts.idx_in_rank,
        )
        sizes = (num_ranks, spec.num_experts)
        return Dispatch(
            rows=rows,
            scales=out_scales,
            row_weights=weights,
            topk_idx=topk_idx,
            recv_src_idx=source,
            tokens_per_expert=table_part(counts.table, "tokens_per_expert", *sizes, local),
            expert_ends=table_part(counts.table, "expert_ends", *sizes, local),
            # NOTE: a view of the word's first byte, since nothing may read the table before the exchange has landed.
            overflow=table_part(counts.table, "overflow", *sizes, 1).view(torch.bool)[0],
            plan=plan,
            groups=HostGroups(counts.host_counts),
        )
