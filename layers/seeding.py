"""Parameters that depend on what they are, not on which rank, device or dtype holds them."""

import hashlib
import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


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
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Copies ``value`` (the whole tensor) into ``parameter``, also when that is a DTensor; no rank is asked."""
    parameter.copy_(spread(value, parameter))


def spread(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of ``value`` as a DTensor when ``like`` is one, of its dtype; else ``value`` itself."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    value = value.to(device=mesh.device_type, dtype=like.dtype)
    return distribute_tensor(value, mesh, like.placements, src_data_rank=None)
