"""Gradient clipping where parameters are sharded over different meshes."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_


class _Part(NamedTuple):
    """Gradients that are split among the same ranks: this rank's part, and the groups over which to add up."""

    groups: tuple[dist.ProcessGroup, ...]
    device: torch.device
    gradients: list[Tensor]


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    *,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` for parameters that lie on different meshes, or on none.

    The norm is that of the unsharded model: every DTensor counts once, whatever the ranks that it is spread over, and
    so does a plain tensor, of which each rank has a copy. Collective over all meshes; ranks must pass the same
    parameters in the same order. Waits for the device only with ``error_if_nonfinite``.

    Args:
        parameters: one, or several, of any shape; those without a gradient count as zero.
        max_norm: largest norm that is left as it is.
        norm_type: order of the norm, positive; ``inf`` for the largest magnitude.
        error_if_nonfinite: raise when the norm is NaN or infinite.
        group: the expert-parallel group, for plain tensors that hold a rank's own experts (``allreduce = False``).

    Returns:
        The norm before clipping, 0-dim, fp32 or wider, the same on all ranks.

    Raises:
        ValueError: ``norm_type`` is not positive; a gradient is a sum yet to be made (``Partial``); or experts are
            plain tensors and ``group`` is None.
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> float(clip_grad_norm_([weight], 1.0)), round(float(weight.grad.norm()), 4)
        (5.0, 1.0)
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type is {norm_type}: it must be positive; 2.0 is usual, math.inf the largest magnitude")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    parts = _split(parameters, group)
    largest = math.isinf(norm_type)
    # Norms to the power of norm_type add up; largest magnitudes are compared.
    powers = [_power_of_norm(part, norm_type) for part in parts]
    if not powers:
        return torch.zeros(())
    home = powers[0].device
    stacked = torch.stack([power.to(home) for power in powers])
    norm = stacked.max() if largest else stacked.sum().pow(1 / norm_type)
    if error_if_nonfinite and not bool(norm.isfinite()):
        raise RuntimeError(
            f"the norm of order {norm_type} of the gradients is {float(norm)}: nothing was clipped; leave this step"
            " out, or pass error_if_nonfinite=False"
        )
    scale = (max_norm / (norm + _EPSILON)).clamp(max=1.0)
    for part in parts:
        for gradients in _alike(part.gradients):
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return norm


def _split(parameters: list[Tensor], group: dist.ProcessGroup | None) -> list[_Part]:
    parts: dict[tuple, _Part] = {}
    for index, parameter in enumerate(parameters):
        if not parameter.requires_grad and parameter.grad is None:
            continue
        groups, device = _spread_over(parameter, group, index)
        # A part exists wherever its parameters do: a rank without a gradient still takes part in adding up.
        part = parts.setdefault((groups, device), _Part(groups, device, []))
        gradient = parameter.grad
        if gradient is not None:
            part.gradients.append(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
    return list(parts.values())


def _spread_over(
    parameter: Tensor, group: dist.ProcessGroup | None, index: int
) -> tuple[tuple[dist.ProcessGroup, ...], torch.device]:
    """Groups among which the elements of a parameter's gradient are divided, and where to add up."""
    if not isinstance(parameter, DTensor):
        if getattr(parameter, "allreduce", True) or not dist.is_initialized():
            return (), parameter.device
        if group is None:
            raise ValueError(
                f"parameters[{index}] of shape {list(parameter.shape)} holds experts of this rank alone, of which the"
                " others have no copy: pass group, the expert-parallel group"
            )
        return (group,), parameter.device
    gradient = parameter.grad
    placements = gradient.placements if isinstance(gradient, DTensor) else parameter.placements
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"the gradient of parameters[{index}] is {placements}: it is not summed over ranks yet; let FSDP reduce it,"
            " or redistribute it, before clipping"
        )
    mesh = parameter.device_mesh
    groups = tuple(mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate())
    local = parameter.to_local().device
    # Offloaded shards lie on the CPU, where the mesh's groups may not communicate.
    return groups, local if local.type == mesh.device_type else torch.device(mesh.device_type)


def _power_of_norm(part: _Part, norm_type: float) -> Tensor:
    """Sum over all ranks of ``|g| ** norm_type``; for ``inf`` the largest magnitude."""
    largest = math.isinf(norm_type)
    powers = []
    for gradients in _alike([gradient for gradient in part.gradients if gradient.numel()]):
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        norms = torch.stack([n.to(wide) for n in torch._foreach_norm(gradients, norm_type, dtype=wide)])
        powers.append((norms.max() if largest else norms.pow(norm_type).sum()).to(part.device))
    wide = max((power.dtype for power in powers), key=lambda dtype: dtype.itemsize, default=torch.float32)
    stacked = torch.stack([power.to(wide) for power in powers]) if powers else torch.zeros(1, device=part.device)
    total = stacked.max() if largest else stacked.sum()
    for group in part.groups:
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return total


def _alike(gradients: list[Tensor]) -> list[list[Tensor]]:
    """The same tensors in lists of one device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        found.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return list(found.values())
