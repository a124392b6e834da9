"""What Trainer runs on: a few sequences and a tiny model."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset

from moe_ep.testing import RankContext
from tests.frameworks.transformers.models import make_ids


class Sequences(Dataset):
    """Token ids of equal length, which are their own labels but for the first."""

    def __init__(self, number: int) -> None:
        self.ids = make_ids(0, 77, batch=number)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Nothing predicts the first token: no loss looks at its label, but older releases of Trainer count it.
        labels = self.ids[index].clone()
        labels[0] = -100
        return {"input_ids": self.ids[index], "labels": labels}


def set_environment(ctx: RankContext) -> None:
    """What torchrun sets. The process group exists: nothing connects to the address."""
    rank, size = str(ctx.rank), str(ctx.world_size)
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def make_arguments(ctx: RankContext, folder: str, **fields: Any) -> transformers.TrainingArguments:
    """Of this rank, on the CPU: four steps of SGD with clipping, two micro-batches each."""
    set_environment(ctx)
    settings = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.1,
        "max_grad_norm": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return transformers.TrainingArguments(**{**settings, **fields})


def steps_by_hand(model: nn.Module, dataset: Sequences, order: list[list[int]], args: Any) -> list[float]:
    """The same steps without Trainer: sequences of each step, one mean, clipped. Returns norms before clipping."""
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=args.learning_rate), []
    for indices in order:
        optimizer.zero_grad()
        ids = dataset.ids[indices]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm).item())
        optimizer.step()
    return norms
