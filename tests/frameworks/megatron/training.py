"""Several optimizer steps of a tiny GPT with Megatron's own data parallelism and optimizer."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.frameworks.megatron.models import make_gpt, named

VOCAB, LENGTH = 32, 12


def wrap(model: torch.nn.Module, *, lr: float = 2e-2) -> tuple[torch.nn.Module, Any]:
    """Megatron's DDP and Adam around a model."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = model.config
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(overlap_grad_reduce=False), model)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        bf16=config.bf16,
        params_dtype=config.params_dtype,
        clip_grad=0.0,
        weight_decay=0.0,
        use_distributed_optimizer=False,
    )
    return ddp, get_megatron_optimizer(settings, [ddp])


def batch(rank: int, step: int, *, sequences: int = 2, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, labels and positions [sequences, length] of a data-parallel rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(VOCAB, (sequences, length + 1), generator=generator)
    positions = torch.arange(length).expand(sequences, length)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions


def causal_mask(length: int = LENGTH) -> Tensor:
    """True where attention may not look."""
    return torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]


def train(dispatcher: str, config: Any, *, steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this rank's batches, and the parameters at the end by global name.

    Args:
        dispatcher: "native" or "moe_ep".
        config: ``TransformerConfig``.
        steps: optimizer steps.
    """
    model = make_gpt(dispatcher, config, vocab_size=VOCAB, length=LENGTH)
    ddp, optimizer = wrap(model)
    losses = []
    for step in range(steps):
        ids, labels, positions = batch(dist.get_rank(), step)
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        loss = ddp(ids, positions, causal_mask(), labels=labels).mean()
        loss.backward()
        ddp.finish_grad_sync()
        updated, _, _ = optimizer.step()
        assert updated
        losses.append(loss.item())
    return losses, {name: parameter.detach().clone() for name, parameter in named(model).items()}
