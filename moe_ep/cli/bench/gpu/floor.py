"""The floor of an exchange: its bytes pushed to the peers from all SMs, without plan, flags or placing."""

from typing import Any

import torch
from torch import Tensor

from moe_ep.backends.cuda import load_extension
from moe_ep.backends.cuda_exchange import CudaBackend
from moe_ep.backends.sharing import share
from moe_ep.cli.bench.gpu.timer import CALLS_IN_GRAPH, Call, Captured, Stopwatch, Timing, in_a_row

_ALIGNMENT = 128
_HOPPER = (9, 0)

Bytes = tuple[tuple[int, ...], ...]


def offsets(table: Bytes) -> Bytes:
    """[R][R] where each source's bytes begin in the memory of each target."""
    taken = [0] * len(table)
    found = []
    for row in table:
        found.append(tuple(taken))
        taken = [at + aligned(size) for at, size in zip(taken, row, strict=True)]
    return tuple(found)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class Floor:
    """Measures floors, on memory of its own that the ranks share. Constructing one and all methods are collective.

    Args:
        backend: says by which way the ranks share memory, and carries the handles.
        watch: the stopwatch.
    """

    def __init__(self, backend: CudaBackend, watch: Stopwatch) -> None:
        self._link = backend.link
        self._watch = watch
        self._extension = load_extension()
        device = self._link.device
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self.works = torch.cuda.get_device_capability(device) >= _HOPPER
        self._arena: Any = None
        self._addresses: list[int] = []
        self._source = torch.empty(0, dtype=torch.uint8, device=device)
        self._known: dict[tuple[Bytes, bool], Timing] = {}

    def time(self, table: Bytes, *, in_graph: bool = False) -> Timing | None:
        """Time of pushing ``table[source][target]`` bytes, all ranks at once; None on GPUs without bulk copies.

        Args:
            table: the bytes.
            in_graph: for the time of one push among ``CALLS_IN_GRAPH`` in a CUDA graph.

        Raises:
            MoeEpError: on all ranks, when bytes did not arrive.
        """
        if not self.works or not any(map(any, table)):
            return None
        if (table, in_graph) not in self._known:
            self._reserve(table)
            self._check(table)
            self._known[table, in_graph] = self._time(lambda: self._push(table), in_graph)
            # Nobody may push other bytes while some are under way.
            self._watch.barrier()
        return self._known[table, in_graph]

    def close(self) -> None:
        """Give the memory back."""
        self._watch.barrier()
        if self._arena is not None:
            self._arena.close()
        self._arena, self._addresses = None, []
        self._watch.barrier()

    def _time(self, push: Call, in_graph: bool) -> Timing:
        if not in_graph:
            return self._watch.time(push, ahead=True)
        return self._watch.time(Captured(in_a_row(push, push))).of_each(CALLS_IN_GRAPH)

    def _push(self, table: Bytes) -> None:
        rank, places = self._watch.rank.rank, offsets(table)
        sources = _starts(table[rank])
        # Each rank begins with another peer, so that no link waits for its turn.
        order = [(rank + step) % len(table) for step in range(1, len(table) + 1)]
        order = [peer for peer in order if table[rank][peer]]
        self._extension.push(
            sources=[self._source.data_ptr() + sources[peer] for peer in order],
            targets=[self._addresses[peer] + places[rank][peer] for peer in order],
            num_bytes=[table[rank][peer] for peer in order],
            num_sms=self.num_sms,
            stream=torch.cuda.current_stream(self._link.device).cuda_stream,
        )

    def _reserve(self, table: Bytes) -> None:
        rank, size = self._watch.rank.rank, len(table)
        held = [sum(map(aligned, column)) for column in zip(*table, strict=True)]
        sent = [sum(map(aligned, row)) for row in table]
        if self._source.numel() < max(sent):
            self._source = _random_bytes(max(sent), rank, self._link.device)
        if self._arena is not None and self._arena.num_bytes >= max(held):
            return
        self.close()
        arena = self._extension.Arena(num_bytes=max(held), device=self._link.device.index, way=self._link.way)
        self._addresses = share(arena, rank, size, self._link.gather_bytes)
        self._arena = arena

    def _check(self, table: Bytes) -> None:
        """Push once over NaN and compare what came with what the peers drew."""
        rank, places = self._watch.rank.rank, offsets(table)
        memory = torch.from_dlpack(self._arena.view(0, self._arena.num_bytes))
        memory.fill_(0xFF)
        self._watch.barrier()
        self._push(table)
        self._watch.barrier()
        good = True
        for source, row in enumerate(table):
            begin, at = _starts(row)[rank], places[source][rank]
            drawn = _random_bytes(self._source.numel(), source, self._link.device)
            good = good and torch.equal(memory[at : at + row[rank]], drawn[begin : begin + row[rank]])
        self._watch.require(good, "the floor")


def _starts(row: tuple[int, ...]) -> list[int]:
    """Where the bytes for each target begin in the source's memory."""
    starts = [0]
    for size in row:
        starts.append(starts[-1] + aligned(size))
    return starts[:-1]


def _random_bytes(num_bytes: int, rank: int, device: torch.device) -> Tensor:
    """The same on every rank that asks for a rank's bytes."""
    generator = torch.Generator(device).manual_seed(7919 * (rank + 1))
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device, generator=generator)
