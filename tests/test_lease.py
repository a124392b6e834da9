"""``out="arena"``: rows that are over when the next exchange of their Buffer is launched, and how misuse is found."""

from collections.abc import Callable

import pytest
import torch

import moe_ep
from moe_ep import Buffer, Dispatched, TokenDispatcher
from moe_ep.errors import ExchangeMismatchError, MoeEpError, PeerAbortedError
from moe_ep.testing import RankContext
from tests.checks import Case, check_dispatched, check_output, round_trip, run_experts

Ranks = Callable[..., list]

LAYOUTS = {
    "expanded": {},
    "aligned": {"alignment": 4},
    "compact": {"layout": "compact", "weights": "experts"},
    "slab": {"layout": "slab", "max_tokens_per_rank": 9},
    "capacity": {"capacity": moe_ep.Capacity(rows=60), "max_tokens_per_rank": 9},
}
CASE = Case(tokens=(4, 4, 4), num_experts=6, top_k=2)


@torch.no_grad()
def lend(ctx: RankContext, case: Case, dispatcher: TokenDispatcher, how: str = "plain") -> Dispatched:
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    if how == "async":
        return dispatcher.dispatch_async(x, topk_idx, topk_weights, out="arena").wait()
    planned = dispatcher.plan([topk_idx])[0] if how == "planned" else None
    return dispatcher.dispatch(x, topk_idx, topk_weights, planned, out="arena")


@torch.no_grad()
def deliver(ctx: RankContext, layout: dict) -> list[bool]:
    found = []
    for seed, how in enumerate(("plain", "async", "planned")):
        case = Case(tokens=(5, 0, 9)[: ctx.world_size], kind="holes", seed=seed, **layout)
        dispatcher = case.dispatcher(ctx.group)
        for _ in range(2):
            routed = lend(ctx, case, dispatcher, how)
            expected = check_dispatched(case, ctx.rank, routed)
            y = run_experts(case, ctx.rank, routed, expected)
            out = dispatcher.combine(y, routed.handle, routed.weights if case.weights == "combine" else None)
            check_output(case, ctx.rank, out, expected)
            found.append(routed.in_arena)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rows_are_those_of_private_dispatches(ranks: Ranks, num_ranks: int, layout: str) -> None:
    # The torch backend has no arena: what it gives is lent all the same.
    assert ranks(num_ranks, deliver, LAYOUTS[layout]) == [[False] * 6] * num_ranks


# What ends a lease: every exchange of the same Buffer, of this dispatcher or another, that takes place or not.


def next_exchange(ctx: RankContext, case: Case, dispatcher: TokenDispatcher, routed: Dispatched, name: str) -> None:
    x, (topk_idx, topk_weights) = case.x(ctx.rank), case.routing(ctx.rank)
    if name == "dispatch":
        dispatcher.dispatch(x, topk_idx, topk_weights)
    elif name == "lending dispatch":
        lend(ctx, case, dispatcher)
    elif name == "asynchronous dispatch":
        dispatcher.dispatch_async(x, topk_idx, topk_weights)
    elif name == "combine":
        dispatcher.combine(routed.x.clone(), routed.handle, routed.weights)
    elif name == "plan":
        dispatcher.plan([topk_idx])
    elif name == "replay":
        dispatcher._exchanger.replay(x, routed.handle.plan).result()
    elif name == "other dispatcher":
        Case(tokens=case.tokens, num_experts=6).dispatcher(dispatcher.group, buffer=dispatcher.buffer).plan(
            [torch.full((1, 3), -1)]
        )
    elif name == "refused":
        with pytest.raises(ValueError, match="topk_weights"):
            dispatcher.dispatch(x, topk_idx, topk_weights[:1])
    else:
        assert name == "Buffer.dispatch"
        buffer = dispatcher.buffer
        layout = buffer.get_dispatch_layout(topk_idx, case.num_experts)
        buffer.dispatch(
            x,
            num_tokens_per_rank=layout[0],
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )


ENDS = (
    "dispatch",
    "lending dispatch",
    "asynchronous dispatch",
    "combine",
    "plan",
    "replay",
    "other dispatcher",
    "refused",
    "Buffer.dispatch",
)


def use_late(ctx: RankContext, name: str, how: str) -> tuple[bool, str]:
    case = Case(tokens=(4, 5), num_experts=6, top_k=2)
    group = ctx.new_group()
    dispatcher = case.dispatcher(group, buffer=Buffer(group, backend="torch", timeout_s=20))
    scale = torch.ones(case.hidden_size, requires_grad=True)
    # In time, nothing is wrong, of the rows or of views of them.
    routed = lend(ctx, case, dispatcher, how)
    (routed.x * scale).sum().backward()
    scale.grad = None
    early = (routed.x[1:].view(-1) * scale.repeat(routed.x.shape[0] - 1)).sum()
    with torch.no_grad():
        next_exchange(ctx, case, dispatcher, routed, name)
    late = (routed.x * scale).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        early.backward()
    # The torch backend's memory is private: what is made of it afterwards is not known to be wrong.
    late.backward()
    return scale.grad is not None, str(caught.value)


@pytest.mark.parametrize("name", ENDS)
def test_what_was_saved_of_rows_raises_after_the_next_exchange(ranks: Ranks, name: str) -> None:
    assert all(good for good, _ in ranks(2, use_late, name, "async" if name == "plan" else "plain"))


def keep_private(ctx: RankContext) -> None:
    case = Case(tokens=(4, 5), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(ctx.group)
    scale = torch.ones(case.hidden_size, requires_grad=True)
    with torch.no_grad():
        routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank), out="private")
    total = (routed.x * scale).sum()
    with torch.no_grad():
        lend(ctx, case, dispatcher)
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    total.backward()


def test_private_rows_are_never_over(ranks: Ranks) -> None:
    ranks(2, keep_private)


def lend_for_inference(ctx: RankContext) -> None:
    case = Case(tokens=(4, 5), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(ctx.group)
    with torch.inference_mode():
        for how in ("plain", "async"):
            routed = lend(ctx, case, dispatcher, how)
            check_dispatched(case, ctx.rank, routed)
            dispatcher.combine(routed.x * 2, routed.handle, routed.weights)


def test_inference_mode(ranks: Ranks) -> None:
    ranks(2, lend_for_inference)


def lend_fp8(ctx: RankContext) -> None:
    dispatcher = TokenDispatcher(ctx.group, num_experts=4, hidden_size=128, top_k=1, weights="experts")
    topk_idx = torch.arange(4).unsqueeze(1)
    x = torch.arange(1, 5).unsqueeze(1).expand(4, 128).to(torch.float8_e4m3fn).contiguous()
    with torch.no_grad():
        routed = dispatcher.dispatch((x, topk_idx.float()), topk_idx, torch.ones(4, 1), out="arena")
    experts = torch.tensor([2 * ctx.rank, 2 * ctx.rank, 2 * ctx.rank + 1, 2 * ctx.rank + 1])
    assert torch.equal(routed.x[:, 0].float(), experts + 1.0)
    assert torch.equal(routed.scales[:, 0], experts.float())


def test_rows_may_come_in_fp8(ranks: Ranks) -> None:
    ranks(2, lend_fp8)


# Refusals


REFUSED = {
    "other string": r"out='Arena' must be \"private\" or \"arena\"",
    "grad mode": r'out="arena" cannot be used in grad mode.*torch\.no_grad\(\)',
    "wire_dtype": r'out="arena" cannot be used with wire_dtype=torch\.float8_e4m3fn.*out="private"',
    "x is lent": r'x lies in rows of a dispatch with out="arena".*x\.clone\(\)',
    "y is lent": r'y lies in rows of a dispatch with out="arena".*y\.clone\(\)',
}


def ask_wrongly(ctx: RankContext, fault: str, bad_ranks: tuple[int, ...], use_async: bool) -> Exception | None:
    wire = {"hidden_size": 128, "wire_dtype": torch.float8_e4m3fn} if fault == "wire_dtype" else {}
    tokens = (4,) * ctx.world_size
    case = Case(tokens=tokens, num_experts=6, top_k=2, hidden_size=wire.get("hidden_size", 8))
    # Peers that only noticed by this timeout would outlast the test.
    dispatcher = case.dispatcher(ctx.group, timeout_s=600, **wire)
    x, routing, bad = case.x(ctx.rank), case.routing(ctx.rank), ctx.rank in bad_ranks
    caught: Exception | None = None
    out = "arena"
    with torch.set_grad_enabled(bad and fault == "grad mode"):
        if fault == "other string" and bad:
            out = "Arena"
        if fault == "wire_dtype" and not bad:
            out = "private"
        try:
            if fault == "y is lent":
                routed = dispatcher.dispatch(x, *routing, out="arena")
                dispatcher.combine(routed.x if bad else routed.x * 2, routed.handle, routed.weights)
            else:
                if fault == "x is lent":
                    rows = dispatcher.dispatch(x, *routing, out="arena").x
                    # Every rank holds as many.
                    x = rows[:4].contiguous() if bad else x
                if use_async:
                    dispatcher.dispatch_async(x, *routing, out=out).wait()
                else:
                    dispatcher.dispatch(x, *routing, out=out)
        except (ValueError, PeerAbortedError) as error:
            caught = error
    if not wire:
        # Nothing is lost: the next exchange of the same dispatcher works.
        round_trip(ctx, case, dispatcher)
    return caught


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_on_one_rank_ends_all(ranks: Ranks, fault: str, use_async: bool) -> None:
    results = ranks(3, ask_wrongly, fault, (1,), use_async)
    own = results[1]
    assert isinstance(own, ValueError)
    with pytest.raises(ValueError, match=REFUSED[fault]):
        raise own
    for rank in (0, 2):
        assert isinstance(results[rank], PeerAbortedError)
        assert results[rank].reason == f"ValueError: {own}"


@pytest.mark.parametrize("fault", ["other string", "grad mode", "wire_dtype"])
def test_a_refusal_on_all_ranks(ranks: Ranks, fault: str) -> None:
    for error in ranks(2, ask_wrongly, fault, (0, 1), False):
        with pytest.raises(ValueError, match=REFUSED[fault]):
            raise error


def test_graphs_do_not_lend() -> None:
    case = Case(tokens=(4,), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(None)
    x, routing = case.x(0), case.routing(0)

    def run() -> torch.Tensor:
        return dispatcher.dispatch(x, *routing, out="arena").x + 1

    torch._dynamo.reset()
    # Whatever the compiler makes of the error, it says which it was.
    with torch.no_grad(), pytest.raises(Exception, match=r"out=.{0,2}arena.{0,2} cannot be used under torch\.compile"):
        torch.compile(run, backend="eager", fullgraph=True)()


def differ(ctx: RankContext) -> str:
    group = ctx.new_group()
    dispatcher = CASE.dispatcher(group, buffer=Buffer(group, backend="torch", timeout_s=20))
    with torch.no_grad(), pytest.raises(ExchangeMismatchError) as caught:
        dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank), out="arena" if ctx.rank == 1 else "private")
    return str(caught.value)


def test_ranks_that_differ_are_told(ranks: Ranks) -> None:
    assert all('out="arena"' in text for text in ranks(3, differ))


def launch_before_wait(ctx: RankContext) -> str:
    case = Case(tokens=(4, 5), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(ctx.group)
    with torch.no_grad():
        pending = dispatcher.dispatch_async(case.x(ctx.rank), *case.routing(ctx.rank), out="arena")
        round_trip(ctx, case, dispatcher)
        with pytest.raises(MoeEpError) as caught:
            pending.wait()
        round_trip(ctx, case, dispatcher)
    return str(caught.value)


def test_rows_that_are_over_cannot_be_waited_for(ranks: Ranks) -> None:
    assert all("another exchange of its Buffer was launched before wait()" in t for t in ranks(2, launch_before_wait))


def test_an_empty_tensor_shares_no_memory() -> None:
    case = Case(tokens=(0,), num_experts=6, top_k=2)
    dispatcher = case.dispatcher(None)
    with torch.no_grad():
        routed = lend(RankContext(0, 1, None), case, dispatcher)
        assert dispatcher.combine(routed.x + 1, routed.handle, routed.weights).shape == (0, 8)
