"""Between this rank's slice of a run and the unsharded view that checkpoints hold."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from moe_ep.cli.demo.checkpoint import Checkpoint
from moe_ep.cli.demo.model import LanguageModel
from moe_ep.cli.demo.options import UsageError
from moe_ep.layers import expert_parameters, gather_full_state_dict, load_full_state_dict, reshard

_MOMENTS = ("exp_avg", "exp_avg_sq")


def gather_model(model: LanguageModel, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Copies of the unsharded model's tensors on the CPU, by name. Collective over ``group``."""
    full = gather_full_state_dict(model, group)
    return {name: tensor.to("cpu", copy=True) for name, tensor in full.items()}


def load_model(model: LanguageModel, full: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Copy this rank's part of an unsharded model into ``model``.

    Raises:
        UsageError: when names or shapes are not those of ``model``.
    """
    try:
        load_full_state_dict(model, full, group)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"the checkpoint's tensors do not fit its own options, take another one: {error}") from error


def gather_optimizer(
    model: LanguageModel, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup | None
) -> dict[str, torch.Tensor]:
    """AdamW's two moments of every parameter, unsharded, on the CPU: "exp_avg.NAME", "exp_avg_sq.NAME". Collective."""
    sharded = {name for name, _ in expert_parameters(model)}
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        for moment in _MOMENTS:
            value = state.get(moment, torch.zeros_like(parameter)).detach()
            whole = _gather(value, group) if name in sharded else value
            tensors[f"{moment}.{name}"] = whole.to("cpu", copy=True)
    return tensors


def load_optimizer(
    model: LanguageModel, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, group: dist.ProcessGroup | None
) -> None:
    """Give ``optimizer`` this rank's part of the checkpoint's moments."""
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    own = reshard([checkpoint.section("optimizer")], num_ranks)[rank]
    for name, parameter in model.named_parameters():
        moments = {moment: own[f"{moment}.{name}"].to(parameter, copy=True) for moment in _MOMENTS}
        # The fused AdamW counts its steps on the device of the parameter, for the bias correction.
        step = torch.tensor(float(checkpoint.step), device=parameter.device)
        optimizer.state[parameter] = {"step": step, **moments}


def _gather(value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Every rank's experts, concatenated along dimension 0."""
    if group is None:
        return value
    whole = value.new_empty(value.shape[0] * dist.get_world_size(group), *value.shape[1:])
    dist.all_gather(list(whole.chunk(dist.get_world_size(group))), value.contiguous(), group=group)
    return whole
