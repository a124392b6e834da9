"""Parallelized models under DDP, and their tensors made whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_ep.integrations.transformers import parallelize
from moe_ep.integrations.transformers.experts import shares
from moe_ep.integrations.transformers.slicing import join
from moe_ep.testing import RankContext
from tests.frameworks.transformers.training import Run, ids_of, load, train


def gather_of(model: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Makes parameters, or their gradients, by name whole. Collective over the groups of ``model``."""
    cuts = {}
    for _, experts, share in shares(model):
        lora = {id(parameter): last for parameter, last in share.lora_parameters()}
        for parameter in share.parameters(experts):
            cuts[id(parameter)] = (share.exchange, experts.num_experts, lora.get(id(parameter), False))
    by_name = {name: cuts[id(p)] for name, p in model.named_parameters() if id(p) in cuts}

    def gather(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        out = {}
        for name, tensor in tensors.items():
            out[name] = tensor.detach().clone()
            if name in by_name:
                exchange, num_local, last = by_name[name]
                out[name] = join(out[name], num_local, exchange.group, last)
        return out

    return gather


def make_groups(ctx: RankContext, num_ranks: int) -> tuple[object, object]:
    """Consecutive ranks share experts, strided ones hold the same; the second is None where there is one copy."""
    world = ctx.world_size
    if num_ranks == world:
        return ctx.group, None
    groups = [ctx.subgroup(range(first, first + num_ranks)) for first in range(0, world, num_ranks)]
    replicas = [ctx.subgroup(range(first, world, num_ranks)) for first in range(num_ranks)]
    return _only(groups), _only(replicas)


def _only(groups: Sequence[object]) -> object:
    (group,) = [group for group in groups if group is not None]
    return group


def spread_model(ctx: RankContext, model: nn.Module, num_ranks: int | None = None) -> DistributedDataParallel:
    """The model with its experts over ``num_ranks`` ranks (None: all), under DDP."""
    group, replicas = make_groups(ctx, num_ranks or ctx.world_size)
    return DistributedDataParallel(parallelize(model, group, replica_group=replicas))


def spread_run(ctx: RankContext, path: str, num_ranks: int | None = None, **options: object) -> Run:
    """Trains a saved model in fp64 with its experts spread."""
    model = load(path)
    ddp = spread_model(ctx, model, num_ranks)
    return train(model, lambda step: ids_of(ctx.rank, step), forward=ddp, gather=gather_of(model), **options)


def router_bias(model: nn.Module) -> list[Tensor]:
    """Biases of the routers of a GPT-OSS model."""
    return [layer.mlp.router.bias for layer in model.model.layers]


def same_everywhere(ctx: RankContext, value: Tensor) -> bool:
    """Whether all ranks hold the same bits."""
    others = [torch.empty_like(value) for _ in range(ctx.world_size)]
    torch.distributed.all_gather(others, value.contiguous())
    return all(torch.equal(value, other) for other in others)
