"""Parameters that depend on what they are, not on which rank, device or dtype holds them."""

import hashlib
import math

import torch
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def seeded_uniform(shape: tuple[int, ...], fan_in: int, *key: int | str) -> torch.Tensor:
    """Draws U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of ``torch.nn.Linear``.

    Args:
        shape: shape of the result.
        fan_in: inputs of one output, at least 1.
        *key: what the numbers depend on, and all they depend on: (seed, layer, name or expert).

    Returns:
        fp32 CPU tensor; the same numbers for the same key everywhere.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    bound = 1 / math.sqrt(fan_in)
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor, ep_dim: str | None = None) -> None:
    """Copies ``value`` into ``parameter``, also when that is a DTensor; arguments as of :func:`spread`."""
    parameter.copy_(spread(value, parameter, ep_dim))


def spread(value: torch.Tensor, like: torch.Tensor, ep_dim: str | None = None) -> torch.Tensor:
    """This rank's part of ``value`` as a DTensor when ``like`` is one, of its dtype; else ``value`` itself.

    No rank is asked.

    Args:
        value: the whole tensor; with ``ep_dim`` what this rank holds along that dimension.
        like: what the result resembles.
        ep_dim: dimension of the mesh of ``like`` over which experts are spread; None where it has none.
    """
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    value = value.to(device=mesh.device_type, dtype=like.dtype)
    if ep_dim is None:
        return distribute_tensor(value, mesh, like.placements, src_data_rank=None)
    for name, placement in zip(mesh.mesh_dim_names or (), like.placements, strict=True):
        # What data parallelism shards is a rank's experts, so each dimension divides what the one before has left.
        if name != ep_dim and not placement.is_replicate():
            shard = Shard(placement.dim)  # type: ignore[attr-defined]
            value = distribute_tensor(value, mesh[name], [shard], src_data_rank=None).to_local()
    return DTensor.from_local(value, mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
