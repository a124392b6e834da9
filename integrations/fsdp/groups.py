"""Parameter groups for optimizers that update many tensors in one call."""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of ``model`` for an optimizer, those of each mesh in a group of their own.

    PyTorch's optimizers update the tensors of a group in one call where they are on GPUs (``foreach``), and such a call
    takes neither plain tensors and DTensors together nor DTensors of different meshes. Experts under
    :func:`apply_ep` and :func:`wrap_ddp` have another mesh than everything else, or alone have one.

    Args:
        model: after :func:`wrap_ddp`, or after :func:`apply_ep` and ``fully_shard``.

    Returns:
        ``{"params": [...]}`` for every mesh, and for plain tensors, in the order of their first parameters; options of
        the group can be added.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]
