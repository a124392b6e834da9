"""The host twin of the plan kernels against a computation of its own in torch, and against the Python plan."""

import pytest
import torch
from torch import Tensor

from moe_ep.backends.cuda_counting import choices_of_mask
from moe_ep.plan import count_choices, tokens_in_rank
from tests.plan_arrays import KINDS, POISON, SHAPES, PlanArrays, make_topk_idx

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")


def expected_plan(topk_idx: Tensor, num_experts: int, num_ranks: int) -> PlanArrays:
    """Computes the plan from sorts and running sums over whole tensors."""
    num_tokens, top_k = topk_idx.shape
    chosen = (topk_idx >= 0) & (topk_idx < num_experts)
    expert = torch.where(chosen, topk_idx, num_experts).flatten()
    counts = torch.bincount(expert, minlength=num_experts + 1)
    order = expert.argsort(stable=True)
    position = torch.empty_like(expert)
    position[order] = torch.arange(expert.numel()) - (counts.cumsum(0) - counts)[expert[order]]
    rank = torch.where(chosen, topk_idx // (num_experts // num_ranks), num_ranks)
    in_rank = (rank.unsqueeze(2) == torch.arange(num_ranks)).any(1)
    return PlanArrays(
        choices_per_expert=counts[:num_experts].int(),
        tokens_per_rank=in_rank.sum(0).int(),
        is_token_in_rank=in_rank.to(torch.uint8),
        idx_in_expert=torch.where(chosen, position.view(num_tokens, top_k), -1).int(),
        idx_in_rank=torch.where(in_rank, in_rank.cumsum(0) - 1, -1).int(),
    )


def host_plan(topk_idx: Tensor, num_experts: int, num_ranks: int) -> PlanArrays:
    arrays = PlanArrays.poisoned(topk_idx, num_experts, num_ranks)
    _C.plan_host(_C.PlanParams(**arrays.arguments(topk_idx)))
    return arrays


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_host_twin_equals_torch(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype):
    topk_idx = make_topk_idx(shape, kind, dtype)
    num_experts, num_ranks = shape[2:]
    host_plan(topk_idx, num_experts, num_ranks).assert_equal(expected_plan(topk_idx.long(), num_experts, num_ranks))


@pytest.mark.parametrize("kind", ["uniform", "one", "empty", "holes"])
@pytest.mark.parametrize("shape", SHAPES[:9], ids=str)
def test_host_twin_equals_python_plan(shape: tuple[int, int, int, int], kind: str):
    topk_idx = make_topk_idx(shape, kind)
    num_experts, num_ranks = shape[2:]
    found = host_plan(topk_idx, num_experts, num_ranks)
    assert torch.equal(found.choices_per_expert.long(), count_choices(topk_idx, num_experts))
    assert torch.equal(found.is_token_in_rank.bool(), tokens_in_rank(topk_idx, num_experts, num_ranks))


@pytest.mark.parametrize("num_ranks", [1, 3, 16])
@pytest.mark.parametrize("num_tokens", [0, 1, 97])
def test_choices_of_a_mask_plan_the_rows_of_the_mask(num_tokens: int, num_ranks: int):
    mask = torch.rand(num_tokens, num_ranks, generator=torch.Generator().manual_seed(5)) < 0.4
    choices = choices_of_mask(mask)
    arrays = PlanArrays.poisoned(choices, num_ranks, num_ranks)
    token_ranks = torch.full((num_tokens,), POISON, dtype=torch.int32)
    _C.plan_host(_C.PlanParams(**arrays.arguments(choices), token_ranks=token_ranks.data_ptr()))
    assert torch.equal(arrays.is_token_in_rank.bool(), mask)
    assert torch.equal(arrays.tokens_per_rank.long(), mask.sum(0))
    assert torch.equal(arrays.idx_in_rank.long(), torch.where(mask, mask.cumsum(0) - 1, -1))
    assert torch.equal(token_ranks.long(), (mask.long() << torch.arange(num_ranks)).sum(1))


@pytest.mark.parametrize("name", ["idx_in_expert", "idx_in_rank", "is_token_in_rank", "tokens_per_rank"])
def test_planted_fault_is_caught(name: str):
    topk_idx = make_topk_idx((97, 6, 6, 2), "holes")
    found = host_plan(topk_idx, 6, 2)
    values = getattr(found, name).flatten()
    # Two neighbours change places, as a race between two warps would have it.
    other = int((values != values[0]).nonzero()[0])
    values[[0, other]] = values[[other, 0]]
    with pytest.raises(AssertionError, match=name):
        found.assert_equal(expected_plan(topk_idx, 6, 2))


def test_repeated_expert_takes_places_in_choice_order():
    found = host_plan(torch.tensor([[3, 3], [0, 3]]), 4, 2)
    assert found.idx_in_expert.tolist() == [[0, 1], [0, 2]]
    assert found.tokens_per_rank.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"top_k": 0}, "top_k=0: must be 1 to 64"),
        ({"top_k": 65}, "top_k=65: must be 1 to 64"),
        ({"num_experts": 4097}, "num_experts=4097: must be 1 to 4096"),
        ({"num_ranks": 65}, "num_ranks=65: must be 1 to 64"),
        ({"num_ranks": 3}, "num_experts=8: must be a multiple of num_ranks=3"),
        ({"num_tokens": -1}, "num_tokens=-1: must not be negative"),
        ({"num_tokens": 2**30}, r"num_tokens=1073741824: num_tokens \* top_k must be below 2\*\*31, top_k=2"),
        ({"index_bytes": 2}, "index_bytes=2: compiled for 4 8"),
        ({"topk_idx": 0}, "topk_idx=0: must be the address of 8 elements"),
        ({"idx_in_rank": 6}, "idx_in_rank=6: must be a multiple of 4"),
    ],
)
def test_wrong_arguments(change: dict[str, int], text: str):
    topk_idx = torch.zeros(4, 2, dtype=torch.int64)
    arguments = PlanArrays.poisoned(topk_idx, 8, 4).arguments(topk_idx)
    with pytest.raises(ValueError, match=text):
        _C.PlanParams(**{**arguments, **change})


def test_workspace_is_measured_from_the_shape():
    def workspace_bytes(num_tokens: int) -> int:
        topk_idx = torch.zeros(num_tokens, 2, dtype=torch.int64)
        params = _C.PlanParams(**PlanArrays.poisoned(topk_idx, 60, 4).arguments(topk_idx))
        told = _C.plan_workspace_bytes(num_tokens=num_tokens, top_k=2, num_experts=60, num_ranks=4)
        assert told == params.workspace_bytes
        return params.workspace_bytes

    columns_bytes = (60 + 4) * 4
    # Sixteen warps of a block take eight tokens each; the last block writes totals, so there is always one.
    assert workspace_bytes(0) == workspace_bytes(1) == workspace_bytes(128) == columns_bytes
    assert workspace_bytes(129) == 2 * columns_bytes
    # Chunks grow with T, so that the blocks whose counts are added up stay few: to 32 tokens in 16 blocks, then in 64.
    assert workspace_bytes(2048) == workspace_bytes(4096) == workspace_bytes(8192) == 16 * columns_bytes
    assert workspace_bytes(2049) == workspace_bytes(4097) == 9 * columns_bytes
    assert workspace_bytes(1024 * 32) == 64 * columns_bytes
    assert workspace_bytes(1024 * 32 + 1) == 33 * columns_bytes


def test_small_workspace_is_refused_or_no_kernels_are_built():
    from moe_ep.errors import NotBuiltError

    topk_idx = torch.zeros(4, 2, dtype=torch.int64)
    params = _C.PlanParams(**PlanArrays.poisoned(topk_idx, 8, 4).arguments(topk_idx))
    built = _C.build_info()["cuda"]
    error, text = (ValueError, "workspace_bytes=0: must be at least") if built else (NotBuiltError, "without CUDA")
    with pytest.raises(error, match=text):
        _C.plan_cuda(params, workspace=0, workspace_bytes=0, stream=0)
