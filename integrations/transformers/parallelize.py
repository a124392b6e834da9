"""``parallelize``: spreads the experts of a loaded model over ranks, in place."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moe_ep.buffer import resolve_group
from moe_ep.integrations.transformers.checkpoint import guard_saving
from moe_ep.integrations.transformers.exchange import ExpertExchange
from moe_ep.integrations.transformers.experts import ATTRIBUTE, NAME, LocalExperts, ignore_experts_in_ddp
from moe_ep.integrations.transformers.slicing import cut

Model = TypeVar("Model", bound=nn.Module)
Group = dist.ProcessGroup | DeviceMesh
# They bring tokens to experts themselves.
_EXCHANGING = ("deepgemm_megamoe",)


class _Found(NamedTuple):
    """An experts module: its name, its parameters stacked over experts, and what PEFT wrapped around it."""

    name: str
    experts: nn.Module
    stacked: tuple[str, ...]
    wrappers: list[nn.Module]


def parallelize(
    model: Model,
    group: Group | None = None,
    *,
    replica_group: Group | None = None,
    data_parallel_size: int | None = None,
    backend: str = "auto",
) -> Model:
    """Spread the experts of a model over the ranks of ``group``, in place. Not collective, but every rank calls it.

    Each rank keeps its slice of every stacked expert parameter, and of LoRA weights for them; routers, shared experts
    and everything else stay whole. Tokens then travel by ``moe_ep.TokenDispatcher``; the experts still compute with the
    implementation that the model had. Wrap in DDP, build the optimizer and call ``Trainer`` afterwards: gradients of
    experts are summed over ranks by the exchange, divided by ``data_parallel_size`` as they arise, and DDP leaves them
    alone.

    Args:
        model: a ``PreTrainedModel`` or ``PeftModel`` with all of its experts in memory, the same on every rank.
        group: ProcessGroup or 1-D DeviceMesh; None for all ranks. R divides the number of experts.
        replica_group: ranks that hold the same experts, where several groups train one model; their gradients are
            summed during backward.
        data_parallel_size: W, how many ranks' losses are averaged; None for all ranks.
        backend: of the exchanges: ``"auto"``, ``"torch"`` or ``"cuda"``.

    Returns:
        ``model``.

    Raises:
        ValueError: for what cannot be spread, or would silently compute something else; names the remedy.
    """
    process_group, replicas, divisor = _check_groups(group, replica_group, data_parallel_size)
    _check_model(model)
    found = _find_experts(model)
    rank, num_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
    for one in found:
        _check_experts(one, num_ranks)
    configs: dict[int, Any] = {}
    for one in found:
        _spread(one, rank, num_ranks, process_group, replicas, divisor, backend, configs)
    ignore_experts_in_ddp(model)
    guard_saving(model)
    return model


def _check_groups(
    group: Group | None, replica_group: Group | None, data_parallel_size: int | None
) -> tuple[dist.ProcessGroup, dist.ProcessGroup | None, int]:
    if not dist.is_initialized():
        raise ValueError("torch.distributed is not initialized: call dist.init_process_group, or start with torchrun")
    process_group = resolve_group(dist.group.WORLD if group is None else group)
    replicas = resolve_group(replica_group)
    assert process_group is not None
    num_ranks, world = dist.get_world_size(process_group), dist.get_world_size()
    num_replicas = 1 if replicas is None else dist.get_world_size(replicas)
    if data_parallel_size is None and num_ranks * num_replicas != world:
        raise ValueError(
            f"group has {num_ranks} ranks and replica_group {num_replicas}, of {world}: pass as replica_group the "
            "ranks that hold the same experts, or data_parallel_size where other ranks do not train on other data"
        )
    divisor = world if data_parallel_size is None else data_parallel_size
    if divisor < 1:
        raise ValueError(f"data_parallel_size={divisor} must be positive: give the number of ranks that are averaged")
    return process_group, replicas if num_replicas > 1 else None, divisor


def _check_model(model: nn.Module) -> None:
    if any(ATTRIBUTE in module.__dict__ for module in model.modules()):
        raise ValueError("model is spread over ranks already: parallelize a model once, as it was loaded")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("model is wrapped in DistributedDataParallel: parallelize it first, then wrap it")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is a DTensor, sharded by transformers or FSDP: load without a distributed_config or tp_plan, "
                'or leave parallelize out and load with DistributedConfig(ep_implementation="moe_ep")'
            )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("model is quantized, and packed experts cannot be sliced: load it without quantization_config")


def _find_experts(model: nn.Module) -> list[_Found]:
    """Experts modules, each with the LoRA wrappers around it."""
    wrappers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if hasattr(module, "get_base_layer") and hasattr(module, "base_layer"):
            wrappers.setdefault(id(module.get_base_layer()), []).append(module)  # type: ignore[operator]
    found = []
    for name, module in model.named_modules():
        stacked = _stacked_names(module)
        if not any(module._parameters[one].dim() == 3 for one in stacked):  # type: ignore[union-attr]
            continue
        if not hasattr(type(module).forward, "__wrapped__") or not hasattr(module, "config"):
            raise ValueError(
                f"{name} ({type(module).__name__}) holds stacked experts, but not behind transformers' experts "
                "interface (@use_experts_implementation), where tokens could be sent: use a release of transformers, "
                "or of the model's own code, in which it is"
            )
        found.append(_Found(name, module, stacked, wrappers.get(id(module), [])))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no stacked experts (a module with num_experts and 3-D parameters of that "
            "length): only mixture-of-experts models of transformers 5 can be parallelized"
        )
    return found


def _stacked_names(module: nn.Module) -> tuple[str, ...]:
    num_experts = getattr(module, "num_experts", None)
    if not isinstance(num_experts, int):
        return ()
    return tuple(
        name
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() >= 2 and parameter.shape[0] == num_experts
    )


def _check_experts(found: _Found, num_ranks: int) -> None:
    num_experts: int = found.experts.num_experts  # type: ignore[assignment]
    if num_experts % num_ranks:
        raise ValueError(
            f"{found.name} has {num_experts} experts, which {num_ranks} ranks cannot share evenly: use a group whose "
            f"size divides {num_experts}, and replica_group for the rest"
        )
    for name in found.stacked:
        parameter = found.experts._parameters[name]
        assert parameter is not None
        if parameter.is_meta or not parameter.dtype.is_floating_point:
            raise ValueError(
                f"{found.name}.{name} is {parameter.dtype} on {parameter.device}: load the model whole and "
                "unquantized, without device_map, before parallelize"
            )
    implementation = found.experts.config._experts_implementation  # type: ignore[union-attr]
    if implementation in _EXCHANGING:
        raise ValueError(
            f'experts_implementation="{implementation}" exchanges tokens itself: load with "grouped_mm", or do not '
            "parallelize"
        )
    for wrapper in found.wrappers:
        _check_wrapper(found, wrapper, num_experts // num_ranks)


def _check_wrapper(found: _Found, wrapper: nn.Module, num_local: int) -> None:
    if not all(hasattr(wrapper, name) for name in ("parameter_name", "num_experts", "lora_A", "lora_B")):
        raise ValueError(
            f"{found.name} is wrapped by {type(wrapper).__name__}, whose parameters cannot be told apart by expert: "
            "adapt experts with LoraConfig(target_parameters=...)"
        )
    if num_local == 1 and getattr(found.experts, "is_transposed", False):
        raise ValueError(
            f"{found.name} would hold one expert per rank, whose LoRA update PEFT applies transposed for "
            f"{type(found.experts).__name__}: use a group of fewer ranks"
        )


def _spread(
    found: _Found,
    rank: int,
    num_ranks: int,
    group: dist.ProcessGroup,
    replicas: dist.ProcessGroup | None,
    divisor: int,
    backend: str,
    configs: dict[int, Any],
) -> None:
    experts = found.experts
    num_experts: int = experts.num_experts  # type: ignore[assignment]
    config: Any = experts.config
    if id(config) not in configs:
        # The model's own stays as it is: it is saved, and other models may share it.
        configs[id(config)] = copy.deepcopy(config)
        configs[id(config)]._experts_implementation = NAME
    compute = config._experts_implementation
    exchange = ExpertExchange(group, num_experts, layer=found.name, backend=backend)
    share = LocalExperts(
        exchange, found.stacked, "grouped_mm" if compute == NAME else compute, found.wrappers, replicas, divisor
    )
    lora = list(share.lora_parameters())
    for parameter, expert_last in [(experts._parameters[name], False) for name in found.stacked] + lora:
        assert parameter is not None
        _keep_slice(parameter, rank, num_ranks, num_experts, expert_last, replicas)
    for wrapper in found.wrappers:
        wrapper.num_experts = num_experts // num_ranks  # type: ignore[assignment]
    experts.num_experts = num_experts // num_ranks  # type: ignore[assignment]
    experts.config = configs[id(config)]  # type: ignore[assignment]
    setattr(experts, ATTRIBUTE, share)
    share.tag(experts)


def _keep_slice(
    parameter: nn.Parameter,
    rank: int,
    num_ranks: int,
    num_experts: int,
    expert_last: bool,
    replicas: dist.ProcessGroup | None,
) -> None:
    own: Tensor = cut(parameter.detach(), num_experts, rank, num_ranks, expert_last)
    if replicas is not None:
        # Ranks may have drawn different initial values.
        dist.broadcast(own, dist.get_global_rank(replicas, 0), group=replicas)
    with torch.no_grad():
        # The parameter stays the same object: optimizers may hold it. The whole tensor is freed.
        parameter.grad = None
        parameter.data = own
