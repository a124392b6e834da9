"""Megatron's flex dispatcher, unchanged, on the module that stands in for deep_ep."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_ep.testing import RankContext
from tests.frameworks.megatron.compare import Case, assert_same_bits, assert_unsharded, run_sharded
from tests.frameworks.megatron.models import layout, make_config, make_layer
from tests.frameworks.megatron.shim import on_cpu
from tests.frameworks.megatron.test_schedule import SCHEDULED, difference, plain, scheduled
from tests.frameworks.megatron.training import train

Ranks = Callable[..., list]

FLEX = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}


@on_cpu
def has_our_buffer(ctx: RankContext) -> bool:
    # The workers' shim installs the module before it imports Megatron, as a program has to.
    from megatron.core.transformer.moe import fused_a2a

    from moe_ep.integrations import deep_ep

    return fused_a2a.HAVE_DEEP_EP and fused_a2a.Buffer is deep_ep.Buffer


def test_megatron_found_the_module(ranks: Ranks) -> None:
    assert ranks(2, has_our_buffer) == [True, True]


# Probabilities travel in fp32 there, so that rows do too.
FP32 = {"params_dtype": torch.float32}
CASES = {
    "uneven tokens": Case(tokens=(5, 3), changes=FP32),
    "one rank gets all": Case(tokens=(9, 1), favoured=(2, 3), changes=FP32),
    "drop": Case(tokens=(6, 6), changes={**FP32, "moe_expert_capacity_factor": 0.75}),
    "sigmoid": Case(changes={**FP32, "num_moe_experts": 8, "moe_router_score_function": "sigmoid"}),
    "recomputed": Case(changes={**FP32, "recompute_granularity": "selective", "recompute_modules": ["moe"]}),
}


@on_cpu
def against_stock(ctx: RankContext, case: Case) -> None:
    # Two terms per token: their sum is the same in either order, so every bit must be.
    assert_same_bits(run_sharded(case, "native", **FLEX), run_sharded(case, "native"))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_bit_is_that_of_all_to_all(ranks: Ranks, case: Case) -> None:
    ranks(2, against_stock, case)


@on_cpu
def with_split_experts(ctx: RankContext, etp: int) -> None:
    case = Case(tokens=(8, 4), tp=2, ep=2, etp=etp, changes={**FP32, "num_moe_experts": 8})
    assert_unsharded(run_sharded(case, "native", **FLEX), case)


@pytest.mark.parametrize("etp", [1, 2])
def test_tensor_and_expert_parallel(ranks: Ranks, etp: int) -> None:
    ranks(4, with_split_experts, etp)


@on_cpu
def losses(ctx: RankContext) -> tuple[list[float], list[float]]:
    with layout(ep=2):
        flex, _ = train("native", make_config(ep=2, **FP32, **FLEX))
        ours, _ = train("moe_ep", make_config(ep=2, **FP32))
    return flex, ours


def test_losses_are_those_of_our_dispatcher(ranks: Ranks) -> None:
    for flex, ours in ranks(2, losses):
        assert flex == ours
        assert flex[-1] != flex[0]


@on_cpu
def compare_schedules(ctx: RankContext) -> str:
    with layout(ep=2):
        config = make_config(ep=2, **{**SCHEDULED, **FLEX})
        return difference(scheduled("native", ctx.rank, config), plain("native", ctx.rank, config))


def test_schedule_gives_the_bits_of_autograd(ranks: Ranks) -> None:
    assert ranks(2, compare_schedules) == ["", ""]


@on_cpu
def growing_rows(ctx: RankContext) -> None:
    """A second layer's rows are longer: Megatron makes a larger Buffer while the first layer waits for its backward."""
    from megatron.core.transformer.moe import fused_a2a

    with layout(ep=2):
        sizes = (16, 256)
        layers = [make_layer("native", make_config(ep=2, hidden_size=size, **FP32, **FLEX)) for size in sizes]
        x = [torch.randn(3, 2, size, requires_grad=True) for size in sizes]
        buffers, outs = [], []
        for layer, one in zip(layers, x, strict=True):
            outs.append(layer(one)[0])
            buffers.append(fused_a2a._buffer)
        assert buffers[0] is not buffers[1]
        sum(out.square().sum() for out in outs).backward()
        assert all(bool(one.grad.abs().max() > 0) for one in x)


def test_handles_outlive_their_buffer(ranks: Ranks) -> None:
    ranks(2, growing_rows)


@on_cpu
def lost_row(ctx: RankContext, lost: bool) -> bool:
    """Whether the comparison notices that dispatches lose a row."""
    import moe_ep

    real, case = moe_ep.Buffer.dispatch, Case(changes=FP32)

    def dispatch(self: moe_ep.Buffer, *args: Any, **kwargs: Any) -> tuple:
        rows, *rest = real(self, *args, **kwargs)
        rest[-1].current_stream_wait()
        return _without_last(rows) if lost else rows, *rest

    with mock.patch.object(moe_ep.Buffer, "dispatch", dispatch):
        flex = run_sharded(case, "native", **FLEX)
    stock = run_sharded(case, "native")
    try:
        assert_same_bits(flex, stock)
    except AssertionError:
        return True
    return False


def _without_last(rows: Tensor) -> Tensor:
    return torch.cat([rows[:-1], torch.zeros_like(rows[-1:])])


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_row_is_found(ranks: Ranks, lost: bool) -> None:
    assert any(ranks(2, lost_row, lost)) == lost
