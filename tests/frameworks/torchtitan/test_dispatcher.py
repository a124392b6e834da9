"""torchtitan's MoE block with both dispatchers: the same bits where sums have one order, gradients of everything."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import get_spmd_context, set_spmd_backend
from torchtitan.models.common.moe import MoE
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from moe_ep.integrations.torchtitan import MoeEpTokenDispatcher
from moe_ep.testing import RankContext
from tests.frameworks.torchtitan.blocks import EXPERTS, HIDDEN, INNER, Block, moe_of, rows_of, shard
from tests.frameworks.torchtitan.models import on_ranks

EVEN = Block()
UNEVEN = Block(tokens=((2, 6), (1, 3)))
# torchtitan itself cannot shape an empty batch, but a batch of empty sequences.
EMPTY = Block(tokens=((5, 0), (2, 4)))
TOKENS = pytest.mark.parametrize("block", [EVEN, UNEVEN, EMPTY], ids=["even", "uneven", "empty rank"])


def forward_backward(moe: MoE, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients of one rank's block; the loss is a sum, so that ranks without tokens have one too."""
    x = x.clone().requires_grad_()
    out = moe(x)
    (out.float().square().sum() / 10).backward()
    inner = moe.routed_experts.inner_experts
    results = {
        "output": out.detach(),
        "gradient of inputs": x.grad,
        "gradient of the gate": moe.router.gate.weight.grad,
    }
    results |= {f"gradient of {name}": getattr(inner, name).grad for name in EXPERTS}
    results |= {f"gradient of shared {n}": p.grad for n, p in moe.shared_experts.named_parameters()}
    return results


def bound_of(block: Block) -> float:
    """Relative error of a result, against the same with sums in another order.

    Experts compute in bf16 in both, rows of both have the same values, and so have their outputs: what differs is the
    order of k terms of a token, rounded to the rows' dtype once (here) or k times (torchtitan), and of the sums over H
    that make a score's gradient. An output that differs in its last bit is an upstream gradient that does, which
    expert GEMMs round to bf16: a half-unit may become a unit of bf16 in each of the five tensors between them (the
    gradients of y, of both branches of h, of their product, of x) and once more in the stored gradient.
    """
    rows = (block.top_k + 1) * torch.finfo(block.dtype).eps
    return 2 * (rows + (HIDDEN + INNER) * torch.finfo(torch.float32).eps + 6 * torch.finfo(torch.bfloat16).eps)


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for name, target in expected.items():
        error = (found[name].double() - target.double()).abs().max().item() if target.numel() else 0.0
        allowed = bound * target.abs().max().item() if target.numel() else 0.0
        assert error <= allowed, f"{name} is off by {error} of at most {allowed}"


def compare_with_stock(ctx: RankContext, block: Block) -> None:
    results = []
    for ours in (False, True):
        moe = shard(ctx, moe_of(block, ours=ours))
        kind = MoeEpTokenDispatcher if ours else AllToAllTokenDispatcher
        assert type(moe.routed_experts.token_dispatcher) is kind
        results.append((forward_backward(moe, rows_of(block, ctx.rank)), moe.tokens_per_expert_E))
    (stock, stock_counts), (ours, counts) = results
    assert torch.equal(stock_counts, counts)
    # Nothing of these two passes through a sum over choices where there is one.
    same = ["output"] if block.top_k == 1 else []
    for name in same:
        assert torch.equal(stock[name], ours[name]), name
    check_same(ours, stock, bound_of(block))


@TOKENS
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_equal_those_of_torchtitans_own_dispatcher(block: Block, top_k: int, dtype: torch.dtype):
    on_ranks(2, compare_with_stock, block.with_(top_k=top_k, dtype=dtype))


def compare_rows(ctx: RankContext, block: Block) -> None:
    """What both dispatchers hand to the experts."""
    handed = []
    for ours in (False, True):
        moe = shard(ctx, moe_of(block, ours=ours))
        x = rows_of(block, ctx.rank)
        scores, ids, probs = moe.router(x)
        counts = torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, ids, True).sum(dim=(0, 1))
        args = (x.view(-1, HIDDEN), scores.flatten(0, 1), ids.flatten(0, 1), counts)
        rows, groups, _ = moe.routed_experts.token_dispatcher.dispatch(*args)
        handed.append((rows, groups))
    for stock, ours in zip(*handed, strict=True):
        assert torch.equal(stock, ours)
        assert stock.dtype == ours.dtype


@TOKENS
def test_experts_get_the_same_rows_in_the_same_order(block: Block):
    on_ranks(2, compare_rows, block)
    on_ranks(4, compare_rows, block.with_(tokens=(*block.tokens, (3, 1), (1, 2))))


def compare_with_unsharded(ctx: RankContext, block: Block) -> None:
    found = forward_backward(shard(ctx, moe_of(block, ours=True)), rows_of(block, ctx.rank))
    for name in found:
        if name == "gradient of the gate" or "shared" in name:
            dist.all_reduce(found[name])
    alone = moe_of(block, ours=False)
    parts = [forward_backward(alone, rows_of(block, rank)) for rank in range(ctx.world_size)]
    # Gradients of parameters have added up over the calls; what a rank holds of experts is a slice.
    expected = {name: value for name, value in parts[-1].items() if name.startswith("gradient")}
    for name in EXPERTS:
        expected[f"gradient of {name}"] = expected[f"gradient of {name}"].chunk(ctx.world_size)[ctx.rank]
    expected |= {name: parts[ctx.rank][name] for name in ("output", "gradient of inputs")}
    assert all(bool(value.any()) for name, value in expected.items() if "shared" in name)
    # One bf16 GEMM over all ranks' rows, against one per rank that are added: one more rounding each.
    check_same(found, expected, bound_of(block) + ctx.world_size * torch.finfo(torch.bfloat16).eps)


@TOKENS
@pytest.mark.parametrize("top_k", [1, 3])
def test_results_equal_the_unsharded_block(block: Block, top_k: int):
    on_ranks(2, compare_with_unsharded, block.with_(top_k=top_k))


def test_one_expert_per_rank_on_four_ranks():
    on_ranks(4, compare_with_unsharded, Block(num_experts=4, top_k=3, tokens=((1, 4), (2, 3), (1, 0), (3, 2))))


def roll_scores(ctx: RankContext, block: Block) -> bool:
    """Whether the comparison notices scores that belong to the row before."""
    dispatch = MoeEpTokenDispatcher.dispatch

    def faulty(self: MoeEpTokenDispatcher, x: Tensor, scores: Tensor, *rest: Tensor) -> tuple:
        return dispatch(self, x, scores.roll(1, 0), *rest)

    MoeEpTokenDispatcher.dispatch = faulty
    try:
        compare_with_unsharded(ctx, block)
    except AssertionError as error:
        return " is off by " in str(error)
    finally:
        MoeEpTokenDispatcher.dispatch = dispatch
    return False


def test_a_planted_fault_is_caught():
    assert on_ranks(2, roll_scores, EVEN) == [True, True]


def recompute(ctx: RankContext, block: Block, reentrant: bool) -> None:
    results = []
    for again in (False, True):
        moe = shard(ctx, moe_of(block, ours=True))
        x = rows_of(block, ctx.rank).requires_grad_()
        out = checkpoint(moe, x, use_reentrant=reentrant) if again else moe(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(parameter.grad for parameter in moe.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_no_bit(reentrant: bool):
    on_ranks(2, recompute, UNEVEN, reentrant)


def pad(ctx: RankContext, block: Block) -> None:
    """Groups of multiples of 16 rows, zero behind the real ones, and the results of unpadded ones."""
    results = []
    for multiple in (None, 16):
        moe = shard(ctx, moe_of(block, ours=True, settings={"pad_multiple": multiple}))
        sizes: list[list[int]] = []
        moe.routed_experts.inner_experts.register_forward_pre_hook(
            lambda _, args, to=sizes: to.append(args[1].tolist())
        )
        results.append(forward_backward(moe, rows_of(block, ctx.rank)))
        if multiple is not None:
            assert all(size % multiple == 0 for size in itertools.chain(*sizes))
            assert sum(sizes[0]) > 0
    check_same(results[1], results[0], bound_of(block))


def test_padded_groups():
    on_ranks(2, pad, UNEVEN)


def one_rank(block: Block) -> None:
    """Without expert parallelism: wire_meshes(ep_mesh=None), or no call of it at all."""
    expected = forward_backward(moe_of(block, ours=False), rows_of(block, 0))
    for wired in (False, True):
        moe = moe_of(block, ours=True)
        if wired:
            moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=None)
        check_same(forward_backward(moe, rows_of(block, 0)), expected, bound_of(block))


def test_without_expert_parallelism():
    one_rank(EVEN)


def evaluate(ctx: RankContext, block: Block) -> None:
    moe = shard(ctx, moe_of(block, ours=True)).eval()
    x = rows_of(block, ctx.rank)
    with torch.no_grad():
        alone = moe(x)
    moe.requires_grad_(False)
    x.requires_grad_()
    out = moe(x)
    out.sum().backward()
    assert torch.equal(alone, out)
    assert x.grad is not None
    # A validator may run in another dtype than training.
    assert moe.bfloat16()(x.detach().bfloat16()).dtype == torch.bfloat16


def test_evaluation_and_frozen_experts():
    on_ranks(2, evaluate, EVEN)


def default_backend(ctx: RankContext, block: Block) -> None:
    """torchtitan's default, ``spmd_types``, under which its own dispatcher takes the group of the current mesh.

    That one sends lists of uneven tensors then, which gloo has not, so ours is compared with itself elsewhere.
    """
    expected = forward_backward(shard(ctx, moe_of(block, ours=True)), rows_of(block, ctx.rank))
    size = ctx.world_size
    dims = ParallelDims(dp_replicate=1, dp_shard=size, cp=1, tp=1, pp=1, ep=size, world_size=size)
    context = get_spmd_context(parallel_dims=dims)
    moe = shard(ctx, moe_of(block, ours=True))
    set_spmd_backend("spmd_types")
    with context():
        moe.routed_experts.token_dispatcher.wire_meshes(ep_mesh=dims.get_optional_mesh("ep"))
        found = forward_backward(moe, rows_of(block, ctx.rank))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_under_torchtitans_default_spmd_backend():
    on_ranks(2, default_backend, EVEN)
    on_ranks(2, default_backend, UNEVEN)
