"""``EPMoELayer`` for module specs, and functions that put the dispatcher into models and specs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any, TypeVar

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from moe_ep.integrations.megatron.dispatcher import EPTokenDispatcher
from moe_ep.integrations.megatron.settings import check_config

Spec = TypeVar("Spec")


class EPMoELayer(MoELayer):
    """Megatron's MoE layer with moe_ep as its dispatcher; name it in a spec instead of ``MoELayer``.

    Parameters, checkpoints and everything but the movement of tokens are Megatron's own.

    Args:
        config: ``TransformerConfig`` with ``moe_token_dispatcher_type="alltoall"``.
        submodules: ``MoESubmodules``.
        layer_number: of the transformer layer.
        pg_collection: process groups; None takes those of ``parallel_state``.
        backend: of the exchanges: ``"auto"``, ``"torch"`` or ``"cuda"``.
        kwargs: what later releases of Megatron-Core pass on to ``MoELayer``.

    Raises:
        ValueError: for settings that cannot work; names the remedy.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        backend: str = "auto",
        **kwargs: Any,
    ) -> None:
        check_config(config)
        if pg_collection is None:
            # Megatron-Core 0.16 hands the groups to MoELayer alone, which it recognises by identity.
            pg_collection = get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection, **kwargs)
        _set_dispatcher(self, pg_collection, backend)


def patch_model(model: nn.Module | Iterable[nn.Module], *, backend: str = "auto") -> int:
    """Give every MoE layer of a model the moe_ep dispatcher. Collective; changes no parameter.

    Args:
        model: a model, or its chunks (virtual pipeline stages); wrapped in Megatron's DDP or not.
        backend: of the exchanges: ``"auto"``, ``"torch"`` or ``"cuda"``. Layers that have the dispatcher keep theirs.

    Returns:
        MoE layers that have the dispatcher now; those that had it before are counted.

    Raises:
        ValueError: for settings that cannot work, or where there is no MoE layer.
    """
    chunks = [model] if isinstance(model, nn.Module) else list(model)
    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    if not layers:
        raise ValueError(
            "model has no megatron.core MoELayer: build it with num_moe_experts and a spec that has MoE layers, and "
            "pass all of its chunks at once"
        )
    for layer in layers:
        check_config(layer.config)
    for layer in layers:
        if not isinstance(layer.token_dispatcher, EPTokenDispatcher):
            _set_dispatcher(layer, _groups_of(layer), backend)
    return len(layers)


def patch_spec(spec: Spec, *, backend: str = "auto") -> Spec:
    """A copy of a spec that builds ``EPMoELayer`` wherever it built ``MoELayer``.

    Args:
        spec: of a layer (``ModuleSpec``), of a block (``TransformerBlockSubmodules``), or anything made of those.
        backend: of the exchanges: ``"auto"``, ``"torch"`` or ``"cuda"``.

    Raises:
        ValueError: where it builds no ``MoELayer``.
    """
    copied = copy.deepcopy(spec)
    if not _replace(copied, backend, set()):
        raise ValueError(
            f"spec={type(spec).__name__} builds no MoELayer: make it with num_experts, as in "
            "get_gpt_layer_local_spec(num_experts=8)"
        )
    return copied


def _set_dispatcher(layer: MoELayer, groups: ProcessGroupCollection, backend: str) -> None:
    layer.token_dispatcher = EPTokenDispatcher(
        layer.num_local_experts,
        layer.local_expert_indices,
        config=layer.config,
        pg_collection=groups,
        backend=backend,
    )
    if layer.use_shared_expert and layer.shared_expert_overlap:
        layer.token_dispatcher.set_shared_experts(layer.shared_experts)


def _groups_of(layer: MoELayer) -> ProcessGroupCollection:
    """The groups that the layer's present dispatcher was built with."""
    present = layer.token_dispatcher
    return ProcessGroupCollection(ep=present.ep_group, expt_tp=present.tp_group, tp_ep=present.tp_ep_group)


def _replace(part: Any, backend: str, seen: set[int]) -> int:
    """Replace MoELayer inside a spec, in place; returns how often."""
    if id(part) in seen:
        return 0
    seen.add(id(part))
    if isinstance(part, ModuleSpec) and part.module is MoELayer:
        part.module = EPMoELayer
        part.params = {**(part.params or {}), "backend": backend}
        return 1
    if isinstance(part, list | tuple):
        return sum(_replace(entry, backend, seen) for entry in part)
    found = 0
    for name, value in list(getattr(part, "__dict__", {}).items()):
        # Later releases build with functools.partial(MoELayer, submodules=...).
        if isinstance(value, functools.partial) and value.func is MoELayer:
            keywords = {**value.keywords, "backend": backend}
            setattr(part, name, functools.partial(EPMoELayer, *value.args, **keywords))
            found += 1
        elif not isinstance(value, type):
            found += _replace(value, backend, seen)
    return found
