"""The exchange around real experts modules of transformers, beside its own all-to-all and the unsharded module."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moe_ep.integrations.transformers.exchange import ExpertExchange
from moe_ep.integrations.transformers.slicing import cut, join
from moe_ep.integrations.transformers.versions import has_ep_registry
from moe_ep.testing import RankContext
from tests.frameworks.transformers.models import NUM_EXPERTS, make_config

HIDDEN = 32
KINDS = {"mixtral": MixtralExperts, "gpt_oss": GptOssExperts}


class Case(NamedTuple):
    """Which experts, tokens of each rank, choices per token, how they are routed, dtypes of rows and of weights."""

    kind: str
    tokens: tuple[int, ...]
    top_k: int
    routing: str
    dtype: torch.dtype
    weights_dtype: torch.dtype
    implementation: str = "grouped_mm"


def make_experts(case: Case, dtype: torch.dtype) -> nn.Module:
    """All experts, the same in every process."""
    generator = torch.Generator().manual_seed(3)
    experts = KINDS[case.kind](make_config(case.kind, experts_implementation=case.implementation))
    for parameter in experts.parameters():
        values = torch.randn(parameter.shape, generator=generator) / HIDDEN**0.5
        # Values that 16 bits hold, so that rounding begins inside.
        parameter.data = values.to(case.dtype).to(dtype)
    return experts


def inputs_of(case: Case, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H], ids [T, K], weights [T, K] and the gradient of the output [T, H] of one rank, as 16 bits hold them."""
    generator = torch.Generator().manual_seed(50 + rank)
    tokens = case.tokens[rank]
    ids = torch.rand(tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, : case.top_k].contiguous()
    if case.routing == "one rank":
        ids = ids % (NUM_EXPERTS // 2)
        ids = (ids[:, :1] + torch.arange(case.top_k)) % (NUM_EXPERTS // 2)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(case.dtype)
    weights = torch.rand(tokens, case.top_k, generator=generator).to(case.weights_dtype)
    return x, ids, weights, torch.randn(tokens, HIDDEN, generator=generator).to(case.dtype)


class Outcome(NamedTuple):
    """Output, gradients of x and weights, and of the experts' parameters, whole."""

    out: Tensor
    dx: Tensor
    dweights: Tensor
    dexperts: list[Tensor]


def run(forward: Any, experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> Outcome:
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    out = forward(x, ids, weights)
    out.backward(grad)
    return Outcome(out.detach(), x.grad, weights.grad, [p.grad for p in experts.parameters()])


def whole_module(case: Case, dtype: torch.dtype) -> list[Outcome]:
    """Every rank's outcome from one module with all experts; parameter gradients are sums over ranks."""
    experts = make_experts(case._replace(implementation="eager" if dtype == torch.float64 else "grouped_mm"), dtype)
    outcomes = []
    for rank in range(len(case.tokens)):
        x, ids, weights, grad = inputs_of(case, rank)
        if case.tokens[rank]:
            outcomes.append(run(experts, experts, x.to(dtype), ids, weights.to(dtype), grad.to(dtype)))
        else:
            outcomes.append(Outcome(x, x, weights, []))
    return [one._replace(dexperts=[p.grad for p in experts.parameters()]) for one in outcomes]


def slice_of(experts: nn.Module, rank: int, num_ranks: int) -> nn.Module:
    own = copy.deepcopy(experts)
    for parameter in own.parameters():
        parameter.data = cut(parameter.data, NUM_EXPERTS, rank, num_ranks)
    own.num_experts = NUM_EXPERTS // num_ranks
    return own


def through_exchange(ctx: RankContext, case: Case) -> Outcome:
    own = slice_of(make_experts(case, case.dtype), ctx.rank, ctx.world_size)
    exchange = ExpertExchange(ctx.group, NUM_EXPERTS)
    outcome = run(lambda *arguments: exchange(own, *arguments), own, *inputs_of(case, ctx.rank))
    assert len(exchange.dispatchers) == 1
    return _gathered(ctx, outcome)


def through_all_to_all(ctx: RankContext, case: Case) -> Outcome:
    from transformers.distributed.expert_parallel import AllToAllEP

    from tests.frameworks.transformers.training import stable_sorts

    own = slice_of(make_experts(case, case.dtype), ctx.rank, ctx.world_size)
    mesh = DeviceMesh.from_group(ctx.group, "cpu")
    alone = DeviceMesh.from_group(_alone(ctx), "cpu")
    with stable_sorts():
        return _gathered(ctx, run(AllToAllEP(own, mesh, alone), own, *inputs_of(case, ctx.rank)))


def _alone(ctx: RankContext) -> Any:
    groups = [ctx.subgroup([rank]) for rank in range(ctx.world_size)]
    return groups[ctx.rank]


def _gathered(ctx: RankContext, outcome: Outcome) -> Outcome:
    num_local = NUM_EXPERTS // ctx.world_size
    return outcome._replace(dexperts=[join(grad, num_local, ctx.group) for grad in outcome.dexperts])


UNEVEN = {2: (7, 4), 4: (5, 1, 9, 2)}
EMPTY = {2: (7, 0), 4: (5, 0, 0, 2)}


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("routing", ["all ranks", "one rank"])
@pytest.mark.parametrize("tokens", [UNEVEN, EMPTY], ids=["uneven", "empty"])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_module(
    ranks, kind: str, num_ranks: int, tokens: dict, routing: str, implementation: str
) -> None:
    case = Case(kind, tokens[num_ranks], 3, routing, torch.float64, torch.float64, implementation)
    outcomes = ranks(num_ranks, through_exchange, case)
    for ours, theirs in zip(outcomes, whole_module(case, torch.float64), strict=True):
        for left, right in zip(_flat(ours), _flat(theirs), strict=True):
            # fp64: sums of at most a few hundred terms of magnitude ten.
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-11)


def _flat(outcome: Outcome) -> list[Tensor]:
    return [outcome.out, outcome.dx, outcome.dweights, *outcome.dexperts]


def sums_of_magnitudes(case: Case, rank: int) -> tuple[float, float]:
    """The largest sums over a token's choices of |weighted output| and of |gradient of x|."""
    experts = make_experts(case._replace(implementation="eager"), torch.float64)
    x, ids, weights, grad = (t.double() if t.is_floating_point() else t for t in inputs_of(case, rank))
    single = [run(experts, experts, x, ids[:, k : k + 1], weights[:, k : k + 1], grad) for k in range(case.top_k)]
    return tuple(sum(one[field].abs() for one in single).max().item() for field in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("weights_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_no_further_from_exact_than_the_framework(ranks, kind: str, weights_dtype: torch.dtype) -> None:
    """Both round the same products to bf16 and sum them in fp32; sums within a rank are rounded once more."""
    case = Case(kind, UNEVEN[2], 4, "all ranks", torch.bfloat16, weights_dtype)
    exact, framework = whole_module(case, torch.float64), whole_module(case, torch.bfloat16)
    for rank, ours in enumerate(ranks(2, through_exchange, case)):
        # Half a unit of the sum within each of two ranks, which together are at most the sum of magnitudes, and of
        # both results. Nothing is summed over ranks for a router weight's gradient: the two results alone.
        bounds = [3 * 2**-9 * magnitude for magnitude in sums_of_magnitudes(case, rank)]
        bounds.append(2 * 2**-9 * exact[rank].dweights.abs().max().item())
        for field, bound in enumerate(bounds):
            errors = [(one[field] - exact[rank][field]).abs().max().item() for one in (ours, framework[rank])]
            assert errors[0] <= errors[1] + bound, (Outcome._fields[field], errors, bound)


if has_ep_registry():
    # A sum of two terms has one order. In bf16 it would also need one way to round halves of units, and torch has two
    # on CPUs, that of embedding_bag and that of sum.
    @pytest.mark.parametrize(("top_k", "dtype"), [(1, torch.float32), (2, torch.float32), (1, torch.bfloat16)], ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tokens", [UNEVEN, EMPTY], ids=["uneven", "empty"])
    def test_equals_all_to_all_bit_for_bit(ranks, tokens: dict, kind: str, top_k: int, dtype: torch.dtype) -> None:
        case = Case(kind, tokens[2], top_k, "all ranks", dtype, dtype)
        for ours, theirs in zip(ranks(2, through_exchange, case), ranks(2, through_all_to_all, case), strict=True):
            for left, right in zip(_flat(ours), _flat(theirs), strict=True):
                assert torch.equal(left, right)


def test_the_place_of_the_weights_follows_the_framework(ranks) -> None:
    ranks(2, check_places)


def check_places(ctx: RankContext) -> None:
    """As wide as rows: multiplied by the experts, with the framework's rounding. Wider: in combine, in fp32."""
    places = {(torch.bfloat16, torch.float32): "combine", (torch.bfloat16, torch.bfloat16): "experts"}
    places |= {(torch.float32, torch.float32): "experts", (torch.float64, torch.float64): "experts"}
    for (dtype, weights_dtype), place in places.items():
        case = Case("mixtral", UNEVEN[2], 2, "all ranks", dtype, weights_dtype, "eager")
        own = slice_of(make_experts(case, dtype), ctx.rank, 2)
        exchange = ExpertExchange(ctx.group, NUM_EXPERTS)
        x, ids, weights, _ = inputs_of(case, ctx.rank)
        assert exchange(own, x, ids, weights).dtype == dtype
        assert [one.weights for one in exchange.dispatchers] == [place]


def test_slices_join_to_the_whole(ranks) -> None:
    ranks(2, check_slices)


def check_slices(ctx: RankContext) -> None:
    for shape, expert_last in (((8, 3, 5), False), ((24, 5), False), ((5, 24), True)):
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        own = cut(whole, 8, ctx.rank, 2, expert_last)
        assert torch.equal(join(own, 4, ctx.group, expert_last), whole)
    # The expert is the fastest index: the first rank has experts 0 to 3 of each of the three rows of rank 24 / 8.
    assert cut(torch.arange(24).view(1, 24), 8, 0, 2, True).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19]]
