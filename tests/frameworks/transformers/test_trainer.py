"""``ExpertParallelTrainer`` and plain accelerate loops."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import transformers

from moe_ep.integrations.fsdp import clip_grad_norm_
from moe_ep.integrations.transformers import parallelize, save_pretrained
from moe_ep.integrations.transformers.trainer import ExpertParallelTrainer, check_trainer
from moe_ep.testing import RankContext
from tests.frameworks.transformers.models import make_model, saved_model
from tests.frameworks.transformers.trainer_model import Sequences, make_arguments, set_environment, steps_by_hand
from tests.frameworks.transformers.training import RELATIVE, load

# World 2, two micro-batches of two: eight sequences a step.
NUM_SEQUENCES = 32


class Recorder(transformers.TrainerCallback):
    """Gradient norms that Trainer logs."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: object, state: object, control: object, logs: dict, **kwargs: object) -> None:
        if "grad_norm" in logs:
            self.norms.append(float(logs["grad_norm"]))


class InOrder:
    """Sequences are not shuffled."""

    def _get_train_sampler(self, *arguments: object) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Plain(InOrder, transformers.Trainer):
    """Of transformers, with all experts on every rank."""


class Spread(InOrder, ExpertParallelTrainer):
    """With experts over ranks."""


def train(ctx: RankContext, path: str, folder: str, kind: type[transformers.Trainer]) -> list[float]:
    model, recorder = load(path, torch.float32), Recorder()
    if kind is Spread:
        parallelize(model)
    args = make_arguments(ctx, folder, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer = kind(model=model, args=args, train_dataset=Sequences(NUM_SEQUENCES), callbacks=[recorder])
    trainer.train()
    trainer.save_model(f"{folder}/last")
    return recorder.norms


def test_trainer_clips_by_one_norm_and_saves_whole_models(ranks, tmp_path: Path) -> None:
    path = saved_model("qwen2_moe")
    ours, theirs = (ranks(2, train, path, str(tmp_path / kind.__name__), kind, timeout=120) for kind in (Spread, Plain))
    assert len(ours[0]) == 4
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=4 * RELATIVE)
    # Both the checkpoint of the last step and the model that was asked for.
    for folder in ("checkpoint-4", "last"):
        spread, plain = (
            dict(load(str(tmp_path / kind.__name__ / folder), torch.float32).named_parameters())
            for kind in (Spread, Plain)
        )
        assert spread.keys() == plain.keys()
        for name, parameter in plain.items():
            # Clipped gradients have norm 0.5; four steps of 0.1 carry their errors on.
            torch.testing.assert_close(spread[name], parameter, rtol=0, atol=4 * 0.1 * 0.5 * RELATIVE, msg=name)


def make_arguments_alone(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(folder), learning_rate=0.1, max_grad_norm=0.5, use_cpu=True)


def refuse(ctx: RankContext, folder: str) -> None:
    model = parallelize(make_model("mixtral"))
    with pytest.raises(ValueError, match="rank 0's experts alone: pass save_only_model=True"):
        ExpertParallelTrainer(model=model, args=make_arguments(ctx, folder, save_strategy="steps"))
    with pytest.raises(ValueError, match="model is not parallelized"):
        ExpertParallelTrainer(model=make_model("mixtral"), args=make_arguments(ctx, folder))
    trainer = ExpertParallelTrainer(model=model, args=make_arguments(ctx, folder))
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="bf16=True"):
        check_trainer(trainer)
    trainer.args.fp16, trainer.is_deepspeed_enabled = False, True
    with pytest.raises(ValueError, match="leave fsdp and deepspeed out"):
        check_trainer(trainer)


def test_refusals_name_the_remedy(ranks, tmp_path: Path) -> None:
    ranks(2, refuse, str(tmp_path))


def accelerate_loop(ctx: RankContext, path: str, folder: str) -> list[float]:
    set_environment(ctx)
    model = parallelize(load(path, torch.float32).train())
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(Sequences(NUM_SEQUENCES), batch_size=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    norms = []
    for batch in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(wrapped(**batch, use_cache=False).loss)
            if accelerator.sync_gradients:
                norms.append(clip_grad_norm_(model.parameters(), 0.5, group=ctx.group).item())
            optimizer.step()
            optimizer.zero_grad()
    save_pretrained(wrapped, folder)
    return norms


def test_an_accelerate_loop(ranks, tmp_path: Path) -> None:
    path = saved_model("mixtral")
    norms = ranks(2, accelerate_loop, path, str(tmp_path))
    reference = load(path, torch.float32).train()
    order = [list(range(8 * step, 8 * step + 8)) for step in range(4)]
    expected = steps_by_hand(reference, Sequences(NUM_SEQUENCES), order, make_arguments_alone(tmp_path))
    assert norms[0] == norms[1]
    assert norms[0] == pytest.approx(expected, rel=4 * RELATIVE)
    plain = dict(load(str(tmp_path), torch.float32).named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(plain[name], parameter, rtol=0, atol=4 * 0.1 * 0.5 * RELATIVE, msg=name)
