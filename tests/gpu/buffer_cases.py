"""Random exchanges of ``Buffer``'s tuple calls, and everything that must be the same on every backend."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from moe_ep import Buffer, Config
from moe_ep.testing import make_routing

HIDDEN = (8, 64, 128, 136, 512, 2048, 7168)
TOKENS = (0, 1, 3, 7, 8, 9, 40, 64, 129, 520)
ROWS = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn)
KINDS = ("uniform", "zipf", "one", "empty", "holes")
ORDERS = ("plain", "async", "after", "after on comm")


@dataclasses.dataclass(frozen=True)
class Case:
    """One dispatch, replay and combine.

    Attributes:
        mode: ``exact``, ``worst`` (a fixed number of rows) or ``mask`` (without choices).
        rows: dtype of what is dispatched.
        scales: dtype and strides of the scales of fp8 rows.
        order: which of the event arguments are given.
    """

    mode: str
    num_experts: int
    top_k: int
    hidden: int
    tokens: list[int]
    kind: str
    rows: torch.dtype
    scales: tuple[torch.dtype, str]
    weighted: bool
    alignment: int
    num_sms: int | None
    num_biases: int
    order: str
    wide_counts: bool
    worst: int
    seed: int


def make_case(seed: int, num_ranks: int, max_row_bytes: int = 1 << 16) -> Case:
    """Draw a case; the same on all ranks."""
    draw = random.Random(seed)
    num_experts = draw.choice((1, 2, 3, 8, 16)) * num_ranks
    rows = draw.choice(ROWS)
    multiple = 128 if rows == torch.float8_e4m3fn else 8
    hidden = draw.choice([h for h in HIDDEN if h % multiple == 0 and h * rows.itemsize <= max_row_bytes])
    tokens = [draw.choice(TOKENS) for _ in range(num_ranks)]
    return Case(
        mode=draw.choice(("exact", "worst", "mask")),
        num_experts=num_experts,
        top_k=min(draw.choice((1, 2, 3, 4, 8)), num_experts),
        hidden=hidden,
        tokens=tokens,
        kind=draw.choice(KINDS),
        rows=rows,
        scales=(draw.choice((torch.float32, torch.int32)), draw.choice(("row-major", "column-major", "padded"))),
        weighted=draw.random() < 0.7,
        alignment=draw.choice((1, 4, 128)),
        num_sms=draw.choice((None, 2, 6, 24)),
        num_biases=draw.choice((0, 0, 1, 2)),
        order=draw.choice(ORDERS),
        wide_counts=draw.random() < 0.3,
        worst=max(sum(tokens) + draw.choice((0, 5)), 1),
        seed=seed,
    )


def flags(order: str) -> dict[str, Any]:
    """The event arguments of a call, whose inputs were made on the current stream."""
    if order == "plain":
        return {}
    if order == "async":
        return {"async_finish": True}
    if order == "after":
        return {"previous_event": Buffer.capture()}
    return {"previous_event": Buffer.capture(), "async_finish": True, "allocate_on_comm_stream": True}


def small_integers(shape: tuple[int, ...], seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Sums of these are exact, whatever their order and rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).to(dtype).to(device)


def make_scales(case: Case, rank: int, device: str) -> Tensor:
    dtype, order = case.scales
    scales = small_integers((case.tokens[rank], case.hidden // 128), case.seed * 3 + rank, dtype, device)
    if order == "column-major":
        return scales.t().contiguous().t()
    return scales if order == "row-major" else torch.cat([scales, scales], dim=1)[:, : case.hidden // 128]


def layout_of(buffer: Buffer, topk_idx: Tensor, case: Case) -> dict[str, Tensor | None]:
    """The layout arguments of a dispatch."""
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(
        topk_idx, case.num_experts, **flags(case.order)
    )
    event.current_stream_wait()
    return {
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": per_node,
        "num_tokens_per_expert": per_expert.long() if case.wide_counts else per_expert,
        "is_token_in_rank": in_rank,
    }


def run_case(rank: int, device: str, buffer: Buffer, case: Case) -> dict[str, Tensor]:
    """A layout, dispatch, replay and combine: what must be equal on every backend, on the CPU."""
    num_tokens = case.tokens[rank]
    topk_idx, weights = make_routing(
        num_tokens, case.top_k, case.num_experts, kind=case.kind, seed=case.seed * 31 + rank
    )
    weights = torch.where(weights > 0.2, 1.0, 0.5).masked_fill_(topk_idx < 0, 0.0)
    weights = weights.to(device, torch.float64 if case.rows == torch.float64 else torch.float32)
    topk_idx = topk_idx.to(device)
    rows = small_integers((num_tokens, case.hidden), case.seed * 17 + rank, case.rows, device)
    is_fp8 = case.rows == torch.float8_e4m3fn
    x = (rows, make_scales(case, rank, device)) if is_fp8 else rows
    layout = layout_of(buffer, topk_idx, case)
    chosen: dict[str, Any] = {}
    if case.mode != "mask":
        chosen = {"topk_idx": topk_idx, "topk_weights": weights if case.weighted else None}
        chosen["num_worst_tokens"] = case.worst if case.mode == "worst" else 0
    config = Config(num_sms=case.num_sms)
    recv_x, recv_idx, recv_weights, listed, handle, event = buffer.dispatch(
        x, **layout, **chosen, expert_alignment=case.alignment, config=config, **flags(case.order)
    )
    event.current_stream_wait()
    num_received = int(handle.num_recv_tokens)
    again, *nothing, event = buffer.dispatch(x, handle, config=config, **flags(case.order))
    event.current_stream_wait()
    assert nothing == [None, None, None, None]

    # Experts answer in a wider dtype.
    work = torch.bfloat16 if is_fp8 else case.rows
    received = recv_x[0] if is_fp8 else recv_x
    y = received.to(work) * 2
    # Rows behind the last are nobody's.
    y[num_received:] = float("nan")
    values = recv_weights
    if case.mode == "mask" and case.weighted:
        values = small_integers((num_received, 5), case.seed * 7 + rank, torch.float32, device)
    biases = tuple(
        small_integers((num_tokens, case.hidden), case.seed * 5 + which, work, device)
        for which in range(case.num_biases)
    )
    out, out_values, event = buffer.combine(
        y,
        handle,
        topk_weights=values,
        bias=biases if len(biases) > 1 else (biases[0] if biases else None),
        config=config,
        **flags(case.order),
    )
    event.current_stream_wait()
    results = {
        **{name: value for name, value in layout.items() if value is not None},
        "rows": received.view(torch.uint8)[:num_received],
        "again": (again[0] if is_fp8 else again).view(torch.uint8)[:num_received],
        "topk_idx": recv_idx,
        "topk_weights": recv_weights,
        "listed": torch.tensor(listed),
        "prefix": handle[0],
        "source": handle[3][:num_received],
        "in_rank": handle[4],
        "before": handle[-4],
        "received": handle.num_recv_tokens,
        "out": out,
        "values": out_values,
    }
    if is_fp8:
        assert recv_x[1].is_contiguous()
        results |= {"scales": recv_x[1][:num_received], "again_scales": again[1][:num_received]}
    assert handle.num_recv_tokens.shape == ()
    assert bool((handle[3][num_received:] == -1).all())
    return {name: result.cpu() for name, result in results.items() if result is not None}
