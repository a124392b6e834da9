"""``ExpertParallelTrainer`` and plain accelerate loops."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from torch import nn

from moe_ep.integrations.fsdp import clip_grad_norm_
from moe_ep.integrations.transformers import dispatchers, expert_parameters, parallelize, save_pretrained
from moe_ep.integrations.transformers.trainer import ExpertParallelMixin, ExpertParallelTrainer, check_trainer
from moe_ep.integrations.transformers.versions import has_ep_registry
from moe_ep.testing import RankContext
from tests.frameworks.transformers.faults import planted
from tests.frameworks.transformers.models import make_model, saved_model
from tests.frameworks.transformers.spread import same_everywhere
from tests.frameworks.transformers.trainer_model import Sequences, make_arguments, set_environment, steps_by_hand
from tests.frameworks.transformers.training import RELATIVE, load, load_sharded

# World 2, two micro-batches of two: eight sequences a step.
NUM_SEQUENCES = 32
# Under autocast both runs round the same products to bf16. Where reordered sums of fp32 differ by 64 units of 2^-24,
# one element in 2^10 is rounded to the other side, by a unit of 2^-8: a root mean square of 2^-13, after each of 20
# products.
RELATIVE_BF16 = 20 * 2.0**-13


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


class Sharded(Plain):
    """Of transformers too, for a model that was sharded as it was loaded."""


SHARDED = [Sharded] if has_ep_registry() else []


def model_for(ctx: RankContext, path: str, kind: type[transformers.Trainer]) -> nn.Module:
    if kind is Sharded:
        return load_sharded(ctx, path, "moe_ep", {"fsdp_size": 2, "ep_size": 2})
    model = load(path, torch.float32)
    return parallelize(model) if kind is Spread else model


def train(ctx: RankContext, path: str, folder: str, kind: type[transformers.Trainer]) -> list[float]:
    model, recorder = model_for(ctx, path, kind), Recorder()
    args = make_arguments(ctx, folder, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer = kind(model=model, args=args, train_dataset=Sequences(NUM_SEQUENCES), callbacks=[recorder])
    trainer.train()
    trainer.save_model(f"{folder}/last")
    if kind is Spread:
        with pytest.raises(ValueError, match="cannot resume from .*checkpoint-4.*parallelize the new model"):
            trainer.train(resume_from_checkpoint=True)
    return recorder.norms


@pytest.mark.parametrize("kind", [Spread, *SHARDED])
def test_trainer_clips_by_one_norm_and_saves_whole_models(
    ranks, tmp_path: Path, kind: type[transformers.Trainer]
) -> None:
    path = saved_model("qwen2_moe")
    ours, theirs = (ranks(2, train, path, str(tmp_path / one.__name__), one, timeout=120) for one in (kind, Plain))
    assert len(ours[0]) == 4
    for own, other in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, rel=4 * RELATIVE)
    # Both the checkpoint of the last step and the model that was asked for.
    for folder in ("checkpoint-4", "last"):
        spread, plain = (
            dict(load(str(tmp_path / one.__name__ / folder), torch.float32).named_parameters()) for one in (kind, Plain)
        )
        assert spread.keys() == plain.keys()
        for name, parameter in plain.items():
            # Clipped gradients have norm 0.5; four steps of 0.1 carry their errors on.
            torch.testing.assert_close(spread[name], parameter, rtol=0, atol=4 * 0.1 * 0.5 * RELATIVE, msg=name)


def train_in_bf16(
    ctx: RankContext,
    path: str,
    folder: str,
    kind: type[transformers.Trainer],
    reentrant: bool | None = None,
    fault: str | None = None,
) -> tuple[list[float], set[int]]:
    """Gradient norms of two steps, and how often each layer exchanged; ``reentrant`` None keeps activations."""
    model, recorder, fields = model_for(ctx, path, kind), Recorder(), {}
    if reentrant is not None:
        fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    args = make_arguments(ctx, folder, max_steps=2, bf16=True, **fields)
    trainer = kind(model=model, args=args, train_dataset=Sequences(NUM_SEQUENCES), callbacks=[recorder])
    with planted(fault):
        trainer.train()
    return recorder.norms, {one.stats()["exchanges"] for layer in dispatchers(model).values() for one in layer}


def test_trainer_in_bf16_with_and_without_recomputation(ranks, tmp_path: Path) -> None:
    path, folder = saved_model("mixtral"), str(tmp_path)
    (norms, _), _ = ranks(2, train_in_bf16, path, folder, Plain)
    kept = ranks(2, train_in_bf16, path, folder, Spread)
    # Two micro-batches in each of two steps: dispatch, combine, and both backward.
    assert kept[0] == kept[1] == (pytest.approx(norms, rel=2 * RELATIVE_BF16), {4 * 4})
    for reentrant in (False, True):
        # Recomputation dispatches and combines once more, and changes no bit.
        recomputed = ranks(2, train_in_bf16, path, folder, Spread, reentrant)
        assert recomputed == [(own, {4 * 6}) for own, _ in kept]
    # Of the faults, the one that changes norms least.
    (faulty, _), _ = ranks(2, train_in_bf16, path, folder, Spread, None, "weights without gradient")
    assert faulty[0] != pytest.approx(norms[0], rel=2 * RELATIVE_BF16)


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


def refuse_to_load(ctx: RankContext, folder: str) -> None:
    model, dataset = parallelize(make_model("mixtral")), Sequences(2)
    best = {"save_strategy": "steps", "save_only_model": True, "eval_strategy": "steps", "load_best_model_at_end": True}
    for fields in (best, {"resume_from_checkpoint": "checkpoint-2"}):
        with pytest.raises(ValueError, match=f"{list(fields)[-1]}=.* must be left out.*with from_pretrained, and"):
            ExpertParallelTrainer(
                model=model, args=make_arguments(ctx, folder, **fields), train_dataset=dataset, eval_dataset=dataset
            )
    # Arguments may be changed afterwards.
    trainer = ExpertParallelTrainer(
        model=model,
        args=make_arguments(ctx, folder, **{**best, "load_best_model_at_end": False}, max_steps=1, eval_steps=1),
        train_dataset=dataset,
        eval_dataset=dataset,
    )
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "loss"
    with pytest.raises(ValueError, match="best checkpoint cannot be loaded.*parallelize the new model"):
        trainer.train()


def test_checkpoints_are_not_loaded_into_a_parallelized_model(ranks, tmp_path: Path) -> None:
    ranks(2, refuse_to_load, str(tmp_path))


class Mixed(ExpertParallelMixin, Plain):
    """A subclass of one's own, with what parallelized models need before it."""


def refuse_other_trainers(ctx: RankContext, folder: str) -> None:
    args, dataset = make_arguments(ctx, folder, max_steps=1), Sequences(NUM_SEQUENCES)
    for kind in (transformers.Trainer, Plain):
        trainer = kind(model=parallelize(make_model("mixtral")), args=args, train_dataset=dataset)
        with pytest.raises(ValueError, match=f"^{kind.__name__} clips by .*ExpertParallelTrainer, or"):
            trainer.train()
    model = parallelize(make_model("mixtral"))
    Mixed(model=model, args=args, train_dataset=dataset).train()
    experts = {name for name, _ in expert_parameters(model)}
    for name, parameter in model.named_parameters():
        assert name in experts or same_everywhere(ctx, parameter.detach()), name


def test_a_trainer_that_does_not_know_of_ranks_is_refused(ranks, tmp_path: Path) -> None:
    ranks(2, refuse_other_trainers, str(tmp_path))


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
