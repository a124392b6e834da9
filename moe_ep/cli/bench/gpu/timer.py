"""Times one call on all ranks at once, by the method of the project: whole calls, cold caches, ranks lined up."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_ep.cli.bench.timing import FLUSH_BYTES, Rank, gather_times, line_up
from moe_ep.errors import MoeEpError

WARMUP = 5
# Writes of the flush before a call whose host time is no part of it: half a millisecond, in which a host that is slow
# for a moment launches all of it on every rank. After one, late ranks made graphs take up to a third longer.
_FLUSHES_AHEAD = 8
# Starting a graph takes about as long as a whole exchange of few tokens; among so many it hardly counts.
CALLS_IN_GRAPH = 20
GRAPH_MODE = f"graph of {CALLS_IN_GRAPH}"

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Medians of each rank in microseconds: the slowest rank's, and their mean."""

    max_us: float
    mean_us: float

    def of_each(self, calls: int) -> "Timing":
        """Time of one of so many equal calls that were timed as one."""
        return Timing(max_us=self.max_us / calls, mean_us=self.mean_us / calls)

    def plus(self, other: "Timing") -> "Timing":
        """Time of both, one after the other."""
        return Timing(max_us=self.max_us + other.max_us, mean_us=self.mean_us + other.mean_us)


class Stopwatch:
    """Measures calls on this rank's GPU. All methods are collective.

    Args:
        rank: this process's place.
        repeats: timed calls per figure, after ``WARMUP`` others.
    """

    def __init__(self, rank: Rank, repeats: int) -> None:
        self.rank = rank
        self.repeats = repeats
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=rank.device)
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time(self, call: Call, *, ahead: bool = False) -> Timing:
        """Device time of a whole call, from an event before it to one after it: waits for the host count.

        Args:
            call: what is timed.
            ahead: whether the host has launched all of it when the clock starts, on all ranks, as is always so for a
                graph.
        """
        flushes = _FLUSHES_AHEAD if ahead or isinstance(call, Captured) else 1
        return self._gather([self._time_once(call, flushes) for _ in range(WARMUP + self.repeats)][WARMUP:])

    def host(self, call: Call) -> float:
        """Microseconds that a call keeps the host, on the slowest rank; the device is idle when it begins."""
        times = []
        for _ in range(WARMUP + self.repeats):
            torch.cuda.synchronize(self.rank.device)
            line_up(self.rank)
            torch.cuda.synchronize(self.rank.device)
            begin = time.perf_counter()
            result = call()
            times.append((time.perf_counter() - begin) * 1e6)
            del result
        return self._gather(times[WARMUP:]).max_us

    def require(self, good: bool, what: str) -> None:
        """Raise on all ranks unless the results of all of them are right.

        Raises:
            MoeEpError: naming what differs, and where.
        """
        verdicts = gather_times(torch.tensor([float(good)]), self.rank)[:, 0].tolist()
        wrong = [str(rank) for rank, verdict in enumerate(verdicts) if not verdict]
        if wrong:
            raise MoeEpError(
                f"bench: {what} gives a wrong result on rank(s) {', '.join(wrong)}: no figures of it count"
            )

    def barrier(self) -> None:
        """All ranks have finished what they launched."""
        torch.cuda.synchronize(self.rank.device)
        line_up(self.rank)
        torch.cuda.synchronize(self.rank.device)

    def _time_once(self, call: Call, flushes: int) -> float:
        for _ in range(flushes):
            self._flush.fill_(1)
        line_up(self.rank)
        self._begin.record()
        # What a call returns is freed after the clock has stopped.
        result = call()
        self._end.record()
        torch.cuda.synchronize(self.rank.device)
        del result
        return self._begin.elapsed_time(self._end) * 1e3

    def _gather(self, times: list[float]) -> Timing:
        medians = gather_times(torch.tensor(times, dtype=torch.float64), self.rank).quantile(0.5, dim=1)
        return Timing(max_us=float(medians.max()), mean_us=float(medians.mean()))


def in_a_row(last: Call, others: Call) -> Call:
    """``CALLS_IN_GRAPH`` calls as one, which returns what the last one does; results of the others are let go."""

    def run() -> object:
        for _ in range(CALLS_IN_GRAPH - 1):
            others()
        return last()

    return run


class Captured:
    """A call in a CUDA graph, and what it returned there. The call must have run before.

    Attributes:
        result: tensors that every replay writes anew.
    """

    def __init__(self, call: Call) -> None:
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        # NOTE: threads of process groups may ask for events while this one captures.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = call()

    def __call__(self) -> None:
        self.graph.replay()
