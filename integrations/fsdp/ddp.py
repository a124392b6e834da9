"""DistributedDataParallel around models with MoE layers."""

import math
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_ep.integrations.fsdp.experts import find_layers, spread
from moe_ep.integrations.fsdp.mesh import EFSDP, EP, flattened, with_shards
from moe_ep.layers import ignore_experts_in_ddp


def wrap_ddp(model: nn.Module, mesh: DeviceMesh, **ddp_options: Any) -> DistributedDataParallel:
    """Wraps ``model`` in DistributedDataParallel, its experts spread over ``mesh["ep"]``.

    Experts become DTensors, left alone by DDP. Where ``mesh`` has more dimensions, ranks along them hold copies of the
    same experts: their gradients are summed as they appear in backward. Gradients are those of the mean over all
    ranks' losses, also when several backward passes add up. Collective over ``mesh``.

    Args:
        model: as for :func:`apply_ep`.
        mesh: one dimension that spreads experts, or ``("replicate", "ep")``.
        **ddp_options: of DistributedDataParallel, without ``process_group``.

    Returns:
        The wrapped model. Optimizers take :func:`parameter_groups` of it.

    Raises:
        ValueError: as :func:`apply_ep`; or a mesh that shards experts, or ``process_group`` among the options.
    """
    if "process_group" in ddp_options:
        raise ValueError("process_group is given: leave it out, it follows from mesh")
    full = with_shards(mesh)
    if full[EFSDP].size() > 1:
        raise ValueError("mesh has a dimension 'efsdp': DDP shards nothing; call it 'replicate', or use apply_ep")
    group = flattened(mesh).get_group()
    copies = [mesh.get_group(dim) for dim in range(mesh.ndim - 1)]
    for layer in find_layers(model, full[EP]):
        spread(layer, full[EP])
        for parameter in layer.experts.parameters():
            for replicas in copies:
                # As DDP does with what it manages: the first rank's values hold.
                dist.broadcast(_local(parameter.detach()), group=replicas, group_src=0)
            # What every rank holds counts once in a norm.
            parameter.allreduce = full[EP].size() == 1  # type: ignore[attr-defined]
            if copies and parameter.requires_grad:
                parameter.register_hook(_average_over(copies))
    ignore_experts_in_ddp(model)
    return DistributedDataParallel(model, process_group=group, **ddp_options)


def _average_over(copies: list[dist.ProcessGroup]) -> Callable[[Tensor], Tensor]:
    """A hook that averages a gradient over the ranks with the same experts."""
    num_copies = math.prod(group.size() for group in copies)

    def hook(gradient: Tensor) -> Tensor:
        average = gradient / num_copies
        for group in copies:
            dist.all_reduce(_local(average), group=group)
        return average

    return hook


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
