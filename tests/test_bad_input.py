"""Wrong arguments: refused by name, on all ranks or on one, and the dispatcher stays usable."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import moe_ep
from moe_ep.errors import NotBuiltError, PeerAbortedError, StaleHandleError
from moe_ep.testing import RankContext
from tests.checks import Case, round_trip

Ranks = Callable[..., list]

CASE = Case(tokens=(4, 4, 4), num_experts=6, top_k=2)


def spoil(name: str, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple:
    """Arguments of dispatch with one thing wrong."""
    ids = ids.clone()
    if name == "id too large":
        ids[2, 1] = 6
    elif name == "id too small":
        ids[0, 0] = -2
    elif name == "expert twice":
        ids[3] = 5
    elif name == "ids int32":
        ids = ids.int()
    elif name == "ids float":
        ids = ids.float()
    elif name == "ids of another K":
        ids = ids[:, :1].contiguous()
    elif name == "ids of another T":
        ids = ids[:3]
    elif name == "ids strided":
        ids = ids.t().contiguous().t()
    elif name == "ids elsewhere":
        ids = ids.to("meta")
    elif name == "x of another H":
        x = x[:, :4].contiguous()
    elif name == "x 3-D":
        x = x.unsqueeze(0)
    elif name == "x bf16":
        x = x.bfloat16()
    elif name == "x strided":
        x = x.t().contiguous().t()
    elif name == "x no tensor":
        x = x.tolist()
    elif name == "weights missing":
        weights = None
    elif name == "weights bf16":
        weights = weights.bfloat16()
    elif name == "weights of another shape":
        weights = weights[:2]
    return x, ids, weights


DISPATCH_FAULTS = {
    "id too large": r"topk_idx\[2, 1\]=6.*-1 <= id < 6",
    "id too small": r"topk_idx\[0, 0\]=-2.*-1 <= id < 6",
    "expert twice": r"topk_idx\[3\]=\[5, 5\].*once",
    "ids int32": r"topk_idx.*torch\.int32.*torch\.int64",
    "ids float": r"topk_idx.*torch\.float32.*torch\.int64",
    "ids of another K": r"topk_idx.*\[4, 1\].*\[4, 2\]",
    "ids of another T": r"topk_idx.*\[3, 2\].*\[4, 2\]",
    "ids strided": r"topk_idx.*contiguous",
    "ids elsewhere": r"topk_idx is on meta.*cpu",
    "x of another H": r"x has shape \[4, 4\].*8",
    "x 3-D": r"x has shape \[1, 4, 8\]",
    "x bf16": r"x has dtype torch\.bfloat16.*torch\.float32",
    "x strided": r"x has strides.*contiguous",
    "x no tensor": r"x is list.*tensor",
    "weights missing": r"topk_weights.*missing",
    "weights bf16": r"topk_weights.*torch\.bfloat16.*torch\.float32",
    "weights of another shape": r"topk_weights.*\[2, 2\].*\[4, 2\]",
}


def dispatch_badly(ctx: RankContext, fault: str, bad_ranks: tuple[int, ...], use_async: bool) -> Exception | None:
    case = replace(CASE, tokens=CASE.tokens[: ctx.world_size])
    # Peers that only noticed by this timeout would outlast the test.
    dispatcher = case.dispatcher(ctx.group, timeout_s=600)
    arguments = (case.x(ctx.rank), *case.routing(ctx.rank))
    if ctx.rank in bad_ranks:
        arguments = spoil(fault, *arguments)
    caught: Exception | None = None
    try:
        if use_async:
            dispatcher.dispatch_async(*arguments).wait()
        else:
            dispatcher.dispatch(*arguments)
    except (ValueError, PeerAbortedError) as error:
        caught = error
    # Nothing is lost: the next exchange of the same dispatcher works.
    round_trip(ctx, case, dispatcher)
    return caught


@pytest.mark.parametrize("fault", DISPATCH_FAULTS)
def test_bad_dispatch_on_one_rank_ends_all(ranks: Ranks, fault: str) -> None:
    results = ranks(3, dispatch_badly, fault, (1,), False)
    own = results[1]
    assert isinstance(own, ValueError)
    with pytest.raises(ValueError, match=DISPATCH_FAULTS[fault]):
        raise own
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, PeerAbortedError)
        assert error.rank == 1
        assert error.reason == f"ValueError: {own}"
        assert "rank 1" in str(error)
        assert str(own) in str(error)


@pytest.mark.parametrize("fault", ["id too large", "x bf16", "weights missing"])
def test_bad_dispatch_on_all_ranks(ranks: Ranks, fault: str) -> None:
    for error in ranks(2, dispatch_badly, fault, (0, 1), False):
        with pytest.raises(ValueError, match=DISPATCH_FAULTS[fault]):
            raise error


@pytest.mark.parametrize("fault", ["expert twice", "x of another H", "ids int32"])
def test_bad_asynchronous_dispatch_on_one_rank(ranks: Ranks, fault: str) -> None:
    results = ranks(3, dispatch_badly, fault, (2,), True)
    assert isinstance(results[2], ValueError)
    assert all(isinstance(results[rank], PeerAbortedError) and results[rank].rank == 2 for rank in (0, 1))


@pytest.mark.parametrize("fault", ["id too large", "x bf16", "x of another H", "weights missing"])
def test_bad_dispatch_without_a_group(fault: str) -> None:
    case = replace(CASE, tokens=(4,))
    dispatcher = case.dispatcher(None)
    with pytest.raises(ValueError, match=DISPATCH_FAULTS[fault]):
        dispatcher.dispatch(*spoil(fault, case.x(0), *case.routing(0)))
    round_trip(RankContext(0, 1, None), case, dispatcher)


COMBINE_FAULTS = {
    "y elsewhere": r"y is on meta but the handle was made on cpu",
    "y no tensor": r"y is list.*tensor",
    "weights missing": r"weights are missing.*routed\.weights",
    "weights of another shape": r"weights has shape",
    "weights fp64": r"weights.*torch\.float64.*torch\.float32",
    "rows missing": r"y has shape",
    "y fp64": r"y has dtype torch\.float64.*torch\.float32",
    "y strided": r"y has strides.*contiguous",
    "no handle": r"handle",
}


def combine_badly(ctx: RankContext, fault: str, bad_rank: int) -> Exception | None:
    dispatcher = CASE.dispatcher(ctx.group)
    routed = dispatcher.dispatch(CASE.x(ctx.rank), *CASE.routing(ctx.rank))
    y, handle, weights = routed.x, routed.handle, routed.weights
    if ctx.rank == bad_rank:
        if fault == "weights missing":
            weights = None
        elif fault == "weights of another shape":
            weights = weights[1:]
        elif fault == "weights fp64":
            weights = weights.double()
        elif fault == "rows missing":
            y = y[1:]
        elif fault == "y elsewhere":
            y = y.to("meta")
        elif fault == "y no tensor":
            y = y.tolist()
        elif fault == "y fp64":
            y = y.double()
        elif fault == "y strided":
            y = torch.cat([y, y], dim=1)[:, :8]
        elif fault == "no handle":
            handle = None
    caught = None
    try:
        dispatcher.combine(y, handle, weights)
    except (ValueError, StaleHandleError, PeerAbortedError) as error:
        caught = error
    round_trip(ctx, CASE, dispatcher)
    return caught


@pytest.mark.parametrize("fault", COMBINE_FAULTS)
def test_bad_combine_on_one_rank_ends_all(ranks: Ranks, fault: str) -> None:
    results = ranks(3, combine_badly, fault, 0)
    kind = StaleHandleError if fault == "y elsewhere" else ValueError
    with pytest.raises(kind, match=COMBINE_FAULTS[fault]):
        raise results[0]
    for error in results[1:]:
        assert isinstance(error, PeerAbortedError)
        assert error.rank == 0
        assert error.reason == f"{kind.__name__}: {results[0]}"


def superfluous_weights(ctx: RankContext) -> str:
    case = Case(tokens=(3, 3), weights="experts")
    dispatcher = case.dispatcher(ctx.group)
    routed = dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank))
    with pytest.raises(ValueError, match='weights="experts"') as caught:
        dispatcher.combine(routed.x, routed.handle, routed.weights)
    round_trip(ctx, case, dispatcher)
    return str(caught.value)


def test_superfluous_weights_are_refused(ranks: Ranks) -> None:
    assert all("weights=None" in text for text in ranks(2, superfluous_weights))


def wrong_plan(ctx: RankContext, kind: str) -> Exception | None:
    case = Case(tokens=(5, 5), num_experts=4, top_k=2)
    dispatcher = case.dispatcher(ctx.group)
    other = replace(case, seed=9, tokens=(6, 6) if kind == "tokens" else (5, 5))
    (planned,) = dispatcher.plan([other.routing(ctx.rank)[0]])
    caught = None
    try:
        dispatcher.dispatch(case.x(ctx.rank), *case.routing(ctx.rank), planned=planned)
    except ValueError as error:
        caught = error
    round_trip(ctx, case, dispatcher)
    return caught


@pytest.mark.parametrize("kind", ["tokens", "choices"])
def test_a_plan_of_other_choices_is_refused(ranks: Ranks, kind: str) -> None:
    for error in ranks(2, wrong_plan, kind):
        with pytest.raises(ValueError, match="planned"):
            raise error


def plan_badly(ctx: RankContext, fault: str) -> Exception | None:
    case = Case(tokens=(5, 5), num_experts=4, top_k=2)
    dispatcher = case.dispatcher(ctx.new_group(), timeout_s=20)
    good, weights = case.routing(ctx.rank)
    chunks, planned = [good], None
    if fault == "all of them":
        planned = dispatcher.plan(chunks)
    if ctx.rank == 1 and fault == "repeated expert":
        chunks = [torch.zeros_like(good)]
    elif ctx.rank == 1 and fault == "no list":
        chunks = good
    caught = None
    try:
        if planned is None:
            dispatcher.plan(chunks)
        else:
            dispatcher.dispatch(case.x(ctx.rank), good, weights, planned if ctx.rank == 1 else planned[0])
    except (ValueError, PeerAbortedError) as error:
        caught = error
    round_trip(ctx, case, dispatcher)
    return caught


@pytest.mark.parametrize("fault", ["repeated expert", "no list", "all of them"])
def test_a_bad_plan_on_one_rank_ends_all(ranks: Ranks, fault: str) -> None:
    first, second = ranks(2, plan_badly, fault)
    assert isinstance(second, ValueError)
    assert isinstance(first, PeerAbortedError)
    assert first.rank == 1


CONSTRUCTION_FAULTS = {
    "E not divisible": ({"num_experts": 7}, r"num_experts=7.*divisible by the 3 ranks"),
    "K > E": ({"num_experts": 3, "top_k": 4}, r"top_k=4.*num_experts=3"),
    "odd rows": ({"hidden_size": 3}, r"hidden_size=3.*16 bytes"),
    "layout": ({"layout": "packed"}, r"layout='packed'.*'compact'"),
    "compact weights": ({"layout": "compact"}, r'layout="compact".*weights="experts"'),
    "slab without size": ({"layout": "slab"}, r"max_tokens_per_rank"),
    "dtype": ({"dtype": torch.int8}, r"dtype=torch\.int8"),
    "backend": ({"backend": "nccl"}, r"backend='nccl'.*torch"),
    "timeout": ({"timeout_s": 0}, r"timeout_s=0"),
    "num_sms": ({"num_sms": 5}, r"num_sms=5.*even"),
    "expert_map": ({"expert_map": torch.tensor([[9]])}, r"expert_map"),
    "replica twice": ({"expert_map": torch.tensor([[0, 1], [1, 2]], dtype=torch.int32)}, r"id 1 more than once"),
    "replica behind a hole": ({"expert_map": torch.tensor([[0, -1, 1]], dtype=torch.int32)}, r"replica behind a -1"),
}


def construct_badly(ctx: RankContext, changes: dict) -> str:
    try:
        CASE.dispatcher(ctx.group, **changes)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("fault", CONSTRUCTION_FAULTS)
def test_bad_settings_name_value_rule_and_remedy(ranks: Ranks, fault: str) -> None:
    changes, text = CONSTRUCTION_FAULTS[fault]
    for found in ranks(3, construct_badly, changes):
        with pytest.raises(ValueError, match=text):
            raise ValueError(found)


def ask_for_cuda(ctx: RankContext) -> str:
    try:
        CASE.dispatcher(ctx.group, backend="cuda")
    except NotBuiltError as error:
        return str(error)
    return "accepted"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_says_how_to_get_it(ranks: Ranks) -> None:
    for text in ranks(3, ask_for_cuda):
        assert "cuda" in text
        assert 'backend="torch"' in text
    with pytest.raises(NotBuiltError, match="cuda"):
        moe_ep.TokenDispatcher(None, num_experts=4, hidden_size=8, top_k=2, backend="cuda")


def test_group_must_be_a_group() -> None:
    assert moe_ep.TokenDispatcher(None, num_experts=4, hidden_size=8, top_k=2).group is None
    with pytest.raises(ValueError, match="group"):
        moe_ep.TokenDispatcher("world", num_experts=4, hidden_size=8, top_k=2)
