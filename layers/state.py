"""State dicts of one rank and of the whole model, and what data-parallel wrappers must know about experts.

Both views of a state dict have the same names. They differ in the expert dimension, the first, of the stacked expert
weights: e in a rank's view, E in the full one. Any module that contains MoE layers of one group will do.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_ep.layers.experts import GroupedExperts
from moe_ep.layers.seeding import spread

StateDict = dict[str, torch.Tensor]
_EXPERT_NAMES = ("experts.w_gate_up", "experts.w_down")
# Counters of this rank; broadcasting rank 0's over them, as DDP does with buffers, would falsify them.
_RANK_BUFFERS = ("tokens_per_expert", "bias_counts")


def is_expert_name(name: str) -> bool:
    """Whether the entry ``name`` of a state dict is stacked over experts."""
    return any(name == ending or name.endswith("." + ending) for ending in _EXPERT_NAMES)


def reshard(views: Sequence[Mapping[str, torch.Tensor]], num_ranks: int) -> list[StateDict]:
    """Turns the state dicts of some number of ranks into those of another number; no process group is involved.

    Args:
        views: one state dict per rank, in rank order; ``[full]`` for a full one.
        num_ranks: how many state dicts to make; 1 makes the full one.

    Returns:
        The new state dicts in rank order. Expert weights are concatenated and sliced along their first dimension
        (slices are views of the concatenation); all other entries are those of the first view.

    Raises:
        ValueError: no views, views with different names, or experts that ``num_ranks`` does not divide.
    """
    if not views:
        raise ValueError("views is empty: pass the state dict of every rank, in rank order")
    for rank, view in enumerate(views):
        if view.keys() != views[0].keys():
            different = sorted(view.keys() ^ views[0].keys())
            raise ValueError(f"views[{rank}] and views[0] differ in {different}: all must come from the same model")
    full = {name: _joined(name, views) for name in views[0]}
    return [{name: _slice(name, value, rank, num_ranks) for name, value in full.items()} for rank in range(num_ranks)]


def gather_full_state_dict(module: nn.Module, group: dist.ProcessGroup | None) -> StateDict:
    """The state dict of the unsharded model, on every rank of ``group``. Collective; waits for the group.

    Sharded parameters (FSDP2) are made whole first. Entries that are not experts are this rank's own, not copies.

    Args:
        module: a model whose MoE layers all use ``group``.
        group: the expert-parallel group; None when one rank holds every expert.

    Returns:
        Names and detached tensors.
    """
    spread_out = _mesh_dimensions(module)
    # DTensors of all experts need no group to be made whole.
    return {n: _gathered(n, v, None if n in spread_out else group) for n, v in module.state_dict().items()}


def load_full_state_dict(module: nn.Module, full: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    """Loads this rank's slice of a full state dict. Not collective.

    Args:
        module: a model whose MoE layers all use ``group``, also after ``fully_shard``.
        full: what :func:`gather_full_state_dict` returned, for any number of ranks; names must match exactly.
        group: the expert-parallel group; None when one rank holds every expert.

    Raises:
        ValueError: the experts cannot be divided among the ranks of ``group``.
        RuntimeError: names or shapes do not match, from ``load_state_dict``.
    """
    rank, num_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    sliced = {name: _slice(name, value, rank, num_ranks) for name, value in full.items()}
    own, ep_dims = module.state_dict(), _mesh_dimensions(module)
    # DTensors of experts have the shape of all of them.
    shapes = {name: (full if name in ep_dims else sliced)[name].shape for name in sliced}
    # Names or shapes that do not match are left as they are for load_state_dict to name.
    fitting = [name for name in sliced if name in own and own[name].shape == shapes[name]]
    module.load_state_dict(sliced | {name: spread(sliced[name], own[name], ep_dims.get(name)) for name in fitting})


def expert_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that belong to this rank alone: those of every :class:`GroupedExperts` in ``module``."""
    for prefix, experts in module.named_modules():
        if isinstance(experts, GroupedExperts):
            yield from experts.named_parameters(prefix, recurse=False)


def scale_expert_gradients(module: nn.Module, divisor: float) -> None:
    """Divides the gradients of expert parameters, after backward and before the optimizer step.

    When every rank's loss is a mean over its own batch and the gradients of the dense part are averaged over the W
    data-parallel ranks (DDP, FSDP), the loss that is minimised is the mean over ranks. An expert's gradient already
    holds the sum over ranks, because tokens came to it from all of them, so it is W times too large: ``divisor=W``.
    Where several ranks hold copies of an expert, their gradients are summed first.

    Args:
        module: any module with MoE layers.
        divisor: W.

    Raises:
        ValueError: the experts were spread by ``moe_ep.integrations.fsdp``, which scales their gradients itself.
    """
    if _mesh_dimensions(module):
        raise ValueError("module was spread by moe_ep.integrations.fsdp, which scales gradients: leave this call out")
    gradients = [parameter.grad for _, parameter in expert_parameters(module) if parameter.grad is not None]
    if gradients:
        torch._foreach_div_(gradients, divisor)


def ignore_experts_in_ddp(module: nn.Module) -> list[str]:
    """Tells DistributedDataParallel to leave experts and per-rank counters alone: call it before wrapping ``module``.

    Returns:
        The names that DDP will ignore. Combine it with :func:`scale_expert_gradients`.
    """
    names = [name for name, _ in expert_parameters(module)]
    names += [name for name, _ in module.named_buffers() if name.split(".")[-1] in _RANK_BUFFERS]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return names


def _mesh_dimensions(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are DTensors of all experts, with the mesh dimension that these are spread over."""
    return {
        f"{prefix}.{name}" if prefix else name: experts.ep_dim
        for prefix, experts in module.named_modules()
        if isinstance(experts, GroupedExperts) and experts.ep_dim is not None
        for name, _ in experts.named_parameters(recurse=False)
    }


def _joined(name: str, views: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
    if not is_expert_name(name) or len(views) == 1:
        return views[0][name]
    return torch.cat([view[name] for view in views])


def _slice(name: str, value: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    if not is_expert_name(name):
        return value
    if num_ranks < 1 or value.shape[0] % num_ranks:
        raise ValueError(f"{name} holds {value.shape[0]} experts: {num_ranks} ranks cannot share them evenly")
    return value.chunk(num_ranks)[rank]


def _gathered(name: str, value: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    value = value.detach()
    value = value.full_tensor() if isinstance(value, DTensor) else value
    if group is None or not is_expert_name(name):
        return value
    out = value.new_empty(value.shape[0] * dist.get_world_size(group), *value.shape[1:])
    dist.all_gather(list(out.chunk(dist.get_world_size(group))), value.contiguous(), group=group)
    return out
