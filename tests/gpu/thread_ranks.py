"""Ranks as threads of one process on one GPU, so that kernels of all ranks run at the same time there.

Processes that share a GPU take turns on it; threads of one process do not, which is what races need to show.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from moe_ep.backends import cuda_link
from moe_ep.backends.control import Call
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.config import ExchangeSpec


class Shared:
    """What the threads' control planes meet in."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.words: list[Tensor | None] = [None] * size
        self.notes: dict[tuple[str, int, int], str] = {}


class ThreadControl:
    """As much of ``ControlPlane`` as the CUDA backend needs, among threads."""

    def __init__(self, rank: int, size: int, shared: Shared, timeout_s: float) -> None:
        self.rank, self.size, self.timeout_s, self.incarnation = rank, size, timeout_s, 0
        self._shared = shared

    def open(self, call: Call, words: Tensor | None = None, error: Exception | None = None) -> Tensor:
        self._shared.words[self.rank] = torch.empty(0, dtype=torch.int64) if words is None else words.cpu()
        self._shared.barrier.wait(self.timeout_s)
        table = torch.stack([words for words in self._shared.words if words is not None])
        self._shared.barrier.wait(self.timeout_s)
        if error is not None:
            raise error
        return table

    def leave_note(self, name: str, seq: int, value: str) -> None:
        self._shared.notes[name, seq, self.rank] = value

    def read_note(self, name: str, seq: int, rank: int) -> str | None:
        return self._shared.notes.get((name, seq, rank))


class ThreadRank:
    """One rank: its backend, and calls with headers of their own."""

    def __init__(self, rank: int, size: int, shared: Shared, granted_bytes: int, timeout_s: float) -> None:
        self.rank, self.size, self.barrier = rank, size, shared.barrier
        self.backend = CudaBackend(ThreadControl(rank, size, shared, timeout_s), granted_bytes)  # type: ignore[arg-type]
        # One process needs no second mapping of the same memory, and kernels may not see it under two addresses.
        self.backend.link.way = "local"

    def header(self, kind: str, serial: int = 0) -> list[int]:
        return self.backend.link.header(Call(kind, 7, serial))

    def dispatch(
        self, x: Tensor, topk_idx: Tensor, weights: Tensor | None, spec: ExchangeSpec, max_tokens: int = 0, **extra: Any
    ) -> Any:  # noqa: ANN401
        self.backend.ensure(x.shape[0], x.shape[1] * x.itemsize, 3 * spec.top_k + x.shape[1] // 128)
        return self.backend.dispatch(
            x, None, topk_idx, weights, spec, self.header("dispatch"), 1, max_tokens=max_tokens, **extra
        )

    def combine(self, y: Tensor, row_weights: Tensor | None, plan: Any, **extra: Any) -> Any:  # noqa: ANN401
        return self.backend.combine(y, row_weights, plan, self.header("combine", plan.serial), **extra)

    def replay(self, x: Tensor, plan: Any, **extra: Any) -> Any:  # noqa: ANN401
        return self.backend.replay(x, plan, self.header("replayed dispatch", plan.serial), **extra)


def share_addresses(
    arena: Any, rank: int, size: int, all_gather: Callable[[bytes], list[bytes]], **_: Any
) -> list[int]:  # noqa: ANN401
    return [int.from_bytes(told, "little") for told in all_gather(arena.base.to_bytes(8, "little"))]


def run_thread_ranks(
    size: int, fn: Callable[..., Any], *args: Any, granted_bytes: int = 0, timeout_s: float = 20.0
) -> list[Any]:
    """Run ``fn(rank, *args)`` on threads, each with a stream of its own; returns their results.

    NOTE: every rank has three streams, and streams that share a hardware queue wait for each other: set
    ``CUDA_DEVICE_MAX_CONNECTIONS=32`` in the environment before CUDA starts.
    """
    shared = Shared(size)
    cuda_link.share = share_addresses

    def run(rank: int) -> Any:  # noqa: ANN401
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            try:
                me = ThreadRank(rank, size, shared, granted_bytes, timeout_s)
                result = fn(me, *args)
                me.backend.link.synchronize()
                me.backend.link.check()
            except BaseException:
                shared.barrier.abort()
                raise
            shared.barrier.wait(timeout_s)
            return result

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for error in (future.exception() for future in futures) if error is not None]
        if errors:
            raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
        return [future.result() for future in futures]
