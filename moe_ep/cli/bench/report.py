"""Results as a table, as JSON and as a plot."""

import contextlib
import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import moe_ep
from moe_ep.cli.bench.gpu import report as gpu_report
from moe_ep.cli.tables import markdown_table, print_table

COLUMNS = ("op", "R", "T", "H", "K", "E", "dtype", "ours us", "usual us", "ratio", "95 % interval", "target", "results")


def describe_machine() -> dict:
    """Processor, cores, memory and GPUs of this machine; no name by which it could be found."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(memory / 2**30),
        "gpus": gpus,
    }


def machine_slug(machine: dict) -> str:
    """Short name of a machine for file names, such as ``4x-nvidia-h200`` or ``2-core-intel-xeon``."""
    if machine["gpus"]:
        name = f"{len(machine['gpus'])}x {machine['gpus'][0]}"
    else:
        name = f"{machine['cores']} core {machine['cpu']}"
    name = re.sub(r"\((r|tm)\)|@.*|processor|cpu", "", name.lower())
    return "-".join(re.findall(r"[a-z0-9.]+", name))[:48].strip("-.")


def build_report(rows: Sequence[dict]) -> dict:
    """Everything a results file holds: machine, commit, versions, rows."""
    return {
        "machine": describe_machine(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "moe_ep": moe_ep.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "nccl": _nccl_version(),
        },
        "rows": list(rows),
    }


def default_path(report: dict, suffix: str) -> Path:
    """``benchmarks/results/DATE-machine`` in the source tree, the same name in any other working folder."""
    name = f"{report['date']}-{machine_slug(report['machine'])}{suffix}"
    return Path("benchmarks/results", name) if Path("benchmarks").is_dir() else Path(name)


def write_json(report: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def read_json(path: Path) -> dict:
    """Read a results file.

    Raises:
        ValueError: not there, or not a results file.
    """
    try:
        report = json.loads(path.read_text())
        rows = report["rows"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file of moe-ep bench: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} is not a results file of moe-ep bench: its rows are not a list")
    return report


def print_report(report: dict) -> None:
    """The figures on the terminal."""
    machine = report["machine"]
    where = ", ".join(machine["gpus"]) or f"{machine['cpu']}, {machine['cores']} cores"
    title = f"moe-ep bench: {where}; torch {report['versions']['torch']}; "
    if _is_of_gpus(report):
        title += "time on the slowest rank, floor = the same bytes pushed by all SMs"
    else:
        title += "ratio = ours / usual, below 1 is faster"
    print_table(title, *_table(report))
    pairs = _decode_table(report)
    if pairs:
        print_table(gpu_report.DECODE_TITLE, gpu_report.DECODE_COLUMNS, pairs)


def markdown_report(report: dict) -> str:
    """The same for a document."""
    table, pairs = markdown_table(*_table(report)), _decode_table(report)
    if not pairs:
        return table
    return f"{table}\n{gpu_report.DECODE_TITLE}:\n\n{markdown_table(gpu_report.DECODE_COLUMNS, pairs)}"


def _table(report: dict) -> tuple[Sequence[str], list[list[str]]]:
    """Columns and rows, as they fit what was measured."""
    if _is_of_gpus(report):
        return gpu_report.COLUMNS, [gpu_report.table_row(row) for row in report["rows"]]
    return COLUMNS, [table_row(row) for row in report["rows"]]


def _decode_table(report: dict) -> list[list[str]]:
    return gpu_report.decode_table(report["rows"]) if _is_of_gpus(report) else []


def _is_of_gpus(report: dict) -> bool:
    return any(gpu_report.is_gpu_row(row) for row in report["rows"])


def table_row(row: dict) -> list[str]:
    """One row of results as cells of ``COLUMNS``."""
    if not row["correct"]:
        verdict = f"DIFFER by {row['max_difference']:.2g}"
    else:
        verdict = {None: "equal", True: "equal, met", False: "equal, MISSED"}[row["met"]]
    return [
        row["op"],
        *(str(row[key]) for key in ("ranks", "tokens", "hidden", "top_k", "experts")),
        row["dtype"],
        f"{row['time_us_max']:,.0f}",
        f"{row['baseline_us']:,.0f}",
        f"{row['ratio_median']:.3f}",
        f"{row['ratio_low']:.3f} .. {row['ratio_high']:.3f}",
        "" if row["target"] is None else f"<= {row['target']:.2f}",
        verdict,
    ]


def write_plot(report: dict, path: Path) -> None:
    """Ratios of the whole calls as dots with their intervals, and their targets as bars; or the curves of GPUs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    if _is_of_gpus(report):
        gpu_report.write_plot(report["rows"], path)
        return
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["op"] not in ("dispatch", "combine") and "_layer_" not in row["op"]]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(8, 1.2 + 0.28 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            late = row["met"] is False
            error = [[row["ratio_median"] - row["ratio_low"]], [row["ratio_high"] - row["ratio_median"]]]
            axes.errorbar(
                row["ratio_median"], place, xerr=error, fmt="o", ms=4, color="C3" if late else "C0", capsize=2
            )
            if row["target"] is not None:
                axes.plot([row["target"]] * 2, [place - 0.35, place + 0.35], color="0.3", lw=1.5)
        axes.axvline(1.0, color="0.7", lw=1, zorder=0)
        axes.set_yticks(range(len(rows)), [_plot_label(row) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("time of moe_ep / time of the usual way, median and 95 % interval; bar: target")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def _plot_label(row: dict) -> str:
    op = {"dispatch_combine": "exchange", "moe_layer": "layer"}.get(row["op"], row["op"])
    return f"{op} R={row['ranks']} H={row['hidden']} K={row['top_k']} E={row['experts']} T={row['tokens']}"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the source tree this package runs from, with ``-dirty`` when files differ; None outside a tree."""
    folder = Path(moe_ep.__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _nccl_version() -> str | None:
    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(str(part) for part in torch.cuda.nccl.version())
