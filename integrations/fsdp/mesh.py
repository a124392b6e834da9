"""Meshes of data-parallel ranks, some of which share experts."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

EP, EFSDP, REPLICATE = "ep", "efsdp", "replicate"
_HINT = 'init_device_mesh(device, (W // R, R), mesh_dim_names=("efsdp", "ep"))'


def dense_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh over which ``fully_shard`` spreads everything but experts: all ranks of ``mesh``. Collective.

    Args:
        mesh: as for :func:`apply_ep`.

    Returns:
        One dimension; two, ``replicate`` and the ranks that shard, where ``mesh`` has a dimension ``replicate``.

    Raises:
        ValueError: as :func:`apply_ep`.
    """
    check_mesh(mesh)
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1:
        return mesh
    if REPLICATE not in names:
        return flattened(mesh)
    if EFSDP not in names:
        return mesh
    groups = [mesh.get_group(REPLICATE), flattened(mesh[EFSDP, EP]).get_group()]
    return DeviceMesh.from_group(groups, mesh.device_type, mesh.mesh.flatten(1), mesh_dim_names=(REPLICATE, "dp"))


def flattened(mesh: DeviceMesh) -> DeviceMesh:
    """All ranks of ``mesh`` in one dimension; the same mesh, and group, for later calls. Collective."""
    return mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names or ()))


def with_shards(mesh: DeviceMesh) -> DeviceMesh:
    """``mesh`` with a dimension ``efsdp``: of one rank where it has none. Collective.

    Raises:
        ValueError: as :func:`apply_ep`.
    """
    check_mesh(mesh)
    names = (mesh.mesh_dim_names or (EP,)) if mesh.ndim > 1 else (EP,)
    if EFSDP in names:
        return mesh
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    groups = mesh.get_all_groups()
    groups.insert(-1, alone)
    return DeviceMesh.from_group(
        groups, mesh.device_type, mesh.mesh.unsqueeze(-2), mesh_dim_names=(*names[:-1], EFSDP, EP)
    )


def check_mesh(mesh: DeviceMesh) -> None:
    """Raise ValueError unless dimensions are as :func:`apply_ep` says."""
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"mesh is {type(mesh).__name__}: it must be a DeviceMesh, such as {_HINT}")
    names = mesh.mesh_dim_names or ()
    if mesh.ndim == 1 and not {EFSDP, REPLICATE}.intersection(names):
        return
    if EP not in names or names != tuple(name for name in (REPLICATE, EFSDP, EP) if name in names):
        raise ValueError(
            f"mesh has dimensions {list(names)}: they must be 'ep', which spreads experts, and before it 'replicate',"
            f' \'efsdp\' or both; make {_HINT}, or take the data-parallel part of a larger mesh, mesh["efsdp", "ep"]'
        )
