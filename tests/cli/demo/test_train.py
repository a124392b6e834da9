import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moe_ep.cli import demo
from moe_ep.cli.demo import checkpoint as checkpoints
from moe_ep.cli.demo import plots
from moe_ep.cli.demo.corpus import heldout_windows, load_corpus
from moe_ep.cli.demo.progress import SilentReporter
from moe_ep.cli.demo.train import Trainer
from moe_ep.cli.demo.worker import InterruptedRunError, Run
from tests.cli.demo.common import CPU, MODEL, SMALL, parse, small_options


def train_on_rank(ctx, options):
    """Losses, unsharded model and held-out loss of a training on the ranks of the pool."""
    corpus = load_corpus(options.train.text, max_bytes=options.train.max_bytes, seq=options.model.seq)
    trainer = Trainer(options, corpus, group=ctx.group, device=CPU)
    for _ in range(options.steps):
        trainer.train_step()
    heldout = trainer.evaluate(heldout_windows(corpus.heldout, seq=options.model.seq, limit=7))
    return trainer.history, trainer.checkpoint(), heldout


def run_on_rank(ctx, options, stop_at=None):
    """A whole run on the ranks of the pool; with ``stop_at``, the last rank is asked to stop in that step."""
    asked = []

    def stop():
        asked.append(None)
        return len(asked) == stop_at and ctx.rank == ctx.world_size - 1

    return Run(options, group=ctx.group, reporter=SilentReporter(), stop=stop).complete()


def timeline_on_rank(ctx, options):
    """The spans of this rank's last step, and those of all ranks that the timeline was drawn from (rank 0 only)."""
    drawn = []
    original = plots.plot_timeline
    plots.plot_timeline = lambda path, spans, **_: drawn.extend(spans)
    try:
        run = Run(options, group=ctx.group, reporter=SilentReporter(), stop=lambda: False)
        run.complete()
    finally:
        plots.plot_timeline = original
    return run.spans, drawn


def check_with_fault(ctx, options):
    """A run on the ranks of the pool in which the last rank begins with one wrong weight of one of its experts."""
    run = Run(options, group=ctx.group, reporter=SilentReporter(), stop=lambda: False)
    if ctx.rank == ctx.world_size - 1:
        with torch.no_grad():
            run.trainer.model.moe_layers()[0].experts.w_down[0, 0, 0] += 1
    return run.complete()


def trace_step(ctx, options):
    corpus = load_corpus(options.train.text, max_bytes=options.train.max_bytes, seq=options.model.seq)
    return Trainer(options, corpus, group=ctx.group, device=CPU).train_step().spans


@pytest.fixture(scope="class")
def reference(text):
    """The whole model in one process, in fp64."""
    options = small_options(text, Path(), dtype="float64")
    corpus = load_corpus(options.train.text, max_bytes=options.train.max_bytes, seq=MODEL.seq)
    trainer = Trainer(options, corpus, group=None, device=CPU)
    for _ in range(options.steps):
        trainer.train_step()
    heldout = trainer.evaluate(heldout_windows(corpus.heldout, seq=MODEL.seq, limit=7))
    return trainer.history, trainer.checkpoint(), heldout


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_ranks_train_the_model_of_one_process(ranks, text, reference, num_ranks):
    # Five sequences never divide evenly, and neither do the last windows of the evaluation. After four steps, a
    # few thousand fp64 roundings of 1e-16, amplified by Adam's division by gradients down to 1e-8, stay below 1e-9.
    options = small_options(text, Path(), ranks=num_ranks, dtype="float64")
    for history, checkpoint, heldout in ranks(num_ranks, train_on_rank, options, timeout=120):
        assert history.loss == pytest.approx(reference[0].loss, abs=1e-9)
        assert torch.equal(torch.stack(history.load), torch.stack(reference[0].load))
        assert heldout == pytest.approx(reference[2], abs=1e-9)
        for name, tensor in reference[1].tensors.items():
            if not name.startswith("rng"):
                torch.testing.assert_close(checkpoint.tensors[name], tensor, rtol=0, atol=1e-9)


def test_ranks_without_a_sequence_take_part(ranks, text):
    one, three = (small_options(text, Path(), ranks=n, batch=1, steps=2, dtype="float64") for n in (2, 3))
    losses = [ranks(options.ranks, train_on_rank, options, timeout=120)[0][0].loss for options in (one, three)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_it_learns(ranks, text):
    options = small_options(text, Path(), ranks=2, steps=40)
    loss = ranks(2, train_on_rank, options, timeout=120)[0][0].loss
    assert loss[0] == pytest.approx(math.log(256), abs=0.2)
    assert sum(loss[-5:]) / 5 < loss[0] - 2


def test_resume_continues_bit_for_bit(ranks, text, tmp_path):
    outs = [tmp_path / name for name in ("straight", "halves")]
    for out in outs:
        out.mkdir()
    straight = ranks(2, run_on_rank, small_options(text, outs[0], ranks=2, steps=20, eval_every=5), timeout=120)[0]
    half = small_options(text, outs[1], ranks=2, steps=10, eval_every=5)
    ranks(2, run_on_rank, half, timeout=120)
    path = outs[1] / "checkpoint.safetensors"
    halves = ranks(2, run_on_rank, replace(half, steps=20, resume=path), timeout=120)[0]
    one, other = (checkpoints.load(out / "checkpoint.safetensors") for out in outs)
    assert one.step == other.step == 20
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert straight["heldout_loss"] == halves["heldout_loss"]
    assert straight["sample"] == halves["sample"]


def test_resume_on_another_number_of_ranks(ranks, text, tmp_path):
    half = small_options(text, tmp_path, ranks=2, steps=3, dtype="float64")
    ranks(2, run_on_rank, half, timeout=120)
    resumed = replace(half, steps=6, ranks=3, resume=tmp_path / "checkpoint.safetensors")
    summary = ranks(3, run_on_rank, resumed, timeout=120)[0]
    straight = ranks(2, train_on_rank, replace(half, steps=6), timeout=120)[0]
    assert summary["final_loss"] == pytest.approx(straight[0].loss[-1], abs=1e-9)


def test_one_rank_asked_to_stop_stops_all_in_the_same_step_with_a_checkpoint(ranks, text, tmp_path):
    options = small_options(text, tmp_path, ranks=2, steps=50)
    with pytest.raises(InterruptedRunError, match="step 3"):
        ranks(2, run_on_rank, options, 3, timeout=120)
    assert checkpoints.load(tmp_path / "checkpoint.safetensors").step == 3


def test_a_step_is_traced_from_attention_to_optimizer(ranks, text):
    for spans in ranks(2, trace_step, small_options(text, Path(), ranks=2), timeout=120):
        names = {(span.name, span.backward) for span in spans}
        both = {"attention", "router", "experts", "shared expert", "head", "dispatch", "combine"}
        assert names == {(name, b) for name in both for b in (False, True)} | {
            ("gradient sum", False),
            ("optimizer", False),
        }
        exchanges = [span for span in spans if span.lane == "exchange"]
        assert len(exchanges) == 4 * MODEL.layers
        assert all(0 <= span.start <= span.end for span in spans)


def test_the_timeline_shows_what_each_rank_measured(ranks, text, tmp_path):
    results = ranks(2, timeline_on_rank, small_options(text, tmp_path, ranks=2, steps=2), timeout=120)
    measured = [spans for spans, _ in results]
    assert all(spans for spans in measured)
    assert measured[0] != measured[1]
    assert results[0][1] == measured


def test_the_check_finds_one_wrong_expert_weight(ranks, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "launch", lambda options, _: ranks(2, check_with_fault, options, timeout=120)[0])
    arguments = [*SMALL, "--text", text, "--out", tmp_path, "--device", "cpu", "--ranks", 2, "--steps", 3, "--check", 3]
    assert demo.run(parse(*arguments)) == 1
    assert "--check found a loss difference" in capsys.readouterr().err


def test_bfloat16_trains(ranks, text):
    history, _, heldout = ranks(2, train_on_rank, small_options(text, Path(), ranks=2, dtype="bfloat16"))[0]
    assert history.loss[-1] < history.loss[0]
    assert math.isfinite(heldout)


def test_a_diverged_training_ends_with_advice(ranks, text, tmp_path):
    options = small_options(text, tmp_path, ranks=2, steps=9)
    options = replace(options, train=replace(options.train, lr=1e30))
    with pytest.raises(ArithmeticError, match="lower --lr"):
        ranks(2, run_on_rank, options)
