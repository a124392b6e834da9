"""Experts as DTensors: every parameter has the shape of all experts and lives in parts on the ranks of one group."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_ep.integrations.fsdp.mesh import EP
from moe_ep.layers import MoELayer


def find_layers(model: nn.Module, ep_mesh: DeviceMesh) -> list[MoELayer]:
    """The MoE layers of ``model``, all of which can be spread over ``ep_mesh``.

    Raises:
        ValueError: none, or one that is sharded already, is of another group, or has experts that cannot be divided.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(f"model is a {type(model).__name__} without a moe_ep.layers.MoELayer: there are no experts")
    for name, layer in layers.items():
        _check(f"layer {name!r}" if name else "model", layer, ep_mesh)
    return list(layers.values())


def _check(name: str, layer: MoELayer, ep_mesh: DeviceMesh) -> None:
    if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
        raise ValueError(f"{name} is sharded already: call this once, and before fully_shard of anything around it")
    size = ep_mesh.size()
    if layer.dispatcher.group_size == 1 < size:
        if layer.num_experts % size:
            raise ValueError(
                f"{name} has {layer.num_experts} experts: {size} ranks of mesh['ep'] cannot share them evenly"
            )
        return
    group = layer.dispatcher.group
    found = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
    wanted = dist.get_process_group_ranks(ep_mesh.get_group())
    if found != wanted:
        raise ValueError(
            f"{name} spreads its experts over ranks {found}, mesh['ep'] over {wanted}: build it with group=mesh['ep'],"
            " or with group=None and all experts on every rank"
        )


def spread(layer: MoELayer, ep_mesh: DeviceMesh) -> None:
    """Makes the expert parameters DTensors over ``ep_mesh``; where a rank holds all experts it keeps its own.

    Gradients are divided by the ranks of ``ep_mesh``: they are sums over those, since tokens came from all of them.
    Averaging over ranks with the same experts, as FSDP and DDP do with any parameter, then gives the mean over all.
    """
    experts, num_ranks = layer.experts, ep_mesh.size()
    if num_ranks == 1:
        return
    if layer.dispatcher.group_size == 1:
        layer.dispatcher.set_group(ep_mesh)
        experts.num_local_experts = layer.dispatcher.num_local_experts
        experts.first_expert = layer.dispatcher.rank * experts.num_local_experts
    for name, parameter in list(experts.named_parameters(recurse=False)):
        own = parameter.detach()
        shape, stride = torch.Size((layer.num_experts, *own.shape[1:])), own.stride()
        if own.shape[0] > experts.num_local_experts:
            # A copy, so that the others' experts are freed.
            own = own[experts.first_expert : experts.first_expert + experts.num_local_experts].clone()
        value = DTensor.from_local(own, ep_mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)
        setattr(experts, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    experts.ep_dim, experts.gradient_scale = EP, 1 / num_ranks
