"""Every measurement the command knows, by operation and backend, and the job that takes them on each rank."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_ep.cli.bench.cases import EXCHANGE_TARGETS, LAYER_TARGET, Case
from moe_ep.cli.bench.exchange import exchange_contest
from moe_ep.cli.bench.layer import layer_contest
from moe_ep.cli.bench.statistics import median_interval
from moe_ep.cli.bench.timing import Contest, Rank, gather_times, time_pairs
from moe_ep.errors import NotBuiltError


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One thing to measure.

    Attributes:
        op: its name in the results.
        backend: the backend of ours.
        layout: layout of the rows.
        prepare: ``(rank, case) -> Contest``, collective.
        target: ``(case) -> float | None``: what the upper end of the ratio's interval must not exceed on CPU.
        baseline: one phrase for what ours is compared with.
    """

    op: str
    backend: str
    layout: str
    prepare: Callable[[Rank, Case], Contest]
    target: Callable[[Case], float | None]
    baseline: str


MEASUREMENTS = (
    Measurement(
        op="dispatch_combine",
        backend="torch",
        layout="expanded",
        prepare=exchange_contest,
        target=lambda case: EXCHANGE_TARGETS.get((case.shape.hidden, case.shape.top_k)),
        baseline="permute + all_to_all_single, one copy per expert",
    ),
    Measurement(
        op="moe_layer",
        backend="torch",
        layout="expanded",
        prepare=layer_contest,
        target=lambda case: LAYER_TARGET,
        baseline="plain grouped_mm MoE",
    ),
)


def find_measurement(op: str, backend: str) -> Measurement:
    """The measurement of that name.

    Raises:
        NotBuiltError: there is none for that backend here.
    """
    for measurement in MEASUREMENTS:
        if (measurement.op, measurement.backend) == (op, backend):
            return measurement
    raise NotBuiltError(
        f"bench has no measurement of {op} for backend={backend!r} here: those of the cuda backend are chosen with "
        f"--part; backend='torch' runs on CPU and on GPUs over NCCL"
    )


def take_measurements(rank: Rank, op: str, backend: str, cases: Sequence[Case], pairs: int) -> list[dict]:
    """Take one measurement at every case. Collective; the rows are the same on every rank."""
    measurement = find_measurement(op, backend)
    rows = []
    for case in cases:
        if rank.rank == 0:
            print(f"  {_describe(measurement, case)}", file=sys.stderr, flush=True)
        rows += measure(rank, measurement, case, pairs)
    return rows


def measure(rank: Rank, measurement: Measurement, case: Case, pairs: int) -> list[dict]:
    """Check one contest, time it, and turn the times into result rows: the whole call, then each stage. Collective."""
    contest = measurement.prepare(rank, case)
    difference, correct = contest.check()
    verdicts = gather_times(torch.tensor([difference, float(correct)], dtype=torch.float64), rank)
    times = gather_times(time_pairs(contest, rank, pairs=pairs), rank)
    traffic = gather_times(torch.tensor([contest.wire_bytes, contest.logical_bytes], dtype=torch.float64), rank)
    common = {
        "backend": measurement.backend,
        "layout": measurement.layout,
        "dtype": case.dtype,
        "tokens": case.tokens,
        "ranks": case.ranks,
        "hidden": case.shape.hidden,
        "top_k": case.shape.top_k,
        "experts": case.shape.experts,
        "routing": case.routing,
        "device": rank.device.type,
        "num_sms": None,
        "floor_us": None,
        "ratio_to_floor": None,
        "max_difference": float(verdicts[:, 0].max()),
        "correct": bool(verdicts[:, 1].all()),
        "baseline": measurement.baseline,
        "pairs": pairs,
    }
    target = measurement.target(case) if rank.device.type == "cpu" else None
    # The busiest rank sets the pace: its bytes, not the mean.
    wire, logical = (int(number) for number in traffic.amax(0))
    num = len(contest.stages)
    rows = [_row(measurement.op, times.sum(3), wire * num, logical * num, target, rank)]
    for index, stage in enumerate(contest.stages):
        name = stage if measurement.op == "dispatch_combine" else f"{measurement.op}_{stage}"
        rows.append(_row(name, times[..., index], wire, logical, None, rank))
    return [row | common for row in rows]


def _row(op: str, times: torch.Tensor, wire: int, logical: int, target: float | None, rank: Rank) -> dict:
    """Figures of one stage or of their sum; ``times`` is [R, 2, pairs] microseconds."""
    # Each rank's median, then the slowest rank; the ratio compares the slowest rank of each pair.
    medians = times.quantile(0.5, dim=2)
    ours, baseline = medians.amax(0).tolist()
    slowest = times.amax(0)
    ratio = median_interval((slowest[0] / slowest[1]).tolist())
    return {
        "op": op,
        "time_us_max": ours,
        "time_us_mean": float(medians[:, 0].mean()),
        "wire_bytes": wire or None,
        "wire_gbps": wire / ours / 1e3 if wire else None,
        "logical_gbps": logical / ours / 1e3 if logical else None,
        "nccl_us": baseline if wire and rank.device.type == "cuda" else None,
        "baseline_us": baseline,
        "ratio_median": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "target": target,
        "met": None if target is None else ratio.high <= target,
    }


def _describe(measurement: Measurement, case: Case) -> str:
    shape = case.shape
    return (
        f"{measurement.op} R={case.ranks} T={case.tokens} H={shape.hidden} K={shape.top_k} E={shape.experts} "
        f"{case.dtype} {case.routing}"
    )
