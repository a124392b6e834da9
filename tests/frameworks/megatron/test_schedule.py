"""Megatron's 1F1B schedule that overlaps the exchanges of one micro-batch with the computation of another."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from moe_ep.testing import RankContext
from tests.frameworks.megatron.models import layout, make_config, make_gpt, named
from tests.frameworks.megatron.shim import on_cpu
from tests.frameworks.megatron.training import LENGTH, VOCAB, batch, causal_mask

Ranks = Callable[..., list]

SCHEDULED = {
    "params_dtype": torch.bfloat16,
    "bf16": True,
    "moe_router_dtype": "fp32",
    "overlap_moe_expert_parallel_comm": True,
}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in named(model).items() if parameter.grad is not None}


def plan_of(model: torch.nn.Module, rank: int, step: int) -> object:
    ids, labels, positions = batch(rank, step)
    return model.build_schedule_plan(ids, positions, causal_mask(), labels=labels)


def scheduled(dispatcher: str, rank: int, config: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and gradients of two micro-batches: the second's forward is woven into the first's backward."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan
    from megatron.core.pipeline_parallel.utils import set_streams

    set_streams()
    run = TransformerModelChunkSchedulePlan.run
    model = make_gpt(dispatcher, config, vocab_size=VOCAB, length=LENGTH)
    plans = [plan_of(model, rank, step) for step in range(2)]
    first = run(plans[0], None)
    seed = torch.ones_like(first)
    second = run(plans[1], plans[0], b_grad=seed)
    run(None, plans[1], b_grad=seed.clone())
    return [first, second], gradients(model)


def plain(dispatcher: str, rank: int, config: object) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same with autograd alone."""
    model = make_gpt(dispatcher, config, vocab_size=VOCAB, length=LENGTH)
    losses = []
    for step in range(2):
        ids, labels, positions = batch(rank, step)
        losses.append(model(ids, positions, causal_mask(), labels=labels))
        losses[-1].float().sum().backward()
    return losses, gradients(model)


def difference(one: tuple[list[Tensor], dict[str, Tensor]], other: tuple[list[Tensor], dict[str, Tensor]]) -> str:
    """The first thing that differs, empty where nothing does."""
    for step, (loss, expected) in enumerate(zip(one[0], other[0], strict=True)):
        if not torch.equal(loss.float(), expected.float()):
            return f"loss {step}"
    if one[1].keys() != other[1].keys():
        return f"which gradients there are: {one[1].keys() ^ other[1].keys()}"
    return next((name for name, grad in one[1].items() if not torch.equal(grad, other[1][name])), "")


@on_cpu
def compare_schedules(ctx: RankContext, changes: dict) -> str:
    with layout(ep=2):
        config = make_config(ep=2, **SCHEDULED, **changes)
        return difference(scheduled("moe_ep", ctx.rank, config), plain("moe_ep", ctx.rank, config))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        {"moe_shared_expert_intermediate_size": 24},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    ],
    ids=["plain", "one local expert", "shared experts", "drop", "pad"],
)
def test_schedule_gives_the_bits_of_autograd(ranks: Ranks, changes: dict) -> None:
    assert ranks(2, compare_schedules, changes) == ["", ""]


@on_cpu
def compare_with_stock(ctx: RankContext, changes: dict) -> str:
    with layout(ep=2):
        config = make_config(ep=2, **changes)
        # Megatron asks for bf16 or fp16, whose sums are rounded differently in the last bit; the schedule itself works.
        config.overlap_moe_expert_parallel_comm = True
        return difference(*(scheduled(kind, ctx.rank, config) for kind in ("moe_ep", "native")))


@pytest.mark.parametrize("changes", [{}, {"moe_expert_capacity_factor": 1.0}], ids=["plain", "drop"])
def test_schedule_gives_the_bits_of_the_stock_dispatcher(ranks: Ranks, changes: dict) -> None:
    assert ranks(2, compare_with_stock, changes) == ["", ""]


@on_cpu
def keep_stage_inputs(ctx: RankContext) -> bool:
    """Whether the comparison notices a dispatcher whose stages hand their inputs on, which the schedule then frees."""
    from moe_ep.integrations.megatron import EPTokenDispatcher

    real = EPTokenDispatcher.__init__

    def careless(self: EPTokenDispatcher, *args: object, **kwargs: object) -> None:
        real(self, *args, **kwargs)
        self._stages_are_freed = False

    with layout(ep=2):
        config = make_config(ep=2, **SCHEDULED)
        expected = plain("moe_ep", ctx.rank, config)
        with (
            mock.patch.object(EPTokenDispatcher, "__init__", careless),
            # What a freed storage holds is undefined; here it is always noise, and stays allocated.
            mock.patch.object(torch.UntypedStorage, "resize_", _scribble),
        ):
            return bool(difference(scheduled("moe_ep", ctx.rank, config), expected))


def _scribble(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
    assert size == 0
    torch.tensor([], dtype=torch.bfloat16).set_(storage).fill_(3.0)
    return storage


def test_a_stage_that_keeps_its_input_is_found(ranks: Ranks) -> None:
    assert ranks(2, keep_stage_inputs) == [True, True]
