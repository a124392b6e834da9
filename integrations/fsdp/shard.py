"""``apply_ep``: experts spread over one dimension of a mesh, what each rank holds of them sharded over another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moe_ep.integrations.fsdp.experts import find_layers, spread
from moe_ep.integrations.fsdp.mesh import EFSDP, EP, REPLICATE, dense_mesh, with_shards
from moe_ep.layers import MoELayer

_missing: ImportError | None = None
try:
    # fully_shard documents these as what shard_placement_fn returns, and does not export them.
    from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
except ImportError as error:
    # The rest of the package works without.
    _missing = error

Placement = Callable[[nn.Parameter], "Shard | ShardPlacementResult | None"]


def apply_ep(
    model: nn.Module, mesh: DeviceMesh, *, dp_mesh: DeviceMesh | None = None, **fsdp_options: Any
) -> nn.Module:
    """Spreads the experts of every :class:`MoELayer` in ``model`` over ``mesh["ep"]`` and shards the layers with FSDP2.

    Each layer becomes one FSDP unit. Its experts are sharded over ``mesh["efsdp"]``, the ranks that hold the same ones;
    everything else in it over ``dp_mesh``. Afterwards, ``fully_shard`` the blocks and the model around the layers with
    ``mesh=dense_mesh(mesh)``, as ever. Gradients are those of the mean over all ranks' losses, for experts, too.

    Collective over ``mesh``. A layer may have been built with ``group=mesh["ep"]``, or with ``group=None`` and all
    experts on every rank, of which each rank then keeps its own; in either case also on the device ``meta``.

    Args:
        model: contains MoE layers; nothing in it is sharded yet.
        mesh: one dimension that spreads experts; or ``replicate``, ``efsdp`` and ``ep`` in this order, where the first
            two may be absent. Its size is W, the number of data-parallel ranks.
        dp_mesh: over which the rest of a layer is sharded; None takes ``dense_mesh(mesh)``.
        **fsdp_options: of ``fully_shard``: ``mp_policy`` (routers keep their dtype, whatever it says),
            ``offload_policy``, ``reshard_after_forward``.

    Returns:
        ``model``.

    Raises:
        ValueError: a mesh that does not fit, no MoE layer, or one that is sharded already, is of another group, or has
            experts that ``mesh["ep"]`` does not divide.
        ImportError: torch before 2.13, with experts that are to be sharded, copied or cast.
    """
    full = with_shards(mesh)
    layers = find_layers(model, full[EP])
    if dp_mesh is None:
        dp_mesh = dense_mesh(mesh)
    if dp_mesh.size() != mesh.size():
        raise ValueError(
            f"dp_mesh has {dp_mesh.size()} ranks and mesh {mesh.size()}: both must be all data-parallel ranks"
        )
    if _missing is not None:
        _check_held_once(full, fsdp_options)
    info = None if _missing is not None else _mesh_of_experts(full)
    for layer in layers:
        spread(layer, full[EP])
        _shard(layer, info, dp_mesh, fsdp_options)
    return model


def _check_held_once(full: DeviceMesh, options: dict[str, Any]) -> None:
    """Raise ImportError where experts need FSDP and this torch cannot shard one module over two meshes."""
    policy: MixedPrecisionPolicy | None = options.get("mp_policy")
    what = ""
    if full[EP].size() not in (1, full.size()):
        what = "experts that several ranks hold"
    elif policy is not None and policy.param_dtype is not None:
        what = "mixed precision"
    if what:
        raise ImportError(
            f"torch {torch.__version__} cannot shard the parameters of one module over two meshes: {what} takes torch"
            " 2.13, or spread the experts over all ranks, in one precision"
        ) from _missing


def _mesh_of_experts(full: DeviceMesh) -> FSDPMeshInfo:
    if REPLICATE in (full.mesh_dim_names or ()):
        return HSDPMeshInfo(mesh=full[REPLICATE, EFSDP], shard_mesh_dim=1, replicate_mesh_dim=0)
    return FSDPMeshInfo(mesh=full[EFSDP], shard_mesh_dim=0)


def _shard(layer: MoELayer, info: FSDPMeshInfo | None, dp_mesh: DeviceMesh, options: dict[str, Any]) -> None:
    policy: MixedPrecisionPolicy | None = options.get("mp_policy")
    if policy is not None and policy.param_dtype is not None:
        # Rows travel in the dtype that experts compute in.
        layer.dispatcher.to(policy.param_dtype)
        own_dtype = replace(policy, param_dtype=None, output_dtype=None, cast_forward_inputs=False)
        # Kept gathered until backward: FSDP finds no tensors in what a router returns, to gather it again for.
        fully_shard(layer.router, mesh=dp_mesh, **{**options, "mp_policy": own_dtype, "reshard_after_forward": False})
    if info is None:
        # Each expert is on one rank, so FSDP has nothing to gather and nothing to reduce.
        own: set[nn.Parameter] = {
            parameter for parameter in layer.experts.parameters() if isinstance(parameter, DTensor)
        }
        fully_shard(layer, mesh=dp_mesh, ignored_params=own, **options)
        return
    fully_shard(layer, mesh=dp_mesh, shard_placement_fn=_placement(layer, info), **options)


def _placement(layer: MoELayer, info: FSDPMeshInfo) -> Placement:
    experts = {id(parameter) for parameter in layer.experts.parameters() if isinstance(parameter, DTensor)}

    def place(parameter: nn.Parameter) -> ShardPlacementResult | None:
        # Experts that are not spread are parameters like any other.
        if id(parameter) not in experts:
            return None
        return ShardPlacementResult(placement=_sharded_dimension(parameter, info.shard_mesh_size), mesh_info=info)

    return place


def _sharded_dimension(parameter: nn.Parameter, num_shards: int) -> Shard:
    """Whole experts where they can be divided, else rows of each; uneven shards are padded, so they come last."""
    assert isinstance(parameter, DTensor)
    num_local, rows = parameter.to_local().shape[:2]
    return Shard(1) if num_local % num_shards and rows % num_shards == 0 else Shard(0)
