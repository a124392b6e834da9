"""What ``parallelize`` leaves in an experts module, and the experts function that transformers then calls."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_ep import TokenDispatcher
from moe_ep.integrations.transformers.exchange import ExpertExchange

NAME = "moe_ep"
# Where an experts module keeps what belongs to it. Not a submodule: names of parameters stay as they are.
ATTRIBUTE = "_moe_ep"
_SCALED = "_moe_ep_scaled"
_REMEDY = (
    "add LoRA adapters before parallelize, and give FSDP ignored_params=set(dict(expert_parameters(model)).values()); "
    "what averages over ranks would mix different experts"
)


class LocalExperts:
    """An experts module's share: its exchange, its parameters here, and how they are reduced.

    Args:
        exchange: of this module.
        names: parameters stacked over experts, cut to this rank's.
        compute: the experts implementation of transformers that computes here.
        wrappers: modules of PEFT that hold LoRA weights of these experts.
        replica_group: ranks that hold the same experts, None where each is held once.
        divisor: W, what gradients are divided by.
    """

    def __init__(
        self,
        exchange: ExpertExchange,
        names: tuple[str, ...],
        compute: str | None,
        wrappers: list[nn.Module],
        replica_group: dist.ProcessGroup | None,
        divisor: int,
    ) -> None:
        self.exchange = exchange
        self.names = names
        self.compute = compute
        self.wrappers = wrappers
        self.replica_group = replica_group
        self.divisor = divisor
        self._is_copy = False
        self._checked_ddp: weakref.ref | None = None

    def parameters(self, experts: nn.Module) -> list[nn.Parameter]:
        """Parameters of this rank's experts alone: the stacked ones, and LoRA weights for them."""
        return [self._stacked(experts, name) for name in self.names] + [p for p, _ in self.lora_parameters()]

    def lora_parameters(self) -> Iterator[tuple[nn.Parameter, bool]]:
        """LoRA weights, each with whether the expert is the fastest index of its last dimension."""
        for wrapper in self.wrappers:
            for holder, expert_last in ((wrapper.lora_A, False), (wrapper.lora_B, True)):
                for linear in holder.values():  # type: ignore[operator,union-attr]
                    yield linear.weight, expert_last

    def _stacked(self, experts: nn.Module, name: str) -> nn.Parameter:
        parameter = experts._parameters.get(name)
        if parameter is None and hasattr(experts, "parametrizations"):
            # PEFT parametrizes it while its wrapper's forward runs.
            parameter = experts.parametrizations[name].original  # type: ignore[union-attr,index]
        if parameter is None:
            raise ValueError(f"{name} of {type(experts).__name__} is no parameter any more: {_REMEDY}")
        return parameter

    def tag(self, experts: nn.Module) -> None:
        """Mark parameters as this rank's alone, as Megatron and DeepSpeed do."""
        for parameter in self.parameters(experts):
            parameter.allreduce = False  # type: ignore[attr-defined]
        self._is_copy = False

    def prepare(self, experts: nn.Module) -> None:
        """Let gradients be scaled and reduced, also of parameters that were frozen before or copied."""
        if self._is_copy:
            self.tag(experts)
        self._check_ddp(experts)
        for parameter in self.parameters(experts):
            if getattr(parameter, "allreduce", True):
                raise ValueError(f"expert parameters were replaced or added after parallelize: {_REMEDY}")
            if parameter.requires_grad and not hasattr(parameter, _SCALED):
                finish = functools.partial(_finish_gradient, divisor=self.divisor, replicas=self.replica_group)
                # NOTE: a hook on the gradient, not on .grad: each micro-batch is scaled once before it is added.
                setattr(parameter, _SCALED, parameter.register_hook(finish))

    def _check_ddp(self, experts: nn.Module) -> None:
        """Raise where DDP runs this forward and averages experts, because it wraps another module than was prepared."""
        ddp = DistributedDataParallel._active_ddp_module
        if ddp is None or (self._checked_ddp is not None and self._checked_ddp() is ddp):
            return
        own = {id(parameter) for parameter in self.parameters(experts)}
        for name, parameter in ddp.module.named_parameters():
            # PEFT's parametrizations rename parameters during the forward.
            name = name.replace("parametrizations.", "").removesuffix(".original")
            if id(parameter) in own and name not in ddp.parameters_to_ignore:
                raise ValueError(
                    f"DistributedDataParallel averages {name} over ranks with other experts: parallelize the outermost "
                    "module, or call ignore_experts_in_ddp(module) on it, before wrapping it"
                )
        _check_trainer()
        self._checked_ddp = weakref.ref(ddp)

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalExperts:
        copy = LocalExperts.__new__(LocalExperts)
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy.exchange = self.exchange.__deepcopy__(memo)
        # A copied parameter has neither attributes nor hooks.
        copy._is_copy = True
        copy._checked_ddp = None
        copy.wrappers = [memo.get(id(wrapper), wrapper) for wrapper in self.wrappers]
        return copy

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a parallelized model belongs to its process group and does not pickle: use "
            "moe_ep.integrations.transformers.save_pretrained, or torch.save(model.state_dict()) for each rank"
        )


def _check_trainer() -> None:
    """Raise where a Trainer of transformers that knows nothing of spread experts runs this forward.

    Neither the model nor DDP knows its Trainer: the calls that led here do.
    """
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame: types.FrameType | None = sys._getframe()
    while trainer is not None and frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, trainer) and not getattr(caller, "trains_spread_experts", False):
            raise ValueError(
                f"{type(caller).__name__} clips by the norm of each rank's own experts, and copies of the dense part "
                "would drift apart: use moe_ep.integrations.transformers.trainer.ExpertParallelTrainer, or put "
                "ExpertParallelMixin of that module before your subclass of Trainer"
            )
        frame = frame.f_back


def _finish_gradient(gradient: Tensor, *, divisor: int, replicas: dist.ProcessGroup | None) -> Tensor:
    gradient = gradient / divisor
    if replicas is not None:
        dist.all_reduce(gradient, group=replicas)
    return gradient


def experts_function(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``ALL_EXPERTS_FUNCTIONS["moe_ep"]``: the experts of all ranks on this rank's tokens. Collective.

    Args:
        self: an experts module of a parallelized model.
        hidden_states: [T, H].
        top_k_index: [T, K] global expert ids.
        top_k_weights: [T, K], or [T, E] from routers that return all of them.

    Returns:
        [T, H] weighted sums.
    """
    share = self.__dict__.get(ATTRIBUTE)
    if share is None:
        raise ValueError(
            f'experts_implementation="{NAME}" needs experts that are spread over ranks: leave it out, and call '
            "moe_ep.integrations.transformers.parallelize(model, group) on the loaded model"
        )
    if not torch.compiler.is_compiling():
        share.prepare(self)
    if top_k_weights.shape != top_k_index.shape:
        top_k_weights = top_k_weights.gather(1, top_k_index)
    return share.exchange(functools.partial(_compute, self, share.compute), hidden_states, top_k_index, top_k_weights)


def _compute(experts: nn.Module, name: str | None, *arguments: Tensor) -> Tensor:
    if name is None or name == "eager":
        # What the decorator of transformers wrapped.
        return type(experts).forward.__wrapped__(experts, *arguments)  # type: ignore[attr-defined]
    return ALL_EXPERTS_FUNCTIONS[name](experts, *arguments)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_function)


def shares(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, experts module, and what this adapter left in it, for every layer that it serves."""
    for name, module in model.named_modules():
        if ATTRIBUTE in module.__dict__:
            yield name, module, module.__dict__[ATTRIBUTE]


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters that belong to this rank's experts alone, LoRA weights of experts included."""
    own = {id(p) for _, experts, share in shares(model) for p in share.parameters(experts)}
    yield from ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) in own)


def ignore_experts_in_ddp(module: nn.Module) -> list[str]:
    """Tell DistributedDataParallel to leave experts alone: before wrapping a module around a parallelized model.

    ``parallelize`` does it for the model it is given.

    Returns:
        The names that DDP will ignore.
    """
    names = [name for name, _ in expert_parameters(module)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
    return names


def dispatchers(model: nn.Module) -> dict[str, list[TokenDispatcher]]:
    """By name of the experts module, the dispatchers that its forwards have made; for hooks and ``stats()``.

    A module has one, and another for each further dtype of rows. Empty lists before the first forward.
    """
    return {name: share.exchange.dispatchers for name, _, share in shares(model)}
