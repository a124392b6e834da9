"""Parameter groups for optimizers that update many tensors in one call."""

from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of ``model`` for an optimizer, plain tensors and DTensors in groups of their own.

    PyTorch's optimizers update the tensors of a group in one call where they are on GPUs, and with ``foreach=True`` or
    ``fused=True`` anywhere; such a call takes no plain tensors beside DTensors. Under :func:`wrap_ddp` experts alone
    are DTensors, under :func:`apply_ep` and ``fully_shard`` all parameters.

    Args:
        model: after these.

    Returns:
        ``{"params": [...]}`` for each kind that there is, plain tensors first; options of the group can be added.
    """
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        kinds[isinstance(parameter, DTensor)].append(parameter)
    return [{"params": parameters} for parameters in kinds if parameters]
