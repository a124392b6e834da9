"""``moe-ep demo`` trains a small MoE language model with its experts on many ranks; ``moe-ep generate`` samples it."""

import argparse
import importlib.util
import os
import sys
import tempfile
from pathlib import Path

import torch

from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo import report
from moe_ep.cli.demo.corpus import load_corpus
from moe_ep.cli.demo.generate import add_generate_arguments, run_generate
from moe_ep.cli.demo.launch import EXIT_FAILURE, StoppedError, WorkerFailedError, launch
from moe_ep.cli.demo.options import (
    DemoOptions,
    UsageError,
    add_arguments,
    resolve,
    resume_path,
    torchrun_world_size,
)
from moe_ep.cli.demo.processes import run_under_torchrun
from moe_ep.cli.demo.progress import ConsoleReporter, SilentReporter
from moe_ep.cli.demo.worker import InterruptedRunError

__all__ = ["add_arguments", "add_generate_arguments", "run", "run_generate"]

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def run(args: argparse.Namespace) -> int:
    """Train, and print what came of it.

    Returns:
        0; 1 when a rank failed or ``--check`` found a difference; 2 when an argument, the text, the checkpoint or the
        output folder is at fault; 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        options = _prepare(args)
        return _run(options)
    except UsageError as error:
        print(f"moe-ep demo: {error}", file=sys.stderr)
        return EXIT_USAGE
    except WorkerFailedError as error:
        print(f"moe-ep demo: {error}", file=sys.stderr)
        return EXIT_USAGE if error.usage else EXIT_FAILURE
    except (StoppedError, InterruptedRunError) as stopped:
        print(f"moe-ep demo: {stopped}; continue with --resume", file=sys.stderr)
        return stopped.exit_code if isinstance(stopped, StoppedError) else EXIT_INTERRUPTED


def _prepare(args: argparse.Namespace) -> DemoOptions:
    """Everything that can be refused is refused here, before a process is started."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib, which draws the plots, is missing: pip install 'moe_ep[demo]'")
    path = resume_path(args)
    resumed = checkpoints.load(path) if path is not None else None
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    options = resolve(
        args,
        remembered=resumed.options if resumed is not None else None,
        num_gpus=num_gpus,
        world_size=torchrun_world_size(),
    )
    if resumed is not None and resumed.step >= options.steps:
        raise UsageError(
            f"--steps {options.steps}: the checkpoint {path} is at step {resumed.step} already; give more steps"
        )
    load_corpus(options.train.text, max_bytes=options.train.max_bytes, seq=options.model.seq)
    _require_writable_folder(options.out, "--out", make=True)
    if options.json is not None:
        _require_writable_file(options.json, "--json")
    return options


def _run(options: DemoOptions) -> int:
    if torchrun_world_size() is not None:
        summary = run_under_torchrun(options)
    else:
        quiet = options.quiet
        reporter = SilentReporter() if quiet else ConsoleReporter(every=options.log_every)
        summary = launch(options, reporter)
    if summary is None:
        return 0
    if not options.quiet:
        print(report.describe(options, summary), flush=True)
    if summary["check_passed"] is False:
        print(
            f"moe-ep demo: --check found a loss difference of {summary['check_max_loss_diff']:.2e} nats",
            file=sys.stderr,
        )
        return EXIT_FAILURE
    return 0


def _require_writable_file(path: Path, flag: str) -> None:
    if path.is_dir():
        raise UsageError(f"{flag}: {path} is a folder; name a file, such as {path / 'summary.json'}")
    # Of a pipe or a device the folder need not be writable.
    if not path.exists():
        _require_writable_folder(path.parent, flag, make=False)
    elif not os.access(path, os.W_OK):
        raise UsageError(f"{flag}: {path} is there and may not be written; name another file")


def _require_writable_folder(folder: Path, flag: str, *, make: bool) -> None:
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable-"):
            pass
    except OSError as error:
        raise UsageError(f"{flag}: cannot write in {folder} ({error.strerror}); name another folder") from error
