"""The demo's pictures: losses, expert load, and the timeline of one step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from moe_ep.cli.demo.tracing import COMPUTE, EXCHANGE, Span
from moe_ep.cli.demo.train import History

_DPI = 130
_GREY = "0.45"
# Steps to each side that the smooth curve of the training loss averages over.
_SMOOTHING = 7
# More columns than this cannot be told apart in the heat map.
_MAX_COLUMNS = 240
_COLOURS = {
    "attention": "#4477aa",
    "router": "#66ccee",
    "shared expert": "#88ddaa",
    "experts": "#228833",
    "head": "#999933",
    "gradient sum": "#aa3377",
    "optimizer": "#bbbbbb",
    "dispatch": "#ee7733",
    "combine": "#cc3311",
}


def plot_loss(path: Path, history: History, summary: dict[str, Any]) -> None:
    """Training and held-out loss over steps, beside the unigram entropy of the text."""
    figure = Figure(figsize=(8, 4.8), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(history.loss) + 1)
    smooth = _smooth(history.loss)
    axes.plot(steps, history.loss, color="#4477aa", alpha=0.3, linewidth=0.9)
    axes.plot(steps, smooth, color="#4477aa", linewidth=1.8, label=f"training ({history.loss[-1]:.2f} at the end)")
    if history.heldout:
        label = f"held-out ({summary['heldout_loss']:.2f} at the end)"
        where, losses = zip(*history.heldout, strict=True)
        axes.plot(where, losses, "o-", color="#ee7733", markersize=4.5, linewidth=1.2, clip_on=False, label=label)
    entropy = summary["unigram_entropy"]
    axes.axhline(entropy, color=_GREY, linestyle="--", linewidth=1.2, label=f"unigram entropy ({entropy:.2f})")
    _finish(axes, title="Loss over the training", xlabel="step", ylabel="loss [nats per byte]")
    axes.set_xlim(0, max(2, len(history.loss)))
    axes.legend(frameon=False)
    figure.savefig(path)


def plot_expert_load(path: Path, history: History) -> None:
    """One band per layer: how much of the layer's work each expert got, over the steps."""
    share = _load_share(history.load)
    num_columns, num_layers, num_experts = share.shape
    height = 1.6 + num_layers * min(2.2, max(0.8, 0.11 * num_experts))
    figure = Figure(figsize=(9, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(num_layers, 1, sharex=True, squeeze=False)[:, 0]
    extent = (0.5, len(history.load) + 0.5, num_experts - 0.5, -0.5)
    for layer, axes in enumerate(panels):
        picture = axes.imshow(
            share[:, layer].T.numpy(),
            aspect="auto",
            extent=extent,
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            interpolation="nearest",
        )
        axes.set_ylabel(f"layer {layer}\nexpert")
        axes.set_yticks(range(0, num_experts, max(1, num_experts // 4)))
    panels[-1].set_xlabel("step")
    panels[0].set_title("Expert load over the training", loc="left", fontweight="bold")
    bar = figure.colorbar(picture, ax=list(panels), extend="max", fraction=0.04, pad=0.02)
    bar.set_label("tokens of the expert / mean of its layer")
    figure.savefig(path)


def plot_timeline(path: Path, spans: Sequence[Sequence[Span]], *, step: int, device: str) -> None:
    """What each rank did in one step: one row for its computation, one for its exchanges; backward is hatched."""
    figure = Figure(figsize=(12, 2.6 + 1.15 * len(spans)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    labels, ticks = [], []
    for rank, own in enumerate(spans):
        for row, lane in enumerate((COMPUTE, EXCHANGE)):
            y = 2.4 * rank + row
            _draw_lane(axes, [span for span in own if span.lane == lane], y)
            labels.append(f"rank {rank}  {lane}")
            ticks.append(y)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(2.4 * len(spans) - 0.9, -0.6)
    axes.margins(x=0.01)
    clock = "GPU" if device == "cuda" else "host"
    _finish(
        axes, title=f"What each rank did in step {step}", xlabel=f"{clock} time since the step began [ms]", ylabel=""
    )
    axes.grid(axis="y", visible=False)
    used = {span.name for own in spans for span in own}
    handles = [Patch(facecolor=colour, label=name) for name, colour in _COLOURS.items() if name in used]
    handles.append(Patch(facecolor="white", edgecolor=_GREY, hatch="////", label="backward"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, columnspacing=1.2)
    figure.savefig(path)


def _draw_lane(axes: Axes, spans: Sequence[Span], y: float) -> None:
    for name, colour in _COLOURS.items():
        for backward in (False, True):
            ranges = [
                (1e3 * span.start, 1e3 * (span.end - span.start))
                for span in spans
                if span.name == name and span.backward == backward
            ]
            hatch = "//////" if backward else None
            axes.broken_barh(ranges, (y - 0.42, 0.84), facecolor=colour, edgecolor="white", linewidth=0.4, hatch=hatch)


def _finish(axes: Axes, *, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _load_share(load: Sequence[torch.Tensor]) -> torch.Tensor:
    """Load over the layer's mean, float64 [columns, L, E]: neighbouring steps share a column where there are many."""
    counts = torch.stack(list(load)).double()
    per_column = -(-len(counts) // _MAX_COLUMNS)
    counts = torch.stack([chunk.mean(0) for chunk in counts.split(per_column)])
    return counts / counts.mean(-1, keepdim=True).clamp(min=1e-9)


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a window around each step; narrower near the start, where the loss falls too fast to be averaged."""
    halves = [min(i, _SMOOTHING) for i in range(len(values))]
    windows = [values[i - half : i + half + 1] for i, half in enumerate(halves)]
    return [sum(window) / len(window) for window in windows]
