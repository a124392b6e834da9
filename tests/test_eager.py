"""Exchanges with gradients that take no operators: the bits of operators, wherever one or the other is taken."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import moe_ep
import moe_ep.dispatcher
from moe_ep.backends.cuda_link import aligned
from moe_ep.eager import EagerCombine, EagerDispatch
from moe_ep.errors import StaleHandleError
from moe_ep.handle import CudaPlan, Plan
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


def plan_beforehand(ctx: RankContext, mode: str) -> None:
    """A dispatch whose counts were exchanged before, with gradients, without, and where somebody watches."""
    case = make_case(ctx.world_size, **MODES[mode])
    dispatcher, (topk_idx, _) = case.dispatcher(ctx.group), case.routing(ctx.rank)
    found = []
    for way in ("eager", "no grad", "watched"):
        leaves, (planned,) = make_leaves(case, ctx.rank), dispatcher.plan([topk_idx])
        watched = torch.autograd.profiler.profile() if way == "watched" else contextlib.nullcontext()
        with counted() as times, watched, torch.set_grad_enabled(way != "no grad"):
            routed = dispatcher.dispatch(leaves.x, topk_idx, leaves.topk_weights, planned)
        assert times[EagerDispatch] == int(way == "eager")
        rows, weights = routed.x.detach(), routed.weights.detach()
        if case.layout == "slab":
            # What is behind a group's last row is anything.
            real = torch.arange(rows.shape[1]) < routed.tokens_per_expert.unsqueeze(1)
            rows, weights = rows[real], weights[real]
        tensors = [rows, weights, routed.tokens_per_expert, routed.expert_ends]
        if way != "no grad":
            (routed.x.sum() + routed.weights.sum()).backward()
            tensors += [leaves.x.grad, leaves.topk_weights.grad]
        assert (routed.overflow is None) == (case.capacity is None)
        found.append(tensors)
    for eager, watched_one in zip(found[0], found[2], strict=True):
        assert torch.equal(eager, watched_one)
    for eager, plain in zip(found[0], found[1], strict=False):
        assert torch.equal(eager, plain)


@pytest.mark.parametrize("mode", ["expanded", "compact", "slab"])
def test_planned_dispatches_give_the_same(ranks: Ranks, mode: str) -> None:
    ranks(2, plan_beforehand, mode)


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


class Late(torch.autograd.Function):
    """Gives a gradient that a collective has yet to bring, as layers of tensor parallelism do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AsyncCollectiveTensor(grad)


@pytest.mark.parametrize("use_async", [False, True])
@pytest.mark.parametrize("mode", ["expanded", "compact", "slab"])
def test_exchanges_are_given_gradients_that_have_come(mode: str, use_async: bool) -> None:
    """Kernels would be given the address of a wrapper, which is none."""
    case = make_case(1, **MODES[mode])
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    exchanger, seen = dispatcher._live(), []

    def note(name: str) -> Any:
        whole = getattr(exchanger, name)

        def noted(*args: Any) -> Any:
            seen.extend(type(arg) for arg in args if isinstance(arg, Tensor))
            return whole(*args)

        return noted

    exchanger.replay, exchanger.combine_grads = note("replay"), note("combine_grads")  # type: ignore[method-assign]
    if use_async:
        routed = dispatcher.dispatch_async(leaves.x, case.routing(0)[0], leaves.topk_weights).wait()
    else:
        routed = dispatcher.dispatch(leaves.x, case.routing(0)[0], leaves.topk_weights)
    rows, weights = Late.apply(routed.x), Late.apply(routed.weights)
    y = apply_experts(case, routed, rows, weights, leaves.matrices)
    given = for_combine(case, weights)
    if use_async:
        out = dispatcher.combine_async(y, routed.handle, given).wait()
    else:
        out = dispatcher.combine(y, routed.handle, given)
    Late.apply(out).backward(probe(case, 0))
    assert seen == [Tensor] * 3
    check_grads(leaves.grads(), unsharded(case)[1][0])


@pytest.mark.parametrize("use_async", [False, True])
def test_exchanges_are_given_rows_that_have_come(use_async: bool) -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    exchanger, seen = dispatcher._live(), []
    dispatch, combine = exchanger.dispatch, exchanger.combine

    def note(*args: Any) -> None:
        seen.extend(type(arg) for arg in args if isinstance(arg, Tensor))

    exchanger.dispatch = lambda *args: (note(*args), dispatch(*args))[1]  # type: ignore[method-assign]
    exchanger.combine = lambda *args: (note(*args), combine(*args))[1]  # type: ignore[method-assign]
    late = [AsyncCollectiveTensor(t) for t in (leaves.x.detach(), case.routing(0)[0], leaves.topk_weights.detach())]
    routed = dispatcher.dispatch_async(*late).wait() if use_async else dispatcher.dispatch(*late)
    y, weights = AsyncCollectiveTensor(routed.x.detach()), AsyncCollectiveTensor(routed.weights.detach())
    if use_async:
        dispatcher.combine_async(y, routed.handle, weights).wait()
    else:
        dispatcher.combine(y, routed.handle, weights)
    assert seen == [Tensor] * 5


def test_kernels_are_given_no_wrapper() -> None:
    x = torch.arange(24.0).view(6, 4)
    for tensor in (x, x[:, 1:3], x[:0], x.flatten()[1:], AsyncCollectiveTensor(x)):
        got = aligned(tensor)
        assert type(got) is Tensor
        assert got.is_contiguous()
        assert got.data_ptr() % 16 == 0
        assert got.data_ptr() != 0 or got.numel() == 0
        assert torch.equal(got, tensor)


def test_a_backward_that_is_watched_shows_operators() -> None:
    case = make_case(1)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    out = run_layer(case, dispatcher, leaves, case.routing(0)[0])
    with torch.autograd.profiler.profile() as profile:
        out.backward(probe(case, 0))
    names = {event.name for event in profile.function_events}
    assert {"moe_ep::dispatch_replay", "moe_ep::weigh_grads", "moe_ep::combine_grads"} <= names
    check_grads(leaves.grads(), unsharded(case)[1][0])


def fields_of(plan: Any) -> list[Any]:
    """All that a plan holds, in order; tensors are told by what they hold."""
    found: list[Any] = []
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        found += fields_of(value) if dataclasses.is_dataclass(value) else [value]
    return [value.tolist() if isinstance(value, Tensor) else value for value in found]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("of_cuda", [False, True])
def test_a_plan_comes_together_again(mode: str, of_cuda: bool) -> None:
    case = make_case(1, **MODES[mode])
    dispatcher = case.dispatcher(None)
    if of_cuda:
        pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")
        from tests.test_compile_cuda import StandIn

        StandIn(dispatcher)
    plan = dispatcher.dispatch(case.x(0), *case.routing(0)).handle.plan
    assert isinstance(plan, CudaPlan) == of_cuda
    assert fields_of(Plan.together(*plan.apart())) == fields_of(plan)
    assert fields_of(Plan.from_tensors(plan.to_tensors())) == fields_of(plan)


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("of_cuda", [False, True])
def test_a_compiled_combine_takes_handles_of_any_dispatch(of_cuda: bool, with_grad: bool) -> None:
    case = make_case(1, capacity=moe_ep.Capacity(rows=40), max_tokens_per_rank=7)
    leaves, dispatcher = make_leaves(case, 0), case.dispatcher(None)
    if of_cuda:
        pytest.importorskip("moe_ep._C", reason="moe_ep._C is not built")
        from tests.test_compile_cuda import StandIn

        StandIn(dispatcher)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=False)
    def combine(y: Tensor, handle: moe_ep.DispatchHandle, weights: Tensor) -> Tensor:
        return dispatcher.combine(y * 2, handle, weights)

    for _ in range(4):
        with torch.set_grad_enabled(with_grad):
            routed = dispatcher.dispatch(leaves.x, case.routing(0)[0], leaves.topk_weights)
            out = combine(routed.x, routed.handle, routed.weights)
        if with_grad:
            out.sum().backward()
    assert counter.frame_count == 1


def test_handles_are_keys() -> None:
    case = make_case(1)
    dispatcher = case.dispatcher(None)
    handles = [dispatcher.dispatch(case.x(0), *case.routing(0)).handle for _ in range(2)]
    assert len({handles[0], handles[1], handles[0]}) == 2
