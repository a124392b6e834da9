"""Random exchanges for the CUDA backend, and what the torch backend makes of the same input on the CPU."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.errors import CapacityError
from moe_ep.testing import make_routing

HIDDEN = (8, 16, 64, 128, 136, 512, 1024, 2048, 3592, 7168)
TOKENS = (0, 1, 3, 7, 8, 9, 40, 64, 129)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
KINDS = ("uniform", "zipf", "one", "empty", "holes")


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of one dispatcher, and what its ranks send."""

    settings: dict[str, Any]
    tokens: list[int]
    kind: str
    seed: int
    asynchronous: bool
    planned: bool


def make_case(seed: int, num_ranks: int, hidden_of: Sequence[int] = HIDDEN, tokens_of: Sequence[int] = TOKENS) -> Case:
    """Draw a case, of these sizes; the same on all ranks."""
    draw = random.Random(seed)
    num_experts = draw.choice((1, 2, 3, 8, 16)) * num_ranks
    top_k = min(draw.choice((1, 2, 3, 4, 8)), num_experts)
    dtype, hidden = draw.choice(DTYPES), draw.choice(hidden_of)
    settings: dict[str, Any] = {"num_experts": num_experts, "hidden_size": hidden, "top_k": top_k, "dtype": dtype}
    tokens = [draw.choice(tokens_of) for _ in range(num_ranks)]
    layout = draw.choice(("expanded", "expanded", "compact", "slab"))
    settings["layout"] = layout
    settings["weights"] = "experts" if layout == "compact" else draw.choice(("combine", "experts"))
    if layout == "expanded":
        settings["alignment"] = draw.choice((1, 1, 4, 16))
    if layout == "slab":
        settings["max_tokens_per_rank"] = max(tokens) + draw.choice((0, 5))
        settings["max_tokens_per_rank"] = max(settings["max_tokens_per_rank"], 1)
    elif draw.random() < 0.5:
        settings["capacity"] = _capacity(draw, settings, tokens, num_ranks)
        settings["on_overflow"] = draw.choice(("raise", "drop"))
        if draw.random() < 0.5:
            settings["max_tokens_per_rank"] = max(*tokens, 1) + draw.choice((0, 9))
    if hidden % 128 == 0 and dtype != torch.float64 and draw.random() < 0.25:
        settings["wire_dtype"] = torch.float8_e4m3fn
    # Drawn apart: what follows is as without it.
    if layout != "compact" and dtype.itemsize == 2 and random.Random(-seed).random() < 0.3:
        settings["combine_dtype"] = torch.float32
    return Case(settings, tokens, draw.choice(KINDS), seed, draw.random() < 0.5, draw.random() < 0.2)


def _capacity(draw: random.Random, settings: dict[str, Any], tokens: list[int], num_ranks: int) -> Capacity:
    alignment, local = settings.get("alignment", 1), settings["num_experts"] // num_ranks
    share = sum(tokens) * settings["top_k"] // settings["num_experts"]
    which = draw.choice(("rows", "per_expert", "factor"))
    if which == "rows":
        rows = int(draw.choice((0.5, 1.5, 4)) * share * local) + local * (alignment - 1) + 1
        return Capacity(rows=rows)
    if which == "per_expert":
        return Capacity(per_expert=(int(draw.choice((0.5, 2, 4)) * share) // alignment + 1) * alignment)
    return Capacity(factor=draw.choice((0.5, 1.25, float(num_ranks * 2))))


def run_case(
    group: dist.ProcessGroup | None, rank: int, device: str, buffer: Buffer, case: Case
) -> dict[str, torch.Tensor]:
    """One dispatch and combine with gradients; what all of it must equal on every backend, on the CPU."""
    dispatcher = TokenDispatcher(group, buffer=buffer, **case.settings)
    num_tokens, top_k, dtype = case.tokens[rank], dispatcher.top_k, dispatcher.dtype
    topk_idx, weights = make_routing(
        num_tokens, top_k, dispatcher.num_experts, kind=case.kind, seed=case.seed * 31 + rank
    )
    generator = torch.Generator().manual_seed(case.seed * 17 + rank)
    # Small integers and factors that are powers of two: sums are exact, whatever their order and rounding.
    x = torch.randint(-2, 3, (num_tokens, dispatcher.hidden_size), generator=generator).to(device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.where(weights > 0.2, 1.0, 0.5).masked_fill_(topk_idx < 0, 0.0).to(device, wide)
    x.requires_grad_()
    weights.requires_grad_()
    topk_idx = topk_idx.to(device)
    planned = dispatcher.plan([topk_idx])[0] if case.planned else None
    if case.asynchronous:
        routed = dispatcher.dispatch_async(x, topk_idx, weights, planned).wait()
    else:
        routed = dispatcher.dispatch(x, topk_idx, weights, planned)
    try:
        dispatcher.check()
    except CapacityError as error:
        return {"overflow": torch.tensor([error.rank, error.needed, error.given])}
    y = torch.where(torch.isfinite(routed.x), routed.x, 0.0)
    given = routed.weights if dispatcher.weights == "combine" else None
    if case.asynchronous:
        out = dispatcher.combine_async(y, routed.handle, given).wait()
    else:
        out = dispatcher.combine(y, routed.handle, given)
    loss = (out * x.detach()).sum()
    if given is None:
        # Only weights of rows that exist have a gradient.
        loss = loss + torch.where(_is_row(routed, dispatcher.layout), routed.weights, 0.0).sum()
    loss.backward()
    is_row = _is_row(routed, dispatcher.layout)
    mask = is_row if dispatcher.layout != "compact" else is_row[:, 0]
    results = {
        "x": routed.x.detach()[mask],
        "weights": routed.weights.detach()[is_row],
        "counts": routed.tokens_per_expert,
        "ends": routed.expert_ends,
        "out": out.detach(),
        "dx": x.grad,
        "dweights": weights.grad,
    }
    if routed.tokens_per_expert_list is not None:
        results["listed"] = torch.tensor(routed.tokens_per_expert_list)
    if routed.topk_idx is not None:
        results["topk_idx"] = routed.topk_idx
    return {name: result.cpu() for name, result in results.items()}


def _is_row(routed: Any, layout: str) -> torch.Tensor:
    """Which layout rows are defined, padding included; in the shape of the weights."""
    if layout == "slab":
        places = torch.arange(routed.weights.shape[1], device=routed.weights.device)
        return places < routed.tokens_per_expert.unsqueeze(1)
    if layout == "compact":
        return (routed.topk_idx >= 0).any(1, keepdim=True).expand_as(routed.topk_idx)
    places = torch.arange(routed.weights.shape[0], device=routed.weights.device)
    return places < routed.expert_ends[-1]
