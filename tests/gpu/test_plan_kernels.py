"""The plan kernels against their host twin."""

import pytest
import torch
from torch import Tensor

from tests.plan_arrays import KINDS, POISON, SHAPES, PlanArrays, make_topk_idx

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")
pytestmark = pytest.mark.gpu


def host_plan(topk_idx: Tensor, num_experts: int, num_ranks: int) -> PlanArrays:
    arrays = PlanArrays.poisoned(topk_idx, num_experts, num_ranks)
    _C.plan_host(_C.PlanParams(**arrays.arguments(topk_idx)))
    return arrays


def cuda_plan(topk_idx: Tensor, num_experts: int, num_ranks: int, *, guard_bytes: int = 4096) -> PlanArrays:
    """Runs the kernels with poisoned outputs and workspace; a store behind the workspace's end is found out."""
    arrays = PlanArrays.poisoned(topk_idx, num_experts, num_ranks)
    params = _C.PlanParams(**arrays.arguments(topk_idx))
    num_bytes = params.workspace_bytes
    workspace = torch.full((num_bytes + guard_bytes,), POISON, dtype=torch.int8, device=topk_idx.device)
    stream = torch.cuda.current_stream()
    _C.plan_cuda(params, workspace=workspace.data_ptr(), workspace_bytes=num_bytes, stream=stream.cuda_stream)
    stream.synchronize()
    assert (workspace[num_bytes:] == POISON).all()
    return arrays


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_equal_host_twin(shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype):
    topk_idx = make_topk_idx(shape, kind, dtype)
    num_experts, num_ranks = shape[2:]
    cuda_plan(topk_idx.cuda(), num_experts, num_ranks).assert_equal(host_plan(topk_idx, num_experts, num_ranks))


@pytest.mark.parametrize("seed", range(24))
def test_random_shapes(seed: int):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    num_ranks, top_k, num_tokens = draw(1, 64), draw(1, 64), draw(0, 5000)
    num_experts = num_ranks * draw(1, 4096 // num_ranks)
    # With replacement: repeated experts are not allowed by the contract, but must not break the order either.
    topk_idx = torch.randint(-1, num_experts, (num_tokens, top_k), generator=generator)
    cuda_plan(topk_idx.cuda(), num_experts, num_ranks).assert_equal(host_plan(topk_idx, num_experts, num_ranks))


def test_repeated_runs_give_the_same_bits():
    topk_idx = make_topk_idx((16384, 8, 256, 8), "zipf").cuda()
    first = cuda_plan(topk_idx, 256, 8)
    for _ in range(50):
        cuda_plan(topk_idx, 256, 8).assert_equal(first)


def test_capture_and_replay_with_other_ids():
    shape = (777, 4, 32, 4)
    topk_idx = make_topk_idx(shape, "uniform").cuda()
    arrays = PlanArrays.poisoned(topk_idx, 32, 4)
    params = _C.PlanParams(**arrays.arguments(topk_idx))
    workspace = torch.empty(params.workspace_bytes, dtype=torch.int8, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        _C.plan_cuda(params, workspace=workspace.data_ptr(), workspace_bytes=params.workspace_bytes, stream=stream)
    for kind in ("holes", "one", "empty"):
        other = make_topk_idx(shape, kind)
        topk_idx.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        arrays.assert_equal(host_plan(other, 32, 4))
