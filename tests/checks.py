"""One exchange, checked against the brute-force oracle: shared by the tests of dispatcher, capacity and buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import moe_ep
from moe_ep.config import Capacity
from moe_ep.testing import RankContext, make_routing
from moe_ep.testing.reference import ExpectedDispatch, ExpectedRank, expected_dispatch


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything that determines an exchange on all ranks; every rank can thus compute every other's part."""

    tokens: tuple[int, ...]
    num_experts: int = 12
    top_k: int = 3
    hidden_size: int = 8
    dtype: torch.dtype = torch.float32
    kind: str = "uniform"
    layout: str = "expanded"
    alignment: int = 1
    weights: str = "combine"
    capacity: Capacity | None = None
    on_overflow: str = "raise"
    max_tokens_per_rank: int | None = None
    expert_map: tuple[tuple[int, ...], ...] | None = None
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.tokens)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def routing(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Choices and weights of a rank. Weights of holes are poisoned: they must not matter."""
        logical = self.num_experts if self.expert_map is None else len(self.expert_map)
        seed = self.seed if self.kind == "one" else 1000 * self.seed + rank
        topk_idx, topk_weights = make_routing(self.tokens[rank], self.top_k, logical, kind=self.kind, seed=seed)
        return topk_idx, topk_weights.masked_fill(topk_idx < 0, 1e6).to(self.weight_dtype)

    def x(self, rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(77 + 1000 * self.seed + rank)
        return torch.randn(self.tokens[rank], self.hidden_size, generator=generator, dtype=torch.float64).to(self.dtype)

    def expected(self) -> ExpectedDispatch:
        given = {} if self.capacity is None else vars(self.capacity)
        return expected_dispatch(
            [self.routing(rank)[0] for rank in range(self.num_ranks)],
            num_experts=self.num_experts,
            layout=self.layout,
            alignment=self.alignment,
            max_tokens_per_rank=self.max_tokens_per_rank,
            expert_map=self.expert_map,
            **given,
        )

    def dispatcher(self, group: object, **changes: object) -> moe_ep.TokenDispatcher:
        names = ("num_experts", "hidden_size", "top_k", "dtype", "layout", "alignment", "weights", "capacity")
        settings = {name: getattr(self, name) for name in (*names, "on_overflow", "max_tokens_per_rank")}
        if self.expert_map is not None:
            settings["expert_map"] = torch.tensor(self.expert_map, dtype=torch.int32)
        return moe_ep.TokenDispatcher(group, **{**settings, "timeout_s": 20, **changes})


def flat_rows(routed: moe_ep.Dispatched) -> torch.Tensor:
    """Rows as [N, H], also of a slab."""
    return routed.x.reshape(-1, routed.x.shape[-1])


def check_dispatched(case: Case, rank: int, routed: moe_ep.Dispatched) -> ExpectedDispatch:
    """Rows, weights, counts and ends of one rank, bit for bit."""
    expected = case.expected()
    mine = expected.ranks[rank]
    rows = flat_rows(routed)
    if case.layout == "slab":
        slots = case.num_ranks * case.max_tokens_per_rank
        assert routed.x.shape == (case.num_experts // case.num_ranks, slots, case.hidden_size)
    else:
        assert tuple(rows.shape) == (mine.num_rows, case.hidden_size)
    assert rows.dtype == case.dtype
    assert routed.tokens_per_expert.dtype == routed.expert_ends.dtype == torch.int32
    assert routed.tokens_per_expert.tolist() == mine.tokens_per_expert
    if case.layout != "compact":
        assert routed.expert_ends.tolist() == mine.expert_ends
    xs = [case.x(source) for source in range(case.num_ranks)]
    for row, (source, token, _) in mine.rows.items():
        assert torch.equal(rows[row], xs[source][token]), f"row {row} is not token {token} of rank {source}"
    if mine.padding:
        assert not rows[mine.padding].any(), "padding rows are not zero"
    check_weights(case, mine, routed)
    return expected


def check_weights(case: Case, mine: ExpectedRank, routed: moe_ep.Dispatched) -> None:
    ws = [case.routing(source)[1] for source in range(case.num_ranks)]
    assert routed.weights.dtype == case.weight_dtype
    if case.layout == "compact":
        valid = len(mine.rows)
        assert routed.topk_idx.dtype == torch.int64
        assert routed.topk_idx[:valid].tolist() == mine.local_ids
        assert bool((routed.topk_idx[valid:] == -1).all())
        for row, (source, token, _) in mine.rows.items():
            here = torch.tensor(mine.local_ids[row]) >= 0
            assert torch.equal(routed.weights[row][here], ws[source][token][here])
            assert not routed.weights[row][~here].any()
        return
    assert routed.topk_idx is None
    weights = routed.weights.reshape(-1)
    assert weights.numel() == flat_rows(routed).shape[0]
    for row, (source, token, choice) in mine.rows.items():
        assert weights[row] == ws[source][token, choice], f"weight of row {row}"
    if mine.padding:
        assert not weights[mine.padding].any(), "weights of padding rows are not zero"


def expert_factor(expert: int) -> float:
    """What expert j multiplies rows by; a power of two, so that the product is exact in every dtype."""
    return (-1.0) ** expert * 2.0 ** (expert % 5 - 2)


def run_experts(case: Case, rank: int, routed: moe_ep.Dispatched, expected: ExpectedDispatch) -> torch.Tensor:
    """Apply the experts row by row; rows that nobody may read become NaN."""
    mine, rows = expected.ranks[rank], flat_rows(routed)
    first = rank * (case.num_experts // case.num_ranks)
    y = torch.full_like(rows, float("nan"))
    if mine.padding:
        y[mine.padding] = 0.0
    for row in mine.rows:
        if case.layout == "compact":
            terms = [
                rows[row] * expert_factor(first + local) * routed.weights[row, k].to(case.dtype)
                for k, local in enumerate(mine.local_ids[row])
                if local >= 0
            ]
            y[row] = torch.stack(terms).sum(0)
            continue
        local = next(i for i, end in enumerate(mine.expert_ends) if row < end)
        y[row] = rows[row] * expert_factor(first + local)
        if case.weights == "experts":
            y[row] *= routed.weights.reshape(-1)[row].to(case.dtype)
    return y.view(routed.x.shape)


def physical(case: Case, logical: int, token: int) -> int:
    if case.expert_map is None:
        return logical
    replicas = [j for j in case.expert_map[logical] if j >= 0]
    return replicas[token % len(replicas)]


def expected_output(case: Case, rank: int, expected: ExpectedDispatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The weighted sum in fp64, and the sum of magnitudes that scales its rounding errors."""
    x, (topk_idx, topk_weights) = case.x(rank).double(), case.routing(rank)
    out, scale = torch.zeros_like(x), torch.zeros_like(x)
    for token, experts in enumerate(topk_idx.tolist()):
        for k, logical in enumerate(experts):
            if logical >= 0 and expected.kept(rank, token, k):
                weight = float(topk_weights[token, k])
                term = x[token] * expert_factor(physical(case, logical, token)) * weight
                out[token] += term
                scale[token] += term.abs()
    return out, scale


def check_output(case: Case, rank: int, out: torch.Tensor, expected: ExpectedDispatch) -> None:
    """Compare a combine with the oracle.

    Each of K terms may be rounded to the rows' dtype when the expert weights it (its weight too, in the same dtype),
    each rank's partial sum once more (K - 1 additions inside it, in that dtype at worst, when the test's own compact
    experts add), and the result once: at most (K + 3) half-units of the dtype. The accumulation itself costs K + 1
    roundings in fp32, or in fp64 for fp64 rows. All relative to the sum of the terms' magnitudes.
    """
    assert out.dtype == case.dtype
    assert out.shape == (case.tokens[rank], case.hidden_size)
    target, scale = expected_output(case, rank, expected)
    accumulate = 2.0**-53 if case.dtype == torch.float64 else 2.0**-24
    roundings = case.top_k + 3 if case.weights == "experts" else 2
    bound = (roundings * torch.finfo(case.dtype).eps / 2 + (case.top_k + 1) * accumulate) * 1.01 * scale
    # Subnormal halves round absolutely.
    bound = bound + torch.finfo(case.dtype).smallest_normal * torch.finfo(case.dtype).eps * roundings
    wrong = ((out.double() - target).abs() > bound) | out.isnan()
    assert not wrong.any(), f"{int(wrong.sum())} of {out.numel()} elements are off, first {wrong.nonzero()[0].tolist()}"


def round_trip(
    ctx: RankContext, case: Case, dispatcher: moe_ep.TokenDispatcher, *, use_async: bool = False
) -> torch.Tensor:
    """Dispatch, experts, combine, all checked; returns the output."""
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    if use_async:
        routed = dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
    else:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
    expected = check_dispatched(case, ctx.rank, routed)
    y = run_experts(case, ctx.rank, routed, expected)
    weights = routed.weights if case.weights == "combine" else None
    if use_async:
        out = dispatcher.combine_async(y, routed.handle, weights).wait()
    else:
        out = dispatcher.combine(y, routed.handle, weights)
    check_output(case, ctx.rank, out, expected)
    return out


def check_round_trips(ctx: RankContext, cases: Sequence[Case], *, use_async: bool = False) -> int:
    """Run several cases in one call: a test costs less than its processes' wake-up."""
    for case in cases:
        round_trip(ctx, case, case.dispatcher(ctx.group), use_async=use_async)
    return len(cases)


def rounding_of_sums(
    ctx: RankContext, layout: str, dtype: torch.dtype, combine_dtype: torch.dtype | None, device: str = "cpu"
) -> tuple[float, float]:
    """Largest error of combine's output and of x's gradient, in half units of the last place of 16-bit rows."""
    num_tokens, num_experts, top_k = 64, 5 * ctx.world_size, 5
    dispatcher = moe_ep.TokenDispatcher(
        ctx.group,
        num_experts=num_experts,
        hidden_size=64,
        top_k=top_k,
        dtype=dtype,
        layout=layout,
        weights="experts",
        max_tokens_per_rank=num_tokens,
        combine_dtype=combine_dtype,
        backend="torch" if device == "cpu" else "cuda",
    )
    topk_idx, topk_weights = make_routing(num_tokens, top_k, num_experts, seed=ctx.rank)
    generator = torch.Generator().manual_seed(ctx.rank)
    x, grad = (torch.rand(num_tokens, 64, generator=generator).add(0.5).to(dtype) for _ in range(2))
    leaf = x.to(device).requires_grad_()
    routed = dispatcher.dispatch(leaf, topk_idx.to(device), topk_weights.to(device))
    out = dispatcher.combine(routed.x, routed.handle)
    out.backward(grad.to(device))
    assert leaf.grad is not None
    bits = 8 if dtype == torch.bfloat16 else 11
    errors = []
    for got, term in ((out.detach(), x), (leaf.grad, grad)):
        # Every choice adds the row itself.
        exact = top_k * term.double()
        half_unit = torch.exp2(torch.floor(torch.log2(exact)) - bits)
        errors.append(float(((got.cpu().double() - exact).abs() / half_unit).max()))
    return errors[0], errors[1]
