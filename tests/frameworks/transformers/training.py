"""A few optimizer steps with and without experts spread over ranks, and what is compared of them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from moe_ep.testing import RankContext
from tests.frameworks.transformers.models import loss_of, make_ids, whole

STEPS = 3
# Uneven, so that ranks have different numbers of tokens.
LENGTHS = (6, 4, 5, 3)
# fp64 sums of at most a few hundred terms of magnitude one differ by 1e-14 when they are reordered; Adam's division by
# root mean squares and its epsilon of 1e-8 make at most 1e-10 of that in three steps of 1e-2.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}
# fp32: from the loss to any gradient lead about 20 products, each a sum of at most 64 terms (hidden size, vocabulary,
# tokens) that may be off by 64 units of 2^-24.
RELATIVE = 20 * 64 * 2.0**-24
LEARNING_RATE = 0.1


class Run(NamedTuple):
    """What one rank saw: losses by step, whole gradients of the first step, whole parameters after the last."""

    losses: list[float]
    grads: dict[str, Tensor]
    parameters: dict[str, Tensor]


def ids_of(rank: int, step: int) -> Tensor:
    """The batch of one data-parallel rank."""
    return make_ids(rank, step, length=LENGTHS[rank])


def make_optimizer(model: nn.Module, *, sgd: bool = False) -> torch.optim.Optimizer:
    """AdamW; SGD where rounding errors are followed from step to step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(parameters, lr=LEARNING_RATE) if sgd else torch.optim.AdamW(parameters, lr=1e-2)


def train(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    steps: int = STEPS,
    *,
    forward: nn.Module | None = None,
    gather: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    sgd: bool = False,
) -> Run:
    """Train ``model`` and keep what is compared.

    Args:
        model: whose parameters are trained.
        batch: token ids of this rank by step.
        steps: how many.
        forward: what is called instead of ``model``, such as DDP around it.
        gather: makes tensors by parameter name whole; None for DTensors and plain tensors.
        sgd: see :func:`make_optimizer`.
    """
    gather = gather or (lambda tensors: {name: whole(t) for name, t in tensors.items()})
    optimizer, losses, grads = make_optimizer(model, sgd=sgd), [], {}
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(forward or model, batch(step))
        loss.backward()
        losses.append(loss.item())
        if step == 0:
            grads = gather({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()
    return Run(losses, grads, gather(dict(model.named_parameters())))


def unsharded(
    model: nn.Module,
    num_ranks: int,
    steps: int = STEPS,
    *,
    sgd: bool = False,
    batch: Callable[[int, int], Tensor] = ids_of,
) -> list[Run]:
    """The same steps in one process: the mean over ranks of each rank's loss is minimised."""
    optimizer, losses, grads = make_optimizer(model, sgd=sgd), [[] for _ in range(num_ranks)], {}
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(num_ranks):
            loss = loss_of(model, batch(rank, step))
            (loss / num_ranks).backward()
            losses[rank].append(loss.item())
        if step == 0:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    parameters = {n: p.detach().clone() for n, p in model.named_parameters()}
    return [Run(own, grads, parameters) for own in losses]


def load(path: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A saved model; fp64, which grouped GEMMs do not know, takes the loop over experts."""
    options.setdefault("experts_implementation", "eager" if dtype == torch.float64 else "grouped_mm")
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)


@functools.cache
def reference(path: str, num_ranks: int, dtype: torch.dtype = torch.float64) -> list[Run]:
    """:func:`unsharded` of a saved model, computed once for the session; fp32 takes SGD."""
    return unsharded(load(path, dtype), num_ranks, sgd=dtype == torch.float32)


def assert_same(ours: Run, theirs: Run, **tolerance: float) -> None:
    """Losses, gradients and parameters; bit for bit without a tolerance."""
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    # transformers computes losses in fp32 whatever the model's dtype is.
    close = {"rtol": 4 * 2.0**-23, "atol": 0.0} if tolerance["rtol"] else tolerance
    _assert_close("losses", torch.tensor(ours.losses), torch.tensor(theirs.losses), close)
    for what in ("grads", "parameters"):
        left, right = getattr(ours, what), getattr(theirs, what)
        assert left.keys() == right.keys(), f"{what}: {sorted(left.keys() ^ right.keys())}"
        for name in left:
            _assert_close(f"{what} of {name}", left[name], right[name], tolerance)


def assert_within_rounding(ours: Run, theirs: Run) -> None:
    """Gradients and losses of fp32 runs under SGD, up to what reordered sums may change."""
    largest = max(grad.abs().max().item() for grad in theirs.grads.values())
    assert ours.grads.keys() == theirs.grads.keys()
    for name, grad in theirs.grads.items():
        _assert_close(f"grads of {name}", ours.grads[name], grad, {"rtol": 0.0, "atol": RELATIVE * largest})
    # A step moves every parameter by its gradient's error, and the loss by that times its gradient.
    slope = sum(grad.abs().sum().item() for grad in theirs.grads.values())
    for step, (left, right) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        atol = RELATIVE * (right + step * LEARNING_RATE * largest * slope)
        _assert_close("losses", torch.tensor(left), torch.tensor(right), {"rtol": 0.0, "atol": atol})


def _assert_close(what: str, left: Tensor, right: Tensor, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(left, right, **tolerance, msg=lambda text: f"{what} differ: {text}")


def check_gradients_reach(run: Run) -> None:
    """Routers, experts, shared experts and what is before them all learn."""
    for name, grad in run.grads.items():
        assert grad.abs().max() > 1e-6, f"{name} has no gradient"


def load_sharded(ctx: RankContext, path: str, implementation: str, sizes: dict[str, int]) -> nn.Module:
    """A model that transformers shards as it loads it, in fp32: FSDP2 divides fp64 gradients of one rank otherwise."""
    from transformers.distributed import DistributedConfig

    import moe_ep.integrations.transformers  # noqa: F401

    os.environ["LOCAL_RANK"] = str(ctx.rank)
    return load(path, torch.float32, distributed_config=DistributedConfig(ep_implementation=implementation, **sizes))


@contextlib.contextmanager
def stable_sorts() -> Iterator[None]:
    """transformers sorts rows by expert without asking for a stable order; dispatch promises one."""
    sort, argsort = torch.sort, torch.argsort
    torch.sort = functools.partial(sort, stable=True)  # type: ignore[assignment]
    torch.argsort = functools.partial(argsort, stable=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.sort, torch.argsort = sort, argsort
