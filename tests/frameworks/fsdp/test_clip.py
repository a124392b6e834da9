"""clip_grad_norm_: the norm of the unsharded model, over any mixture of meshes and plain tensors."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from moe_ep.integrations.fsdp import clip_grad_norm_
from moe_ep.testing import RankContext
from tests.frameworks.fsdp.model import Ranks, make_mesh

ORDERS = [1.0, 2.0, 3.0, math.inf]


def values(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 3), (7, 2), (4, 2, 2), (5,), (3, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def parameter(value: Tensor, grad: Tensor | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros_like(value))
    made.grad = grad
    return made


def mixed(dtype: torch.dtype) -> list[nn.Parameter]:
    """The same gradients on one mesh and another, in whole, unevenly, and without one of them."""
    mesh = make_mesh((2, 2), ("efsdp", "ep"))
    flat = mesh._flatten("all")
    found = values(dtype)
    places = [
        (mesh["ep"], [Shard(0)]),
        (flat, [Shard(0)]),
        (mesh, [Shard(1), Shard(0)]),
        (mesh, [Replicate(), Shard(0)]),
    ]
    sharded = [distribute_tensor(value, *place) for value, place in zip(found, places, strict=False)]
    parameters = [parameter(value, value.clone()) for value in sharded]
    return [*parameters, parameter(found[4], found[4].clone()), parameter(found[0], None)]


def clip_mixed(ctx: RankContext, order: float, max_norm: float, dtype: torch.dtype) -> None:
    exact = [value.double() for value in values(dtype)]
    ours, plain = mixed(dtype), [parameter(value, value.clone()) for value in exact]
    expected = nn.utils.clip_grad_norm_(plain, max_norm, order)
    norm = clip_grad_norm_((p for p in ours), max_norm, order)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert norm.shape == ()
    # Sums of 53 elements, in the dtype of norms; gradients are rounded once more to their own.
    eps = torch.finfo(norm.dtype).eps
    torch.testing.assert_close(norm.double(), expected.double(), rtol=60 * eps, atol=0)
    for p, q in zip(ours, plain, strict=False):
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(grad.double(), q.grad, rtol=60 * eps + torch.finfo(dtype).eps, atol=0)
    assert ours[-1].grad is None


@pytest.mark.parametrize("max_norm", [0.25, 1e3])
@pytest.mark.parametrize("order", ORDERS)
def test_norm_over_mixed_meshes_is_that_of_the_whole(ranks: Ranks, order: float, max_norm: float) -> None:
    ranks(4, clip_mixed, order, max_norm, torch.float64)


def test_norms_of_low_precision_are_wider(ranks: Ranks) -> None:
    ranks(4, clip_mixed, 2.0, 0.25, torch.bfloat16)


def clip_own_experts(ctx: RankContext, order: float) -> str:
    """Plain tensors: a dense one that all ranks have, and a slice of experts."""
    dense, experts = values()[4], values()[0]
    own = experts.chunk(ctx.world_size)[ctx.rank]
    ours = [parameter(dense, dense.clone()), parameter(own, own.clone())]
    ours[1].allreduce = False
    text = ""
    try:
        clip_grad_norm_(ours, 0.25, order)
    except ValueError as error:
        text = str(error)
    plain = [parameter(dense, dense.clone()), parameter(experts, experts.clone())]
    expected = nn.utils.clip_grad_norm_(plain, 0.25, order)
    torch.testing.assert_close(clip_grad_norm_(ours, 0.25, order, group=ctx.group), expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours[1].grad, plain[1].grad.chunk(ctx.world_size)[ctx.rank], rtol=1e-14, atol=0)
    return text


@pytest.mark.parametrize("order", ORDERS)
def test_experts_in_plain_tensors_need_their_group(ranks: Ranks, order: float) -> None:
    for text in ranks(2, clip_own_experts, order):
        assert text.startswith("parameters[1] of shape [2, 3] holds experts of this rank alone")
        assert "pass group" in text


def one_rank_without(ctx: RankContext) -> float:
    """A gradient that is missing on one rank, and one that is infinite on another: all ranks agree."""
    mesh = make_mesh((2,), ("ep",))
    value = DTensor.from_local(torch.full((2,), 3.0), mesh, [Shard(0)])
    one = parameter(value, value.clone() if ctx.rank else None)
    norm = clip_grad_norm_([one], 1.0).item()
    both = parameter(value, DTensor.from_local(torch.full((2,), [1.0, math.inf][ctx.rank]), mesh, [Shard(0)]))
    with pytest.raises(RuntimeError, match="is inf: nothing was clipped"):
        clip_grad_norm_([both], 1.0, error_if_nonfinite=True)
    assert torch.equal(both.grad.to_local(), torch.full((2,), [1.0, math.inf][ctx.rank]))
    return norm


def test_ranks_agree_about_gradients_that_one_of_them_has(ranks: Ranks) -> None:
    assert ranks(2, one_rank_without) == pytest.approx([18**0.5] * 2)


def clip_a_sum_yet_to_be_made(ctx: RankContext) -> str:
    mesh = make_mesh((2,), ("ep",))
    value = DTensor.from_local(torch.ones(2), mesh, [Replicate()])
    made = parameter(value, DTensor.from_local(torch.ones(2), mesh, [Partial()]))
    with pytest.raises(ValueError, match="not summed over ranks yet") as caught:
        clip_grad_norm_([made], 1.0)
    dist.barrier()
    return str(caught.value)


def test_sums_yet_to_be_made_are_refused(ranks: Ranks) -> None:
    assert all("parameters[0]" in text for text in ranks(2, clip_a_sum_yet_to_be_made))


def test_without_processes() -> None:
    for order in ORDERS:
        ours, plain = ([parameter(value, value.clone()) for value in values()] for _ in range(2))
        # Without a process group, experts of this rank are all experts.
        ours[0].allreduce = False
        torch.testing.assert_close(
            clip_grad_norm_(ours, 0.5, order), nn.utils.clip_grad_norm_(plain, 0.5, order), rtol=1e-14, atol=0
        )
        for one, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-14, atol=0)
    assert clip_grad_norm_([], 1.0) == 0
    assert clip_grad_norm_(parameter(torch.ones(4), torch.ones(4)), 1.0) == 2


@pytest.mark.parametrize("order", [0.0, -1.0, math.nan])
def test_orders_without_a_norm_are_refused(order: float) -> None:
    with pytest.raises(ValueError, match="norm_type is .*: it must be positive"):
        clip_grad_norm_([], 1.0, order)
