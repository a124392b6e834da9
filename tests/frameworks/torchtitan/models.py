"""torchtitan's own DeepSeek-V3, small, built and parallelized as its Trainer does it."""

import functools
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig, apply_overrides
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_, get_spmd_context, set_spmd_backend
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3.config_registry import deepseek_v3_debugmodel
from torchtitan.trainer import Trainer

from moe_ep.layers.seeding import assign
from moe_ep.testing import RankContext, run_ranks

LEARNING_RATE = 0.05
OVERRIDE = "moe_ep.integrations.torchtitan.dispatcher"
SELECTIVE_AC = "moe_ep.integrations.torchtitan.selective_ac"
on_ranks = functools.partial(run_ranks, timeout=180.0)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What one training run depends on, but for who exchanges the tokens."""

    ep: int = 2
    tp: int = 1
    backend: str = "partial_dtensor"
    ac: Any = None
    dtype: str = "float32"
    batch: int = 2
    length: int = 16
    steps: int = 3
    compile: bool = False
    extra_overrides: tuple = ()

    def with_(self, **changes: object) -> "Setup":
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Losses of some steps of one rank, and whole gradients of the first of these steps, not clipped, by name."""

    losses: list[float]
    gradients: dict[str, Tensor]


def config_of(setup: Setup, *, ours: bool) -> Trainer.Config:
    """The config that ``--override.imports`` and the other options would give."""
    config = deepseek_v3_debugmodel()
    model = config.model_spec.model
    # One dense layer, one with a MoE; no attention that would be compiled first.
    model.layers = model.layers[:2]
    for layer in model.layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    config.training = TrainingConfig(
        local_batch_size=setup.batch,
        seq_len=setup.length,
        disable_cuda_graphs=True,
        mixed_precision_param=setup.dtype,
    )
    config.parallelism = ParallelismConfig(
        expert_parallel_degree=setup.ep, tensor_parallel_degree=setup.tp, spmd_backend=setup.backend
    )
    config.activation_checkpoint = setup.ac
    # With so large an eps a step is nearly proportional to its gradient, and an error of a gradient stays one.
    config.optimizer = default_adamw(lr=LEARNING_RATE, eps=1.0)
    config.compile.enable, config.compile.components, config.compile.backend = setup.compile, ["model"], "aot_eager"
    config.override.imports = [*([OVERRIDE] if ours else []), *setup.extra_overrides]
    return config


def whole_model(setup: Setup) -> nn.Module:
    """The model on one process, with torchtitan's own dispatcher, which then only sorts."""
    model = config_of(setup, ours=False).model_spec.model.build()
    torch.manual_seed(5)
    with torch.no_grad():
        model.init_weights(buffer_device=None)
        _let_routed_experts_matter(model)
    return model.train()


def _let_routed_experts_matter(model: nn.Module) -> None:
    """torchtitan starts with outputs of experts near 0.004 beside rows near 1, and with scores near 0.5 all over.

    With these factors both are of the order of the rows, and scores spread over most of 0 to 1.
    """
    for name, parameter in model.named_parameters():
        if "routed_experts" in name:
            parameter.mul_(5.0)
        elif "router.gate" in name:
            parameter.mul_(10.0)


class Run:
    """A model, its optimizer and its meshes."""

    def __init__(self, ctx: RankContext, setup: Setup, *, ours: bool, config: Trainer.Config | None = None) -> None:
        os.environ["LOCAL_RANK"] = str(ctx.rank)
        set_spmd_backend(setup.backend)
        self.config = config or config_of(setup, ours=ours)
        self.setup = setup
        self.dims = ParallelDims.from_config(self.config.parallelism, ctx.world_size)
        self.dims.build_mesh()
        spec = self.config.model_spec
        spec.model.update_from_config(config=self.config)
        self.replaced = apply_overrides(self.config.override, self.config) if self.config.override.imports else []
        with torch.device("meta"):
            model = spec.model.build()
        model = spec.parallelize_fn(
            model,
            parallel_dims=self.dims,
            training=self.config.training,
            parallelism=self.config.parallelism,
            compile_config=self.config.compile,
            ac_config=self.config.activation_checkpoint,
            dump_folder="",
        )
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # gloo has no scaled sums; torchtitan's factor is 1 anyway.
                module.set_force_sum_reduction_for_comms(True)
        model.to_empty(device="cpu")
        with torch.no_grad():
            model.init_weights(buffer_device=None)
        # DTensor draws the same numbers for every shard on a CPU: halves of a gate, and thus scores, would be equal.
        for name, parameter in whole_model(setup).named_parameters():
            assign(model.get_parameter(name), parameter)
        self.model: nn.Module = model.train()
        self.optimizers = self.config.optimizer.build(model_parts=[self.model])
        spec.post_optimizer_build_fn(self.optimizers, [self.model], self.dims)
        self.context = get_spmd_context(parallel_dims=self.dims)

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """This rank's part of the mean over all ranks' tokens."""
        with self.context():
            logits = self.model(tokens)
            # With tensor parallelism each rank has a part of the vocabulary.
            logits = logits.full_tensor() if isinstance(logits, DTensor) else logits
            total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
        return total / (labels.numel() * self.dims.dp_shard)

    def train(self, rank: int, steps: int, first: int = 0) -> Trained:
        """Steps of the optimizer, gradients clipped to norm 1. Collective."""
        losses: list[float] = []
        gradients: dict[str, Tensor] = {}
        for step in range(first, first + steps):
            self.optimizers.zero_grad()
            loss = self.loss(*batch_of(self.setup, rank // self.setup.tp, step))
            loss.backward()
            gradients = gradients or self.gradients()
            clip_grad_norm_(list(self.model.parameters()), 1.0, ep_enabled=self.dims.ep_enabled)
            self.optimizers.step()
            losses.append(loss.item())
        return Trained(losses=losses, gradients=gradients)

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by name, zeros where there is none. Collective."""
        found = {}
        for name, parameter in self.model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found[name] = grad.full_tensor().detach() if isinstance(grad, DTensor) else grad.detach()
        return found


def batch_of(setup: Setup, rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and labels of one rank, which every rank can compute."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    both = torch.randint(0, 2048, (setup.batch, setup.length + 1), generator=generator)
    return both[:, :-1], both[:, 1:]
