"""The tokens of a case, drawn alike on every rank, and what an exchange of them must give."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from moe_ep.cli.bench.cases import Case
from moe_ep.cli.bench.gpu.traffic import Traffic, count_traffic, visits
from moe_ep.cli.bench.timing import Rank
from moe_ep.config import FP8_DTYPE, FP8_GROUP
from moe_ep.testing import make_routing

# Of expert groups: what a grouped GEMM over fp8 rows asks for.
ALIGNMENT = 16
# Experts differ by a factor, so that a row that went through a wrong one shows.
_NUM_FACTORS = 4

Fp8Rows = tuple[Tensor, Tensor]


class Inputs:
    """One case. Routing and rows of all ranks are known to each, so that results are checked without asking peers.

    Args:
        rank: this process's place.
        case: shape, tokens and routing.
    """

    def __init__(self, rank: Rank, case: Case) -> None:
        self.rank = rank
        self.case = case
        shape, num = case.shape, case.tokens
        # Drawn for all ranks at once: a skewed routing prefers the same experts on every rank.
        ids, weights = make_routing(num * rank.size, shape.top_k, shape.experts, kind=case.routing, seed=case.seed)
        self.traffic: Traffic = count_traffic(ids.split(num), shape.experts, ALIGNMENT)
        self.all_ids, self.all_weights = ids.to(rank.device), weights.to(rank.device)
        mine = slice(rank.rank * num, (rank.rank + 1) * num)
        self.topk_idx, self.topk_weights = self.all_ids[mine].contiguous(), self.all_weights[mine].contiguous()
        self.x = self.rows_of(rank.rank)
        self.first_expert = rank.rank * (shape.experts // rank.size)
        self.num_local_experts = shape.experts // rank.size

    def rows_of(self, rank: int) -> Tensor:
        """bf16 [T, H] of any rank."""
        device = self.rank.device
        generator = torch.Generator(device).manual_seed(self.case.seed + 1000 * (rank + 1))
        shape = (self.case.tokens, self.case.shape.hidden)
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=generator)

    @functools.cached_property
    def fp8(self) -> Fp8Rows:
        """This rank's rows in fp8 with fp32 scales [T, H / 128]."""
        return cast_fp8(self.x)

    @functools.cached_property
    def received(self) -> tuple[Tensor, Tensor]:
        """(source rank, token) of each compact row that this rank gets, in order."""
        here = visits(self.all_ids, self.rank.size, self.case.shape.experts)[:, self.rank.rank].nonzero()[:, 0]
        return here // self.case.tokens, here % self.case.tokens

    @functools.cached_property
    def grouped(self) -> tuple[Tensor, Tensor]:
        """(row among all ranks' tokens, choice) of each row of this rank's experts, grouped and in order."""
        local = self.all_ids - self.first_expert
        token, k = ((local >= 0) & (local < self.num_local_experts)).nonzero(as_tuple=True)
        order = torch.argsort(local[token, k], stable=True)
        return token[order], k[order]

    @functools.cached_property
    def tokens_per_expert(self) -> Tensor:
        """int64 [e]."""
        token, k = self.grouped
        return torch.bincount(self.all_ids[token, k] - self.first_expert, minlength=self.num_local_experts)

    def aligned_rows(self, alignment: int) -> Tensor:
        """Layout row of each row of ``grouped``, where groups start at multiples of ``alignment``."""
        sizes = (self.tokens_per_expert + alignment - 1) // alignment * alignment
        return self._rows_from(sizes.cumsum(0) - sizes)

    def slab_rows(self) -> Tensor:
        """Layout row of each row of ``grouped`` where every local expert has R * T rows, all slabs counted as one."""
        size = self.rank.size * self.case.tokens
        return self._rows_from(torch.arange(self.num_local_experts, device=self.rank.device) * size)

    def _rows_from(self, starts: Tensor) -> Tensor:
        counts = self.tokens_per_expert
        gaps = starts - (counts.cumsum(0) - counts)
        return torch.arange(int(counts.sum()), device=counts.device) + torch.repeat_interleave(gaps, counts)

    # What must come out. Rows of one source at a time: those of all ranks together may not fit.

    def has_compact(self, rows: Tensor, scales: Tensor | None = None) -> bool:
        """Whether compact rows begin with what this rank must get; scales where rows are fp8."""
        source, token = self.received
        begin = 0
        for rank in range(self.rank.size):
            of_source = token[source == rank]
            place, begin = slice(begin, begin + len(of_source)), begin + len(of_source)
            if not self._has_rows_of(rank, of_source, rows[place], None if scales is None else scales[place]):
                return False
        return True

    def has_weights(self, weights: Tensor, layout: str) -> bool:
        """Whether router weights came along with the rows."""
        if layout == "expanded":
            token, k = self.grouped
            return torch.equal(weights[self.aligned_rows(ALIGNMENT)], self.all_weights[token, k])
        if layout == "slab":
            token, k = self.grouped
            return torch.equal(weights.flatten()[self.slab_rows()], self.all_weights[token, k])
        source, token = self.received
        at = source * self.case.tokens + token
        local = self.all_ids[at] - self.first_expert
        kept = (local >= 0) & (local < self.num_local_experts)
        return torch.equal(weights[: len(at)], self.all_weights[at].masked_fill(~kept, 0.0))

    def has_grouped(self, rows: Tensor, alignment: int, scales: Tensor | None = None) -> bool:
        """Whether rows grouped by expert are what this rank must get; those between groups are zero."""
        places = self.aligned_rows(alignment)
        if len(rows) < self.num_aligned(alignment) or not self._has_at(places, rows, scales):
            return False
        padding = torch.ones(self.num_aligned(alignment), dtype=torch.bool, device=rows.device)
        padding[places] = False
        return not bool(_bits(rows)[: len(padding)][padding].any())

    def has_slabs(self, slabs: Tensor, scales: Tensor | None = None) -> bool:
        """Whether slabs [e, R * T, H] begin with what this rank must get; the rest of each may hold anything."""
        return self._has_at(self.slab_rows(), slabs.flatten(0, 1), scales)

    def _has_at(self, places: Tensor, rows: Tensor, scales: Tensor | None) -> bool:
        """Whether the rows of ``grouped`` are at their places."""
        token, _ = self.grouped
        bits = _bits(rows)
        for rank in range(self.rank.size):
            own = token // self.case.tokens == rank
            at = places[own]
            of_source = None if scales is None else scales[at]
            if not self._has_rows_of(rank, token[own] % self.case.tokens, bits[at], of_source):
                return False
        return True

    def _has_rows_of(self, rank: int, token: Tensor, rows: Tensor, scales: Tensor | None) -> bool:
        """Whether rows, or their bits, are those of a source's tokens; with scales in fp8."""
        want = self.rows_of(rank)
        if scales is None:
            return torch.equal(_bits(rows), _bits(want)[token])
        cast, want_scales = cast_fp8(want)
        return torch.equal(_bits(rows), _bits(cast)[token]) and torch.equal(scales, want_scales[token])

    def num_aligned(self, alignment: int) -> int:
        """Rows of this rank's groups."""
        return int(((self.tokens_per_expert + alignment - 1) // alignment * alignment).sum())

    def compact_outputs(self, rows: Tensor) -> Tensor:
        """What experts might make of compact rows: each rank its own multiple."""
        return rows * (1 + self.rank.rank)

    def grouped_outputs(self, rows: Tensor, alignment: int) -> Tensor:
        """What experts might make of grouped rows: each expert its own multiple; no NaN where there is no row."""
        return self._outputs_at(self.aligned_rows(alignment), rows)

    def slab_outputs(self, slabs: Tensor) -> Tensor:
        """The same of slabs [e, R * T, H]."""
        return self._outputs_at(self.slab_rows(), slabs.flatten(0, 1)).view_as(slabs)

    def _outputs_at(self, places: Tensor, rows: Tensor) -> Tensor:
        token, k = self.grouped
        out = torch.zeros_like(rows)
        out[places] = rows[places] * _factor(self.all_ids[token, k]).unsqueeze(1)
        return out

    def has_compact_sums(self, out: Tensor) -> bool:
        """Whether a combine of ``compact_outputs`` is right."""
        went = visits(self.topk_idx, self.rank.size, self.case.shape.experts)
        terms = (((1 + rank) * self.x).float() * went[:, rank : rank + 1] for rank in range(self.rank.size))
        return self._is_sum(out, terms)

    def has_grouped_sums(self, out: Tensor) -> bool:
        """Whether a weighted combine of ``grouped_outputs``, or of ``slab_outputs``, is right."""

        def term(k: int) -> Tensor:
            ids, weights = self.topk_idx[:, k], self.topk_weights[:, k] * (self.topk_idx[:, k] >= 0)
            return (self.x * _factor(ids).unsqueeze(1)).float() * weights.unsqueeze(1)

        return self._is_sum(out, (term(k) for k in range(self.case.shape.top_k)))

    def _is_sum(self, out: Tensor, terms: Iterable[Tensor]) -> bool:
        """Whether ``out`` is the sum of the terms, up to rounding.

        Sums are accumulated in fp32 and rounded to bf16 on each of the R ranks and once at home; NCCL's ways round the
        weights and each of up to K + R partial sums as well. Each rounding errs by half an epsilon of the sum of
        absolute terms.
        """
        total = torch.zeros(out.shape, device=out.device)
        size = torch.zeros_like(total)
        for term in terms:
            total += term
            size += term.abs()
        bound = (self.case.shape.top_k + self.rank.size + 2) * torch.finfo(torch.bfloat16).eps / 2 * size
        return bool(((out.float() - total).abs() <= bound).all())


def cast_fp8(rows: Tensor) -> Fp8Rows:
    """Rows in e4m3 and their scales, fp32 [T, H / 128], one per 128 elements."""
    groups = rows.float().view(rows.shape[0], -1, FP8_GROUP)
    scales = groups.abs().amax(2).clamp(min=1e-4) / torch.finfo(FP8_DTYPE).max
    return (groups / scales.unsqueeze(2)).to(FP8_DTYPE).view(rows.shape), scales


def pack_fp8(rows: Fp8Rows) -> Tensor:
    """fp8 rows and their scales side by side, in wide words: gathering single bytes would be slow."""
    return torch.cat([part.view(torch.uint8) for part in rows], dim=1).view(torch.int32)


def unpack_fp8(packed: Tensor, hidden: int) -> Fp8Rows:
    """Inverse of :func:`pack_fp8`."""
    words = packed.contiguous().view(torch.uint8)
    return words[:, :hidden].contiguous().view(FP8_DTYPE), words[:, hidden:].contiguous().view(torch.float32)


def _factor(expert: Tensor) -> Tensor:
    return (1 + expert % _NUM_FACTORS).to(torch.bfloat16)


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.uint8)
