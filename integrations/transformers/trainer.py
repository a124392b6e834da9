"""``Trainer`` for parallelized models."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from moe_ep.buffer import resolve_group
from moe_ep.integrations.fsdp import clip_grad_norm_
from moe_ep.integrations.transformers.checkpoint import gather_state_dict
from moe_ep.integrations.transformers.experts import LocalExperts, shares

_RELOAD = (
    "a checkpoint holds the experts of all ranks, and loading it into a model that is parallelized already would leave "
    "this rank's as they are: save with save_pretrained(model, folder), load folder with from_pretrained, and "
    "parallelize the new model"
)


class ExpertParallelMixin:
    """Put before any subclass of ``transformers.Trainer``: clips by the whole model's norm and saves whole models.

    Checkpoints are not loaded into the model that trains: ``train(resume_from_checkpoint=...)`` raises ValueError.

    Raises:
        ValueError: a model that is not parallelized, or arguments by which it would be saved in part or loaded again.
    """

    # Without it, spread experts refuse to be trained by a Trainer.
    trains_spread_experts = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_trainer(trainer)
        # Both releases of Trainer that differ in how they clip end up here.
        trainer.accelerator.clip_grad_norm_ = functools.partial(_clip, trainer)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the whole model, or its adapters. Collective; rank 0 writes."""
        trainer: Any = self
        whole = gather_state_dict(trainer.model, everywhere=trainer.args.save_on_each_node)
        if trainer.args.should_save:
            trainer._save(output_dir or trainer.args.output_dir, state_dict=whole)
        dist.barrier()
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        raise ValueError(f"train cannot resume from {resume_from_checkpoint}: {_RELOAD}")

    def _load_best_model(self) -> None:
        raise ValueError(f"the best checkpoint cannot be loaded after training: {_RELOAD}")


class ExpertParallelTrainer(ExpertParallelMixin, Trainer):
    """``transformers.Trainer`` for a model that ``parallelize`` spread over all ranks."""


def check_trainer(trainer: Any) -> None:
    """Raise ValueError, naming the remedy, for what a Trainer cannot do with a parallelized model."""
    if not any(isinstance(share, LocalExperts) for _, _, share in shares(trainer.model)):
        raise ValueError(
            "model is not parallelized: call moe_ep.integrations.transformers.parallelize(model) before, or use "
            "transformers.Trainer for a model that was loaded with a DistributedConfig"
        )
    args = trainer.args
    if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no" and not args.save_only_model:
        raise ValueError(
            "save_only_model=False would checkpoint the optimizer state of rank 0's experts alone: pass "
            'save_only_model=True, or save_strategy="no"'
        )
    if args.load_best_model_at_end:
        raise ValueError(f"load_best_model_at_end=True must be left out, because {_RELOAD}")
    if args.resume_from_checkpoint:
        raise ValueError(f"resume_from_checkpoint={args.resume_from_checkpoint!r} must be left out, because {_RELOAD}")
    if args.fp16:
        raise ValueError(
            "fp16=True skips steps by the gradients of each rank, and experts overflow on one rank: pass bf16=True"
        )
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise ValueError(
            "FSDP and DeepSpeed would shard experts that differ between ranks: leave fsdp and deepspeed out, or use "
            "moe_ep.integrations.deepspeed or a DistributedConfig"
        )


def _clip(trainer: Any, parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Takes the place of the Accelerator's."""
    trainer.accelerator.unscale_gradients()
    _, _, share = next(shares(trainer.model))
    return clip_grad_norm_(parameters, max_norm, norm_type, group=resolve_group(share.exchange.group))
