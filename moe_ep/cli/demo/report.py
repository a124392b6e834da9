"""The results of a run: figures for people, ``metrics.json``, the summary of ``--json``, and the plots."""

import json
import platform
from typing import TYPE_CHECKING, Any

import torch

from moe_ep.cli.demo.checkpoint import write_atomically
from moe_ep.cli.demo.options import CHECK_LIMIT, CHECK_STEPS, GPU_CHECK_LIMIT, GPU_CHECK_STEPS, DemoOptions, to_dict
from moe_ep.cli.demo.tracing import Span
from moe_ep.cli.demo.train import History, learning_rate

if TYPE_CHECKING:
    from moe_ep.cli.demo.worker import Run

# The balance of the experts is measured over this many steps at the end.
_LOAD_STEPS = 50


def imbalance(load: torch.Tensor) -> float:
    """Load of a layer's busiest expert over the layer's mean load, mean over layers; ``load`` is int [L, E]."""
    load = load.double()
    return float((load.amax(-1) / load.mean(-1).clamp(min=1e-9)).mean())


def load_variation(history: History) -> float:
    """Coefficient of variation (deviation over mean) of the experts' loads in the last steps, mean over layers."""
    total = torch.stack(history.load[-_LOAD_STEPS:]).sum(0).double()
    return float((total.std(-1, correction=0) / total.mean(-1).clamp(min=1e-9)).mean())


def summarise(run: "Run", *, text: str, check: float | None) -> dict[str, Any]:
    """The summary of a run, as plain JSON values; losses and entropies in nats per byte."""
    options, history = run.options, run.trainer.history
    timed_steps = max(0, run.trainer.step - run.first_step - 1)
    tokens = timed_steps * options.train.batch * options.model.seq
    seconds = max(run.train_seconds, 1e-9)
    return {
        "initial_loss": history.loss[0],
        "final_loss": history.loss[-1],
        "heldout_loss": history.heldout[-1][1],
        "unigram_entropy": run.corpus.unigram_entropy(),
        "check_max_loss_diff": check,
        "check_passed": None if check is None else check_passed(options, check),
        "check_limit": None if check is None else check_limit(options),
        "tokens_per_second": tokens / seconds,
        "exchange_time_share": run.exchange_seconds / seconds,
        "expert_load_cv": load_variation(history),
        "ranks": options.ranks,
        "backend": run.trainer.model.moe_layers()[0].dispatcher.backend_name,
        "device": run.device.type,
        "step": run.trainer.step,
        "sample": text,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }


def check_limit(options: DemoOptions) -> float | None:
    """Bound of the loss difference in nats; None where none is promised: over more than 30 steps, in bf16 on CPUs.

    Rounding differs between the two runs, and training amplifies it: the bound holds for the first steps only. On GPUs
    it is 1e-4 for 10 steps, for more of them, and in bf16, 0.1; in fp64 1e-4 everywhere.
    """
    dtype, on_gpus = options.model.dtype, options.device == "cuda"
    if options.check > CHECK_STEPS:
        return None
    if dtype == "bfloat16":
        return GPU_CHECK_LIMIT if on_gpus else None
    few = options.check <= GPU_CHECK_STEPS or dtype == "float64"
    return GPU_CHECK_LIMIT if on_gpus and not few else CHECK_LIMIT


def check_passed(options: DemoOptions, difference: float) -> bool | None:
    """Whether the losses agree within :func:`check_limit`; None without one."""
    limit = check_limit(options)
    return None if limit is None else difference < limit


def write_files(options: DemoOptions, history: History, summary: dict[str, Any], spans: list[list[Span]]) -> None:
    """Write ``metrics.json``, the plots, and the file of ``--json``."""
    # Only one rank draws, and matplotlib takes a second to import.
    from moe_ep.cli.demo import plots

    metrics = {
        "summary": summary,
        "options": to_dict(options),
        "history": {
            "loss": history.loss,
            "lr": [learning_rate(step, options.train) for step in range(len(history.loss))],
            "imbalance": [imbalance(load) for load in history.load],
            "heldout": [{"step": step, "loss": loss} for step, loss in history.heldout],
        },
    }
    write_atomically(options.out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    plots.plot_loss(options.out / "loss.png", history, summary)
    plots.plot_expert_load(options.out / "expert_load.png", history)
    plots.plot_timeline(options.out / "timeline.png", spans, step=summary["step"], device=summary["device"])
    if options.json is not None:
        # Not through a rename: this may be a pipe or a device.
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


def describe(options: DemoOptions, summary: dict[str, Any]) -> str:
    """The end of the run in words."""
    gain = summary["unigram_entropy"] - summary["heldout_loss"]
    lines = [
        "",
        f"held-out loss    {summary['heldout_loss']:.4f} nats per byte",
        f"unigram entropy  {summary['unigram_entropy']:.4f} nats per byte "
        f"({abs(gain):.2f} {'above' if gain > 0 else 'below'} the held-out loss)",
        f"training loss    {summary['initial_loss']:.4f} -> {summary['final_loss']:.4f}",
        f"speed            {summary['tokens_per_second']:,.0f} tokens/s, "
        f"{summary['exchange_time_share']:.0%} of the time in dispatch and combine",
        f"expert load      {summary['expert_load_cv']:.2f} coefficient of variation",
    ]
    if summary["check_max_loss_diff"] is not None:
        limit = summary["check_limit"]
        verdict = {True: f"below {limit}", False: f"NOT below {limit}", None: "no bound promised"}
        lines.append(
            f"check            {summary['check_max_loss_diff']:.2e} nats: largest loss difference from one process "
            f"({verdict[summary['check_passed']]})"
        )
    lines += ["", "sample:", *("  " + line for line in summary["sample"].splitlines()), ""]
    lines.append(f"written to {options.out}: loss.png, expert_load.png, timeline.png, metrics.json, checkpoint")
    return "\n".join(lines)
