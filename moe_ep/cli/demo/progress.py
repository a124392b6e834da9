"""What the user sees while the demo runs: a bar with a live line on a terminal, plain lines elsewhere."""

import sys
from dataclasses import dataclass, replace
from typing import Any, Protocol, TextIO


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The live line.

    Attributes:
        step, steps: steps done, and the last step of the run.
        loss: of this step, nats per byte.
        tokens_per_second: over all ranks, mean of the last steps.
        imbalance: load of a layer's busiest expert over the mean load, mean over layers; 1 is even.
        exchange_share: share of the step in which dispatch or combine was under way, on rank 0.
        heldout: held-out loss when it was just measured, else None.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    imbalance: float
    exchange_share: float
    heldout: float | None = None

    def __str__(self) -> str:
        line = (
            f"loss {self.loss:.4f}  {self.tokens_per_second:,.0f} tokens/s  imbalance {self.imbalance:.2f}  "
            f"dispatch+combine {self.exchange_share:.0%}"
        )
        return line if self.heldout is None else f"{line}  held-out {self.heldout:.4f}"


class Reporter(Protocol):
    """Where a rank's news goes."""

    def say(self, text: str) -> None:
        """Show one or more whole lines."""

    def step(self, report: StepReport) -> None:
        """Show the state of the training."""


class SilentReporter:
    """For ranks other than 0, and for ``--quiet``."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def step(self, report: StepReport) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class ConsoleReporter:
    """Shows a bar on a terminal, and one line in ``every`` steps elsewhere."""

    def __init__(self, *, every: int, out: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._every = every
        self._bar: Any = _make_bar() if self._out.isatty() else None
        self._task: Any = None
        self._heldout: float | None = None

    def say(self, text: str) -> None:
        """Show whole lines, above the bar if there is one."""
        if self._bar is not None and self._bar.live.is_started:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._out, flush=True)

    def step(self, report: StepReport) -> None:
        """Show one step; the bar begins with the first and ends with the last."""
        if self._bar is not None:
            self._show_bar(report)
        elif report.step % self._every == 0 or report.step == report.steps or report.heldout is not None:
            print(f"step {report.step:>{len(str(report.steps))}}/{report.steps}  {report}", file=self._out, flush=True)

    def close(self) -> None:
        """End the bar, so that the terminal is left as it was found."""
        if self._bar is not None:
            self._bar.stop()

    def _show_bar(self, report: StepReport) -> None:
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task("", total=report.steps)
        # The bar keeps showing the last measurement until the next.
        self._heldout = self._heldout if report.heldout is None else report.heldout
        report = replace(report, heldout=self._heldout)
        self._bar.update(self._task, completed=report.step, description=str(report))
        if report.step == report.steps:
            self._bar.stop()


def _make_bar() -> Any:
    # rich is an optional package; without a terminal it is not needed.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        TimeRemainingColumn(compact=True),
    )
