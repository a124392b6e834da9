"""``EPMoELayer`` against Megatron's own dispatcher and against the unsharded layer."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch

from moe_ep.testing import RankContext
from tests.frameworks.megatron.compare import Case, assert_same_bits, assert_unsharded, run_sharded
from tests.frameworks.megatron.shim import on_cpu

Ranks = Callable[..., list]

CASES = {
    "uneven tokens": Case(tokens=(5, 3)),
    "one token against many": Case(tokens=(9, 1)),
    "a rank that receives nothing": Case(tokens=(4, 7), favoured=(0, 1)),
    "all tokens go to the last rank": Case(tokens=(6, 1), favoured=(2, 3)),
    "one local expert": Case(
        tokens=(3, 4), changes={"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": True}
    ),
    "one choice, weighted before the experts": Case(
        changes={"moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_apply_probs_on_input": True}
    ),
    "sigmoid router with groups": Case(
        changes={
            "num_moe_experts": 8,
            "moe_router_score_function": "sigmoid",
            "moe_router_num_groups": 2,
            "moe_router_group_topk": 1,
        }
    ),
}


@on_cpu
def against_stock(ctx: RankContext, case: Case) -> None:
    # Two terms per token: their sum is the same in either order, so every bit must be.
    for dtype in (torch.float64, torch.float32):
        assert_same_bits(*(run_sharded(case, kind, params_dtype=dtype) for kind in ("moe_ep", "native")))


@on_cpu
def against_stock_in_bf16(ctx: RankContext, case: Case) -> None:
    # Probabilities travel in fp32; with a bf16 router the stock dispatcher rounds their gradients once more.
    more = {"params_dtype": torch.bfloat16, "bf16": True, "moe_router_dtype": "fp32"}
    ours, stock = (run_sharded(case, kind, **more) for kind in ("moe_ep", "native"))
    # Experts and router see the same rows and gradients of rows, bit for bit.
    for name, grad in ours.grads.items():
        assert torch.equal(grad, stock.grads[name]), name
    # Sums of two rows in the middle between two bf16 numbers may be rounded to either: one unit, 2**-7; the input's
    # gradient is rounded once more when the router's part is added.
    for mine, theirs, units in ((ours.out, stock.out, 1), (ours.dx, stock.dx, 2)):
        assert mine.dtype == torch.bfloat16
        bound = units * 2.0**-7 * theirs.float().abs().amax() if theirs.numel() else 0.0
        assert bool(((mine.float() - theirs.float()).abs() <= bound).all())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_bit_is_that_of_the_stock_dispatcher(ranks: Ranks, case: Case) -> None:
    ranks(2, against_stock, case)
    ranks(2, against_stock_in_bf16, case)


@on_cpu
def against_unsharded(ctx: RankContext, case: Case) -> None:
    assert_unsharded(run_sharded(case, "moe_ep"), case)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients_are_those_of_the_unsharded_layer(ranks: Ranks, case: Case) -> None:
    ranks(2, against_unsharded, case)


def test_more_choices_and_ranks(ranks: Ranks) -> None:
    ranks(2, against_unsharded, Case(changes={"num_moe_experts": 8, "moe_router_topk": 5}))
    ranks(4, against_unsharded, Case(tokens=(2, 1, 5, 3), ep=4, changes={"num_moe_experts": 8, "moe_router_topk": 3}))


@on_cpu
def planted(ctx: RankContext, fault: str, case: Case) -> bool:
    """Whether the comparison with the unsharded layer notices a fault in the dispatcher."""
    from moe_ep.integrations.megatron import EPTokenDispatcher

    real_dispatch, real_combine = EPTokenDispatcher.token_dispatch, EPTokenDispatcher.token_combine

    def dispatch(
        self: EPTokenDispatcher, hidden: torch.Tensor, probs: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weights = real_dispatch(self, hidden, probs)
        if fault == "a lost row":
            rows = torch.cat([rows[:-1], torch.zeros_like(rows[-1:])])
        if fault == "exchanged weights":
            weights = weights.roll(1)
        if fault == "weights without gradient":
            weights = weights.detach()
        return rows, weights

    def combine(self: EPTokenDispatcher, hidden: torch.Tensor) -> torch.Tensor:
        return real_combine(self, hidden.roll(1, 0) if fault == "exchanged rows" else hidden)

    with (
        mock.patch.object(EPTokenDispatcher, "token_dispatch", dispatch),
        mock.patch.object(EPTokenDispatcher, "token_combine", combine),
    ):
        ours = run_sharded(case, "moe_ep")
    try:
        assert_unsharded(ours, case)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("none", False),
        ("a lost row", True),
        ("exchanged weights", True),
        ("exchanged rows", True),
        ("weights without gradient", True),
    ],
)
def test_a_planted_fault_is_found(ranks: Ranks, fault: str, found: bool) -> None:
    assert any(ranks(2, planted, fault, Case())) == found
