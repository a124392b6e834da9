"""How ranks agree on a way to share memory, and how descriptors and handles travel; memory stands in for GPUs here."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moe_ep.backends.sharing import (
    choose_way,
    exchange_fds,
    gather_capability,
    host_id,
    local_capability,
    share,
)
from moe_ep.errors import ExchangeMismatchError, NotBuiltError, PeerAbortedError, PeerTimeoutError
from moe_ep.testing import run_ranks
from moe_ep.testing.worker import RankContext

SHORT_SECONDS = 1.0


def gatherer(group: dist.ProcessGroup) -> Callable[[bytes], list[bytes]]:
    def all_gather(mine: bytes) -> list[bytes]:
        told: list[Any] = [None] * group.size()
        dist.all_gather_object(told, mine, group=group)
        return told

    return all_gather


def open_fds() -> set[str]:
    # The listing's own descriptor is gone when it has been listed.
    return {name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}


def memory_file(text: str) -> int:
    fd = os.memfd_create("arena")
    os.write(fd, text.encode())
    return fd


@contextlib.contextmanager
def nothing_left_open() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


# Descriptors


def swap_files(ctx: RankContext) -> None:
    with nothing_left_open():
        fd = memory_file(f"from {ctx.rank}")
        # Ranks come at different times: nobody may need another to be there first.
        time.sleep(0.1 * ((ctx.rank * 2) % 3))
        fds = exchange_fds(fd, ctx.rank, ctx.world_size, gatherer(ctx.group), 20.0)
        assert fds[ctx.rank] == fd
        assert [os.pread(one, 100, 0).decode() for one in fds] == [f"from {peer}" for peer in range(ctx.world_size)]
        assert not any(os.get_inheritable(one) for one in fds)
        dist.barrier(ctx.group)
        for one in fds:
            os.pwrite(one, bytes([65 + ctx.rank]), 10 + ctx.rank)
        dist.barrier(ctx.group)
        # The same memory, not copies: everybody's byte stands in the own file.
        assert os.pread(fd, 100, 10).decode() == "ABCD"[: ctx.world_size]
        for one in fds:
            os.close(one)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_rank_gets_every_file(num_ranks: int):
    run_ranks(num_ranks, swap_files)


def swap_without_last(ctx: RankContext) -> None:
    """The last rank names a socket that it never reads, as one does that stops in between."""
    last = ctx.world_size - 1
    all_gather = gatherer(ctx.group)
    with nothing_left_open():
        if ctx.rank == last:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
                name = f"\0moe_ep-test-{os.getpid()}".encode()
                listener.bind(name)
                listener.listen(8)
                all_gather(b"+" + name)
                dist.barrier(ctx.group)
            return
        fd = memory_file("here")
        begin = time.monotonic()
        with pytest.raises(PeerTimeoutError, match=rf"rank {ctx.rank} could not .* with rank\(s\) {last} ") as caught:
            exchange_fds(fd, ctx.rank, ctx.world_size, all_gather, SHORT_SECONDS)
        assert caught.value.ranks == (last,)
        assert time.monotonic() - begin < SHORT_SECONDS + 5
        os.close(fd)
        dist.barrier(ctx.group)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rank_that_never_comes_is_named(num_ranks: int):
    run_ranks(num_ranks, swap_without_last)


def swap_beside_strangers(ctx: RankContext) -> None:
    """Connections that bring nothing, too little, a wrong rank or a rank twice do not count, and leave nothing open."""
    all_gather = gatherer(ctx.group)
    names: list[bytes] = []
    strangers: list[socket.socket] = []

    def all_gather_with_strangers(mine: bytes) -> list[bytes]:
        told = all_gather(mine)
        names.extend(told)
        with open(os.devnull) as other:
            for message in (None, b"", b"ab", struct.pack("=i", 99), struct.pack("=i", 1 - ctx.rank)):
                stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                stranger.connect(told[ctx.rank][1:])
                if message == b"":
                    stranger.close()
                elif message is not None:
                    # The last claims the peer's rank without bringing a file.
                    fds = [] if message == struct.pack("=i", 1 - ctx.rank) else [other.fileno()]
                    socket.send_fds(stranger, [message], fds)
                strangers.append(stranger)
        dist.barrier(ctx.group)
        return told

    with nothing_left_open():
        fd = memory_file(f"from {ctx.rank}")
        fds = exchange_fds(fd, ctx.rank, 2, all_gather_with_strangers, 20.0)
        assert os.pread(fds[1 - ctx.rank], 100, 0).decode() == f"from {1 - ctx.rank}"
        for one in [*fds, *(stranger.detach() for stranger in strangers)]:
            if one >= 0:
                os.close(one)
    assert len(names) == 2


def test_strangers_are_ignored():
    run_ranks(2, swap_beside_strangers)


# Agreement


def capability(index: int, **changes: Any) -> dict[str, Any]:
    uuids = [f"GPU-{one}" for one in range(4)]
    told = {
        "fd": True,
        "ipc": True,
        "uuid": uuids[index],
        "compute_capability": (9, 0),
        "sms": 132,
        "host": "a",
        "access": dict.fromkeys(uuids, True),
    }
    return {**told, **changes}


def test_best_way_that_all_ranks_have_is_chosen():
    everything = [capability(rank) for rank in range(4)]
    assert choose_way(everything) == "fd"
    assert choose_way([*everything[:3], capability(3, fd=False)]) == "ipc"
    assert choose_way([capability(0, fd=False, ipc=False)]) == "local"
    # Several processes on one GPU need no access between GPUs.
    assert choose_way([capability(0, access={"GPU-0": False})] * 2) == "fd"
    # A GPU that a process does not see cannot be asked about.
    assert choose_way([capability(0, access={"GPU-0": True}), capability(1, access={"GPU-1": True})]) == "fd"


def test_ranks_that_lack_every_way_are_named():
    with pytest.raises(
        NotBuiltError, match=r"rank\(s\) 1 cannot .*, rank\(s\) 0, 2 not by CUDA IPC.*backend=\"torch\""
    ):
        choose_way([capability(0, ipc=False), capability(1, fd=False), capability(2, ipc=False)])


def test_hosts_must_be_one():
    with pytest.raises(NotBuiltError, match=r"rank\(s\) 1, 3 run on another machine .*\(b, not a\).*backend=\"torch\""):
        choose_way([capability(0), capability(1, host="b"), capability(2), capability(3, host="b")])


@pytest.mark.parametrize("blind", [0, 1])
def test_gpus_must_reach_each_other_both_ways(blind: int):
    access = {f"GPU-{1 - blind}": False}
    told = [capability(rank, **({"access": access} if rank == blind else {})) for rank in range(2)]
    expected = rf"of rank {blind} \(GPU-{blind}\) has no peer access to that of rank {1 - blind} .*backend=\"torch\""
    with pytest.raises(NotBuiltError, match=expected):
        choose_way(told)


class FakeQueries:
    """Four GPUs in a row, of which neighbours reach each other."""

    @staticmethod
    def device_uuids() -> list[str]:
        return [f"GPU-{index}" for index in range(4)]

    @staticmethod
    def capabilities(device: int) -> dict[str, Any]:
        return {"fd": True, "ipc": True, "uuid": f"GPU-{device}", "compute_capability": (9, 0), "sms": 132}

    @staticmethod
    def peer_access(device: int, peer: int) -> bool:
        return abs(device - peer) < 2


def agree(ctx: RankContext, devices: list[int]) -> str:
    def probe() -> dict[str, Any]:
        return local_capability(FakeQueries(), devices[ctx.rank], host_id())

    way, told = gather_capability(probe, ctx.rank, gatherer(ctx.group))
    assert [one["uuid"] for one in told] == [f"GPU-{device}" for device in devices]
    assert told[ctx.rank] == probe()
    return way


def test_ranks_agree():
    assert run_ranks(3, agree, [0, 1, 1]) == ["fd"] * 3


def disagree(ctx: RankContext) -> None:
    with pytest.raises(NotBuiltError, match=r"of rank 0 \(GPU-0\) has no peer access to that of rank 2 \(GPU-2\)"):
        agree(ctx, [0, 1, 2])


def test_all_ranks_refuse_together():
    run_ranks(3, disagree)


def fail_on_one(ctx: RankContext) -> None:
    def probe() -> dict[str, Any]:
        if ctx.rank == 1:
            raise OSError("no driver")
        return capability(ctx.rank)

    expected, text = (
        (OSError, "no driver") if ctx.rank == 1 else (PeerAbortedError, "rank 1 failed: OSError: no driver")
    )
    with pytest.raises(expected, match=text):
        gather_capability(probe, ctx.rank, gatherer(ctx.group))


def test_failed_probe_is_raised_everywhere():
    run_ranks(3, fail_on_one)


# Arenas


class FakeArena:
    """An arena of host memory files: opening one reads which rank's it is, and that stands for its address."""

    def __init__(self, rank: int, way: str, fails: bool = False) -> None:
        self.base = 1000 + rank
        self.num_bytes = 10 * (rank + 1)
        self.way = way
        self.device = rank
        self.opened: list[tuple[int, int]] = []
        self._fails = fails

    @staticmethod
    def device_uuids() -> list[str]:
        # Every process sees two of its node's GPUs.
        return ["GPU-0", "GPU-1", "GPU-hidden", "GPU-unseen"]

    def export_fd(self) -> int:
        return memory_file(str(self.base))

    def export_ipc(self) -> bytes:
        return bytes([0, 255]) + str(self.base).encode()

    def open_fd(self, fd: int, num_bytes: int, owner_device: int) -> int:
        return self._open(os.pread(fd, 100, 0), num_bytes, owner_device)

    def open_ipc(self, handle: bytes, num_bytes: int, owner_device: int) -> int:
        assert handle[:2] == bytes([0, 255])
        return self._open(handle[2:], num_bytes, owner_device)

    def _open(self, text: bytes, num_bytes: int, owner_device: int) -> int:
        if self._fails:
            raise MemoryError("no address space")
        self.opened.append((num_bytes, owner_device))
        return int(text)


def share_all(ctx: RankContext, way: str) -> None:
    with nothing_left_open():
        arena = FakeArena(ctx.rank, way)
        addresses = share(arena, ctx.rank, ctx.world_size, gatherer(ctx.group))
        assert addresses == [1000 + peer for peer in range(ctx.world_size)]
        peers = [peer for peer in range(ctx.world_size) if peer != ctx.rank]
        assert arena.opened == [(10 * (peer + 1), peer) for peer in peers]


@pytest.mark.parametrize("way", ["fd", "ipc"])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_arenas_are_opened_by_every_peer(num_ranks: int, way: str):
    run_ranks(num_ranks, share_all, way)


class BlindArena(FakeArena):
    """Each process sees its own GPU only, as index 0."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, "fd")
        self.device = 0
        self._rank = rank

    def device_uuids(self) -> list[str]:  # type: ignore[override]
        return [f"GPU-{self._rank}"]


def share_unseen(ctx: RankContext) -> None:
    arena = BlindArena(ctx.rank)
    share(arena, ctx.rank, ctx.world_size, gatherer(ctx.group))
    assert [owner_device for _, owner_device in arena.opened] == [-1]


def test_owner_whose_gpu_is_not_visible_here():
    run_ranks(2, share_unseen)


def share_badly(ctx: RankContext, way: str) -> None:
    all_gather = gatherer(ctx.group)
    with nothing_left_open():
        expected, text = (MemoryError, "no address space") if ctx.rank == 1 else (PeerAbortedError, "rank 1 failed")
        with pytest.raises(expected, match=text):
            share(FakeArena(ctx.rank, way, fails=ctx.rank == 1), ctx.rank, ctx.world_size, all_gather)
        with pytest.raises(ExchangeMismatchError, match="in rank order: fd, ipc, ipc"):
            share(FakeArena(ctx.rank, "ipc" if ctx.rank else "fd"), ctx.rank, ctx.world_size, all_gather)
        expected, text = (ValueError, "'local': must be fd or ipc") if ctx.rank == 2 else (PeerAbortedError, "rank 2")
        with pytest.raises(expected, match=text):
            share(FakeArena(ctx.rank, "local" if ctx.rank == 2 else way), ctx.rank, ctx.world_size, all_gather)


@pytest.mark.parametrize("way", ["fd", "ipc"])
def test_failure_of_one_rank_is_raised_everywhere(way: str):
    run_ranks(3, share_badly, way)


def test_one_rank_needs_nobody():
    def all_gather(mine: bytes) -> list[bytes]:
        raise AssertionError("one rank has nobody to ask")

    assert share(FakeArena(0, "local"), 0, 1, all_gather) == [1000]


def test_arena_says_what_is_missing_without_a_gpu():
    core = pytest.importorskip("moe_ep._C", reason="the extension moe_ep._C is not built: run `make test`")
    if not hasattr(core, "Arena"):
        pytest.skip("moe_ep._C is built without CUDA")
    script = """
from moe_ep import _C
from moe_ep.errors import MoeEpError
calls = [lambda: _C.Arena.capabilities(0), _C.Arena.device_uuids, lambda: _C.Arena.peer_access(0, 0),
         lambda: _C.Arena(num_bytes=1, device=0, way="fd")]
for call in calls:
    try:
        call()
    except MoeEpError as error:
        assert "this process can use no GPU: cudaGetDeviceCount: cudaError" in str(error), error
    else:
        raise AssertionError("no error")
try:
    _C.Arena(num_bytes=1, device=0, way="pigeon")
except ValueError as error:
    assert "must be one of fd, ipc, local" in str(error), error
else:
    raise AssertionError("no error")
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
