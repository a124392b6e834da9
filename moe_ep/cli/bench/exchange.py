"""Dispatch + combine through ``TokenDispatcher`` against the all-to-all dispatcher, to the same expert-grouped rows."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moe_ep.cli.bench.baseline import AllToAllDispatcher
from moe_ep.cli.bench.cases import Case
from moe_ep.cli.bench.timing import Contest, Rank
from moe_ep.config import wire_per_choice
from moe_ep.dispatcher import TokenDispatcher
from moe_ep.testing import make_routing


def exchange_contest(rank: Rank, case: Case) -> Contest:
    """Prepare inputs and both dispatchers. Collective over the ranks.

    The experts between dispatch and combine do nothing, so that only the exchange is timed. The tokens and choices
    differ by rank; the weighted sum is part of combine in both ways.
    """
    if rank.group is None:
        raise ValueError("ranks=1 has nothing to exchange; measure dispatch and combine on 2 ranks or more")
    shape, dtype = case.shape, case.torch_dtype
    x, topk_idx, topk_weights = make_inputs(rank, case)
    ours = TokenDispatcher(
        rank.group,
        num_experts=shape.experts,
        hidden_size=shape.hidden,
        top_k=shape.top_k,
        dtype=dtype,
        backend="torch",
    )
    baseline = AllToAllDispatcher(rank.group, shape.experts)

    def check() -> tuple[float, bool]:
        with torch.no_grad(), _poisoned_outputs():
            routed = ours.dispatch(x, topk_idx, topk_weights)
            rows, counts, route = baseline.dispatch(x, topk_idx, topk_weights)
            same_rows = torch.equal(routed.x, rows) and torch.equal(routed.tokens_per_expert.long(), counts)
            combined = ours.combine(routed.x, routed.handle, routed.weights)
            expected = baseline.combine(rows, route)
        difference = float((combined - expected).abs().max()) if case.tokens else 0.0
        return difference, same_rows and difference <= _sum_bound(x, topk_weights, shape.top_k)

    rows_sent, rows_in_all = count_rows(topk_idx, rank, case)
    row_bytes = shape.hidden * dtype.itemsize
    # Forward alone, so neither way pays for a graph that the other does not build.
    return Contest(
        stages=("dispatch", "combine"),
        ours=(
            torch.no_grad()(lambda _: ours.dispatch(x, topk_idx, topk_weights)),
            torch.no_grad()(lambda routed: ours.combine(routed.x, routed.handle, routed.weights)),
        ),
        baseline=(
            torch.no_grad()(lambda _: baseline.dispatch(x, topk_idx, topk_weights)),
            torch.no_grad()(lambda sent: baseline.combine(sent[0], sent[2])),
        ),
        check=check,
        wire_bytes=rows_sent * row_bytes,
        logical_bytes=rows_in_all * row_bytes,
    )


def make_inputs(rank: Rank, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's tokens [T, H], choices int64 [T, K] and weights [T, K], fp32 (fp64 for fp64 tokens)."""
    shape, dtype = case.shape, case.torch_dtype
    # Drawn for all ranks at once: a skewed routing prefers the same experts on every rank.
    topk_idx, topk_weights = make_routing(
        case.tokens * rank.size, shape.top_k, shape.experts, kind=case.routing, seed=case.seed
    )
    mine = slice(rank.rank * case.tokens, (rank.rank + 1) * case.tokens)
    generator = torch.Generator().manual_seed(case.seed + 1000 * (rank.rank + 1))
    x = torch.randn(case.tokens, shape.hidden, generator=generator)
    weights_dtype = torch.promote_types(dtype, torch.float32)
    return x.to(rank.device, dtype), topk_idx[mine].to(rank.device), topk_weights[mine].to(rank.device, weights_dtype)


def count_rows(topk_idx: torch.Tensor, rank: Rank, case: Case) -> tuple[int, int]:
    """Rows that leave this rank in one exchange of ours, and rows in all, those to itself counted too."""
    experts_per_rank = case.shape.experts // rank.size
    chosen = topk_idx >= 0
    destination = torch.where(chosen, topk_idx // experts_per_rank, rank.size)
    rows = torch.zeros(rank.size + 1, dtype=torch.int64, device=topk_idx.device)
    if wire_per_choice(rank.size, case.shape.experts, case.shape.top_k):
        rows += torch.bincount(destination.flatten(), minlength=rank.size + 1)
    else:
        visits = torch.zeros(topk_idx.shape[0], rank.size + 1, dtype=torch.int64, device=topk_idx.device)
        rows += visits.scatter_(1, destination, 1).sum(0)
    in_all = int(rows[: rank.size].sum())
    return in_all - int(rows[rank.rank]), in_all


def _sum_bound(x: torch.Tensor, topk_weights: torch.Tensor, top_k: int) -> float:
    """Largest difference that two orders of the same weighted sum may have.

    Each way adds K terms |w x| <= max|w x| K / K with K roundings of the accumulator, and rounds weights, partial sums
    and the result to the rows' dtype: (K + 3) epsilons of the sum of absolute terms, for each of the two ways.
    """
    if x.shape[0] == 0:
        return 0.0
    terms = float((x.abs().amax(1) * topk_weights.abs().sum(1).to(x.dtype)).max())
    return 2 * (top_k + 3) * torch.finfo(x.dtype).eps * terms


@contextmanager
def _poisoned_outputs() -> Iterator[None]:
    """Memory from ``empty`` holds NaN inside, so that a row nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
