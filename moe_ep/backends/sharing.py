"""Arenas that the ranks of one node map into each other: by which way, and how descriptors and handles travel."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from moe_ep.errors import ExchangeMismatchError, NotBuiltError, PeerAbortedError, PeerTimeoutError

# Every rank passes bytes of any length and gets those of all ranks, in rank order.
AllGather = Callable[[bytes], list[bytes]]

DEFAULT_SECONDS = 30.0

_REMEDY = 'use backend="torch"'
_RANK = struct.Struct("=i")


class SharedArena(Protocol):
    """What is needed of ``moe_ep._C.Arena``."""

    @property
    def base(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def way(self) -> str: ...
    @property
    def device(self) -> int: ...
    def export_fd(self) -> int: ...
    def export_ipc(self) -> bytes: ...
    def open_fd(self, fd: int, num_bytes: int, owner_device: int) -> int: ...
    def open_ipc(self, handle: bytes, num_bytes: int, owner_device: int) -> int: ...
    @staticmethod
    def device_uuids() -> list[str]: ...


class DeviceQueries(Protocol):
    """What is needed of the class ``moe_ep._C.Arena`` before there is one."""

    @staticmethod
    def capabilities(device: int) -> Mapping[str, Any]: ...
    @staticmethod
    def peer_access(device: int, peer: int) -> bool: ...
    @staticmethod
    def device_uuids() -> list[str]: ...


def host_id() -> str:
    """Names the machine and the network namespace: processes for which it is equal can pass descriptors."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    machine = boot.read_text().strip() if boot.exists() else socket.gethostname()
    namespace = Path("/proc/self/ns/net")
    return f"{machine}/{namespace.stat().st_ino}" if namespace.exists() else machine


def local_capability(queries: DeviceQueries, device: int, host: str) -> dict[str, Any]:
    """What this rank tells the others: ``Arena.capabilities``, and

    - ``host``: of :func:`host_id`.
    - ``access``: for the uuid of every GPU that this process sees, whether its own GPU reaches that one's memory.

    Raises:
        MoeEpError: without a driver or a GPU.
    """
    uuids = queries.device_uuids()
    access = {uuid: queries.peer_access(device, index) for index, uuid in enumerate(uuids)}
    return {**queries.capabilities(device), "host": host, "access": access}


def choose_way(capabilities: Sequence[dict[str, Any]]) -> str:
    """The way by which all ranks share: ``"fd"`` where all have it, else ``"ipc"``, and ``"local"`` for one rank.

    Args:
        capabilities: :func:`local_capability` of every rank, in rank order; the same on all ranks, as is the answer.

    Raises:
        NotBuiltError: when ranks cannot share, naming them and what is missing.
    """
    if len(capabilities) == 1:
        return "local"
    _check_hosts(capabilities)
    _check_access(capabilities)
    for way in ("fd", "ipc"):
        if all(capability[way] for capability in capabilities):
            return way
    lacking = {
        way: ", ".join(str(rank) for rank, capability in enumerate(capabilities) if not capability[way])
        for way in ("fd", "ipc")
    }
    raise NotBuiltError(
        "ranks share no way to map each other's GPU memory: "
        f"rank(s) {lacking['fd']} cannot export it as POSIX file descriptors (cuMemCreate), "
        f"rank(s) {lacking['ipc']} not by CUDA IPC; {_REMEDY}"
    )


def gather_capability(
    probe: Callable[[], dict[str, Any]], rank: int, all_gather: AllGather
) -> tuple[str, list[dict[str, Any]]]:
    """Agree with all ranks on the way by which they share. Collective.

    Args:
        probe: gives this rank's :func:`local_capability`.
        rank: of this process.
        all_gather: carries bytes.

    Returns:
        The way, see :func:`choose_way`, and every rank's capability.

    Raises:
        NotBuiltError: on all ranks, when they cannot share.
        PeerAbortedError: when another rank's probe failed; on that rank its own error.
    """
    told = _gather(lambda: json.dumps(probe()).encode(), rank, all_gather)
    capabilities = [json.loads(text) for text in told]
    for capability in capabilities:
        capability["compute_capability"] = tuple(capability["compute_capability"])
    return choose_way(capabilities), capabilities


def share(
    arena: SharedArena, rank: int, size: int, all_gather: AllGather, *, timeout_s: float = DEFAULT_SECONDS
) -> list[int]:
    """Map every rank's arena for this rank's GPU. Collective: when it returns, all ranks have mapped all arenas.

    Args:
        arena: this rank's, of the same way on all ranks; sizes may differ.
        rank: of this process.
        size: number of ranks.
        all_gather: carries bytes.
        timeout_s: bound of the wait for peers' file descriptors, in seconds.

    Returns:
        Addresses of the arenas of all ranks; this rank's own at its place. They hold until the arena is closed.

    Raises:
        PeerTimeoutError: when ranks do not come.
        PeerAbortedError: when another rank failed to export or to map; on that rank its own error.
        ExchangeMismatchError: when the ways differ.
        ValueError: on a way that is not shared, with several ranks.
    """
    if size == 1:
        return [arena.base]
    told = [json.loads(text) for text in _gather(lambda: json.dumps(_describe(arena)).encode(), rank, all_gather)]
    ways = [one["way"] for one in told]
    if len(set(ways)) > 1:
        raise ExchangeMismatchError(f"ranks share their arenas by different ways, in rank order: {', '.join(ways)}")
    with contextlib.ExitStack() as stack:
        fds: list[int] = []
        if arena.way == "fd":
            own = arena.export_fd()
            stack.callback(os.close, own)
            fds = exchange_fds(own, rank, size, all_gather, timeout_s)
            for peer in _others(rank, size):
                stack.callback(os.close, fds[peer])
        addresses: list[int] = []

        def open_all() -> bytes:
            addresses.extend(_open(arena, rank, told, fds))
            return b""

        _gather(open_all, rank, all_gather)
    return addresses


def exchange_fds(fd: int, rank: int, size: int, all_gather: AllGather, timeout_s: float) -> list[int]:
    """Give every rank of this machine a descriptor of what ``fd`` refers to, and get one of theirs. Collective.

    Only processes of the same user take part.

    Args:
        fd: this rank's; stays the caller's to close.
        rank: of this process.
        size: number of ranks.
        all_gather: carries bytes.
        timeout_s: bound of the exchange once all names have travelled, in seconds.

    Returns:
        File descriptors by rank, new ones that the caller closes; ``fd`` itself at this rank's place.

    Raises:
        PeerTimeoutError: when ranks do not come; it names them.
        PeerAbortedError: when another rank cannot listen; on that rank its own error.
    """
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))

        def listen() -> bytes:
            # In the abstract namespace: nothing is left on disk, and the name ends with the socket.
            name = b"\0moe_ep-" + os.urandom(16).hex().encode()
            listener.bind(name)
            # Room for all ranks and for strangers: sending to a full queue fails at once.
            listener.listen(128)
            return name

        names = _gather(listen, rank, all_gather)
        end = time.monotonic() + timeout_s
        # Everybody listens by now, and connections wait in the peers' queues: nobody has to receive for others to send.
        unreached = [peer for peer in _others(rank, size) if not _send_fd(names[peer], fd, rank, end)]
        received = _receive_fds(listener, rank, size, end)
    missing = sorted({*unreached, *(peer for peer in _others(rank, size) if peer not in received)})
    if missing:
        for other in received.values():
            os.close(other)
        raise PeerTimeoutError(
            f"rank {rank} could not exchange file descriptors with rank(s) {', '.join(map(str, missing))} within "
            f"{timeout_s:g} s: all ranks must run on one machine, in one network namespace, as the same user, and "
            "construct the Buffer together",
            ranks=tuple(missing),
        )
    return [received.get(peer, fd) for peer in range(size)]


def _describe(arena: SharedArena) -> dict[str, Any]:
    if arena.way not in ("fd", "ipc"):
        raise ValueError(f"arena.way={arena.way!r}: must be fd or ipc to be shared among several ranks")
    handle = arena.export_ipc().hex() if arena.way == "ipc" else ""
    uuid = arena.device_uuids()[arena.device]
    return {"way": arena.way, "num_bytes": arena.num_bytes, "uuid": uuid, "handle": handle}


def _open(arena: SharedArena, rank: int, told: list[dict[str, Any]], fds: list[int]) -> list[int]:
    uuids = arena.device_uuids()
    addresses = []
    for peer, its in enumerate(told):
        owner_device = uuids.index(its["uuid"]) if its["uuid"] in uuids else -1
        if peer == rank:
            addresses.append(arena.base)
        elif arena.way == "fd":
            addresses.append(arena.open_fd(fds[peer], its["num_bytes"], owner_device))
        else:
            addresses.append(arena.open_ipc(bytes.fromhex(its["handle"]), its["num_bytes"], owner_device))
    return addresses


def _gather(make: Callable[[], bytes], rank: int, all_gather: AllGather) -> list[bytes]:
    """What ``make`` gives on every rank; a failure on one is raised on all, so that none waits for it further on."""
    failure: Exception | None = None
    try:
        mine = b"+" + make()
    except Exception as error:
        failure = error
        mine = b"-" + f"{type(error).__name__}: {error}".encode()
    told = all_gather(mine)
    if failure is not None:
        raise failure
    for peer, text in enumerate(told):
        if text[:1] == b"-":
            reason = text[1:].decode()
            raise PeerAbortedError(
                f"rank {rank} cannot share its GPU memory because rank {peer} failed: {reason}",
                rank=peer,
                reason=reason,
            )
    return [text[1:] for text in told]


def _send_fd(name: bytes, fd: int, rank: int, end: float) -> bool:
    """Whether the descriptor is in the queue of a peer of the same user."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.settimeout(max(end - time.monotonic(), 0.001))
        peer.connect(name)
        if _is_same_user(peer):
            socket.send_fds(peer, [_RANK.pack(rank)], [fd])
            return True
    return False


def _receive_fds(listener: socket.socket, rank: int, size: int, end: float) -> dict[int, int]:
    """The descriptors by rank that have come when all are there, or at the end."""
    received: dict[int, int] = {}
    with contextlib.ExitStack() as stack:
        waiting = stack.enter_context(selectors.DefaultSelector())
        listener.setblocking(False)
        waiting.register(listener, selectors.EVENT_READ)
        while len(received) < size - 1:
            ready = waiting.select(max(end - time.monotonic(), 0))
            if not ready:
                break
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is listener:
                    connection = stack.enter_context(_accept(listener))
                    waiting.register(connection, selectors.EVENT_READ)
                    continue
                waiting.unregister(key.fileobj)
                sender, fd = _receive_fd(key.fileobj)
                if fd is None:
                    continue
                if sender in _others(rank, size) and sender not in received:
                    received[sender] = fd
                else:
                    os.close(fd)
    return received


def _accept(listener: socket.socket) -> socket.socket:
    connection = listener.accept()[0]
    connection.setblocking(False)
    return connection


def _receive_fd(connection: socket.socket) -> tuple[int, int | None]:
    """The rank and the descriptor of one message; (-1, None) for anything else than a peer's."""
    if not _is_same_user(connection):
        return -1, None
    try:
        message, fds, _, _ = socket.recv_fds(connection, _RANK.size, 1)
    except OSError:
        return -1, None
    for fd in fds:
        # A program that this process starts would keep the memory alive.
        os.set_inheritable(fd, False)
    if len(message) == _RANK.size and len(fds) == 1:
        return _RANK.unpack(message)[0], fds[0]
    for fd in fds:
        os.close(fd)
    return -1, None


def _is_same_user(connection: socket.socket) -> bool:
    credentials = struct.Struct("=iII")
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    return credentials.unpack(told)[1] == os.getuid()


def _others(rank: int, size: int) -> list[int]:
    return [peer for peer in range(size) if peer != rank]


def _check_hosts(capabilities: Sequence[dict[str, Any]]) -> None:
    first = capabilities[0]["host"]
    elsewhere = [rank for rank, capability in enumerate(capabilities) if capability["host"] != first]
    if elsewhere:
        raise NotBuiltError(
            f"rank(s) {', '.join(map(str, elsewhere))} run on another machine or in another network namespace than "
            f"rank 0 ({capabilities[elsewhere[0]]['host']}, not {first}), and GPU memory is shared inside one only; "
            f"{_REMEDY}"
        )


def _check_access(capabilities: Sequence[dict[str, Any]]) -> None:
    for rank, capability in enumerate(capabilities):
        for peer, other in enumerate(capabilities):
            # A GPU that this process does not see is in nobody's list: mapping its memory will tell.
            if capability["uuid"] != other["uuid"] and not capability["access"].get(other["uuid"], True):
                raise NotBuiltError(
                    f"the GPU of rank {rank} ({capability['uuid']}) has no peer access to that of rank {peer} "
                    f"({other['uuid']}): choose GPUs that NVLink or one PCIe root connects (nvidia-smi topo -p2p r), "
                    f"or {_REMEDY}"
                )
