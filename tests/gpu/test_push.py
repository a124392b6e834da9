"""Bulk copies to peers alone: every byte arrives where it belongs, and nothing beside it changes."""

from __future__ import annotations

import pytest
import torch

from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext
from tests.gpu.test_arena import PLACES, Node, meet

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")
if not hasattr(_C, "push"):
    pytest.skip("moe_ep._C is built without CUDA", allow_module_level=True)
pytestmark = pytest.mark.gpu


def drawn(rank: int, num_bytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).cuda()


def push(ctx: RankContext, place: str, sizes: list[int], num_sms: int) -> None:
    """Rank r sends ``sizes[i]`` bytes to rank r + i; gaps of 48 bytes must keep what they held."""
    gap = 48
    slot = max(sizes) + gap
    node = Node(ctx, "fd", place, slot * ctx.world_size)
    mine = node.view(ctx.rank, slot * ctx.world_size)
    mine.fill_(0xFF)
    source = drawn(ctx.rank, sum(sizes))
    meet(ctx)
    peers = [(ctx.rank + step) % ctx.world_size for step in range(len(sizes))]
    _C.push(
        sources=[source.data_ptr() + sum(sizes[:step]) for step in range(len(sizes))],
        targets=[node.addresses[peer] + slot * ctx.rank for peer in peers],
        num_bytes=sizes,
        num_sms=num_sms,
        stream=torch.cuda.current_stream().cuda_stream,
    )
    meet(ctx)
    for sender in range(ctx.world_size):
        step = (ctx.rank - sender) % ctx.world_size
        came = mine[slot * sender : slot * (sender + 1)]
        begin, size = sum(sizes[:step]), sizes[step]
        assert torch.equal(came[:size], drawn(sender, sum(sizes))[begin : begin + size]), sender
        assert bool((came[size:] == 0xFF).all()), sender


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("num_sms", [1, 8])
@pytest.mark.parametrize("sizes", [[16, 0], [7168, 7184], [3 << 20, 14336 * 37]])
def test_bytes_arrive(place: str, sizes: list[int], num_sms: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("bulk copies need a GPU since Hopper")
    run_ranks(2, push, place, sizes, num_sms)
