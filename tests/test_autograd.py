"""Gradients of exchanges: against finite differences, against the unsharded computation, and with parts left out."""

import pytest
import torch
from torch.autograd import gradcheck

from moe_ep import Dispatched, TokenDispatcher
from moe_ep.config import Capacity
from moe_ep.testing import RankContext, distributed_gradcheck
from tests.checks import Case
from tests.sharded import (
    EXACT,
    MODES,
    Leaves,
    Ranks,
    apply_experts,
    check_against_unsharded,
    check_grads,
    for_combine,
    make_case,
    make_leaves,
    probe,
    run_layer,
    unsharded,
)

CAPACITIES = [Capacity(rows=64), Capacity(per_expert=20), Capacity(factor=6.0)]
TINY = {"num_experts": 4, "top_k": 2, "hidden_size": 2}


def rows_used(case: Case, routed: Dispatched) -> torch.Tensor:
    """Mask of the rows that are defined: all of them but the rest of a slab."""
    if case.layout != "slab":
        return torch.ones(routed.x.shape[0], dtype=torch.bool)
    return torch.arange(routed.x.shape[1]) < routed.tokens_per_expert.unsqueeze(1)


# Finite differences


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_async", [False, True])
def test_gradcheck_of_the_round_trip_on_one_rank(mode: str, use_async: bool) -> None:
    case = make_case(1, tokens=(3,), **TINY, **MODES[mode])
    dispatcher, topk_idx = case.dispatcher(None), case.routing(0)[0]

    def layer(*leaves: torch.Tensor) -> torch.Tensor:
        return run_layer(case, dispatcher, Leaves(*leaves), topk_idx, use_async=use_async)

    assert gradcheck(layer, tuple(make_leaves(case, 0)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_async", [False, True])
def test_gradcheck_of_dispatch_alone(mode: str, use_async: bool) -> None:
    case = make_case(1, tokens=(3,), **TINY, **MODES[mode])
    dispatcher, topk_idx = case.dispatcher(None), case.routing(0)[0]

    def dispatch(x: torch.Tensor, topk_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if use_async:
            routed = dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
        else:
            routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        used = rows_used(case, routed)
        weights = routed.weights if case.layout == "compact" else torch.where(used, routed.weights, 0.0)
        return torch.where(used.unsqueeze(-1), routed.x, 0.0), weights

    assert gradcheck(dispatch, tuple(make_leaves(case, 0)[:2]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use_async", [False, True])
def test_gradcheck_of_combine_alone(mode: str, use_async: bool) -> None:
    case = make_case(1, tokens=(3,), **TINY, **MODES[mode])
    dispatcher = case.dispatcher(None)
    with torch.no_grad():
        routed = dispatcher.dispatch(case.x(0), *case.routing(0))
    y = torch.randn(routed.x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = torch.rand(routed.weights.shape, dtype=torch.float64).requires_grad_()

    used = rows_used(case, routed)

    def combine(y: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        # Gradients of undefined rows are as undefined as they are.
        y = torch.where(used.unsqueeze(-1), y, float("nan"))
        weights = weights if weights is None else torch.where(used, weights, float("nan"))
        if use_async:
            return dispatcher.combine_async(y, routed.handle, weights).wait()
        return dispatcher.combine(y, routed.handle, weights)

    assert gradcheck(combine, (y, weights) if case.weights == "combine" else (y,))


def check_differences(ctx: RankContext, modes: list[str], use_async: bool) -> None:
    for mode in modes:
        case = make_case(ctx.world_size, **{**TINY, "num_experts": 2 * ctx.world_size}, **MODES[mode])
        dispatcher, topk_idx = case.dispatcher(ctx.group), case.routing(ctx.rank)[0]

        def layer(*leaves: torch.Tensor, case=case, dispatcher=dispatcher, topk_idx=topk_idx) -> torch.Tensor:
            return run_layer(case, dispatcher, Leaves(*leaves), topk_idx, use_async=use_async)

        assert distributed_gradcheck(layer, make_leaves(case, ctx.rank), group=ctx.group, max_elements=4)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_differences_with_uneven_ranks(ranks: Ranks, num_ranks: int) -> None:
    ranks(num_ranks, check_differences, ["expanded", "aligned", "compact", "slab, experts"], False)
    ranks(num_ranks, check_differences, ["expanded, experts"], True)


def gradcheck_in_step(ctx: RankContext, mode: str, use_async: bool) -> None:
    # Equal T and frozen experts: every rank's output then follows from its own leaves, in equally many calls.
    case = make_case(ctx.world_size, tokens=(2,) * ctx.world_size, **TINY, **MODES[mode])
    dispatcher, topk_idx = case.dispatcher(ctx.group), case.routing(ctx.rank)[0]
    matrices = make_leaves(case, ctx.rank).matrices.detach()

    def layer(x: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        return run_layer(case, dispatcher, Leaves(x, topk_weights, matrices), topk_idx, use_async=use_async)

    assert gradcheck(layer, tuple(make_leaves(case, ctx.rank)[:2]))


@pytest.mark.parametrize(("mode", "use_async"), [("expanded", False), ("compact", True)])
def test_gradcheck_of_the_round_trip_with_equal_tokens(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(2, gradcheck_in_step, mode, use_async)


# Equality with the unsharded computation


def check_all_modes(ctx: RankContext, use_async: bool) -> None:
    for seed, (mode, kind) in enumerate(
        [*((mode, "holes") for mode in MODES), ("expanded", "one"), ("compact", "zipf")]
    ):
        case = make_case(ctx.world_size, kind=kind, seed=seed, **MODES[mode])
        check_against_unsharded(ctx, case, case.dispatcher(ctx.group), use_async=use_async)
    # Rows cross once per choice when few are made, once per (token, rank) when many are.
    for shape in ({"num_experts": ctx.world_size, "top_k": 1}, {"num_experts": 2 * ctx.world_size, "top_k": 2}):
        case = make_case(ctx.world_size, **shape)
        check_against_unsharded(ctx, case, case.dispatcher(ctx.group), use_async=use_async)
    for capacity in CAPACITIES:
        settings = {"capacity": capacity, "max_tokens_per_rank": 9}
        for layout in ({}, {"alignment": 4, "weights": "experts"}):
            case = make_case(ctx.world_size, **settings, **layout)
            check_against_unsharded(ctx, case, case.dispatcher(ctx.group), use_async=use_async)
    case = make_case(ctx.world_size, capacity=Capacity(rows=64), **MODES["compact"])
    check_against_unsharded(ctx, case, case.dispatcher(ctx.group), use_async=use_async)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("use_async", [False, True])
def test_gradients_equal_the_unsharded_ones(ranks: Ranks, num_ranks: int, use_async: bool) -> None:
    ranks(num_ranks, check_all_modes, use_async)


# Parts left out


def backward_by_stages(
    ctx: RankContext, case: Case, dispatcher: TokenDispatcher, use_async: bool
) -> tuple[list[Leaves], list[torch.Tensor]]:
    """Two micro-batches through detached stages, gradients handed over by hand, the older one first (1F1B)."""
    topk_idx = case.routing(ctx.rank)[0]
    leaves, stages = [make_leaves(case, ctx.rank) for _ in range(2)], []
    for x, topk_weights, matrices in leaves:
        if use_async:
            routed = dispatcher.dispatch_async(x, topk_idx, topk_weights).wait()
        else:
            routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        rows, weights = (t.detach().requires_grad_() for t in (routed.x, routed.weights))
        y = apply_experts(case, routed, rows, weights, matrices)
        y_in, weights_in = y.detach().requires_grad_(), weights.detach().requires_grad_()
        if use_async:
            out = dispatcher.combine_async(y_in, routed.handle, for_combine(case, weights_in)).wait()
        else:
            out = dispatcher.combine(y_in, routed.handle, for_combine(case, weights_in))
        stages.append((routed, rows, weights, y, y_in, weights_in, out))
    for routed, rows, weights, y, y_in, weights_in, out in stages:
        out.backward(probe(case, ctx.rank))
        y.backward(y_in.grad)
        weight_grad = weights.grad if case.weights == "experts" else weights_in.grad
        torch.autograd.backward([routed.x, routed.weights], [rows.grad, weight_grad])
    return leaves, [stage[-1] for stage in stages]


def check_stages(ctx: RankContext, mode: str, use_async: bool) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    outs, grads = unsharded(case)
    leaves, ours = backward_by_stages(ctx, case, case.dispatcher(ctx.group), use_async)
    for leaf, out in zip(leaves, ours, strict=True):
        torch.testing.assert_close(out, outs[ctx.rank], **EXACT)
        check_grads(leaf.grads(), grads[ctx.rank])


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["expanded", "aligned", "compact", "slab, experts"])
def test_detached_stages_give_the_same_gradients(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(2, check_stages, mode, use_async)


# Which leaves require no gradient, by rank; "all": on every rank.
FROZEN = {
    "experts": {"all": ("matrices",)},
    "router": {"all": ("topk_weights",)},
    "input": {"all": ("x",)},
    "input on one rank": {0: ("x",)},
    "everything but the experts on one rank": {0: ("x", "topk_weights")},
    "everything on one rank": {2: ("x", "topk_weights", "matrices")},
    "everything": {"all": ("x", "topk_weights", "matrices")},
}


def check_frozen(ctx: RankContext, mode: str, use_async: bool) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    outs, grads = unsharded(case)
    dispatcher = case.dispatcher(ctx.group)
    for frozen in FROZEN.values():
        leaves = make_leaves(case, ctx.rank)
        names = frozen.get("all", frozen.get(ctx.rank, ()))
        for name in names:
            getattr(leaves, name).requires_grad_(False)
        before = dispatcher.stats()["exchanges"]
        out = run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0], use_async=use_async)
        torch.testing.assert_close(out, outs[ctx.rank], **EXACT)
        out.backward(probe(case, ctx.rank))
        assert dispatcher.stats()["exchanges"] == before + 4
        assert [getattr(leaves, name).grad is None for name in Leaves._fields] == [n in names for n in Leaves._fields]
        check_grads(leaves.grads(), grads[ctx.rank])


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["expanded", "compact"])
def test_frozen_parts_pass_the_other_gradients(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(3, check_frozen, mode, use_async)


def use_one_output(ctx: RankContext, use_async: bool) -> None:
    case = make_case(ctx.world_size)
    dispatcher, topk_idx = case.dispatcher(ctx.group), case.routing(ctx.rank)[0]
    chosen = (topk_idx >= 0).double()
    # Ranks may use rows alone, weights alone, or each another one.
    for uses in (["rows"] * 3, ["weights"] * 3, ["rows", "weights", "rows"]):
        leaves = make_leaves(case, ctx.rank)
        if use_async:
            routed = dispatcher.dispatch_async(leaves.x, topk_idx, leaves.topk_weights).wait()
        else:
            routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights)
        before = dispatcher.stats()["exchanges"]
        (routed.x if uses[ctx.rank] == "rows" else routed.weights).sum().backward()
        assert dispatcher.stats()["exchanges"] == before + 1
        # A choice counts where the rank that it went to summed what came.
        counts = {what: torch.tensor([float(use == what) for use in uses]).double() for what in ("rows", "weights")}
        owner = topk_idx.clamp(min=0) // dispatcher.num_local_experts
        dx = (chosen * counts["rows"][owner]).sum(1, keepdim=True).expand_as(leaves.x)
        torch.testing.assert_close(leaves.x.grad, dx, **EXACT)
        torch.testing.assert_close(leaves.topk_weights.grad, chosen * counts["weights"][owner], **EXACT)


@pytest.mark.parametrize("use_async", [False, True])
def test_rows_or_weights_may_stay_unused(ranks: Ranks, use_async: bool) -> None:
    ranks(3, use_one_output, use_async)


def skip_gradients(ctx: RankContext) -> tuple[bool, int]:
    case = make_case(ctx.world_size)
    dispatcher, leaves = case.dispatcher(ctx.group), make_leaves(case, ctx.rank)
    with torch.no_grad():
        out = run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0])
    with torch.inference_mode():
        run_layer(case, dispatcher, leaves, case.routing(ctx.rank)[0], use_async=True)
    return out.requires_grad, dispatcher.stats()["exchanges"]


def test_without_grad_mode_nothing_is_kept(ranks: Ranks) -> None:
    assert ranks(2, skip_gradients) == [(False, 4)] * 2


def differentiate_twice(ctx: RankContext, part: str, use_async: bool) -> str:
    case = make_case(ctx.world_size)
    dispatcher, leaves = case.dispatcher(ctx.group), make_leaves(case, ctx.rank)
    topk_idx = case.routing(ctx.rank)[0]
    if part == "layer":
        out = run_layer(case, dispatcher, leaves, topk_idx, use_async=use_async)
        inputs, target = (leaves.x, leaves.matrices), leaves.matrices
    elif use_async:
        out, inputs, target = dispatcher.dispatch_async(*leaves[:1], topk_idx, leaves[1]).wait().x, leaves[:1], leaves.x
    else:
        out, inputs, target = dispatcher.dispatch(*leaves[:1], topk_idx, leaves[1]).x, leaves[:1], leaves.x
    # The cotangent depends on the leaves, so that first gradients do as well.
    grads = torch.autograd.grad((out * out).sum(), inputs, create_graph=True)
    before = dispatcher.stats()["exchanges"]
    try:
        torch.autograd.grad(sum(g.square().sum() for g in grads), target)
    except RuntimeError as error:
        assert dispatcher.stats()["exchanges"] == before
        return str(error)
    return ""


@pytest.mark.parametrize("part", ["layer", "dispatch"])
def test_differentiating_twice_raises(ranks: Ranks, part: str) -> None:
    for use_async in (False, True):
        for text in ranks(2, differentiate_twice, part, use_async):
            assert "differentiated once" in text or "no autograd formula" in text


def count_exchanges(ctx: RankContext, use_async: bool) -> list[tuple[int, int, int]]:
    case = make_case(ctx.world_size, kind="uniform")
    dispatcher, topk_idx = case.dispatcher(ctx.group), case.routing(ctx.rank)[0]
    phases = ("dispatch", "combine", "backward_dispatch", "backward_combine")
    seen: list[str] = []
    for phase in phases:
        dispatcher.register_hook(f"{phase}_launched", lambda event: seen.append(event.phase))

    def counters() -> tuple[int, int, int]:
        # The last one counts headers on the wire.
        return dispatcher.stats()["exchanges"], len(seen), dispatcher.buffer.control.seq

    start = counters()
    out = run_layer(case, dispatcher, make_leaves(case, ctx.rank), topk_idx, use_async=use_async)
    middle = counters()
    out.sum().backward()
    return [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in ((start, middle), (middle, counters()))]


@pytest.mark.parametrize("use_async", [False, True])
def test_two_exchanges_forward_and_two_backward(ranks: Ranks, use_async: bool) -> None:
    assert ranks(3, count_exchanges, use_async) == [[(2, 2, 2), (2, 2, 2)]] * 3
