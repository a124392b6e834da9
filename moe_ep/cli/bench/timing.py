"""Times two ways of doing the same thing against each other, interleaved, on every rank at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist

FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class Rank:
    """This process's place in the measurement.

    Attributes:
        group: the process group, or None on a single process.
        device: where the tensors live.
    """

    group: dist.ProcessGroup | None
    device: torch.device

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    @property
    def size(self) -> int:
        return 1 if self.group is None else self.group.size()


class Clock(Protocol):
    """Measures the stages of one call: ``start``, a ``lap`` after each stage, then ``read``."""

    def start(self) -> None: ...

    def lap(self) -> None: ...

    def read(self) -> list[float]:
        """Microseconds of each stage since ``start``."""
        ...


@dataclass
class HostClock:
    """Wall time, for CPU tensors."""

    marks: list[float] = field(default_factory=list)

    def start(self) -> None:
        self.marks = [time.perf_counter()]

    def lap(self) -> None:
        self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        return [(end - begin) * 1e6 for begin, end in zip(self.marks, self.marks[1:], strict=False)]


@dataclass
class CudaClock:
    """CUDA events around each stage, after the L2 cache has been overwritten."""

    device: torch.device
    events: list[torch.cuda.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def start(self) -> None:
        self.events = []
        self.lap()

    def lap(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def read(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) * 1e3 for begin, end in zip(self.events, self.events[1:], strict=False)]


Stage = Callable[[object], object]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Two ways to the same result, ready to run on this rank.

    Attributes:
        stages: names of the stages; both ways have the same.
        ours: one function per stage; each takes what the stage before returned, the first takes None.
        baseline: the same for the other way.
        check: runs both once and returns (largest difference on this rank, whether it is within the bound).
        wire_bytes: bytes per stage that leave this rank in our way.
        logical_bytes: the same, counting also what a rank sends to itself.
    """

    stages: Sequence[str]
    ours: Sequence[Stage]
    baseline: Sequence[Stage]
    check: Callable[[], tuple[float, bool]]
    wire_bytes: int = 0
    logical_bytes: int = 0


def make_clock(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


def time_pairs(contest: Contest, rank: Rank, *, pairs: int, warmup: int = 3) -> torch.Tensor:
    """Time both ways ``pairs`` times each, alternating which of them goes first.

    Ranks are lined up by a tiny all-reduce before each call. What a call returns is freed after the clock stopped.

    Returns:
        fp64 [2, pairs, num_stages] microseconds on this rank; index 0 is ours, 1 the baseline.
    """
    clock = make_clock(rank.device)
    ways = (contest.ours, contest.baseline)
    times = torch.zeros(2, pairs, len(contest.stages), dtype=torch.float64)
    for index in range(-warmup, pairs):
        for way in (0, 1) if index % 2 == 0 else (1, 0):
            laps = _time_once(ways[way], clock, rank)
            if index >= 0:
                times[way, index] = torch.tensor(laps, dtype=torch.float64)
    return times


def _time_once(stages: Sequence[Stage], clock: Clock, rank: Rank) -> list[float]:
    if isinstance(clock, CudaClock):
        clock.flush.fill_(1)
    line_up(rank)
    # Every stage's result stays alive until the clock has stopped: freeing is not part of the call.
    states: list[object] = [None]
    clock.start()
    for stage in stages:
        states.append(stage(states[-1]))
        clock.lap()
    return clock.read()


def line_up(rank: Rank) -> None:
    """Let all ranks start at the same moment."""
    if rank.group is not None:
        dist.all_reduce(torch.zeros(1, device=rank.device), group=rank.group)


def gather_times(times: torch.Tensor, rank: Rank) -> torch.Tensor:
    """[R, ...] of every rank's ``times``, on every rank. Collective."""
    if rank.group is None:
        return times.unsqueeze(0)
    mine = times.to(rank.device)
    parts = [torch.empty_like(mine) for _ in range(rank.size)]
    dist.all_gather(parts, mine, group=rank.group)
    return torch.stack(parts).cpu()
