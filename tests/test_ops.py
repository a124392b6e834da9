"""Exchanges with and without operators: without a graph or a watcher they are left out, and nothing else differs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import moe_ep
from moe_ep.config import Capacity
from moe_ep.testing.worker import RankContext
from tests.checks import Case

Ranks = Callable[..., list]
CASES = [
    {"tokens": (7, 4)},
    {"tokens": (7, 4), "num_experts": 2, "top_k": 1},
    {"tokens": (9, 0), "kind": "holes", "alignment": 4},
    {"tokens": (7, 4), "kind": "one", "layout": "slab", "max_tokens_per_rank": 8},
    {"tokens": (7, 4), "layout": "compact", "weights": "experts"},
    {"tokens": (7, 4), "capacity": Capacity(per_expert=2), "on_overflow": "drop", "dtype": torch.bfloat16},
    {"tokens": (7,), "num_experts": 4},
]


class Seen(TorchDispatchMode):
    """Names of this library's operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        if func.namespace == "moe_ep":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def exchange(case: Case, dispatcher: moe_ep.TokenDispatcher, rank: int) -> tuple[list, torch.Tensor]:
    routed = dispatcher.dispatch(case.x(rank), *case.routing(rank))
    y = torch.nan_to_num(routed.x.detach()) * 3
    weights = routed.weights if case.weights == "combine" else None
    return [getattr(routed, name) for name in type(routed).__dataclass_fields__ if name != "handle"], (
        dispatcher.combine(y, routed.handle, weights)
    )


def compare(ctx: RankContext, settings: dict) -> list[str]:
    case = Case(**settings)
    dispatcher = case.dispatcher(ctx.group)
    phases: list[str] = []
    for phase in ("dispatch_launched", "dispatch_ready", "combine_launched", "combine_ready"):
        dispatcher.register_hook(phase, lambda event: phases.append(event.phase))
    with torch.no_grad():
        plain, plain_out = exchange(case, dispatcher, ctx.rank)
        with Seen() as seen:
            watched, watched_out = exchange(case, dispatcher, ctx.rank)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            exchange(case, dispatcher, ctx.rank)
    assert seen.names == ["dispatch", "combine"]
    assert {"moe_ep::dispatch", "moe_ep::combine"} <= {event.name for event in profiled.events()}
    graph, graph_out = exchange(case, dispatcher, ctx.rank)
    assert phases == ["dispatch_launched", "dispatch_ready", "combine_launched", "combine_ready"] * 4
    for other, out in ((watched, watched_out), (graph, graph_out)):
        assert torch.equal(plain_out, out)
        for mine, theirs in zip(plain, other, strict=True):
            if not isinstance(mine, torch.Tensor):
                assert mine == theirs
                continue
            assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
            # Rows past the last group are undefined.
            if case.layout != "slab" and not (case.capacity is not None and mine.is_floating_point()):
                assert torch.equal(mine, theirs)
    assert graph_out.requires_grad
    assert not plain_out.requires_grad
    return seen.names


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_operators_change_nothing(ranks: Ranks, settings: dict) -> None:
    ranks(len(settings["tokens"]), compare, settings) if len(settings["tokens"]) > 1 else compare(_alone(), settings)


def _alone() -> RankContext:
    return RankContext(0, 1, None)  # type: ignore[arg-type]


def use_plain_handle(ctx: RankContext) -> None:
    """A handle made without a graph serves a combine with one, and its gradient."""
    case = Case(tokens=(7, 4))
    dispatcher = case.dispatcher(ctx.group)
    with torch.no_grad():
        routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
        expected = dispatcher.combine(routed.x, routed.handle, routed.weights)
    y = routed.x.clone().requires_grad_()
    weights = routed.weights.clone().requires_grad_()
    for combine in (dispatcher.combine, lambda *args: dispatcher.combine_async(*args).wait()):
        out = combine(y, routed.handle, weights)
        assert torch.equal(out, expected)
        y.grad = weights.grad = None
        out.sum().backward()
        assert y.grad is not None
        assert weights.grad is not None
        # Each row's gradient is its weight times ones.
        assert torch.equal(y.grad, routed.weights.unsqueeze(1).expand_as(y))
        # A dot product of H = 8 terms with ones, in another order: at most 8 roundings of the sum of their sizes.
        bound = 8 * torch.finfo(torch.float32).eps * routed.x.abs().sum(1)
        assert bool(((weights.grad - routed.x.sum(1)).abs() <= bound).all())


def test_a_handle_made_without_a_graph_serves_one_with_it(ranks: Ranks) -> None:
    ranks(2, use_plain_handle)
