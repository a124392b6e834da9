"""One MoE layer three ways: stock dispatcher, ours, and unsharded."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.frameworks.megatron.models import layout, make_config, make_layer, make_x, named, part_of

# The longest sum of these models has fewer than 2**9 terms, no result is made of more than 2**4 sums in a row, and no
# term is more than 2**3 times as large as the largest number of a result: 2**9 * 2**4 * 2**3 half-units of the dtype.
BOUNDS = {torch.float64: 2.0**-37, torch.float32: 2.0**-8}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What determines a layer, its tokens and their routing on all ranks.

    Attributes:
        tokens: S of each data-parallel rank, before it is split over tensor-parallel ranks.
        tp, ep, etp: sizes.
        favoured: experts that all tokens choose; None leaves it to the router's weights.
        changes: of the config.
    """

    tokens: tuple[int, ...] = (5, 3)
    tp: int = 1
    ep: int = 2
    etp: int = 1
    favoured: tuple[int, ...] | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, **more: Any) -> Any:
        return make_config(tp=self.tp, ep=self.ep, etp=self.etp, **{**self.changes, **more})

    def unsharded_config(self) -> Any:
        return make_config(**{**self.changes, "moe_shared_expert_overlap": False})

    def x(self, source: int, config: Any) -> Tensor:
        return make_x(source, self.tokens[source], config.hidden_size, dtype=config.params_dtype)


@dataclass(frozen=True)
class Result:
    """Output, input gradient and parameter gradients by global name, of this rank."""

    out: Tensor
    dx: Tensor
    grads: dict[str, Tensor]
    layer: torch.nn.Module

    def tensors(self) -> dict[str, Tensor]:
        return {"out": self.out, "dx": self.dx, **self.grads}


def run_layer(layer: torch.nn.Module, x: Tensor) -> Result:
    """Forward and backward of a loss that weights every element of the output differently."""
    x = x.clone().requires_grad_()
    out, bias = layer(x)
    assert bias is None
    out.backward(loss_weights(out))
    grads = {name: parameter.grad.clone() for name, parameter in named(layer).items()}
    return Result(out.detach(), x.grad, grads, layer)


def loss_weights(out: Tensor) -> Tensor:
    # A fixed pattern without symmetry, so that exchanged rows or channels change every gradient.
    return (
        torch.linspace(-1.0, 2.0, max(1, out.numel()), dtype=torch.float64)[: out.numel()].view(out.shape).to(out.dtype)
    )


def favour(layer: torch.nn.Module, case: Case) -> None:
    """Make all tokens choose the favoured experts."""
    if case.favoured is not None:
        bias = torch.full((layer.config.num_moe_experts,), -30.0)
        bias[list(case.favoured)] = 30.0
        layer.router.weight.data[:, 0] = bias


def run_sharded(case: Case, dispatcher: str, **more: Any) -> Result:
    """On this rank's tokens, of which tensor-parallel ranks have consecutive parts."""
    with layout(tp=case.tp, ep=case.ep, etp=case.etp):
        config = case.config(**more)
        layer = make_layer(dispatcher, config)
        favour(layer, case)
        source, part = divmod(dist.get_rank(), case.tp)
        return run_layer(layer, case.x(source, config).chunk(case.tp)[part])


def run_unsharded(case: Case) -> Result:
    """All ranks' tokens through one layer that has every expert, a rank at a time; this rank's part of the results."""
    with layout():
        config = case.unsharded_config()
        layer = make_layer("native", config)
        favour(layer, case)
        mine, part = divmod(dist.get_rank(), case.tp)
        kept: Result | None = None
        for source in range(len(case.tokens)):
            whole = case.x(source, config).clone().requires_grad_()
            # Each tensor-parallel rank routes its part by itself, and has a loss of its own.
            for index, x in enumerate(whole.chunk(case.tp)):
                x = x.detach().clone().requires_grad_()
                out, _ = layer(x)
                out.backward(loss_weights(out))
                if (source, index) == (mine, part):
                    kept = Result(out.detach(), x.grad, {}, layer)
        assert kept is not None
        kept.grads.update({name: parameter.grad for name, parameter in named(layer).items()})
        return kept


def reduce_replicated(result: Result) -> dict[str, Tensor]:
    """Gradients as the whole batch gives them: summed over the ranks that hold the same parameter. Inside a layout."""
    from megatron.core import parallel_state as state

    reduced = {}
    for name, parameter in named(result.layer).items():
        total = result.grads[name].clone()
        if "local_experts" in name:
            group = state.get_expert_data_parallel_group()
        elif getattr(parameter, "tensor_model_parallel", False):
            group = state.get_data_parallel_group()
        else:
            group = dist.group.WORLD
        dist.all_reduce(total, group=group)
        reduced[name] = total
    return reduced


def assert_same_bits(ours: Result, stock: Result) -> None:
    """Every number of two runs is equal."""
    theirs = stock.tensors()
    for name, value in ours.tensors().items():
        assert torch.equal(value, theirs[name]), f"{name} differs by {(value - theirs[name]).abs().max():.3e}"


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every number of two runs is equal but for the order of sums."""
    for name, value in ours.items():
        expected = theirs[name]
        assert value.shape == expected.shape, f"{name} has shape {tuple(value.shape)}, not {tuple(expected.shape)}"
        if value.numel():
            error = (value - expected).abs().max()
            assert error <= BOUNDS[value.dtype] * max(1.0, float(expected.abs().max())), (
                f"{name} differs by {error:.3e}"
            )


def assert_unsharded(ours: Result, case: Case) -> None:
    """Output, input gradient and all parameter gradients equal those of the unsharded layer."""
    whole = run_unsharded(case)
    with layout(tp=case.tp, ep=case.ep, etp=case.etp):
        # NOTE: collectives first: a comparison that fails ends here on one rank alone.
        reduced = reduce_replicated(ours)
        parts = {name: part_of(name, value, whole.grads[name]) for name, value in named(ours.layer).items()}
    assert_close({"out": ours.out, "dx": ours.dx}, {"out": whole.out, "dx": whole.dx})
    assert_close(reduced, parts)
    assert all(bool(grad.abs().max() > 0) for name, grad in parts.items() if "router" in name)


def layer_losses(case: Case, *, sharded: bool, steps: int = 4, lr: float = 0.02) -> list[float]:
    """Losses of this rank's tokens over steps of plain gradient descent on a layer, sharded or whole on every rank."""
    results = []
    parallel = {"tp": case.tp, "ep": case.ep, "etp": case.etp} if sharded else {}
    with layout(**parallel):
        config = case.config() if sharded else case.unsharded_config()
        layer = make_layer("moe_ep" if sharded else "native", config)
        source, part = divmod(dist.get_rank(), case.tp)
        x = case.x(source, config).chunk(case.tp)[part]
        for _ in range(steps):
            layer.zero_grad()
            # The same output for every token: experts have something to learn.
            loss = (layer(x)[0] - 1.0).square().sum()
            loss.backward()
            grads = {name: parameter.grad for name, parameter in named(layer).items()}
            reduced = reduce_replicated(Result(x, x, grads, layer))
            for name, parameter in named(layer).items():
                parameter.data.sub_(reduced[name], alpha=lr / sum(case.tokens))
            results.append(loss.item())
    return results
