"""Rows of a run on GPUs as tables, and as plots: time by tokens, rate by SMs, pairs of decoding."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_ep.cli.bench.gpu.timer import GRAPH_MODE

COLUMNS = (
    "op", "layout", "dtype", "mode", "by", "R", "T", "routing", "SMs", "us max", "us mean", "wire GB/s", "logical GB/s",
    "floor us", "x floor", "NCCL us", "host us", "also",
)  # fmt: skip
DECODE_TITLE = f"decoding: us of one dispatch and combine behind it, and of each alone, in a {GRAPH_MODE}"
DECODE_COLUMNS = (
    "layout", "dtype", "R", "T", "routing", "pair", "NCCL", "NCCL / ours", "dispatch", "NCCL", "combine", "NCCL",
    "floor of the pair",
)  # fmt: skip
# Keys that only some rows have, as they are told in the last column.
_FACTS = {
    "laps": "rounds: {}",
    "num_chunks": "chunks: {}",
    "sm_budget": "{} SMs kept free",
    "exchange_us": "exchange {:,.0f} us",
    "compute_us": "compute {:,.0f} us",
    "hidden_share": "{:.0%} hidden",
}

Row = dict[str, Any]


def is_gpu_row(row: Row) -> bool:
    """Whether a row is of a run with backend cuda, whose table differs from that of the others."""
    return "mode" in row


def table_row(row: Row) -> list[str]:
    """One row of results as cells of ``COLUMNS``."""
    facts = [text.format(row[key]) for key, text in _FACTS.items() if key in row]
    if "arena_bytes" in row and row["op"] == "dispatch":
        facts.append(f"arena {row['arena_bytes'] / 2**20:,.0f} MiB")
    return [
        *(row[key] for key in ("op", "layout")),
        _short(row["dtype"]),
        row["mode"],
        row["backend"],
        str(row["ranks"]),
        str(row["tokens"]),
        row["routing"],
        _number(row["num_sms"], "{}"),
        f"{row['time_us_max']:,.1f}",
        f"{row['time_us_mean']:,.1f}",
        _number(row["wire_gbps"], "{:,.1f}"),
        _number(row["logical_gbps"], "{:,.1f}"),
        _number(row["floor_us"], "{:,.1f}"),
        _number(row["ratio_to_floor"], "{:.2f}"),
        _number(row["nccl_us"], "{:,.1f}"),
        _number(row.get("host_us"), "{:,.1f}"),
        ", ".join(facts),
    ]


def decode_table(rows: Sequence[Row]) -> list[list[str]]:
    """Pairs of decoding beside their halves and NCCL's, as cells of ``DECODE_COLUMNS``; empty where there are none."""
    ours = [row for row in rows if row["mode"] == GRAPH_MODE and row["backend"] == "cuda"]
    found = {(row["op"], row["dtype"], *_case_of(row)): row for row in ours}
    table = []
    for row in ours:
        if row["op"] != "decode_pair":
            continue
        halves = (("dispatch", row["dtype"]), ("combine", "bfloat16"))
        cells = [_times_of(found.get((*half, *_case_of(row)))) for half in halves]
        nccl = row["nccl_us"]
        table.append(
            [
                row["layout"],
                _short(row["dtype"]),
                str(row["ranks"]),
                str(row["tokens"]),
                row["routing"],
                *_times_of(row),
                _number(None if nccl is None else nccl / row["time_us_max"], "{:.2f}"),
                *(cell for pair in cells for cell in pair),
                _number(row["floor_us"], "{:,.1f}"),
            ]
        )
    return table


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Time by tokens for dispatch, combine and pairs, and rate by SMs, of uniform routing on the most ranks measured.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    most = max((row["ranks"] for row in rows), default=0)
    rows = [row for row in rows if row["ranks"] == most]
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(20, 5), layout="constrained")
        panels = figure.subplots(1, 4)
        for axes, op in zip(panels, ("dispatch", "combine"), strict=False):
            _plot_times(axes, sweep_rows(rows, op), op)
        _plot_rates(panels[2], curve_rows(rows))
        _plot_pairs(panels[3], pair_rows(rows))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=140)


def sweep_rows(rows: Sequence[Row], op: str) -> list[Row]:
    """Rows of one operation at the SMs that it takes by itself, one for each T, way and mode."""
    found = [
        row
        for row in rows
        if row["op"] == op and row["routing"] == "uniform" and "laps" not in row and row["mode"] != GRAPH_MODE
    ]
    usual = _usual_sms(found)
    return [row for row in found if row["num_sms"] in (None, usual.get((row["layout"], row["mode"])))]


def curve_rows(rows: Sequence[Row]) -> list[Row]:
    """Rows of the SM curve: those in a graph, of the T that was measured on the most numbers of SMs."""
    found = [
        row
        for row in rows
        if row["mode"] == "capacity"
        and row["op"] in ("dispatch", "combine")
        and row["dtype"] == "bfloat16"
        and row["routing"] == "uniform"
        and row["num_sms"]
        and row["backend"] == "cuda"
        and "laps" not in row
    ]
    counts = {tokens: len({row["num_sms"] for row in found if row["tokens"] == tokens}) for tokens in _tokens(found)}
    most = max(counts, key=counts.__getitem__, default=None)
    return [row for row in found if row["tokens"] == most]


def pair_rows(rows: Sequence[Row]) -> list[Row]:
    """Pairs of decoding, ours and NCCL's."""
    return [row for row in rows if row["op"] == "decode_pair" and row["routing"] == "uniform"]


def _plot_times(axes: Any, rows: Sequence[Row], op: str) -> None:
    ours = [row for row in rows if row["backend"] == "cuda"]
    lines: dict[str, dict[int, float]] = {}
    for row in ours:
        name = f"{row['layout']} {'fp8 ' if row['dtype'] != 'bfloat16' else ''}{row['mode']}"
        lines.setdefault(name, {})[row["tokens"]] = row["time_us_max"]
    for name, points in lines.items():
        _line(axes, points, label=name, marker="o", ms=3)
    floors = {row["tokens"]: row["floor_us"] for row in ours if row["dtype"] == "bfloat16" and row["floor_us"]}
    _line(axes, floors, label="floor bf16", color="k", ls=":")
    for layout, style in (("compact", "--"), ("expanded", "-.")):
        points = {row["tokens"]: row["nccl_us"] for row in ours if _is_plain(row, layout) and row["nccl_us"]}
        _line(axes, points, label=f"NCCL, {layout}", color="0.5", ls=style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("us, slowest rank, median")
    axes.set_title(op)
    if rows:
        axes.legend(fontsize=7)


def _plot_rates(axes: Any, rows: Sequence[Row]) -> None:
    for op, layout in sorted({(row["op"], row["layout"]) for row in rows}):
        points = {
            row["num_sms"]: row["wire_gbps"] or row["logical_gbps"]
            for row in rows
            if (row["op"], row["layout"]) == (op, layout)
        }
        _line(axes, points, label=f"{op} {layout}", marker="o", ms=3)
    axes.set_xlabel("SMs")
    axes.set_ylabel("GB/s over the wire")
    axes.set_ylim(bottom=0)
    axes.set_title(f"T = {rows[0]['tokens']}" if rows else "SMs: not measured")
    if rows:
        axes.legend(fontsize=7)


def _plot_pairs(axes: Any, rows: Sequence[Row]) -> None:
    lines: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows:
        lines.setdefault((row["backend"], row["layout"], row["dtype"]), {})[row["tokens"]] = row["time_us_max"]
    for (backend, layout, dtype), points in lines.items():
        ours = backend == "cuda"
        label = f"{layout if ours else 'NCCL'} {_short(dtype)}"
        _line(axes, points, label=label, marker="o", ms=3, ls="-" if ours else "--")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("tokens per rank")
    axes.set_ylabel("us, slowest rank, median")
    axes.set_title(f"dispatch and combine, {GRAPH_MODE}" if rows else "dispatch and combine in graphs: not measured")
    if rows:
        axes.legend(fontsize=7)


def _line(axes: Any, points: dict[int, float], **style: Any) -> None:
    if points:
        axes.plot(*zip(*sorted(points.items()), strict=True), **style)


def _is_plain(row: Row, layout: str) -> bool:
    return row["layout"] == layout and row["mode"] == "exact" and row["dtype"] == "bfloat16"


def _usual_sms(rows: Sequence[Row]) -> dict[tuple[str, str], int]:
    """The most frequent number of SMs by layout and mode: a sweep measures it at every T, a curve each one once."""
    counts: dict[tuple[str, str], Counter[int]] = {}
    for row in rows:
        if row["num_sms"]:
            counts.setdefault((row["layout"], row["mode"]), Counter())[row["num_sms"]] += 1
    return {key: counter.most_common(1)[0][0] for key, counter in counts.items()}


def _case_of(row: Row) -> tuple[Any, ...]:
    """What the halves of a pair share."""
    return tuple(row[key] for key in ("layout", "ranks", "tokens", "routing", "hidden", "top_k", "experts"))


def _times_of(row: Row | None) -> tuple[str, str]:
    """A row's time and NCCL's."""
    return ("", "") if row is None else (f"{row['time_us_max']:,.1f}", _number(row["nccl_us"], "{:,.1f}"))


def _short(dtype: str) -> str:
    return {"bfloat16": "bf16", "float8_e4m3fn": "fp8"}.get(dtype, dtype)


def _tokens(rows: Sequence[Row]) -> set[int]:
    return {row["tokens"] for row in rows}


def _number(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)
