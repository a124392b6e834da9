"""Rows that stay in the arena: bit for bit those of the torch backend, and whole for as long as they are lent."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ep import Buffer, Capacity, Dispatched, TokenDispatcher
from moe_ep.errors import CapacityError, MoeEpError, PeerAbortedError
from moe_ep.testing import make_routing, run_ranks
from moe_ep.testing.worker import RankContext
from tests.gpu.exchange_cases import Case, _is_row, make_case

pytestmark = pytest.mark.gpu

SLEEP_CYCLES = 2_000_000
TIMEOUT_S = 120.0
# In which some of the random cases fit, and others do not.
SMALL_GRANT = 16 * 16384


def make_buffer(ctx: RankContext, granted_bytes: int = 0, bulk: bool = True) -> Buffer:
    torch.cuda.set_device(ctx.rank % torch.cuda.device_count())
    buffer = Buffer(ctx.group, granted_bytes, backend="cuda", timeout_s=20)
    buffer.backend.settings.bulk = bulk and torch.cuda.get_device_capability() >= (9, 0)
    return buffer


def needs_bulk(bulk: bool) -> None:
    if bulk and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("copies by the copy engine need a GPU since Hopper")


# Parity


def make_lent_case(seed: int, num_ranks: int, exact: bool) -> Case:
    """As ``make_case``, of what may stay in the arena."""
    case = make_case(seed, num_ranks)
    settings = {name: value for name, value in case.settings.items() if name != "wire_dtype"}
    if exact:
        settings = {name: value for name, value in settings.items() if name not in ("capacity", "on_overflow")}
        if settings["layout"] == "slab":
            settings["layout"] = "expanded"
    return dataclasses.replace(case, settings=settings)


def inputs_of(case: Case, dispatcher: TokenDispatcher, rank: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, dtype = case.tokens[rank], dispatcher.dtype
    seed = case.seed * 31 + rank
    topk_idx, weights = make_routing(num_tokens, dispatcher.top_k, dispatcher.num_experts, kind=case.kind, seed=seed)
    generator = torch.Generator().manual_seed(case.seed * 17 + rank + 1000 * turn)
    # Small integers: sums are exact, whatever their order.
    x = torch.randint(-2, 3, (num_tokens, dispatcher.hidden_size), generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.where(weights > 0.2, 1.0, 0.5).masked_fill_(topk_idx < 0, 0.0).to(wide)
    return x, topk_idx, weights


def run_lent(
    ctx: RankContext, device: str, buffer: Buffer, case: Case, turns: int
) -> tuple[list[dict[str, Tensor]], list[bool]]:
    """Dispatches whose rows are lent, each with a combine and a replay; results on the CPU, and what stayed there."""
    dispatcher = TokenDispatcher(ctx.group, buffer=buffer, **case.settings)
    found, stayed = [], []
    for turn in range(turns):
        x, topk_idx, weights = (one.to(device) for one in inputs_of(case, dispatcher, ctx.rank, turn))
        try:
            planned = dispatcher.plan([topk_idx])[0] if case.planned else None
            # Counts may tell of an overflow before rows are sent.
            dispatcher.check()
        except CapacityError as error:
            found.append({"overflow": torch.tensor([error.rank, error.needed, error.given])})
            stayed.append(ctx.world_size > 1)
            continue
        if case.asynchronous:
            routed = dispatcher.dispatch_async(x, topk_idx, weights, planned, out="arena").wait()
        else:
            routed = dispatcher.dispatch(x, topk_idx, weights, planned, out="arena")
        stayed.append(routed.in_arena)
        is_row = _is_row(routed, dispatcher.layout)
        rows = routed.x.clone()
        # Whatever the next dispatch does not store is found.
        routed.x.fill_(torch.nan)
        try:
            dispatcher.check()
        except CapacityError as error:
            found.append({"overflow": torch.tensor([error.rank, error.needed, error.given])})
            continue
        given = routed.weights if dispatcher.weights == "combine" else None
        out = dispatcher.combine(torch.where(torch.isfinite(rows), rows, 0.0), routed.handle, given)
        mask = is_row if dispatcher.layout != "compact" else is_row[:, 0]
        again = dispatcher._exchanger.replay(-x, routed.handle.plan).result()
        results = {
            "x": rows[mask],
            "again": again[mask],
            "weights": routed.weights[is_row],
            "counts": routed.tokens_per_expert,
            "ends": routed.expert_ends,
            "out": out,
        }
        if routed.tokens_per_expert_list is not None:
            results["listed"] = torch.tensor(routed.tokens_per_expert_list)
        if routed.topk_idx is not None:
            results["topk_idx"] = routed.topk_idx
        found.append({name: result.cpu() for name, result in results.items()})
    return found, stayed


@torch.no_grad()
def compare(ctx: RankContext, seeds: list[int], bulk: bool, granted_bytes: int) -> list[list[bool]]:
    oracle = Buffer(ctx.group, backend="torch", timeout_s=20)
    buffer = make_buffer(ctx, granted_bytes * ctx.world_size, bulk)
    stayed = []
    for seed in seeds:
        case = make_lent_case(seed, ctx.world_size, exact=granted_bytes > 0)
        expected, _ = run_lent(ctx, "cpu", oracle, case, 2)
        got, told = run_lent(ctx, "cuda", buffer, case, 2)
        stayed.append(told)
        for turn in range(2):
            assert expected[turn].keys() == got[turn].keys(), (turn, case, expected[turn], got[turn])
            for name, want in expected[turn].items():
                have = got[turn][name]
                assert torch.equal(want, have), (name, turn, told, case, (want != have).nonzero()[:5])
    buffer.drain()
    return stayed


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_equals_torch_backend(num_ranks: int, bulk: bool) -> None:
    needs_bulk(bulk)
    first = 60_000 + 1000 * num_ranks + 100 * bulk
    stayed = run_ranks(num_ranks, compare, list(range(first, first + 32)), bulk, 0, timeout=TIMEOUT_S)
    # All ranks decide alike. What found too little memory finds enough the next time; a single rank has no rings.
    assert all(told == stayed[0] for told in stayed)
    assert {second for _, second in stayed[0]} == {num_ranks > 1}


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_rows_that_do_not_fit_a_grant_are_private(num_ranks: int, bulk: bool) -> None:
    needs_bulk(bulk)
    first = 70_000 + 1000 * num_ranks + 100 * bulk
    stayed = run_ranks(num_ranks, compare, list(range(first, first + 32)), bulk, SMALL_GRANT, timeout=TIMEOUT_S)
    assert all(told == stayed[0] for told in stayed)
    told = [one for both in stayed[0] for one in both]
    assert False in told
    assert True in told


SHAPES: dict[str, tuple[dict[str, Any], list[int], str]] = {
    "64 choices of 4096 experts": (
        {"num_experts": 4096, "top_k": 64, "hidden_size": 8, "dtype": torch.float32, "weights": "experts"},
        [40, 33],
        "uniform",
    ),
    "9 choices, over the border of a warp": (
        {"num_experts": 32, "top_k": 9, "hidden_size": 64, "dtype": torch.float32, "alignment": 8},
        [129, 7],
        "holes",
    ),
    "rows in pieces": ({"num_experts": 8, "top_k": 3, "hidden_size": 32768, "dtype": torch.bfloat16}, [9, 21], "zipf"),
    "compact rows in pieces": (
        {
            "num_experts": 8,
            "top_k": 3,
            "hidden_size": 32768,
            "dtype": torch.bfloat16,
            "layout": "compact",
            "weights": "experts",
        },
        [9, 21],
        "zipf",
    ),
    "65536 tokens": ({"num_experts": 8, "top_k": 2, "hidden_size": 8, "dtype": torch.bfloat16}, [65536, 1], "uniform"),
    # More groups than flags: never in the arena.
    "65537 tokens": ({"num_experts": 8, "top_k": 2, "hidden_size": 8, "dtype": torch.bfloat16}, [65537, 1], "uniform"),
}


@torch.no_grad()
def compare_shape(ctx: RankContext, name: str, bulk: bool) -> list[bool]:
    settings, tokens, kind = SHAPES[name]
    case = Case(settings, tokens, kind, 1, False, False)
    oracle = Buffer(ctx.group, backend="torch", timeout_s=60)
    # Skewed routing may find too little memory the first time.
    expected, _ = run_lent(ctx, "cpu", oracle, case, 2)
    got, told = run_lent(ctx, "cuda", make_buffer(ctx, bulk=bulk), case, 2)
    for want, have in zip(expected, got, strict=True):
        for key, value in want.items():
            assert torch.equal(value, have[key]), key
    return told[-1:]


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("name", SHAPES)
def test_edges(name: str, bulk: bool) -> None:
    needs_bulk(bulk)
    told = run_ranks(2, compare_shape, name, bulk, timeout=TIMEOUT_S)
    assert told == [[name != "65537 tokens"]] * 2


@torch.no_grad()
def compare_fp8(ctx: RankContext, layout: str) -> bool:
    settings: dict[str, Any] = {"num_experts": 4 * ctx.world_size, "hidden_size": 256, "top_k": 3, "layout": layout}
    if layout == "slab":
        settings["max_tokens_per_rank"] = 90
    generator = torch.Generator().manual_seed(ctx.rank)
    x = torch.randn(90 - 50 * ctx.rank, 256, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(len(x), 2, generator=generator)
    topk_idx, weights = make_routing(len(x), 3, 4 * ctx.world_size, kind="holes", seed=ctx.rank)
    results = []
    for device, buffer in (("cpu", Buffer(ctx.group, backend="torch", timeout_s=20)), ("cuda", make_buffer(ctx))):
        dispatcher = TokenDispatcher(ctx.group, buffer=buffer, weights="experts", **settings)
        rows = (x.to(device), scales.to(device))
        routed = dispatcher.dispatch(rows, topk_idx.to(device), weights.to(device), out="arena")
        is_row = _is_row(routed, layout)
        mask = is_row if layout != "compact" else is_row[:, 0]
        assert routed.scales is not None
        flat = routed.x.reshape(-1, 256)[mask.flatten()]
        results.append((flat.view(torch.uint8).cpu(), routed.scales[mask.flatten()].cpu(), routed.in_arena))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    return results[1][2]


@pytest.mark.parametrize("layout", ["compact", "expanded", "slab"])
def test_rows_and_scales_in_fp8(layout: str) -> None:
    assert run_ranks(2, compare_fp8, layout) == [True, True]


@torch.no_grad()
def use_counts_again(ctx: RankContext, layout: str) -> list[bool]:
    lender = Lender(ctx, layout, exact=True)
    (planned,) = lender.dispatcher.plan([lender.topk_idx])
    stayed = []
    for turn, out in enumerate(("arena", "private", "arena")):
        x = lender.x + turn
        routed = lender.dispatcher.dispatch(x, lender.topk_idx, lender.weights, planned, out=out)
        stayed.append(routed.in_arena)
        assert torch.equal(routed.x, lender.want + turn), out
    return stayed


@pytest.mark.parametrize("layout", ["compact", "expanded"])
def test_planned_counts_serve_rows_of_either_kind(layout: str) -> None:
    assert run_ranks(2, use_counts_again, layout) == [[True, False, True]] * 2


# How long rows are whole


class Lender:
    """A dispatcher whose rows are known: row for row the token's source and number, plus the turn."""

    HIDDEN, TOKENS, TOP_K = 2048, 256, 2

    def __init__(self, ctx: RankContext, layout: str, exact: bool, bulk: bool = True) -> None:
        self.buffer = make_buffer(ctx, bulk=bulk)
        experts, size = 4 * ctx.world_size, ctx.world_size
        rows = size * self.TOKENS * (1 if layout == "compact" else self.TOP_K)
        self.dispatcher = TokenDispatcher(
            ctx.group,
            num_experts=experts,
            hidden_size=self.HIDDEN,
            top_k=self.TOP_K,
            dtype=torch.float32,
            layout=layout,
            weights="experts",
            capacity=None if exact else Capacity(rows=rows),
            max_tokens_per_rank=self.TOKENS,
            buffer=self.buffer,
        )
        topk_idx, weights = make_routing(self.TOKENS, self.TOP_K, experts, seed=ctx.rank)
        self.topk_idx, self.weights = topk_idx.cuda(), torch.ones_like(weights).cuda()
        numbers = torch.arange(self.TOKENS, dtype=torch.float32, device="cuda") + 1000 * ctx.rank
        self.x = numbers.unsqueeze(1).expand(-1, self.HIDDEN).contiguous()
        private = self.dispatcher.dispatch(self.x, self.topk_idx, self.weights)
        self.num_rows = private.x.shape[0]
        if not exact:
            self.num_rows = (
                int((private.topk_idx >= 0).any(1).sum()) if layout == "compact" else int(private.expert_ends[-1])
            )
        self.want = private.x[: self.num_rows].clone()
        self.home = self.dispatcher.combine(private.x, private.handle)
        # The first one in exact mode may find too little memory.
        self.lend(0)
        torch.cuda.synchronize()

    def lend(self, turn: int) -> Dispatched:
        return self.dispatcher.dispatch(self.x + turn, self.topk_idx, self.weights, out="arena")


@torch.no_grad()
def read_slowly(ctx: RankContext, layout: str, exact: bool) -> None:
    """Rows are read late, by kernels that the host has only launched when peers are through with the next exchanges."""
    lender, skew = Lender(ctx, layout, exact), random.Random(ctx.rank)
    copies, outs = [], []
    for turn in range(60):
        routed = lender.lend(turn)
        assert routed.in_arena
        if skew.random() < 0.5:
            torch.cuda._sleep(skew.randrange(SLEEP_CYCLES))
        copies.append(routed.x[: lender.num_rows].sum(1))
        if turn % 3 == 0:
            # Rings of a combine lie where the rows did.
            outs.append(lender.dispatcher.combine(routed.x * 1.0, routed.handle)[:, 0] - lender.home[:, 0])
        if turn % 7 == 0:
            lender.dispatcher.plan([lender.topk_idx])
    for turn, sums in enumerate(copies):
        assert torch.equal(sums, (lender.want + turn).sum(1)), (turn, layout, exact)
    visits = lender.home[:, 0] / lender.x[:, 0].clamp(min=1)
    for at, extra in enumerate(outs):
        known = lender.x[:, 0] > 0
        assert torch.equal(extra[known], (visits * 3 * at)[known]), at
    lender.dispatcher.check()


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "capacity"])
@pytest.mark.parametrize("layout", ["compact", "expanded"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rows_are_whole_until_the_next_exchange(num_ranks: int, layout: str, exact: bool) -> None:
    run_ranks(num_ranks, read_slowly, layout, exact, timeout=TIMEOUT_S)


@torch.no_grad()
def read_beside(ctx: RankContext) -> None:
    """The tuple interface may wait for an event in place of the current stream, but not before rows are read."""
    lender = Lender(ctx, "compact", exact=False)
    buffer, rows = lender.buffer, lender.x.clone()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(lender.topk_idx, lender.dispatcher.num_experts)
    copies = []
    for turn in range(20):
        routed = lender.lend(turn)
        event = Buffer.capture()
        torch.cuda._sleep(SLEEP_CYCLES if turn % 2 == ctx.rank % 2 else 1)
        copies.append(routed.x[: lender.num_rows].sum(1))
        *_, done = buffer.dispatch(
            rows,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=lender.topk_idx,
            topk_weights=lender.weights,
            previous_event=event,
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        done.current_stream_wait()
    for turn, sums in enumerate(copies):
        assert torch.equal(sums, (lender.want + turn).sum(1)), turn


def test_exchanges_that_wait_for_an_event_wait_for_readers_too() -> None:
    run_ranks(2, read_beside, timeout=TIMEOUT_S)


@torch.no_grad()
def use_late(ctx: RankContext) -> tuple[bool, str]:
    lender = Lender(ctx, "compact", exact=False)
    scale = torch.ones(lender.HIDDEN, device="cuda", requires_grad=True)
    first = lender.lend(1)
    with torch.enable_grad():
        (first.x * scale).sum().backward()
        late = (first.x * scale).sum()
    second = lender.lend(2)
    # The same memory: this is what a kernel would read.
    same = torch.equal(first.x[: lender.num_rows], second.x[: lender.num_rows])
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        late.backward()
    return same, str(caught.value)


def test_what_was_saved_of_rows_raises_after_the_next_exchange() -> None:
    assert all(same for same, _ in run_ranks(2, use_late))


@torch.no_grad()
def send_lent(ctx: RankContext) -> str:
    lender = Lender(ctx, "compact", exact=False)
    routed = lender.lend(1)
    try:
        lender.dispatcher.combine(routed.x if ctx.rank == 0 else routed.x * 1.0, routed.handle)
        torch.cuda.synchronize()
        lender.dispatcher.check()
    except (ValueError, MoeEpError) as error:
        text = f"{type(error).__name__}: {error}"
    lender.dispatcher.reset()
    routed = lender.lend(3)
    assert torch.equal(routed.x[: lender.num_rows], lender.want + 3)
    return text


def test_rows_in_the_arena_are_not_sent() -> None:
    own, other = run_ranks(2, send_lent)
    assert own.startswith('ValueError: y lies in rows of a dispatch with out="arena"')
    assert other.startswith("PeerAbortedError: rank 0 raised instead of taking part in combine: ValueError: y lies in")


# Sizes


@torch.no_grad()
def grant_too_little(ctx: RankContext, layout: str) -> tuple[str, bool]:
    buffer = make_buffer(ctx, SMALL_GRANT * ctx.world_size)
    settings: dict[str, Any] = {"num_experts": 2 * ctx.world_size, "hidden_size": 2048, "top_k": 2, "layout": layout}
    if layout != "slab":
        settings["capacity"] = Capacity(rows=4096)
    if layout == "compact":
        settings["weights"] = "experts"
    dispatcher = TokenDispatcher(ctx.group, buffer=buffer, max_tokens_per_rank=512, **settings)
    topk_idx, weights = make_routing(12, 2, dispatcher.num_experts, seed=ctx.rank)
    x = torch.ones(12, 2048, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="num_nvl_bytes") as caught:
        dispatcher.dispatch(x, topk_idx.cuda(), weights.cuda(), out="arena")
    dispatcher.reset()
    private = dispatcher.dispatch(x, topk_idx.cuda(), weights.cuda())
    return str(caught.value), private.in_arena


@pytest.mark.parametrize("layout", ["compact", "expanded", "slab"])
def test_a_fixed_number_of_rows_must_fit_a_grant(layout: str) -> None:
    for text, in_arena in run_ranks(2, grant_too_little, layout):
        assert "grant at least" in text
        assert not in_arena


@torch.no_grad()
def grow(ctx: RankContext) -> list[bool]:
    """All tokens go to one rank, which even routing says nothing of."""
    buffer = make_buffer(ctx)
    dispatcher = TokenDispatcher(ctx.group, num_experts=2 * ctx.world_size, hidden_size=2048, top_k=2, buffer=buffer)
    topk_idx = torch.tensor([[0, 1]], device="cuda").expand(512, 2).contiguous()
    x = torch.full((512, 2048), ctx.rank + 1.0, dtype=torch.bfloat16, device="cuda")
    weights = torch.ones(512, 2, device="cuda")
    sizes, stayed = [], []
    for _ in range(3):
        routed = dispatcher.dispatch(x, topk_idx, weights, out="arena")
        stayed.append(routed.in_arena)
        sizes.append(buffer.backend.memory_bytes)
        if ctx.rank == 0:
            assert torch.equal(routed.x[:, 0].float().cpu(), torch.tensor([1.0, 2.0]).repeat_interleave(512).repeat(2))
    assert sizes[0] < sizes[1] == sizes[2]
    return stayed


def test_the_arena_grows_to_what_was_needed() -> None:
    assert run_ranks(2, grow) == [[False, True, True]] * 2


# Graphs, refusals


@torch.no_grad()
def replay_graph(ctx: RankContext, layout: str, bulk: bool) -> None:
    lender = Lender(ctx, layout, exact=False, bulk=bulk)
    x = lender.x.clone()

    def step() -> tuple[Tensor, Tensor, Dispatched]:
        routed = lender.dispatcher.dispatch(x, lender.topk_idx, lender.weights, out="arena")
        sums = routed.x[: lender.num_rows].sum(1)
        return sums, lender.dispatcher.combine(routed.x * 1.0, routed.handle), routed

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        sums, out, routed = step()
    assert routed.in_arena
    visits = lender.home[:, 0] / lender.x[:, 0].clamp(min=1)
    for turn in (5, 0, 9):
        x.copy_(lender.x + turn)
        graph.replay()
        assert torch.equal(sums, (lender.want + turn).sum(1))
        known = lender.x[:, 0] > 0
        assert torch.equal(out[known, 0], (lender.home[:, 0] + visits * turn)[known])
        # Eager ones in between, of another kind.
        assert torch.equal(lender.lend(turn).x[: lender.num_rows], lender.want + turn)
    lender.dispatcher.check()


@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "vector"])
@pytest.mark.parametrize("layout", ["compact", "expanded"])
def test_graphs(layout: str, bulk: bool) -> None:
    needs_bulk(bulk)
    run_ranks(2, replay_graph, layout, bulk, timeout=TIMEOUT_S)


def ask_in_grad_mode(ctx: RankContext, warm: bool) -> str:
    buffer = make_buffer(ctx)
    dispatcher = TokenDispatcher(ctx.group, num_experts=2 * ctx.world_size, hidden_size=16, top_k=2, buffer=buffer)
    topk_idx, weights = (one.cuda() for one in make_routing(12, 2, dispatcher.num_experts, seed=ctx.rank))
    x = torch.ones(12, 16, dtype=torch.bfloat16, device="cuda")
    if warm:
        with torch.no_grad():
            dispatcher.dispatch(x, topk_idx, weights, out="arena")
    text = ""
    try:
        with torch.set_grad_enabled(ctx.rank == 1):
            dispatcher.dispatch(x, topk_idx, weights, out="arena")
    except (ValueError, PeerAbortedError) as error:
        text = f"{type(error).__name__}: {error}"
    if warm:
        dispatcher.reset()
    with torch.no_grad():
        dispatcher.dispatch(x, topk_idx, weights, out="arena")
    dispatcher.check()
    return text


@pytest.mark.parametrize("warm", [False, True])
def test_a_refusal_of_one_rank_reaches_the_others(warm: bool) -> None:
    first, second = run_ranks(2, ask_in_grad_mode, warm)
    assert second.startswith('ValueError: out="arena" cannot be used in grad mode')
    assert first.startswith("PeerAbortedError: rank 1 raised instead")
