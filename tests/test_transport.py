"""Rows cross in envelopes, behind them, or some this way and some that: the same rows in every case."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from moe_ep import TokenDispatcher
from moe_ep.backends import control, transport
from moe_ep.errors import PeerAbortedError
from moe_ep.testing import make_routing
from moe_ep.testing.worker import RankContext

Ranks = Callable[..., list]


@contextlib.contextmanager
def envelopes_of(num_bytes: int, dispatcher: TokenDispatcher) -> Iterator[None]:
    """Inside, envelopes are smaller. All ranks enter and leave between the same exchanges."""
    usual = control.ENVELOPE_BYTES
    control.ENVELOPE_BYTES = transport.ENVELOPE_BYTES = num_bytes
    dispatcher.buffer.control._inbox = None
    try:
        yield
    finally:
        control.ENVELOPE_BYTES = transport.ENVELOPE_BYTES = usual
        dispatcher.buffer.control._inbox = None


def exchange(ctx: RankContext, limit: int, tokens: list[int], layout: str) -> tuple[list[torch.Tensor], int]:
    """Everything that a dispatch and a combine give, forward and backward, and how many swaps followed envelopes."""
    group, num_experts = ctx.group, 2 * ctx.world_size
    place = "experts" if layout == "compact" else "combine"
    dispatcher = TokenDispatcher(
        group,
        num_experts=num_experts,
        hidden_size=24,
        top_k=2,
        dtype=torch.float32,
        layout=layout,
        weights=place,
        max_tokens_per_rank=max(tokens),
    )
    swaps = []
    real = dispatcher.buffer.backend.transport._all_to_all
    with envelopes_of(limit, dispatcher):
        dispatcher.buffer.backend.transport._all_to_all = lambda *args: (swaps.append(1), real(*args))
        num_tokens = tokens[ctx.rank]
        topk_idx, weights = make_routing(num_tokens, 2, num_experts, kind="uniform", seed=ctx.rank)
        x = torch.randn(num_tokens, 24, generator=torch.Generator().manual_seed(ctx.rank)).requires_grad_()
        weights.requires_grad_()
        routed = dispatcher.dispatch(x, topk_idx, weights)
        y = torch.nan_to_num(routed.x) * 3
        out = dispatcher.combine(y, routed.handle, routed.weights if place == "combine" else None)
        (out * x.detach()).sum().backward()
        assert x.grad is not None
        assert weights.grad is not None
    dispatcher.buffer.backend.transport._all_to_all = real
    return [out.detach(), x.grad, weights.grad, routed.tokens_per_expert], len(swaps)


def compare(ctx: RankContext, limit: int, tokens: list[int], layout: str) -> tuple[bool, int]:
    enclosed, none = exchange(ctx, 16 << 20, tokens, layout)
    assert none == 0
    other, swaps = exchange(ctx, limit, tokens, layout)
    return all(torch.equal(a, b) for a, b in zip(enclosed, other, strict=True)), swaps


@pytest.mark.parametrize("layout", ["expanded", "compact", "slab"])
@pytest.mark.parametrize(
    ("limit", "tokens", "swaps"),
    [
        pytest.param(256, [9, 8, 10], 4, id="none fits"),
        pytest.param(2048, [40, 3, 0], 4, id="some fit"),
    ],
)
def test_rows_do_not_depend_on_their_way(ranks: Ranks, layout: str, limit: int, tokens: list[int], swaps: int) -> None:
    for same, followed in ranks(3, compare, limit, tokens, layout):
        assert same
        # Every rank takes part in the swap behind the envelopes as soon as one needs it.
        assert followed == swaps


def plan_much(ctx: RankContext, chunks: list[int]) -> str:
    """Envelopes of 256 bytes hold the counts of 6 experts for 9 chunks."""
    dispatcher = TokenDispatcher(
        ctx.new_group(), num_experts=6, hidden_size=8, top_k=2, dtype=torch.float32, timeout_s=20
    )
    topk_idx, weights = make_routing(5, 2, 6, kind="uniform", seed=ctx.rank)
    text = "accepted"
    with envelopes_of(256, dispatcher):
        try:
            dispatcher.plan([topk_idx] * chunks[ctx.rank])
        except (ValueError, PeerAbortedError) as error:
            text = f"{type(error).__name__}: {error}"
    planned = dispatcher.plan([topk_idx])
    dispatcher.dispatch(torch.ones(5, 8), topk_idx, weights, planned[0])
    return text


@pytest.mark.parametrize(
    ("chunks", "kinds"),
    [
        ([8, 8, 8], ["accepted"] * 3),
        ([9, 9, 9], ["ValueError"] * 3),
        ([100, 8, 8], ["ValueError", "PeerAbortedError", "PeerAbortedError"]),
    ],
    ids=str,
)
def test_counts_that_no_envelope_holds_are_refused_on_all_ranks(
    ranks: Ranks, chunks: list[int], kinds: list[str]
) -> None:
    for text, kind in zip(ranks(3, plan_much, chunks), kinds, strict=True):
        assert text.startswith(kind), text
        assert text == "accepted" or "plan fewer chunks" in text


def send_one_row(ctx: RankContext, layout: str) -> None:
    dispatcher = TokenDispatcher(
        ctx.group, num_experts=6, hidden_size=8, top_k=2, dtype=torch.float64, layout=layout, weights="experts"
    )
    x = torch.full((1, 8), 2.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    routed = dispatcher.dispatch(x, torch.tensor([[2 * ctx.rank, -1]]), weights)
    factors = routed.weights.sum(1) if layout == "compact" else routed.weights
    out = dispatcher.combine(routed.x * factors.unsqueeze(1), routed.handle)
    # The gradient of a sum has stride 0.
    out.sum().backward()
    assert torch.equal(out, x)
    assert torch.equal(x.grad, torch.ones_like(x))
    assert weights.grad.tolist() == [[16.0, 0.0]]


@pytest.mark.parametrize("layout", ["expanded", "compact"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_single_rows_of_64_bits_arrive(ranks: Ranks, num_ranks: int, layout: str) -> None:
    ranks(num_ranks, send_one_row, layout)
