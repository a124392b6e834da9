"""Memory shared among processes: on one GPU, on several, while its owner lives, and after."""

from __future__ import annotations

import gc
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_ep.backends.sharing import exchange_fds, gather_capability, host_id, local_capability, share
from moe_ep.errors import MoeEpError
from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext

_C = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test` or pip install")
if not hasattr(_C, "Arena"):
    pytest.skip("moe_ep._C is built without CUDA", allow_module_level=True)
pytestmark = pytest.mark.gpu

MIB = 1 << 20
WAYS = ["fd", "ipc"]
# All ranks on one GPU, or one GPU each.
PLACES = ["one_gpu", pytest.param("spread", marks=pytest.mark.multi_gpu(2))]


def gatherer(group: dist.ProcessGroup) -> Callable[[bytes], list[bytes]]:
    def all_gather(mine: bytes) -> list[bytes]:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, mine, group=group)
        return told

    return all_gather


class Node:
    """One rank's arena, shared with all others, as tensors."""

    def __init__(self, ctx: RankContext, way: str, place: str, num_bytes: int) -> None:
        device = ctx.rank % torch.cuda.device_count() if place == "spread" else 0
        torch.cuda.set_device(device)
        self.arena = _C.Arena(num_bytes=num_bytes, device=device, way=way)
        self.addresses = share(self.arena, ctx.rank, ctx.world_size, gatherer(ctx.group))
        self._rank = ctx.rank

    def view(self, rank: int, num_bytes: int, offset: int = 0) -> Tensor:
        if rank == self._rank:
            return torch.from_dlpack(self.arena.view(offset, num_bytes))
        return torch.from_dlpack(self.arena.peer_view(self.addresses[rank] + offset, num_bytes))


def meet(ctx: RankContext) -> None:
    torch.cuda.synchronize()
    dist.barrier(ctx.group)


# One process


@pytest.fixture
def arena() -> Any:
    found = _C.Arena(num_bytes=3 * MIB, device=0, way="local")
    yield found
    found.close()


def test_capabilities_are_those_of_the_gpu():
    told = _C.Arena.capabilities(0)
    properties = torch.cuda.get_device_properties(0)
    assert told["compute_capability"] == (properties.major, properties.minor)
    assert told["sms"] == properties.multi_processor_count
    assert told["uuid"] == _C.Arena.device_uuids()[0] == f"GPU-{properties.uuid}"
    assert len(set(_C.Arena.device_uuids())) == torch.cuda.device_count()
    assert _C.Arena.peer_access(0, 0)
    with pytest.raises(ValueError, match="device=99: must be 0 to"):
        _C.Arena.capabilities(99)


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_memory_is_zeroed_and_rounded_up(way: str):
    for num_bytes in (1, 2 * MIB, 5 * MIB + 3):
        arena = _C.Arena(num_bytes=num_bytes, device=0, way=way)
        assert (arena.way, arena.device) == (way, 0)
        assert arena.base % 128 == 0
        assert arena.num_bytes % (128 if way == "local" else 2 * MIB) == 0
        assert num_bytes <= arena.num_bytes < num_bytes + 2 * MIB
        everything = torch.from_dlpack(arena.view(0, arena.num_bytes))
        assert not everything.any()
        # What the next one may be given.
        everything.fill_(255)
        torch.cuda.synchronize()
        arena.close()


def test_view_is_the_memory(arena: Any):
    view = torch.from_dlpack(arena.view(256, 1024))
    assert (view.dtype, view.shape, view.device) == (torch.uint8, (1024,), torch.device("cuda:0"))
    assert view.data_ptr() == arena.base + 256
    numbers = torch.arange(512, device="cuda").to(torch.bfloat16)
    view.view(torch.bfloat16).copy_(numbers)
    everything = torch.from_dlpack(arena.view(0, arena.num_bytes))
    assert torch.equal(everything[256:1280].view(torch.bfloat16), numbers)
    assert not everything[:256].any()
    assert not everything[1280:].any()
    assert torch.from_dlpack(arena.view(arena.num_bytes, 0)).numel() == 0


def test_view_outside_is_refused(arena: Any):
    for offset, num_bytes in ((-1, 2), (0, arena.num_bytes + 1), (arena.num_bytes, 1), (8, -1), (2**62, 2**62)):
        with pytest.raises(ValueError, match=f"offset={offset}, num_bytes={num_bytes}: must lie in the arena"):
            arena.view(offset, num_bytes)
    with pytest.raises(ValueError, match="must lie in a peer's memory"):
        arena.peer_view(arena.base, 1)


def test_view_keeps_the_memory():
    free = torch.cuda.mem_get_info()[0]
    arena = _C.Arena(num_bytes=64 * MIB, device=0, way="fd")
    view = torch.from_dlpack(arena.view(0, 64 * MIB))
    unused = arena.view(0, 64 * MIB)
    del arena
    gc.collect()
    assert torch.cuda.mem_get_info()[0] <= free - 64 * MIB
    assert int(view.fill_(3).sum(dtype=torch.int64)) == 3 * 64 * MIB
    del view
    # Torch and its kernels took memory of their own above.
    before = torch.cuda.mem_get_info()[0]
    assert before <= free - 64 * MIB
    del unused
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= before + 64 * MIB


def test_closed_arena_refuses_use():
    arena = _C.Arena(num_bytes=1, device=0, way="fd")
    arena.close()
    arena.close()
    assert arena.base == 0
    for call in (lambda: arena.view(0, 0), arena.export_fd, lambda: arena.open_fd(0, 2 * MIB, -1)):
        with pytest.raises(ValueError, match="this arena is closed"):
            call()


def test_calls_of_another_way_are_refused(arena: Any):
    for call in (arena.export_fd, arena.export_ipc, lambda: arena.open_ipc(bytes(64), 2 * MIB, -1)):
        with pytest.raises(ValueError, match="this arena's way is local"):
            call()


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_what_the_device_cannot_give_is_an_error_that_passes(way: str):
    with pytest.raises(MoeEpError, match=r"^(cuMemCreate|cudaMalloc): \w+, "):
        _C.Arena(num_bytes=1 << 46, device=0, way=way)
    assert torch.ones(1000, device="cuda").sum().item() == 1000
    arena = _C.Arena(num_bytes=MIB, device=0, way=way)
    arena.close()


def test_failed_opening_leaves_nothing():
    arena = _C.Arena(num_bytes=MIB, device=0, way="fd")
    own = arena.export_fd()
    wrong, write_end = os.pipe()
    for _ in range(3):
        with pytest.raises(MoeEpError, match="cuMemImportFromShareableHandle: CUDA_ERROR"):
            arena.open_fd(wrong, arena.num_bytes, 0)
        with pytest.raises(MoeEpError, match=r"cuMem(Map|SetAccess): CUDA_ERROR"):
            arena.open_fd(own, 64 * arena.num_bytes, 0)
    with pytest.raises(ValueError, match="must be the peer's num_bytes, a multiple of"):
        arena.open_fd(own, 1, 0)
    address = arena.open_fd(own, arena.num_bytes, 0)
    torch.from_dlpack(arena.peer_view(address, 100)).fill_(9)
    assert int(torch.from_dlpack(arena.view(0, arena.num_bytes)).sum(dtype=torch.int64)) == 900
    torch.cuda.synchronize()
    arena.close()
    for fd in (own, wrong, write_end):
        os.close(fd)


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_unshared_memory_is_given_back(way: str):
    free = 0
    for attempt in range(40):
        if attempt == 2:
            free = torch.cuda.mem_get_info()[0]
        arena = _C.Arena(num_bytes=64 * MIB, device=0, way=way)
        # By either path.
        if attempt % 2:
            arena.close()
        del arena
    gc.collect()
    assert torch.cuda.mem_get_info()[0] > free - 64 * MIB


@pytest.mark.parametrize("way", [*WAYS, "local"])
def test_arena_comes_and_goes_while_a_graph_is_captured(way: str):
    x = torch.zeros(10, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x += 1
        _C.Arena(num_bytes=MIB, device=0, way=way).close()
        x += 1
    graph.replay()
    assert x.tolist() == [2] * 10


@pytest.mark.multi_gpu(2)
def test_current_device_stays():
    torch.cuda.set_device(0)
    arena = _C.Arena(num_bytes=MIB, device=1, way="fd")
    assert torch.from_dlpack(arena.view(0, 8)).device == torch.device("cuda:1")
    os.close(arena.export_fd())
    arena.close()
    assert torch.empty(1, device="cuda").device == torch.device("cuda:0")


# Several processes


def store_everywhere(ctx: RankContext, way: str, place: str) -> None:
    num_bytes = 3 * MIB * (ctx.rank + 1) + 5
    node = Node(ctx, way, place, num_bytes)
    used = 3 * MIB + 5
    part = used // ctx.world_size
    for owner in range(ctx.world_size):
        node.view(owner, part, ctx.rank * part).fill_(10 * owner + ctx.rank + 1)
    meet(ctx)
    for owner in range(ctx.world_size):
        for writer in range(ctx.world_size):
            found = node.view(owner, part, writer * part)
            assert torch.equal(found, torch.full_like(found, 10 * owner + writer + 1))
    own = node.view(ctx.rank, node.arena.num_bytes)
    assert not own[ctx.world_size * part :].any()
    # Copies between own and mapped memory, to the last byte of an arena of another size.
    peer = (ctx.rank + 1) % ctx.world_size
    its_bytes = 3 * MIB * (peer + 1) + 5
    meet(ctx)
    pattern = torch.arange(1000, device=own.device).to(torch.uint8)
    node.view(peer, 1000, its_bytes - 1000).copy_(pattern)
    meet(ctx)
    assert torch.equal(node.view(ctx.rank, 1000, num_bytes - 1000), pattern)
    assert torch.equal(node.view(peer, 1000, its_bytes - 1000).cpu(), pattern.cpu())
    with pytest.raises(ValueError, match="must lie in a peer's memory"):
        node.arena.peer_view(node.addresses[peer] + 100, its_bytes + 2 * MIB)
    meet(ctx)
    node.arena.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_stores_into_every_arena(num_ranks: int, way: str, place: str):
    run_ranks(num_ranks, store_everywhere, way, place)


def agree(ctx: RankContext) -> str:
    torch.cuda.set_device(0)

    def probe() -> dict[str, Any]:
        return local_capability(_C.Arena, 0, host_id())

    way, told = gather_capability(probe, ctx.rank, gatherer(ctx.group))
    assert told[1 - ctx.rank] == told[ctx.rank] == probe()
    return way


def test_ranks_agree_on_file_descriptors_where_there_are():
    expected = "fd" if _C.Arena.capabilities(0)["fd"] else "ipc"
    assert run_ranks(2, agree) == [expected] * 2


def reopen(ctx: RankContext, way: str, place: str, rounds: int) -> None:
    size = 32 * MIB
    free, fds = 0, 0
    for attempt in range(rounds + 2):
        if attempt == 2:
            meet(ctx)
            free, fds = torch.cuda.mem_get_info()[0], len(os.listdir("/proc/self/fd"))
            meet(ctx)
        node = Node(ctx, way, place, size)
        peer = (ctx.rank + 1) % ctx.world_size
        node.view(peer, size).fill_(attempt + 1)
        meet(ctx)
        assert int(node.view(ctx.rank, 1)) == attempt + 1
        # One rank closes while its peers may still store.
        node.arena.close()
        del node
    meet(ctx)
    # An exported IPC handle keeps its memory until the process ends.
    on_this_gpu = ctx.world_size if place == "one_gpu" else 1
    kept = rounds * size * on_this_gpu if way == "ipc" else 0
    assert torch.cuda.mem_get_info()[0] > free - kept - size
    assert len(os.listdir("/proc/self/fd")) < fds + rounds


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("way", "rounds"), [("fd", 30), ("ipc", 6)])
def test_reopening_leaks_nothing(way: str, rounds: int, place: str):
    run_ranks(2, reopen, way, place, rounds, fresh=True, timeout=120.0)


def outlast_close(ctx: RankContext, way: str, place: str) -> None:
    node = Node(ctx, way, place, 64 * MIB)
    if ctx.rank == 0:
        node.arena.close()
        # What the closed memory would be given to, were it free.
        others = [torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        torch.cuda.synchronize()
    dist.barrier(ctx.group)
    if ctx.rank == 1:
        mapped = node.view(0, 64 * MIB)
        mapped.fill_(77)
        assert int((mapped == 77).sum()) == 64 * MIB
        del mapped
    meet(ctx)
    if ctx.rank == 0:
        assert not any(bool(other.any()) for other in others)
    node.arena.close()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_peer_may_store_after_the_owner_closed(way: str, place: str):
    run_ranks(2, outlast_close, way, place, fresh=True, timeout=120.0)


def outlive_owner(ctx: RankContext, way: str, place: str) -> int:
    size = 64 * MIB
    node = Node(ctx, way, place, size)
    # The owner alone holds the end that writes: its death is the end of the file.
    read_end, write_end = os.pipe()
    peers_end = exchange_fds(read_end, ctx.rank, 2, gatherer(ctx.group), 20.0)[1 - ctx.rank]
    mapped = node.view(0, size)
    if ctx.rank == 0:
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write_end)
    passes = {False: 0, True: 0}
    begin, died = time.monotonic(), 0.0
    while not died or time.monotonic() < died + 1.0:
        assert time.monotonic() < begin + 30, "the owner did not die"
        for _ in range(50):
            mapped.fill_(sum(passes.values()) % 256)
        torch.cuda.synchronize()
        passes[bool(died)] += 1
        if not died and select.select([peers_end], [], [], 0)[0]:
            died = time.monotonic()
    assert min(passes.values()) > 0
    fresh = torch.arange(1000, device="cuda")
    assert int(fresh.sum()) == 499500
    mapped.fill_(5)
    assert int((mapped == 5).sum()) == size
    del mapped
    node.arena.close()
    again = _C.Arena(num_bytes=size, device=torch.cuda.current_device(), way=way)
    assert not torch.from_dlpack(again.view(0, size)).any()
    torch.cuda.synchronize()
    again.close()
    return passes[True]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("way", WAYS)
def test_peer_stores_on_when_the_owner_is_killed(way: str, place: str):
    assert run_ranks(2, outlive_owner, way, place, fresh=True, expect_dead=[0], timeout=120.0)[1] > 0
