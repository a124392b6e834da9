"""Exchanges on the caller's own streams, in any order with others; and CUDA graphs that outlive the arena they used."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ep import Buffer, Capacity, TokenDispatcher
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.errors import CapacityError
from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, TOP_K, STEPS = 16, 64, 2, 40
# About 30 ms.
LONG_CYCLES = 50_000_000


def take_gpu(ctx: RankContext) -> None:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())


def make_dispatcher(ctx: RankContext, tokens: int = TOKENS, **settings: Any) -> TokenDispatcher:
    """Rows of any routing fit."""
    take_gpu(ctx)
    settings = {"capacity": Capacity(per_expert=ctx.world_size * tokens), "max_tokens_per_rank": tokens} | settings
    return TokenDispatcher(
        ctx.group,
        num_experts=4 * ctx.world_size,
        hidden_size=HIDDEN,
        top_k=TOP_K,
        dtype=torch.float32,
        backend="cuda",
        **settings,
    )


def choices(dispatcher: TokenDispatcher, tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Every token goes to two experts of different ranks, where there are several; weights are 1."""
    token = torch.arange(tokens, device="cuda").unsqueeze(1)
    first = token % dispatcher.num_experts
    topk_idx = torch.cat([first, (first + dispatcher.num_local_experts) % dispatcher.num_experts], dim=1)
    if dispatcher.group_size == 1:
        topk_idx = torch.cat([first, (first + 1) % dispatcher.num_experts], dim=1)
    return topk_idx, torch.ones(tokens, TOP_K, device="cuda")


def link_of(dispatcher: TokenDispatcher) -> Any:  # noqa: ANN401
    assert isinstance(dispatcher.buffer.backend, CudaBackend)
    return dispatcher.buffer.backend.link


def rows_of_step(rows: Tensor, counts: Tensor, step: int, num_ranks: int) -> bool:
    """Whether valid rows are those that all ranks sent in a step.

    Args:
        rows: expert-grouped, with as much room for every expert where sizes are fixed.
        counts: [e] valid ones of each expert.
        step: number of the exchange.
        num_ranks: R.
    """
    told = counts.tolist()
    fixed = len(rows) > sum(told)
    groups = rows.split(len(rows) // len(told) if fixed else told)
    valid = torch.cat([group[:count] for group, count in zip(groups, told, strict=True)])
    wanted = torch.tensor([100.0 * step + rank for rank in range(num_ranks)], device=rows.device)
    return len(valid) > 0 and bool(torch.isin(valid, wanted).all())


def mix_streams(ctx: RankContext, exact: bool, ordered: bool) -> bool:
    """Exchanges one after the other on streams that nobody orders but the exchanges; whether all are right.

    Args:
        exact: whether sizes are.
        ordered: whether exchanges are ordered among each other.
    """
    sizes: dict[str, Any] = {"capacity": None, "max_tokens_per_rank": None} if exact else {}
    dispatcher = make_dispatcher(ctx, **sizes, timeout_s=20)
    topk_idx, weights = choices(dispatcher)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    draw = random.Random(ctx.rank)
    results = []
    with torch.no_grad():
        dispatcher.dispatch(torch.zeros(TOKENS, HIDDEN, device="cuda"), topk_idx, weights)
        torch.cuda.synchronize()
        if not ordered:
            link_of(dispatcher)._order = type("Nothing", (), {"follow": lambda *_: None})()
        for step in range(1, STEPS):
            # Ranks differ in what they use, so that exchanges in a wrong order meet others.
            stream = streams[draw.randrange(3)]
            with torch.cuda.stream(stream):
                torch.cuda._sleep(draw.choice((0, 0, 100_000, LONG_CYCLES // 10)))
                x = torch.full((TOKENS, HIDDEN), 100.0 * step + ctx.rank, device="cuda")
                if draw.random() < 0.3:
                    routed = dispatcher.dispatch_async(x, topk_idx, weights).wait()
                    out = dispatcher.combine_async(routed.x, routed.handle, routed.weights).wait()
                else:
                    routed = dispatcher.dispatch(x, topk_idx, weights)
                    out = dispatcher.combine(routed.x, routed.handle, routed.weights)
                results.append((step, routed.x, routed.tokens_per_expert, out))
        torch.cuda.synchronize()
    right = [rows_of_step(rows, counts, step, ctx.world_size) for step, rows, counts, _ in results]
    return all(right) and all(bool((out == TOP_K * (100.0 * step + ctx.rank)).all()) for step, _, _, out in results)


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("exact", [False, True], ids=["capacity", "exact"])
def test_exchanges_keep_their_order_on_any_streams(num_ranks: int, exact: bool) -> None:
    assert run_ranks(num_ranks, mix_streams, exact, True) == [True] * num_ranks


def swap(ctx: RankContext, ordered: bool) -> bool:
    """Rank 0 launches two exchanges on streams of which the first is busy, rank 1 both on one."""
    dispatcher = make_dispatcher(ctx, timeout_s=10)
    topk_idx, weights = choices(dispatcher)
    slow = torch.cuda.Stream() if ctx.rank == 0 else torch.cuda.current_stream()
    with torch.no_grad():
        dispatcher.dispatch(torch.zeros(TOKENS, HIDDEN, device="cuda"), topk_idx, weights)
        xs = [torch.full((TOKENS, HIDDEN), 100.0 * step + ctx.rank, device="cuda") for step in (1, 2)]
        torch.cuda.synchronize()
        if not ordered:
            link_of(dispatcher)._order = type("Nothing", (), {"follow": lambda *_: None})()
        with torch.cuda.stream(slow):
            torch.cuda._sleep(10 * LONG_CYCLES)
            first = dispatcher.dispatch(xs[0], topk_idx, weights)
        second = dispatcher.dispatch(xs[1], topk_idx, weights)
        torch.cuda.synchronize()
    right = [
        rows_of_step(routed.x, routed.tokens_per_expert, step, ctx.world_size)
        for step, routed in ((1, first), (2, second))
    ]
    return all(right)


def test_an_exchange_waits_for_the_one_before_on_another_stream() -> None:
    assert run_ranks(2, swap, True) == [True, True]


def test_unordered_exchanges_would_meet_others() -> None:
    """The planted fault: without the order between streams the test above fails."""
    assert run_ranks(2, swap, False, fresh=True) != [True, True]


def leaves_flights(ctx: RankContext) -> list[bool]:
    """Whether an exchange has left something in flight behind it: alone, and asynchronous."""
    dispatcher = make_dispatcher(ctx)
    topk_idx, weights = choices(dispatcher)
    link, left = link_of(dispatcher), []
    x = torch.ones(TOKENS, HIDDEN, device="cuda")
    with torch.no_grad():
        dispatcher.dispatch(x, topk_idx, weights)
        torch.cuda.synchronize()
        link.begin()
        for dispatch in (dispatcher.dispatch, dispatcher.dispatch_async):
            before = link._eager.flights
            dispatch(x, topk_idx, weights)
            left.append(link._eager.flights > before)
    return left


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_only_asynchronous_exchanges_are_in_flight(num_ranks: int) -> None:
    assert run_ranks(num_ranks, leaves_flights) == [[False, True]] * num_ranks


def wait_out_of_order(ctx: RankContext) -> bool:
    """Another stream waits for the first of two exchanges, after this one for the second; a third comes behind both."""
    dispatcher = make_dispatcher(ctx, timeout_s=20)
    topk_idx, weights = choices(dispatcher)
    other, right = torch.cuda.Stream(), True
    xs = [torch.full((TOKENS, HIDDEN), 100.0 * step + ctx.rank, device="cuda") for step in range(1, 4)]
    with torch.no_grad():
        dispatcher.dispatch(xs[0], topk_idx, weights)
        torch.cuda.synchronize()
        for _ in range(30):
            first, second = (dispatcher.dispatch_async(x, topk_idx, weights) for x in xs[:2])
            routed = [second.wait()]
            with torch.cuda.stream(other):
                routed = [first.wait(), *routed, dispatcher.dispatch(xs[2], topk_idx, weights)]
            torch.cuda.synchronize()
            for step, one in enumerate(routed, 1):
                right = right and rows_of_step(one.x, one.tokens_per_expert, step, ctx.world_size)
    return right


def test_waits_in_any_order_keep_exchanges_apart() -> None:
    assert run_ranks(2, wait_out_of_order) == [True, True]


def grow(ctx: RankContext) -> list[int]:
    """Rounds of exchanges whose fixed sizes were told one after another, through one Buffer."""
    take_gpu(ctx)
    buffer, laps = Buffer.for_group(ctx.group, backend="cuda"), []
    for tokens in (1, 256, 8):
        dispatcher = make_dispatcher(ctx, tokens, buffer=buffer)
        topk_idx, weights = choices(dispatcher, tokens)
        x = torch.full((tokens, HIDDEN), 100.0 + ctx.rank, device="cuda")
        with torch.no_grad():
            routed = dispatcher.dispatch(x, topk_idx, weights)
            out = dispatcher.combine(routed.x, routed.handle, routed.weights)
        assert rows_of_step(routed.x, routed.tokens_per_expert, 1, ctx.world_size)
        assert bool((out == TOP_K * x).all())
        exchanger = dispatcher._live()
        laps.append(buffer.backend.num_laps(tokens, exchanger._record(exchanger.spec)))  # type: ignore[attr-defined]
    return laps


def test_rings_grow_for_larger_fixed_sizes() -> None:
    assert run_ranks(2, grow, fresh=True) == [[1, 1, 1]] * 2


def replay_after_growth(ctx: RankContext) -> tuple[int, int, list[tuple[int, int, int]]]:
    """A graph goes on through the arena it was captured with, beside eager exchanges through a larger one."""
    take_gpu(ctx)
    buffer = Buffer.for_group(ctx.group, backend="cuda")
    small = make_dispatcher(ctx, 8, buffer=buffer, capacity=Capacity(per_expert=8))
    topk_idx, weights = choices(small, 8)
    even = topk_idx.clone()
    x = torch.zeros(8, HIDDEN, device="cuda")

    def exchange() -> tuple[Tensor, Tensor, Tensor]:
        routed = small.dispatch(x, topk_idx, weights)
        return routed.x, routed.tokens_per_expert, small.combine(routed.x, routed.handle, routed.weights)

    with torch.no_grad():
        exchange()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rows, counts, out = exchange()
        before = buffer.backend.memory_bytes
        large = make_dispatcher(ctx, 512, buffer=buffer)
        large_idx, large_weights = choices(large, 512)
        raised = []
        for step in range(1, 7):
            x.fill_(100.0 * step + ctx.rank)
            # At step 4 all tokens choose the first two experts, which have too few rows: 8 from each rank.
            topk_idx.copy_(torch.tensor([0, 1], device="cuda").expand(8, 2) if step == 4 else even)
            graph.replay()
            big = torch.full((512, HIDDEN), 100.0 * step + ctx.rank, device="cuda")
            torch.cuda.synchronize()
            if step == 4:
                with pytest.raises(CapacityError) as caught:
                    large.dispatch(big, large_idx, large_weights)
                raised.append((caught.value.rank, caught.value.needed, caught.value.given))
                assert bool(out.isnan().all())
                continue
            routed = large.dispatch(big, large_idx, large_weights)
            home = large.combine(routed.x, routed.handle, routed.weights)
            assert rows_of_step(rows, counts, step, ctx.world_size)
            assert bool((out == TOP_K * x).all())
            assert rows_of_step(routed.x, routed.tokens_per_expert, step, ctx.world_size)
            assert bool((home == TOP_K * big).all())
            if step == 5:
                large.reset()
    torch.cuda.synchronize()
    return before, buffer.backend.memory_bytes, raised


def test_graphs_outlive_their_arena() -> None:
    answers = run_ranks(2, replay_after_growth, fresh=True)
    for before, after, raised in answers:
        assert after > before
        # 16 tokens on an expert of rank 0 with room for 8.
        assert raised == answers[0][2]
        assert raised[0][0] == 0
