"""A small expert layer around a dispatcher, and the same computation without one: shared by the tests of gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import moe_ep
from moe_ep.testing import RankContext
from tests.checks import Case

Ranks = Callable[..., list]

# fp64: sums of at most a few hundred terms of magnitude one, 1e-16 each.
EXACT = {"rtol": 1e-12, "atol": 1e-12}

# Every layout with every place of the weights that it allows.
MODES: dict[str, dict] = {
    "expanded": {},
    "expanded, experts": {"weights": "experts"},
    "aligned": {"alignment": 4},
    "compact": {"layout": "compact", "weights": "experts"},
    "slab": {"layout": "slab", "max_tokens_per_rank": 12},
    "slab, experts": {"layout": "slab", "max_tokens_per_rank": 12, "weights": "experts"},
}
# Uneven, with an empty rank wherever there is more than one.
TOKENS = {1: (7,), 2: (7, 0), 3: (4, 0, 9), 4: (5, 0, 9, 2)}


def make_case(num_ranks: int, **fields: object) -> Case:
    """fp64, uneven tokens, choices with holes."""
    settings = {"tokens": TOKENS[num_ranks], "hidden_size": 4, "kind": "holes", "dtype": torch.float64}
    return Case(**{**settings, **fields})


class Leaves(NamedTuple):
    """What gradients are asked of: x [T, H], router weights [T, K], matrices of the local experts [e, H, H]."""

    x: Tensor
    topk_weights: Tensor
    matrices: Tensor

    def grads(self) -> list[Tensor | None]:
        return [leaf.grad for leaf in self]

    def on(self, device: str) -> Leaves:
        """New leaves with the same values on a device."""
        return Leaves(*(leaf.detach().to(device).requires_grad_() for leaf in self))


def all_matrices(case: Case) -> Tensor:
    """[E, H, H]."""
    generator = torch.Generator().manual_seed(5)
    shape = (case.num_experts, case.hidden_size, case.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)


def make_leaves(case: Case, rank: int) -> Leaves:
    """This rank's leaves; all require grad."""
    local = case.num_experts // case.num_ranks
    leaves = (case.x(rank), case.routing(rank)[1], all_matrices(case)[rank * local : (rank + 1) * local].clone())
    return Leaves(*(leaf.requires_grad_() for leaf in leaves))


def probe(case: Case, rank: int) -> Tensor:
    """[T, H]: the loss of a rank is <probe, output>."""
    generator = torch.Generator().manual_seed(99 + rank)
    shape = (case.tokens[rank], case.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)


def apply_experts(case: Case, routed: moe_ep.Dispatched, rows: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    """Expert j computes tanh(row @ matrices[j]). Undefined rows are neither read nor written: they become NaN.

    Vectorised without sizes that depend on data, so that it compiles into the same graph.
    """
    if case.layout == "compact":
        return _apply_compact(routed, rows, weights, matrices)
    if case.layout == "slab":
        used = torch.arange(rows.shape[1], device=rows.device) < routed.tokens_per_expert.unsqueeze(1)
        hidden = torch.tanh(torch.bmm(torch.where(used.unsqueeze(-1), rows, 0.0), matrices))
        defined = used
    else:
        ends = routed.expert_ends.long()
        index = torch.arange(rows.shape[0], device=rows.device)
        expert = torch.searchsorted(ends, index, right=True).clamp(max=matrices.shape[0] - 1)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        used = index - starts[expert] < routed.tokens_per_expert[expert]
        safe = torch.where(used.unsqueeze(-1), rows, 0.0)
        hidden = torch.tanh(torch.bmm(safe.unsqueeze(1), matrices[expert]).squeeze(1))
        defined = index < ends[-1]
    if case.weights == "experts":
        hidden = hidden * torch.where(used, weights, 0.0).unsqueeze(-1).to(hidden.dtype)
    return torch.where(defined.unsqueeze(-1), hidden, float("nan"))


def _apply_compact(routed: moe_ep.Dispatched, rows: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    assert routed.topk_idx is not None
    chosen = routed.topk_idx >= 0
    used = chosen.any(1, keepdim=True)
    safe = torch.where(used, rows, 0.0)
    hidden = torch.tanh(torch.einsum("nh,nkhg->nkg", safe, matrices[routed.topk_idx.clamp(min=0)]))
    summed = (hidden * torch.where(chosen, weights, 0.0).unsqueeze(-1).to(hidden.dtype)).sum(1)
    return torch.where(used, summed, float("nan"))


def for_combine(case: Case, weights: Tensor) -> Tensor | None:
    """What combine is given as weights."""
    return weights if case.weights == "combine" else None


def run_layer(
    case: Case, dispatcher: moe_ep.TokenDispatcher, leaves: Leaves, topk_idx: Tensor, *, use_async: bool = False
) -> Tensor:
    """Dispatch, experts, combine; [T, H]."""
    if use_async:
        routed = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights).wait()
        y = apply_experts(case, routed, routed.x, routed.weights, leaves.matrices)
        return dispatcher.combine_async(y, routed.handle, for_combine(case, routed.weights)).wait()
    routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights)
    y = apply_experts(case, routed, routed.x, routed.weights, leaves.matrices)
    return dispatcher.combine(y, routed.handle, for_combine(case, routed.weights))


def unsharded(case: Case) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Outputs and gradients of every rank, computed in one place without any exchange."""
    num_ranks = case.num_ranks
    xs = [case.x(rank).requires_grad_() for rank in range(num_ranks)]
    ws = [case.routing(rank)[1].requires_grad_() for rank in range(num_ranks)]
    matrices = all_matrices(case).requires_grad_()
    outs = []
    for rank in range(num_ranks):
        topk_idx = case.routing(rank)[0]
        hidden = torch.tanh(torch.einsum("th,tkhg->tkg", xs[rank], matrices[topk_idx.clamp(min=0)]))
        outs.append((hidden * torch.where(topk_idx >= 0, ws[rank], 0.0).unsqueeze(-1)).sum(1))
    sum((out * probe(case, rank)).sum() for rank, out in enumerate(outs)).backward()
    assert matrices.grad is not None
    grads = [[x.grad, w.grad, m] for x, w, m in zip(xs, ws, matrices.grad.chunk(num_ranks), strict=True)]
    return [out.detach() for out in outs], grads


def check_grads(grads: list[Tensor | None], expected: list[Tensor], **tolerance: float) -> None:
    """Compare gradients of x, router weights and matrices; None in ``grads`` is a frozen one."""
    for name, ours, theirs in zip(Leaves._fields, grads, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(
                ours, theirs, **(tolerance or EXACT), msg=lambda text, name=name: f"gradient of {name}: {text}"
            )


def check_against_unsharded(
    ctx: RankContext, case: Case, dispatcher: moe_ep.TokenDispatcher, *, use_async: bool = False
) -> None:
    """Output and all gradients of this rank equal those of the unsharded computation."""
    outs, grads = unsharded(case)
    leaves = make_leaves(case, ctx.rank)
    out = run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0], use_async=use_async)
    torch.testing.assert_close(out, outs[ctx.rank], **EXACT)
    (out * probe(case, ctx.rank)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    check_grads(leaves.grads(), grads[ctx.rank])
