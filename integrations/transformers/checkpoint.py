"""Whole checkpoints of parallelized models."""

from __future__ import annotations

import os
import types
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_ep.buffer import resolve_group
from moe_ep.integrations.transformers.experts import LocalExperts, shares
from moe_ep.integrations.transformers.slicing import join

_SAVE = "save_pretrained"
_REMEDY = (
    "call moe_ep.integrations.transformers.save_pretrained(model, directory) on every rank, or pass the state_dict "
    "that gather_state_dict returned"
)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP and ``torch.compile``."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def gather_state_dict(model: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """The state dict of the model as it was before ``parallelize``, on the CPU. Collective over all groups.

    Of a ``PeftModel``, the base model's experts are left out: adapters are saved without them.

    Args:
        model: parallelized; wrapped in DDP or not.
        everywhere: whether every rank keeps it, rather than rank 0 alone.

    Returns:
        Names and detached tensors; empty on other ranks unless ``everywhere``.
    """
    model = unwrapped(model)
    is_adapter = _is_peft(model)
    cuts: dict[int, tuple[LocalExperts, bool]] = {}
    frozen: set[int] = set()
    for _, experts, share in shares(model):
        if not isinstance(share, LocalExperts):
            raise ValueError("model was sharded as it was loaded: model.save_pretrained gathers it itself")
        lora = {id(parameter): last for parameter, last in share.lora_parameters()}
        for parameter in share.parameters(experts):
            cuts[id(parameter)] = (share, lora.get(id(parameter), False))
            if is_adapter and id(parameter) not in lora:
                frozen.add(id(parameter))
    keep = everywhere or dist.get_rank() == 0
    whole = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) in frozen:
            continue
        full = value.detach()
        if id(value) in cuts:
            share, expert_last = cuts[id(value)]
            group = resolve_group(share.exchange.group)
            assert group is not None
            full = join(full, share.exchange.num_experts // dist.get_world_size(group), group, expert_last)
        if keep:
            whole[name] = full.cpu()
    return whole


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Save a parallelized model, or its adapters, as if it were not. Collective; rank 0 writes.

    Args:
        model: parallelized; wrapped in DDP or not.
        save_directory: what ``from_pretrained`` reads, with any version of transformers and no moe_ep.
        kwargs: of the model's own ``save_pretrained``.
    """
    model = unwrapped(model)
    whole = gather_state_dict(model)
    if dist.get_rank() == 0:
        model.save_pretrained(save_directory, state_dict=whole, **kwargs)  # type: ignore[operator]
    dist.barrier()


def guard_saving(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the model, and of the one inside a ``PeftModel``, refuse a rank's slice."""
    inner = model.get_base_model() if _is_peft(model) else model  # type: ignore[operator]
    for one in {id(m): m for m in (model, inner)}.values():
        if hasattr(one, _SAVE):
            # NOTE: a bound method of the instance, because a copy of the model then binds to the copy.
            one.__dict__[_SAVE] = types.MethodType(_save_whole, one)


def _save_whole(
    self: nn.Module, save_directory: str | os.PathLike, *args: Any, state_dict: Mapping | None = None, **kwargs: Any
) -> None:
    if state_dict is None:
        raise ValueError(f"each rank holds a slice of the experts, which alone is no checkpoint: {_REMEDY}")
    own = self.state_dict(keep_vars=True)
    sliced = {id(p) for _, experts, share in shares(self) for p in share.parameters(experts)}
    for name, value in state_dict.items():
        if name in own and id(own[name]) in sliced and value.shape == own[name].shape:
            ranks = {dist.get_world_size(resolve_group(share.exchange.group)) for _, _, share in shares(self)}
            if ranks != {1}:
                raise ValueError(f"{name} in state_dict is one rank's slice: {_REMEDY}")
    getattr(type(self), _SAVE)(self, save_directory, *args, state_dict=state_dict, **kwargs)


def _is_peft(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")
