"""A small model with DeepSpeed's MoE, the engine around it, and the same model on one process."""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import deepspeed
import deepspeed.ops
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from torch import Tensor, nn

from moe_ep.integrations.deepspeed import convert
from moe_ep.testing import RankContext, run_ranks

HIDDEN = 16
INNER = 32
LEARNING_RATE = 0.02
AUX = 0.01

# A pool's first call imports DeepSpeed, which takes long where several jobs share two cores.
on_ranks = functools.partial(run_ranks, timeout=180.0)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What one training run depends on, but for who exchanges the tokens."""

    stage: int = 0
    k: int = 2
    drop: bool = True
    capacity_factor: float = 0.5
    dtype: torch.dtype = torch.float32
    num_experts: int = 4
    ep_size: int = 2
    tokens: tuple[tuple[int, int], ...] = ((4, 6), (4, 6))
    use_rts: bool = True
    use_residual: bool = False
    # Of k = 2 alone, whose second expert DeepSpeed draws at random by default.
    sample_second: bool = True
    min_capacity: int = 2
    steps: int = 4

    def with_(self, **changes: object) -> "Setup":
        return replace(self, **changes)


def join(ctx: RankContext) -> None:
    """Let DeepSpeed take this worker's process group for its world."""
    join_world(ctx.rank, ctx.world_size)


def join_world(rank: int, num_ranks: int) -> None:
    """As :func:`join`, for any process that has a process group."""
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", num_ranks)):
        os.environ[name] = str(value)
    # Serves inference_all_reduce alone. Compiling it would tie these tests to a compiler, and to a lock file that a
    # killed run leaves behind for all later ones to wait at.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo")


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))


class Model(nn.Module):
    """Dense, MoE, dense; returns the loss, a mean over its tokens, and keeps what the MoE returned."""

    def __init__(self, setup: Setup, one_expert: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(HIDDEN, HIDDEN)
        self.moe = MoE(
            HIDDEN,
            one_expert or expert(),
            num_experts=setup.num_experts,
            ep_size=setup.ep_size,
            k=setup.k,
            capacity_factor=setup.capacity_factor,
            min_capacity=setup.min_capacity,
            drop_tokens=setup.drop,
            use_rts=setup.use_rts,
            use_residual=setup.use_residual,
            top2_2nd_expert_sampling=setup.sample_second,
        )
        self.last = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out, l_aux, self.exp_counts = self.moe(self.first(x))
        y = self.last(out).float()
        return y.square().sum() / max(1, y.numel()) + AUX * l_aux


@torch.no_grad()
def draw(one: nn.Module, number: int) -> None:
    """Parameters of an expert that depend on nothing but its global number, in any dtype."""
    generator = torch.Generator().manual_seed(1000 + number)
    for parameter in one.parameters():
        parameter.copy_(torch.empty(parameter.shape).uniform_(-0.5, 0.5, generator=generator))


def spread_experts(model: nn.Module, ep_rank: int) -> None:
    """Give every expert parameters of its own: DeepSpeed starts with copies of one."""
    for module in model.modules():
        if isinstance(module, MoE):
            for local, one in enumerate(module.deepspeed_moe.experts.deepspeed_experts):
                draw(one, ep_rank * module.num_local_experts + local)


def build(ctx: RankContext, setup: Setup, *, ours: bool, one_expert: nn.Module | None = None) -> Model:
    """The model, equal on all ranks but for its experts; not yet an engine."""
    torch.manual_seed(3)
    model = Model(setup, one_expert)
    spread_experts(model, ctx.rank % setup.ep_size)
    return convert(model) if ours else model


def inputs(setup: Setup, rank: int, step: int = 0) -> Tensor:
    """[batch, sequence, HIDDEN] of one rank, which every rank can compute."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(*setup.tokens[rank], HIDDEN, generator=generator)


def engine_of(model: nn.Module, setup: Setup, **config: object) -> deepspeed.DeepSpeedEngine:
    """``deepspeed.initialize`` with plain SGD, so that an error of a gradient stays in proportion."""
    parameters = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.5)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": setup.stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": setup.dtype == torch.bfloat16},
        **config,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run, step by step: losses, choices per expert, and the norm of the loss's gradient by all parameters."""

    losses: list[float]
    counts: list[list[int]]
    gradient_norm: float


def train(ctx: RankContext, engine: deepspeed.DeepSpeedEngine, setup: Setup, first_step: int = 0) -> Trained:
    losses, counts = [], []
    torch.manual_seed(50 + ctx.rank)
    before = [parameter.detach().float().clone() for parameter in engine.module.parameters()]
    for step in range(first_step, first_step + setup.steps):
        loss = engine(inputs(setup, ctx.rank, step).to(setup.dtype))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        counts.append(engine.module.exp_counts.tolist())
    pairs = zip(engine.module.parameters(), before, strict=True)
    moved = sum((new.detach().float() - old).square().sum().item() for new, old in pairs) ** 0.5
    # Momentum 0.5 makes a step at most twice its gradient.
    return Trained(losses=losses, counts=counts, gradient_norm=moved / (LEARNING_RATE * setup.steps))


def unsharded_losses(ctx: RankContext, setup: Setup, num_ranks: int) -> list[list[float]]:
    """Losses of every rank's batch, in fp64 and without any exchange: [step][rank].

    DeepSpeed averages gradients over the ranks, so this is gradient descent on the mean of the ranks' losses.
    """
    model = Unsharded(ctx, setup)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.5)
    losses = []
    for step in range(setup.steps):
        optimizer.zero_grad()
        batch = [model(inputs(setup, rank, step)) for rank in range(num_ranks)]
        (sum(batch) / num_ranks).backward()
        optimizer.step()
        losses.append([loss.item() for loss in batch])
    return losses


class Unsharded(nn.Module):
    """The model with all experts here and a loop over tokens' choices; DeepSpeed's gate, all else in fp64."""

    def __init__(self, ctx: RankContext, setup: Setup) -> None:
        super().__init__()
        model = build(ctx, setup, ours=False)
        self.first, self.last = model.first.double(), model.last.double()
        self.gate = model.moe.deepspeed_moe.gate
        self.min_capacity = setup.min_capacity
        self.experts = nn.ModuleList(expert() for _ in range(setup.num_experts)).double()
        for number, one in enumerate(self.experts):
            draw(one, number)

    def moe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, HIDDEN)
        if not rows.shape[0]:
            return x, x.sum()
        # DeepSpeed refuses fewer tokens than min_capacity where k is 1; a capacity of all tokens drops as little.
        self.gate.min_capacity = min(self.min_capacity, rows.shape[0])
        l_aux, _, _, indices, _, gates, _ = self.gate(rows, None, True)
        out = torch.zeros_like(rows)
        for choice in range(self.gate.k):
            for number, one in enumerate(self.experts):
                chosen = (indices[choice] == number).nonzero().flatten()
                weights = gates[choice, chosen].double().unsqueeze(1)
                out = out.index_add(0, chosen, weights * one(rows[chosen]))
        return out.view_as(x), l_aux

    def forward(self, x: Tensor) -> Tensor:
        out, l_aux = self.moe(self.first(x.double()))
        y = self.last(out)
        return y.square().sum() / max(1, y.numel()) + AUX * l_aux


def relative_bound(setup: Setup, dtypes: Sequence[torch.dtype] = ()) -> float:
    """Relative error of a loss, and of a gradient, for one run against another that adds in another order.

    A value passes three matrix products (at most INNER terms each), the sum over k choices, whose weight and partial
    sums are roundings too, and the mean; a gradient in addition the sum over a rank's rows, at most all choices of all
    ranks. Each term of each sum is one rounding of half an ulp of the accumulation, fp32, and each of the 10 tensors
    between (five layers' outputs, forward and backward) one of the rows' dtype, plus k partial sums on the wire. Twice,
    because both runs round.
    """
    rows = setup.k * sum(batch * length for batch, length in setup.tokens)
    sums = 3 * INNER + setup.k + HIDDEN + rows
    stored = 10 + setup.k
    unit = max(torch.finfo(dtype).eps for dtype in (setup.dtype, *dtypes)) / 2
    return 2 * (sums * torch.finfo(torch.float32).eps / 2 + stored * unit)
