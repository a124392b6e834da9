"""What each rank does from start to end: set up, train, save, measure, and, on rank 0, plot and report."""

import math
import os
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo import report
from moe_ep.cli.demo.checkpoint import Checkpoint
from moe_ep.cli.demo.corpus import heldout_windows, load_corpus
from moe_ep.cli.demo.options import CHECKPOINT_NAME, DemoOptions
from moe_ep.cli.demo.progress import Reporter, StepReport
from moe_ep.cli.demo.sampling import sample
from moe_ep.cli.demo.tracing import Span, exchange_share
from moe_ep.cli.demo.train import StepResult, Trainer

# Sequences of the held-out part that are measured, the same each time.
_HELDOUT_WINDOWS = 128
# The live speed is a mean over this many steps.
_SPEED_STEPS = 10


class InterruptedRunError(Exception):
    """The run was asked to stop and did, with its checkpoint saved."""


class Run:
    """One rank's part of a run.

    Args:
        options: the run.
        group: all ranks.
        reporter: where rank 0's news go; other ranks are given a silent one.
        stop: True once the user asked to stop.
    """

    def __init__(
        self, options: DemoOptions, *, group: dist.ProcessGroup, reporter: Reporter, stop: Callable[[], bool]
    ) -> None:
        self.options = options
        self.group = group
        self.rank = dist.get_rank(group)
        self.reporter = reporter
        self.stop = stop
        train, model = options.train, options.model
        self.corpus = load_corpus(train.text, max_bytes=train.max_bytes, seq=model.seq)
        self.device = local_device(options)
        self.trainer = Trainer(options, self.corpus, group=group, device=self.device, stop=stop)
        self.saved: Checkpoint | None = None
        self.resumed = checkpoints.load(options.resume) if options.resume else None
        if self.resumed is not None:
            self.trainer.restore(self.resumed)
        self.first_step = self.trainer.step
        self.spans: list[Span] = []
        self.train_seconds = 0.0
        self.exchange_seconds = 0.0

    def complete(self) -> dict[str, Any] | None:
        """Do the whole run; returns the summary on rank 0, None elsewhere.

        Raises:
            InterruptedRunError: when the user asked to stop.
        """
        self._introduce()
        self._train()
        spans: list[list[Span]] = [[] for _ in range(self.options.ranks)]
        dist.all_gather_object(spans, self.spans, group=self.group)
        # What follows is rank 0's alone: the others may go home, and nobody's exit disturbs it.
        dist.barrier(group=self.group)
        if self.rank != 0:
            return None
        assert self.saved is not None
        text = sample(
            self.saved, prompt=self.options.prompt, num_bytes=self.options.sample_bytes,
            temperature=self.options.temperature, seed=self.options.train.seed,
        )  # fmt: skip
        summary = report.summarise(self, text=text, check=self._check() if self.options.check else None)
        report.write_files(self.options, self.trainer.history, summary, spans)
        return summary

    def _introduce(self) -> None:
        model = self.trainer.model
        dense = sum(p.numel() for p in model.dense_parameters())
        experts = sum(p.numel() for p in model.expert_parameters())
        backend = model.moe_layers()[0].dispatcher.backend_name
        self.reporter.say(
            f"text: {self.corpus.source}, {self.corpus.num_files:,} files, "
            f"{len(self.corpus.train):,} bytes to learn, {len(self.corpus.heldout):,} held out\n"
            f"model: {dense:,} dense and {experts * self.options.ranks:,} expert parameters, "
            f"{self.options.model.layers} layers of {self.options.model.experts} experts over {self.options.ranks} "
            f"{'rank' if self.options.ranks == 1 else 'ranks'} ({self.device.type}, {backend} backend)"
        )
        if self.resumed is not None:
            self.reporter.say(f"resumed at step {self.first_step} from {self.options.resume}")
            if self.resumed.fingerprint != self.corpus.fingerprint:
                self.reporter.say("note: the text is not the one that the checkpoint was trained on")

    def _train(self) -> None:
        recent: deque[float] = deque(maxlen=_SPEED_STEPS)
        windows = heldout_windows(self.corpus.heldout, seq=self.options.model.seq, limit=_HELDOUT_WINDOWS)
        while self.trainer.step < self.options.steps:
            result = self.trainer.train_step()
            recent.append(result.seconds)
            self._account(result)
            step = self.trainer.step
            heldout = None
            if step % self.options.eval_every == 0 or step == self.options.steps:
                heldout = self.trainer.evaluate(windows)
                self.trainer.history.heldout.append((step, heldout))
            if result.stop or step % self.options.save_every == 0 or step == self.options.steps:
                self._save()
            self.reporter.step(self._step_report(result, sum(recent) / len(recent), heldout))
            if result.stop:
                raise InterruptedRunError(f"stopped at step {step}")

    def _account(self, result: StepResult) -> None:
        if not math.isfinite(result.loss):
            raise ArithmeticError(
                f"the loss is {result.loss} at step {self.trainer.step}; lower --lr (now {self.options.train.lr})"
            )
        self.spans = result.spans
        # The first step of a run warms caches and connections up: it says nothing about the speed.
        if self.trainer.step > self.first_step + 1:
            self.train_seconds += result.seconds
            self.exchange_seconds += exchange_share(result.spans, result.seconds) * result.seconds

    def _step_report(self, result: StepResult, seconds: float, heldout: float | None) -> StepReport:
        return StepReport(
            step=self.trainer.step,
            steps=self.options.steps,
            loss=result.loss,
            tokens_per_second=self.options.train.batch * self.options.model.seq / seconds,
            imbalance=report.imbalance(result.load),
            exchange_share=exchange_share(result.spans, result.seconds),
            heldout=heldout,
        )

    def _save(self) -> None:
        self.saved = self.trainer.checkpoint()
        if self.rank == 0:
            checkpoints.save(self.options.out / CHECKPOINT_NAME, self.saved)

    def _check(self) -> float:
        """Repeat the first steps of this run unsharded in this process; returns the largest loss difference, nats."""
        reference = Trainer(self.options, self.corpus, group=None, device=self.device)
        if self.resumed is not None:
            reference.restore(self.resumed)
        count = min(self.options.check, self.options.steps - self.first_step)
        self.reporter.say(f"check: repeating {count} steps unsharded in one process")
        for _ in range(count):
            reference.train_step()
            if self.stop():
                raise InterruptedRunError("stopped during the check")
        ours = self.trainer.history.loss[self.first_step : self.first_step + count]
        theirs = reference.history.loss[self.first_step :]
        return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def local_device(options: DemoOptions) -> torch.device:
    """The device of this rank; also made the current one, where it is a GPU."""
    if options.device != "cuda":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
