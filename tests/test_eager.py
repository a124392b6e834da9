"""Exchanges with gradients that take no operators: the bits of operators, wherever one or the other is taken."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import moe_ep
import moe_ep.dispatcher
from moe_ep.eager import EagerCombine, EagerDispatch
from moe_ep.errors import StaleHandleError
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import MODES, Leaves, Ranks, check_grads, make_case, make_leaves, probe, run_layer, unsharded


@contextlib.contextmanager
def counted() -> Any:
    """How often each Function is applied inside."""
    found = dict.fromkeys((EagerDispatch, EagerCombine), 0)

    class Counting:
        def __init__(self, function: type) -> None:
            self.function = function

        def apply(self, *args: object) -> object:
            found[self.function] += 1
            return self.function.apply(*args)  # type: ignore[attr-defined]

    names = {function.__name__: function for function in found}
    with pytest.MonkeyPatch.context() as patch:
        for name, function in names.items():
            patch.setattr(moe_ep.dispatcher, name, Counting(function))
        yield found


def results(case: Case, rank: int, dispatcher: moe_ep.TokenDispatcher) -> list[Tensor]:
    leaves = make_leaves(case, rank)
    out = run_layer(case, dispatcher, leaves, case.routing(rank)[0])
    (out * probe(case, rank)).sum().backward()
    return [out.detach(), *leaves.grads()]  # type: ignore[list-item]


def compare_with_operators(ctx: RankContext, mode: str) -> None:
    case = make_case(ctx.world_size, **MODES[mode])
    dispatcher = case.dispatcher(ctx.group)
    with counted() as found:
        eager = results(case, ctx.rank, dispatcher)
    assert list(found.values()) == [1, 1]
    with counted() as found, torch.autograd.profiler.profile():
        operators = results(case, ctx.rank, dispatcher)
    assert list(found.values()) == [0, 0]
    for ours, theirs in zip(eager, operators, strict=True):
        assert torch.equal(ours, theirs)


class Mode(TorchFunctionMode):
    """Sees functions of torch, and lets them be."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_gives_the_bits_of_operators(ranks: Ranks, mode: str) -> None:
    ranks(2, compare_with_operators, mode)


@pytest.mark.parametrize("mode", ["expanded", "compact"])
def test_a_checkpoint_computes_again_what_it_has_saved(mode: str) -> None:
    """Its forward runs under a mode, as that of a tool that counts, say; what is computed again does not.

    With plans of the CUDA backend, whose tensors are fewer here than those of operators.
    """
    pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")
    from tests.test_compile_cuda import StandIn

    case = make_case(1, **MODES[mode])
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    StandIn(dispatcher)
    with counted() as found:
        results(case, 0, dispatcher)
    assert list(found.values()) == [1, 1]

    def layer(*tensors: Tensor) -> Tensor:
        return run_layer(case, dispatcher, Leaves(*tensors), case.routing(0)[0])

    with Mode():
        out = checkpoint(layer, *leaves, use_reentrant=False)
    out.backward(probe(case, 0))
    check_grads(leaves.grads(), unsharded(case)[1][0])


def test_backward_again_needs_the_graph_to_be_retained() -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    out = run_layer(case, dispatcher, leaves, case.routing(0)[0])
    for times in (1, 2):
        out.backward(probe(case, 0), retain_graph=times == 1)
        check_grads([grad / times for grad in leaves.grads()], unsharded(case)[1][0])  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(probe(case, 0))


def test_backward_without_the_dispatcher_says_so() -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    out = run_layer(case, dispatcher, leaves, case.routing(0)[0])
    del dispatcher
    with pytest.raises(StaleHandleError, match="keep it alive"):
        out.backward(probe(case, 0))


def test_rows_without_a_use_have_zero_gradients() -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    routed = dispatcher.dispatch(leaves.x, case.routing(0)[0], leaves.topk_weights)
    routed.weights.sum().backward()
    assert leaves.x.grad is not None
    assert not leaves.x.grad.any()
    assert torch.equal(leaves.topk_weights.grad, (case.routing(0)[0] >= 0).to(torch.float64))


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    with torch.autograd.graph.save_on_cpu():
        out = run_layer(case, dispatcher, leaves, case.routing(0)[0])
    out.backward(probe(case, 0))
    check_grads(leaves.grads(), unsharded(case)[1][0])
