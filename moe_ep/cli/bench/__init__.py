"""``moe-ep bench``: times dispatch, combine and the MoE layer against the usual way of doing the same."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_ep.cli.bench import cases, gpu
from moe_ep.cli.bench.cases import Case, Shape
from moe_ep.cli.bench.launch import launch, pick_device, run_in_world, under_torchrun
from moe_ep.cli.bench.registry import find_measurement, take_measurements
from moe_ep.cli.bench.report import (
    build_report,
    default_path,
    markdown_report,
    print_report,
    read_json,
    write_json,
    write_plot,
)

EXIT_TARGET_MISSED = 1
EXIT_WRONG_RESULT = 1
OPS = ("dispatch_combine", "moe_layer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``moe-ep bench``."""
    parser.add_argument("--op", choices=OPS, action="append", help="measure only this; may be repeated (default: all)")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", help="numbers of processes (default: 2 4)")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="T", help="tokens per rank (default: 256 1024 4096)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="H:K:E",
        help=f"hidden, top-k, experts (default: {' '.join(cases.DEFAULT_SHAPES)})",
    )
    parser.add_argument(
        "--layer-tokens", type=int, nargs="+", metavar="T", help=f"of moe_layer (default: {cases.LAYER_TOKENS})"
    )
    parser.add_argument(
        "--layer-shapes", nargs="+", metavar="H:K:E", help=f"of moe_layer (default: {cases.LAYER_SHAPE})"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the rows (default: float32)")
    parser.add_argument(
        "--routing",
        choices=("uniform", "zipf"),
        help="how tokens choose experts (default: uniform; with --backend cuda both)",
    )
    parser.add_argument(
        "--pairs",
        type=int,
        metavar="N",
        help=f"interleaved pairs per figure (default: 30; with --backend cuda calls per figure, {gpu.DEFAULT_REPEATS})",
    )
    parser.add_argument(
        "--backend", choices=("torch", "cuda"), default="torch", help="backend of our side; cuda measures its kernels"
    )
    parser.add_argument(
        "--part", choices=gpu.PARTS, action="append", help="with --backend cuda only this; may be repeated"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes GPUs if enough")
    parser.add_argument("--quick", action="store_true", help="smallest case and few pairs: a test that all of it runs")
    parser.add_argument("--json", nargs="?", const="", metavar="FILE", help="write the results file")
    parser.add_argument("--plot", nargs="?", const="", metavar="FILE", help="write the plot (needs matplotlib)")
    parser.add_argument("--assert", dest="assert_targets", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--show", nargs="+", metavar="FILE", help="measure nothing: print results files as Markdown")


def run(args: argparse.Namespace) -> int:
    """Measure, report, and return the exit code: 1 for a wrong result, or a missed target with ``--assert``."""
    if args.show:
        for name in args.show:
            print(markdown_report(read_json(Path(name))))
        return 0
    for option, choice in (("--json", args.json), ("--plot", args.plot)):
        folder = Path(choice or ".").parent
        # Found now rather than after minutes of measuring.
        if choice and (Path(choice).is_dir() or not os.access(folder, os.W_OK)):
            raise ValueError(f"{option} {choice} cannot be written: name a file in a folder that exists and is yours")
    rows = gpu.measure(args) if args.backend == "cuda" else _measure(args)
    if rows is None:
        return 0
    report = build_report(rows)
    print_report(report)
    for choice, suffix, write in ((args.json, ".json", write_json), (args.plot, ".png", write_plot)):
        if choice is not None:
            path = Path(choice) if choice else default_path(report, suffix)
            write(report, path)
            print(f"wrote {path}")
    return _exit_code(rows, assert_targets=args.assert_targets)


def _exit_code(rows: list[dict], *, assert_targets: bool) -> int:
    # Rows of the cuda backend exist only where their checks passed, and have no targets.
    rows = [row for row in rows if "correct" in row]
    wrong = [row for row in rows if not row["correct"]]
    if wrong:
        print(f"{len(wrong)} figures do not count: the two ways gave different results", file=sys.stderr)
        return EXIT_WRONG_RESULT
    missed = sum(row["met"] is False for row in rows)
    with_target = sum(row["target"] is not None for row in rows)
    if with_target:
        print(f"targets met: {with_target - missed} of {with_target}")
    return EXIT_TARGET_MISSED if missed and assert_targets else 0


def _measure(args: argparse.Namespace) -> list[dict] | None:
    """Rows of every measurement asked for; None on the ranks of a torchrun world that do not report."""
    if args.part:
        raise ValueError(f"part={args.part[0]} needs --backend cuda; the torch backend's measurements are --op")
    ops = args.op or OPS
    for op in ops:
        find_measurement(op, args.backend)
    if torch.cuda.is_available() and args.device != "cpu":
        print(
            "GPUs found: these figures are the torch backend's, over NCCL. Those of the CUDA kernels: --backend cuda.",
            file=sys.stderr,
        )
    pairs = args.pairs
    if pairs is None:
        pairs = cases.QUICK_PAIRS if args.quick else cases.DEFAULT_PAIRS
    if pairs < 1:
        raise ValueError(f"pairs={pairs} must be 1 or more; 30 gives a usable interval")
    if under_torchrun():
        return _measure_in_world(args, ops, pairs)
    rows = []
    jobs = [(op, ranks, _cases(args, op, ranks)) for op in ops for ranks in _rank_counts(args, op)]
    for op, ranks, chosen in jobs:
        device = pick_device(args.device, ranks)
        print(f"{op} on {ranks} process{'es' if ranks > 1 else ''} ({device})", file=sys.stderr)
        for case in chosen:
            # In processes of its own: what malloc kept of a larger case makes a later one cheaper, or dearer.
            rows += launch(ranks, device, take_measurements, op, args.backend, [case], pairs)
    return rows


def _measure_in_world(args: argparse.Namespace, ops: Sequence[str], pairs: int) -> list[dict] | None:
    world = int(os.environ["WORLD_SIZE"])
    if "dispatch_combine" not in ops or world < 2:
        raise ValueError(f"under torchrun only dispatch_combine is measured, on 2 ranks or more; the world has {world}")
    device = pick_device(args.device, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    chosen = _cases(args, "dispatch_combine", world)
    return run_in_world(device, take_measurements, "dispatch_combine", args.backend, chosen, pairs)


def _rank_counts(args: argparse.Namespace, op: str) -> tuple[int, ...]:
    if op == "moe_layer":
        return (1,)
    counts = tuple(args.ranks or (cases.QUICK_RANKS if args.quick else cases.DEFAULT_RANKS))
    for count in counts:
        if count < 2:
            raise ValueError(f"ranks={count} has nothing to exchange; give 2 or more")
    return counts


def _cases(args: argparse.Namespace, op: str, ranks: int) -> list[Case]:
    if op == "moe_layer":
        tokens = args.layer_tokens or [cases.QUICK_LAYER_TOKENS if args.quick else cases.LAYER_TOKENS]
        shapes = args.layer_shapes or [cases.LAYER_SHAPE]
    else:
        tokens = args.tokens or (cases.QUICK_TOKENS if args.quick else cases.DEFAULT_TOKENS)
        shapes = args.shapes or cases.DEFAULT_SHAPES
    for count in tokens:
        if count < 1:
            raise ValueError(f"tokens={count} must be 1 or more")
    parsed = [Shape.parse(shape) for shape in shapes]
    return list(
        cases.exchange_cases(ranks, tokens, parsed, dtype=args.dtype or "float32", routing=args.routing or "uniform")
    )
