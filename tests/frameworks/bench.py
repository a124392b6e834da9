"""Times training steps of the frameworks with moe_ep against the same steps with their own dispatchers.

``make bench-frameworks`` runs it where the frameworks are installed. Each folder here that is measured has a module
``step`` with ``make_step(dispatcher, tokens, hidden, top_k, num_experts=...)``: it builds one MoE layer on the ranks of
WORLD and returns a callable that takes a whole step (forward, backward, optimizer) and returns the loss. ``"native"``
stands for the framework's own dispatcher, every other name for one of ours.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moe_ep.cli.bench.cases import DEFAULT_PAIRS, Case, Shape
from moe_ep.cli.bench.launch import launch
from moe_ep.cli.bench.registry import Measurement, measure
from moe_ep.cli.bench.report import build_report, default_path, read_json, write_json
from moe_ep.cli.bench.timing import Contest, Rank
from moe_ep.cli.tables import markdown_table
from tests.frameworks.session import FOLDERS, missing_packages, pinned_versions

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "benchmarks" / "README.md"
BEGIN, END = "<!-- frameworks: made by make bench-frameworks -->", "<!-- frameworks: end -->"
COLUMNS = ("framework", "with", *"THKE", "rows", "step ms", "its own, ms", "ratio", "95 % interval", "target")
RANKS = 2
TARGET = 1.05
# With fewer choices there is little to leave out of the wire: reported, and not promised.
TARGET_FROM_K = 4
SHAPES = ("512:2:16", "512:4:16", "512:8:16")
TOKENS = 1024
CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One framework's step with one dispatcher of ours.

    Attributes:
        framework: the folder with its ``step``.
        dispatcher: what ``make_step`` is asked for.
        native: one phrase for the framework's own dispatcher; None times ours alone.
        with_target: whether the ratio has a target.
        dtype: of the rows.
    """

    framework: str
    dispatcher: str = "moe_ep"
    native: str | None = None
    with_target: bool = True
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return self.framework if self.dispatcher == "moe_ep" else self.dispatcher


SUBJECTS = (
    Subject(framework="transformers", native="all_to_all"),
    Subject(framework="megatron", native="alltoall"),
    Subject(framework="deepspeed", native="MOELayer"),
    Subject(framework="torchtitan", native="AllToAllTokenDispatcher", dtype="bfloat16"),
    Subject(framework="megatron", dispatcher="deep_ep", native="alltoall", with_target=False),
    Subject(framework="fsdp", dispatcher="fsdp2"),
    Subject(framework="fsdp", dispatcher="ddp"),
)


def losses_agree(ours: Sequence[float], native: Sequence[float], dtype: str) -> tuple[float, bool]:
    """Largest relative difference of the losses of the first steps, and whether rounding explains it.

    A loss is a mean of squares over 10^5 elements and more, so that what is rounded in another order averages out: in
    fp32 to less than the loss's own rounding. In bf16 torchtitan also rounds after every choice that it adds, which has
    a mean of its own, of less than one epsilon.
    """
    bound = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, native, strict=True)]
    worst = max(differences)
    return worst, math.isfinite(worst) and worst <= bound


def prepare(subject: Subject, rank: Rank, case: Case) -> Contest:
    """Both steps, built on this rank. Collective."""
    shape = case.shape
    make_step = importlib.import_module(f"tests.frameworks.{subject.framework}.step").make_step
    sizes = {"tokens": case.tokens, "hidden": shape.hidden, "top_k": shape.top_k, "num_experts": shape.experts}
    ours = make_step(subject.dispatcher, **sizes)
    native: Callable[[], float] | None = make_step("native", **sizes) if subject.native else None

    def check() -> tuple[float, bool]:
        found = [ours() for _ in range(CHECKED_STEPS)]
        if native is None:
            # What one's own layer computes is compared with the unsharded model by its tests.
            return 0.0, all(map(math.isfinite, found))
        return losses_agree(found, [native() for _ in range(CHECKED_STEPS)], case.dtype)

    def run(step: Callable[[], float] | None) -> Callable[[object], object]:
        def stage(_: object) -> object:
            gc.disable()
            try:
                return None if step is None else step()
            finally:
                gc.enable()

        return stage

    return Contest(stages=("step",), ours=(run(ours),), baseline=(run(native),), check=check)


def take(rank: Rank, subject: Subject, case: Case, pairs: int) -> list[dict]:
    """The row of one subject and case. Collective."""
    measurement = Measurement(
        op=f"{subject.name}_step",
        backend="torch",
        layout="expanded",
        prepare=lambda rank, case: prepare(subject, rank, case),
        target=lambda case: TARGET if subject.with_target and case.shape.top_k >= TARGET_FROM_K else None,
        baseline=subject.native or "",
    )
    row = measure(rank, measurement, case, pairs)[0]
    if subject.native is None:
        row |= dict.fromkeys(
            ("baseline", "baseline_us", "ratio_median", "ratio_low", "ratio_high", "target", "met", "nccl_us")
        )
    versions = {package: pinned_versions()[package] for package in FOLDERS[subject.framework]}
    return [row | {"framework": subject.framework, "dispatcher": subject.dispatcher, "versions": versions}]


def table(report: dict) -> str:
    """The rows of a results file in Markdown."""
    return markdown_table(COLUMNS, [_cells(row) for row in report["rows"]])


def _cells(row: dict) -> list[str]:
    version = next(iter(row["versions"].values()), "")
    measured = row["ratio_median"] is not None
    return [
        f"{row['framework']} {version}".strip(),
        row["dispatcher"],
        *(str(row[key]) for key in ("tokens", "hidden", "top_k", "experts")),
        row["dtype"],
        f"{row['time_us_max'] / 1e3:,.1f}",
        f"{row['baseline_us'] / 1e3:,.1f} ({row['baseline']})" if measured else "",
        f"{row['ratio_median']:.3f}" if measured else "",
        f"{row['ratio_low']:.3f} .. {row['ratio_high']:.3f}" if measured else "",
        _verdict(row),
    ]


def _verdict(row: dict) -> str:
    if not row["correct"]:
        return f"LOSSES DIFFER by {row['max_difference']:.2g}"
    return "" if row["target"] is None else f"<= {row['target']:.2f}, {'met' if row['met'] else 'MISSED'}"


def section(path: Path) -> str:
    """What the benchmarks' page holds between its marks, made from a results file."""
    report = read_json(path)
    machine = report["machine"]
    return (
        f"{BEGIN}\n\nFrom [{path.name}](results/{path.name}): {machine['cpu']}, {machine['cores']} cores,"
        f" torch {report['versions']['torch']}, {report['date']}.\n\n{table(report)}\n{END}"
    )


def latest_results() -> Path | None:
    """The newest results file of this benchmark."""
    return max((ROOT / "benchmarks" / "results").glob("*-frameworks.json"), default=None)


def write_section(path: Path) -> None:
    """Put the table of ``path`` into the benchmarks' page."""
    page = README.read_text(encoding="utf-8")
    made, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: section(path), page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{README} has {count} places between {BEGIN!r} and {END!r}: it must have one")
    README.write_text(made, encoding="utf-8")


def _cases(args: argparse.Namespace) -> Iterator[tuple[Subject, Case]]:
    for subject in SUBJECTS:
        if args.framework and subject.name not in args.framework and subject.framework not in args.framework:
            continue
        missing = missing_packages(subject.framework)
        if missing:
            raise ValueError(f"{subject.framework} needs {', '.join(missing)}: run this as make bench-frameworks")
        for text in args.shapes:
            shape = Shape.parse(text)
            yield subject, Case(ranks=RANKS, tokens=args.tokens, shape=shape, dtype=subject.dtype, routing="learned")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write; exit code 1 for losses that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--framework", action="append", help="only this; may be repeated")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="H:K:E", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="T", help=f"per rank (default: {TOKENS})")
    parser.add_argument("--pairs", type=int, default=DEFAULT_PAIRS, metavar="N", help="interleaved pairs per figure")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write a results file")
    parser.add_argument("--readme", action="store_true", help="put the newest file into benchmarks/README.md")
    args = parser.parse_args(arguments)
    rows = []
    for subject, case in list(_cases(args)):
        print(
            f"{subject.name}: T={case.tokens} H={case.shape.hidden} K={case.shape.top_k}", file=sys.stderr, flush=True
        )
        rows += launch(RANKS, "cpu", take, subject, case, args.pairs)
        print(json.dumps({key: rows[-1][key] for key in ("time_us_max", "ratio_median", "ratio_high", "correct")}))
    report = build_report(rows)
    print(table(report))
    if args.json is not None:
        path = Path(args.json) if args.json else default_path(report, "-frameworks.json")
        write_json(report, path)
        print(f"wrote {path}")
    if args.readme:
        newest = latest_results()
        if newest is None:
            raise ValueError("benchmarks/results has no file of this benchmark: run it with --json first")
        write_section(newest)
    return 0 if all(row["correct"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
