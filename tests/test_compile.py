"""The operators of moe_ep:: under torch.compile, and what torch demands of operators."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import moe_ep
from moe_ep.backends.control import ControlPlane
from moe_ep.config import Capacity
from moe_ep.ops import NUM_EXTRAS
from moe_ep.testing import RankContext
from tests.checks import Case
from tests.sharded import (
    EXACT,
    MODES,
    Leaves,
    Ranks,
    check_grads,
    make_case,
    make_leaves,
    probe,
    run_layer,
    unsharded,
)

ROOM = {"max_tokens_per_rank": 12}
COMPILED = {
    **{mode: MODES[mode] for mode in ("expanded", "compact", "slab", "slab, experts")},
    "rows": {"capacity": Capacity(rows=64), **ROOM},
    "per expert": {"capacity": Capacity(per_expert=20), "alignment": 4, **ROOM},
    "factor": {"capacity": Capacity(factor=8.0), "weights": "experts", **ROOM},
    "compact rows": {"capacity": Capacity(rows=64), **MODES["compact"]},
}
# Tokens of each rank, step after step: other sizes, an empty rank, one token.
STEPS = {1: [(6,), (4,), (9,), (0,), (1,)], 2: [(6, 3), (4, 7), (0, 5), (9, 1)]}


def compile_layer(case: Case, dispatcher: moe_ep.TokenDispatcher, backend: object) -> Callable[..., Tensor]:
    def layer(x: Tensor, topk_weights: Tensor, matrices: Tensor, topk_idx: Tensor) -> Tensor:
        return run_layer(case, dispatcher, Leaves(x, topk_weights, matrices), topk_idx)

    return torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)


def run_steps(
    rank: int,
    group: object,
    num_ranks: int,
    mode: str,
    compiler: str,
    adapt: Callable[[moe_ep.TokenDispatcher], object] = lambda dispatcher: None,
    device: str = "cpu",
    steps: Sequence[tuple[int, ...]] | None = None,
    **settings: object,
) -> int:
    """Forward and backward with changing token counts; returns how often something was compiled."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    run = dispatcher = None
    for seed, tokens in enumerate(steps or STEPS[num_ranks]):
        case = make_case(num_ranks, tokens=tokens, seed=seed, **COMPILED[mode])
        if run is None:
            dispatcher = case.dispatcher(group, timeout_s=90, **settings)
            adapt(dispatcher)
            run = compile_layer(case, dispatcher, counter)
        outs, grads = unsharded(case)
        leaves = make_leaves(case, rank).on(device)
        before = dispatcher.stats()["exchanges"]
        out = run(*leaves, case.routing(rank)[0].to(device))
        torch.testing.assert_close(out.cpu(), outs[rank], **EXACT)
        (out * probe(case, rank).to(device)).sum().backward()
        check_grads([leaf.cpu() for leaf in leaves.grads()], grads[rank])
        assert dispatcher.stats()["exchanges"] == before + 4
    return counter.frame_count


# The other modes run on two ranks, and with plans of the CUDA backend on one.
@pytest.mark.parametrize("mode", ["slab", "rows", "factor", "compact rows"])
def test_compiles_into_one_graph_without_a_group(mode: str) -> None:
    # Sizes 0 and 1 are special to the compiler; the others share one graph.
    assert run_steps(0, None, 1, mode, "aot_eager") <= 3


def compile_on_ranks(ctx: RankContext, mode: str) -> int:
    return run_steps(ctx.rank, ctx.group, ctx.world_size, mode, "aot_eager")


@pytest.mark.parametrize("mode", ["expanded", "compact", "slab, experts", "per expert"])
def test_compiles_into_one_graph_on_two_ranks(ranks: Ranks, mode: str) -> None:
    assert all(count <= 3 for count in ranks(2, compile_on_ranks, mode, timeout=120))


@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside: bool) -> None:
    case = make_case(1, tokens=(6,), dtype=torch.float32)
    dispatcher = case.dispatcher(None)
    x, (topk_idx, topk_weights) = case.x(0).requires_grad_(), case.routing(0)

    def layer(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside or torch.is_autocast_enabled("cpu")):
            routed = dispatcher.dispatch(x, topk_idx, topk_weights)
            return dispatcher.combine(routed.x * 2, routed.handle, routed.weights)

    torch._dynamo.reset()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        out = run(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    compiled_grad, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        again = layer(x)
    again.float().sum().backward()
    assert torch.equal(out, again)
    assert torch.equal(compiled_grad, x.grad)


def compile_side_by_side(ctx: RankContext, device: str = "cpu", backend: str = "torch") -> list[int]:
    """Three layers that do not depend on each other; ranks compile them into different graphs."""
    torch._dynamo.reset()
    case = make_case(ctx.world_size, tokens=(6, 1))
    dispatchers = [case.dispatcher(ctx.group, timeout_s=90, backend=backend) for _ in range(3)]
    topk_idx = case.routing(ctx.rank)[0].to(device)

    def layers(*leaves: Leaves) -> Tensor:
        pairs = zip(dispatchers, leaves, strict=True)
        outs = [run_layer(case, dispatcher, own, topk_idx) for dispatcher, own in pairs]
        # Used in another order than made.
        return outs[2] + outs[0] - outs[1]

    leaves = [make_leaves(case, ctx.rank).on(device) for _ in dispatchers]
    run = torch.compile(layers, backend="aot_eager", fullgraph=True, dynamic=bool(ctx.rank))
    run(*leaves).backward(probe(case, ctx.rank).to(device))
    grads = unsharded(case)[1][ctx.rank]
    for sign, own in zip((1, -1, 1), leaves, strict=True):
        check_grads([sign * leaf.cpu() for leaf in own.grads()], grads)
    return [dispatcher.stats()["exchanges"] for dispatcher in dispatchers]


def test_independent_layers_keep_their_order_on_all_ranks(ranks: Ranks) -> None:
    assert ranks(2, compile_side_by_side, timeout=120) == [[4, 4, 4]] * 2


def test_inductor() -> None:
    assert run_steps(0, None, 1, "expanded", "inductor") <= 3


def checkpoint_selectively(rank: int, group: object, num_ranks: int, device: str = "cpu", **settings: object) -> None:
    """Exchanges on the save list are not repeated by the backward of a compiled graph."""
    torch._dynamo.reset()
    case = make_case(num_ranks)
    dispatcher, leaves = case.dispatcher(group, **settings), make_leaves(case, rank).on(device)
    topk_idx = case.routing(rank)[0].to(device)
    saved = [torch.ops.moe_ep.dispatch.default, torch.ops.moe_ep.combine.default]

    def contexts() -> tuple:
        return create_selective_checkpoint_contexts(saved)

    def layer(x: Tensor, topk_weights: Tensor, matrices: Tensor) -> Tensor:
        return run_layer(case, dispatcher, Leaves(x, topk_weights, matrices), topk_idx)

    def block(x: Tensor, topk_weights: Tensor, matrices: Tensor) -> Tensor:
        return checkpoint(layer, x, topk_weights, matrices, use_reentrant=False, context_fn=contexts)

    out = torch.compile(block, backend="aot_eager", fullgraph=True)(*leaves)
    out.backward(probe(case, rank).to(device))
    assert dispatcher.stats()["exchanges"] == 4
    check_grads([leaf.cpu() for leaf in leaves.grads()], unsharded(case)[1][rank])


def test_selective_checkpoint_in_a_compiled_graph() -> None:
    checkpoint_selectively(0, None, 1)


def operator_inputs(
    mode: str,
    name: str,
    adapt: Callable[[moe_ep.TokenDispatcher], object] = lambda dispatcher: None,
    device: str = "cpu",
    **settings: object,
) -> tuple:
    """Arguments of one operator, from a real exchange of one rank."""
    case = make_case(1, **COMPILED[mode])
    dispatcher = case.dispatcher(None, **settings)
    adapt(dispatcher)
    x, topk_idx, topk_weights = (tensor.to(device) for tensor in (case.x(0), *case.routing(0)))
    KEPT.append(dispatcher)
    anchor, number = torch.zeros((), requires_grad=True), dispatcher._exchanger.id
    if name == "dispatch":
        return x.requires_grad_(), topk_idx, topk_weights.requires_grad_(), anchor, number
    rows, weights, _, tensors = torch.ops.moe_ep.dispatch(x, topk_idx, topk_weights, anchor.detach(), number)
    plan = tensors[NUM_EXTRAS:]
    rows, weights = rows.detach().nan_to_num(), weights.detach().nan_to_num()
    if name == "combine":
        given = weights.requires_grad_() if case.weights == "combine" else None
        return rows.requires_grad_(), given, plan, anchor, number
    if name == "dispatch_replay":
        return x.detach(), plan, rows.shape[0], number
    return rows, weights, plan, number


# Operators name their dispatcher by number and do not keep it alive.
KEPT: list[moe_ep.TokenDispatcher] = []


@pytest.mark.parametrize("name", ["dispatch", "combine", "dispatch_replay", "combine_grads"])
@pytest.mark.parametrize("mode", ["expanded", "compact", "per expert"])
def test_operators_pass_opcheck(mode: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A plan holds the number of its exchange, the one thing in which two calls differ.
    monkeypatch.setattr(ControlPlane, "seq", property(lambda self: 7, lambda self, value: None), raising=False)
    opcheck(getattr(torch.ops.moe_ep, name).default, operator_inputs(mode, name))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8)])
def test_gradients_of_weighted_rows_pass_opcheck(shape: tuple[int, ...]) -> None:
    grads, rows = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weights = torch.rand(shape[:-1], dtype=torch.float64)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(torch.ops.moe_ep.weigh_grads.default, (grads, rows, weights), test_utils=tests)
    got = torch.ops.moe_ep.weigh_grads(grads, rows, weights)
    assert torch.equal(got[0], grads * weights.unsqueeze(-1))
    torch.testing.assert_close(got[1], (grads * rows).sum(-1))


def compile_afresh(rows: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A first dispatcher of a process, compiled; whether it gives what it gives eagerly."""
    monkeypatch.setattr("moe_ep.exchange._num_registered", 0)
    torch._dynamo.reset()
    dispatcher = moe_ep.TokenDispatcher(
        None, num_experts=4, hidden_size=8, top_k=2, dtype=torch.float32, capacity=Capacity(rows=rows)
    )

    def layer(x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        routed = dispatcher.dispatch(x, topk_idx, topk_weights)
        return dispatcher.combine((routed.x * 2).relu(), routed.handle, routed.weights)

    inputs = torch.randn(8, 8), torch.tensor([[0, 1]] * 8), torch.rand(8, 2)
    with torch.no_grad():
        return torch.equal(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs))


def test_graphs_on_disk_are_not_taken_for_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    with fresh_cache():
        assert compile_afresh(64, monkeypatch)
        assert compile_afresh(96, monkeypatch)
