"""Exchanges under activation checkpointing: both modes, around all and parts of a layer, several layers at once."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moe_ep
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import (
    MODES,
    Leaves,
    Ranks,
    apply_experts,
    check_grads,
    for_combine,
    make_case,
    make_leaves,
    probe,
    run_layer,
    unsharded,
)

# What lies inside checkpoints, by initials: "de" is one checkpoint around dispatch and experts.
SPANS = [("dec",), ("de",), ("ec",), ("d",), ("e",), ("c",), ("d", "e", "c"), ("de", "c")]
Wrap = Callable[..., Callable]


class Layer:
    """A layer in three parts, each a function of the tensors that it differentiates."""

    def __init__(self, case: Case, dispatcher: moe_ep.TokenDispatcher, topk_idx: Tensor, use_async: bool) -> None:
        self.case, self.dispatcher, self.topk_idx, self.use_async = case, dispatcher, topk_idx, use_async

    def dispatch(self, x: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor, moe_ep.Dispatched]:
        if self.use_async:
            routed = self.dispatcher.dispatch_async(x, self.topk_idx, topk_weights).wait()
        else:
            routed = self.dispatcher.dispatch(x, self.topk_idx, topk_weights)
        return routed.x, routed.weights, routed

    def experts(self, rows: Tensor, weights: Tensor, matrices: Tensor, routed: moe_ep.Dispatched) -> Tensor:
        return apply_experts(self.case, routed, rows, weights, matrices)

    def combine(self, y: Tensor, weights: Tensor, routed: moe_ep.Dispatched) -> Tensor:
        given = for_combine(self.case, weights)
        if self.use_async:
            return self.dispatcher.combine_async(y, routed.handle, given).wait()
        return self.dispatcher.combine(y, routed.handle, given)

    def dispatch_and_experts(self, x: Tensor, topk_weights: Tensor, matrices: Tensor) -> tuple:
        rows, weights, routed = self.dispatch(x, topk_weights)
        return self.experts(rows, weights, matrices, routed), weights, routed

    def experts_and_combine(self, rows: Tensor, weights: Tensor, matrices: Tensor, routed: moe_ep.Dispatched) -> Tensor:
        return self.combine(self.experts(rows, weights, matrices, routed), weights, routed)

    def whole(self, x: Tensor, topk_weights: Tensor, matrices: Tensor) -> Tensor:
        return self.combine(*self.dispatch_and_experts(x, topk_weights, matrices))

    def run(self, leaves: Leaves, spans: Sequence[str], wrap: Wrap) -> Tensor:
        """The layer with ``spans`` inside checkpoints."""

        def part(fn: Callable, name: str) -> Callable:
            return wrap(fn) if name in spans else fn

        x, topk_weights, matrices = leaves
        if "dec" in spans:
            return part(self.whole, "dec")(x, topk_weights, matrices)
        if "de" in spans:
            y, weights, routed = part(self.dispatch_and_experts, "de")(x, topk_weights, matrices)
        else:
            rows, weights, routed = part(self.dispatch, "d")(x, topk_weights)
            if "ec" in spans:
                return part(self.experts_and_combine, "ec")(rows, weights, matrices, routed)
            y = part(self.experts, "e")(rows, weights, matrices, routed)
        return part(self.combine, "c")(y, weights, routed)


def wrapper(use_reentrant: bool) -> Wrap:
    return lambda fn: functools.partial(checkpoint, fn, use_reentrant=use_reentrant)


def make_layers(ctx: RankContext, case: Case, use_async: bool, count: int = 1) -> list[Layer]:
    """Layers with a dispatcher each, over one Buffer."""
    topk_idx = case.routing(ctx.rank)[0]
    return [Layer(case, case.dispatcher(ctx.group), topk_idx, use_async) for _ in range(count)]


def backward(ctx: RankContext, layers: list[Layer], spans: Sequence[str], wrap: Wrap) -> tuple[list[Tensor], int]:
    """Output and gradients of layers behind each other, and how many exchanges all of it took."""
    case = layers[0].case
    leaves = [make_leaves(case, ctx.rank) for _ in layers]
    before = sum(layer.dispatcher.stats()["exchanges"] for layer in layers)
    out = leaves[0].x
    for layer, own in zip(layers, leaves, strict=True):
        out = layer.run(own._replace(x=out), spans, wrap)
    (out * probe(case, ctx.rank)).sum().backward()
    grads = [leaf.grad for own in leaves for leaf in own if leaf.grad is not None]
    assert len(grads) == 1 + 2 * len(layers)
    return [out.detach(), *grads], sum(layer.dispatcher.stats()["exchanges"] for layer in layers) - before


def check_spans(ctx: RankContext, mode: str, use_async: bool, count: int) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    layers = make_layers(ctx, case, use_async, count)
    plain, exchanges = backward(ctx, layers, (), wrapper(True))
    assert exchanges == 4 * count
    if count == 1:
        outs, grads = unsharded(case)
        check_grads(plain[1:], grads[ctx.rank])
    for spans in SPANS:
        for use_reentrant in (True, False):
            ours, exchanges = backward(ctx, layers, spans, wrapper(use_reentrant))
            for a, b in zip(ours, plain, strict=True):
                # The plan of the recomputation equals the first, so nothing may differ in a single bit.
                assert torch.equal(a, b), f"{spans}, reentrant={use_reentrant}"
            repeated = count * sum(span.count("d") + span.count("c") for span in spans)
            # The other mode may stop as soon as it has what backward needs.
            assert exchanges <= 4 * count + repeated
            assert exchanges == 4 * count + repeated or not use_reentrant


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_checkpoints_around_parts_give_the_same_bits(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(2, check_spans, mode, use_async, 1)


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["expanded", "compact"])
def test_two_layers_replay_after_each_other(ranks: Ranks, mode: str, use_async: bool) -> None:
    ranks(3, check_spans, mode, use_async, 2)


def check_interleaved(ctx: RankContext, use_async: bool) -> None:
    """Two micro-batches in one layer: backward of the older one runs after forward of the younger one."""
    case = make_case(ctx.world_size)
    (layer,) = make_layers(ctx, case, use_async)
    grads = unsharded(case)[1][ctx.rank]
    for use_reentrant in (True, False):
        wrap = wrapper(use_reentrant)
        batches = [make_leaves(case, ctx.rank) for _ in range(3)]
        outs = [layer.run(leaves, ("dec",), wrap) for leaves in batches[:2]]
        outs[0].backward(probe(case, ctx.rank))
        outs.append(layer.run(batches[2], ("de",), wrap))
        for out in outs[1:]:
            out.backward(probe(case, ctx.rank))
        for leaves in batches:
            check_grads(leaves.grads(), grads)


@pytest.mark.parametrize("use_async", [False, True])
def test_micro_batches_interleave(ranks: Ranks, use_async: bool) -> None:
    ranks(3, check_interleaved, use_async)


def check_empty_and_frozen(ctx: RankContext) -> None:
    # One rank has no tokens, another an input without gradient: reentrant checkpoints need one input with a gradient.
    case = make_case(ctx.world_size)
    (layer,) = make_layers(ctx, case, False)
    grads = unsharded(case)[1][ctx.rank]
    for use_reentrant in (True, False):
        leaves = make_leaves(case, ctx.rank)
        leaves.x.requires_grad_(ctx.rank != 0)
        layer.run(leaves, ("dec",), wrapper(use_reentrant)).backward(probe(case, ctx.rank))
        assert (leaves.x.grad is None) == (ctx.rank == 0)
        check_grads(leaves.grads(), grads)


def test_an_input_without_gradient_on_one_rank(ranks: Ranks) -> None:
    ranks(3, check_empty_and_frozen)


def recompute_flags(ctx: RankContext, use_reentrant: bool, use_async: bool) -> list[tuple[str, bool]]:
    case = make_case(ctx.world_size)
    (layer,) = make_layers(ctx, case, use_async)
    seen: list[tuple[str, bool]] = []
    for phase in moe_ep.hooks.PHASES:
        layer.dispatcher.register_hook(phase, lambda event: seen.append((event.phase, event.recompute)))
    layer.run(make_leaves(case, ctx.rank), ("de",), wrapper(use_reentrant)).sum().backward()
    return seen


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hooks_tell_a_recomputation(ranks: Ranks, use_reentrant: bool, use_async: bool) -> None:
    first = [(f"{kind}_{moment}", False) for kind in ("dispatch", "combine") for moment in ("launched", "ready")]
    back = [(f"backward_{phase}", False) for phase, _ in first]
    again = [("dispatch_launched", True), ("dispatch_ready", True)]
    for seen in ranks(2, recompute_flags, use_reentrant, use_async):
        # Backward of combine needs y, so the other mode recomputes before its exchange is ready.
        assert [pair for pair in seen if pair not in again] == [*first, *back[2:], *back[:2]]
        assert [pair for pair in seen if pair in again] == again
        assert seen.index(back[1]) > seen.index(again[1]) > seen.index(first[3])


def check_selective(ctx: RankContext, mode: str) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    layers = make_layers(ctx, case, False, 2)
    plain, exchanges = backward(ctx, layers, (), wrapper(False))
    assert exchanges == 8
    saved = [torch.ops.moe_ep.dispatch.default, torch.ops.moe_ep.combine.default]
    for ops, repeated in ((saved, 0), (saved[:1], 1), (saved[1:], 1), ([torch.ops.aten.bmm.default], 2)):
        contexts = functools.partial(create_selective_checkpoint_contexts, ops)

        def wrap(fn: Callable, contexts: Callable = contexts) -> Callable:
            return functools.partial(checkpoint, fn, use_reentrant=False, context_fn=contexts, early_stop=False)

        ours, exchanges = backward(ctx, layers, ("dec",), wrap)
        assert exchanges == 8 + 2 * repeated
        for a, b in zip(ours, plain, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["expanded", "compact", "slab"])
def test_exchanges_in_a_save_list_are_not_repeated(ranks: Ranks, mode: str) -> None:
    ranks(2, check_selective, mode)


def test_a_compact_run_through_checkpoints_without_a_group() -> None:
    case = make_case(1, **MODES["compact"])
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)

    def layer(x: Tensor, topk_weights: Tensor, matrices: Tensor) -> Tensor:
        return run_layer(case, dispatcher, Leaves(x, topk_weights, matrices), case.routing(0)[0])

    checkpoint(layer, *leaves, use_reentrant=True).backward(probe(case, 0))
    check_grads(leaves.grads(), unsharded(case)[1][0])
