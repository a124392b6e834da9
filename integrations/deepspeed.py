"""DeepSpeed's ``MoE`` with moe_ep's exchanges: ``convert(model)``, and nothing else changes.

The gate stays DeepSpeed's, with its capacities, noise and auxiliary loss, and so do names, attributes and groups of all
parameters, so ZeRO stages 0 to 2 and checkpoints work as before. What is replaced lies between gate and experts:
instead of two all-to-alls of ``[experts, capacity, hidden]``, of which all but the routed rows are zeros, each rank
sends the rows that it routes, in any number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_ep.config import ExchangeSpec
from moe_ep.dispatcher import TokenDispatcher
from moe_ep.integrations.versions import require

require("deepspeed", at_least="0.19.8", below="0.20")

# NOTE: below the check, so that a version without these names is named by it and not by a failing import.
from deepspeed.moe.experts import Experts  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.moe.sharded_moe import (  # noqa: E402
    FIRST_ALLTOALL_TIMER,
    MOE_TIMER,
    SECOND_ALLTOALL_TIMER,
    MOELayer,
    TopKGate,
)
from deepspeed.utils import groups  # noqa: E402
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size  # noqa: E402

_ZERO3 = (
    "ZeRO stage 3 cannot hold DeepSpeed's MoE, with or without moe_ep: choose zero_optimization.stage 0, 1 or 2 "
    "(experts are spread over the ranks already), DeepSpeed's AutoEP, or FSDP2 with moe_ep.layers.MoELayer "
    "(docs/fsdp.md)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings:
    """What ``convert`` passes on to every dispatcher."""

    backend: str
    num_sms: int | None
    timeout_s: float | None
    validate: bool | None


def convert(
    model: nn.Module,
    *,
    config: Mapping[str, Any] | str | Path | None = None,
    backend: str = "auto",
    num_sms: int | None = None,
    timeout_s: float | None = None,
    validate: bool | None = None,
) -> nn.Module:
    """Let every ``deepspeed.moe.layer.MoE`` in ``model`` exchange its tokens through moe_ep.

    Modules are changed in place and keep their identity, hooks, parameters and state-dict names. Call it on all ranks,
    before ``deepspeed.initialize`` or after; calling it again changes nothing.

    Args:
        model: any module, a DeepSpeed engine too.
        config: the DeepSpeed config (a dict or the path of a JSON file), to refuse here what it cannot be used with.
        backend: of the dispatchers: ``"auto"``, ``"torch"`` or ``"cuda"``.
        num_sms: SMs of each exchange; None takes the measured default.
        timeout_s: bound of every wait in seconds; None takes ``MOE_EP_TIMEOUT_S``, else 600.
        validate: whether to check expert ids; None checks on the torch backend.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: no MoE layer in ``model``, ZeRO stage 3, Tutel, gates or experts of another class, a hidden size or
            number of experts that no exchange can carry. Nothing has been changed then.
    """
    _refuse_zero3(model, config)
    layers = {name or "model": moe for name, moe in model.named_modules() if isinstance(moe, MoE)}
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without a deepspeed.moe.layer.MoE: build its sparse layers with that "
            "class, or use the adapter of the framework that they come from (moe_ep.integrations)"
        )
    for name, moe in layers.items():
        _check_layer(name, moe)
    settings = _Settings(backend=backend, num_sms=num_sms, timeout_s=timeout_s, validate=validate)
    for moe in layers.values():
        if not isinstance(moe.deepspeed_moe, EPMOELayer):
            _convert_layer(moe.deepspeed_moe, settings)
    return model


class EPExperts(Experts):
    """DeepSpeed's ``Experts`` for groups of different sizes."""

    def forward(self, inputs: Tensor, counts: list[int]) -> Tensor:
        """Run each local expert on its rows.

        Args:
            inputs: [N, M] rows grouped by local expert.
            counts: rows of each expert.

        Returns:
            [N, M'] in the same order.
        """
        outputs = []
        for rows, expert in zip(inputs.split(counts), self.deepspeed_experts, strict=True):
            # An expert that nobody chose sees one row of zeros, as padding always showed it some: whatever it computes
            # is defined, and its parameters get gradients, zeros, which ZeRO's buckets wait for.
            count = rows.shape[0]
            shown = rows if count else rows.new_zeros(1, rows.shape[1])
            # Experts are written for [ranks, 1, capacity, M].
            out = expert(shown[None, None])
            if isinstance(out, tuple):
                out = out[0]
            outputs.append(out.flatten(0, 2)[:count])
        return torch.cat(outputs)


class EPMOELayer(MOELayer):
    """DeepSpeed's ``MOELayer`` between whose gate and experts moe_ep moves the tokens. Made by :func:`convert`.

    Attributes:
        dispatcher: :class:`moe_ep.TokenDispatcher`; None until DeepSpeed has given the layer its group.
    """

    dispatcher: TokenDispatcher | None
    _settings: _Settings

    def _set_ep_group(self, ep_group: dist.ProcessGroup) -> None:
        if bwc_tensor_model_parallel_world_size(groups.mpu) > 1:
            raise ValueError(
                f"the mpu's tensor-parallel size is {bwc_tensor_model_parallel_world_size(groups.mpu)}: moe_ep's layer "
                "for DeepSpeed takes the tokens of a rank for its own, and they would be sent once per tensor-parallel "
                "rank; use moe_ep.integrations.megatron, or leave these layers to DeepSpeed"
            )
        self.ep_group = ep_group
        # NOTE: the gate keeps ep_group None. With it, a gate that drops nothing would agree on a common capacity in a
        # collective of its own; nothing is padded to a capacity here.
        self.dispatcher = TokenDispatcher(
            ep_group,
            num_experts=self.ep_size * self.num_local_experts,
            hidden_size=self.gate.wg.in_features,
            top_k=self.gate.k,
            dtype=_dtype_of(self.experts),
            **dataclasses.asdict(self._settings),
        )

    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        """As DeepSpeed's: ``input`` is (hidden [..., M], used_token or None); sets ``l_aux`` and ``exp_counts``."""
        if self.dispatcher is None:
            raise RuntimeError(
                "this MoE layer has no expert-parallel group yet: call deepspeed.initialize, or its MoE's "
                "set_deepspeed_parallelism(), before the first forward"
            )
        hidden, used_token = input
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        with self._timed(MOE_TIMER, "time_moe"):
            topk_idx, topk_weights = self._route(rows, used_token)
            dispatcher = self._dispatcher_for(rows)
            with self._timed(FIRST_ALLTOALL_TIMER, "time_falltoall"):
                routed = dispatcher.dispatch(rows, topk_idx, topk_weights)
            counts = routed.tokens_per_expert_list
            assert counts is not None
            y = self.experts(routed.x, counts)
            with self._timed(SECOND_ALLTOALL_TIMER, "time_salltoall"):
                out = dispatcher.combine(y.contiguous(), routed.handle, routed.weights)
        return out.reshape(hidden.shape)

    def _route(self, rows: Tensor, used_token: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gate's choices: expert ids [S, k] int64, -1 where capacity dropped one, and weights [S, k]."""
        if not rows.shape[0]:
            return self._route_nothing(rows)
        with _enough_tokens(self.gate, rows.shape[0]):
            self.l_aux, _, _, indices, _, gates, self.exp_counts = self.gate(rows, used_token, True)
        return indices.t().to(torch.int64).contiguous(), gates.t().to(_weight_dtype(rows)).contiguous()

    def _route_nothing(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What a gate would say of no tokens, if it could: a zero loss that still reaches the gate's weight."""
        logits = F.linear(rows.float(), self.gate.wg.weight.float())
        self.l_aux = logits.sum()
        self.exp_counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=rows.device)
        topk_weights = logits[:, : self.gate.k].to(_weight_dtype(rows))
        return torch.empty(0, self.gate.k, dtype=torch.int64, device=rows.device), topk_weights.contiguous()

    def _dispatcher_for(self, rows: Tensor) -> TokenDispatcher:
        """The dispatcher, in the dtype of these rows: a model may keep its residual stream in another than experts'."""
        assert self.dispatcher is not None
        if rows.dtype != self.dispatcher.dtype and not torch.is_autocast_enabled(rows.device.type):
            self.dispatcher.to(rows.dtype)
        return self.dispatcher

    @contextlib.contextmanager
    def _timed(self, timer: str, attribute: str) -> Iterator[None]:
        """Keep DeepSpeed's ``wall_clock_breakdown`` figures, milliseconds, where the engine reads them."""
        if not self.wall_clock_breakdown:
            yield
            return
        self.timers(timer).start()
        yield
        self.timers(timer).stop()
        setattr(self, attribute, self.timers(timer).elapsed(reset=False))


@contextlib.contextmanager
def _enough_tokens(gate: TopKGate, num_tokens: int) -> Iterator[None]:
    """Let a top-1 gate take fewer tokens than ``min_capacity``, which it refuses on this rank alone.

    A capacity of all tokens drops none of them, and so would the larger ``min_capacity``.
    """
    minimum = gate.min_capacity
    gate.min_capacity = min(minimum, num_tokens) if gate.k == 1 else minimum
    try:
        yield
    finally:
        gate.min_capacity = minimum


def _weight_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _dtype_of(experts: nn.Module) -> torch.dtype:
    for parameter in experts.parameters():
        return parameter.dtype
    return torch.get_default_dtype()


def _convert_layer(layer: MOELayer, settings: _Settings) -> None:
    # In place, as fully_shard does it: hooks stay, and so do references of an engine that exists already.
    layer.__class__ = EPMOELayer
    layer.experts.__class__ = EPExperts
    layer._settings = settings
    layer.dispatcher = None
    layer.gate.ep_group = None
    if layer.ep_group is not None:
        layer._set_ep_group(layer.ep_group)


def _check_layer(name: str, moe: MoE) -> None:
    layer = moe.deepspeed_moe
    parts = [("", layer, MOELayer, EPMOELayer), (".experts", layer.experts, Experts, EPExperts)]
    for suffix, part, stock, ours in parts:
        if type(part) not in (stock, ours):
            raise ValueError(
                f"{name}.deepspeed_moe{suffix} is a {type(part).__name__}: its forward would be replaced by moe_ep's, "
                f"so only DeepSpeed's own {stock.__name__} can be converted; convert the model before it is changed"
            )
    if not isinstance(layer.gate, TopKGate):
        raise ValueError(
            f"{name}.deepspeed_moe.gate is a {type(layer.gate).__name__}: moe_ep asks DeepSpeed's TopKGate, or a "
            "subclass, for routes; derive it from that"
        )
    if layer.use_tutel:
        raise ValueError(f"{name} was built with use_tutel=True: Tutel would place tokens too; build it without")
    ExchangeSpec(
        num_experts=moe.num_experts,
        hidden_size=layer.gate.wg.in_features,
        top_k=layer.gate.k,
        num_ranks=moe.ep_size,
        dtype=_dtype_of(layer.experts),
    ).check()


def _refuse_zero3(model: nn.Module, config: Mapping[str, Any] | str | Path | None) -> None:
    partitioned = next((name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")), None)
    if partitioned is not None:
        raise ValueError(f"{partitioned} is partitioned by deepspeed.zero.Init: {_ZERO3}")
    if config is None:
        return
    if not isinstance(config, Mapping):
        config = json.loads(Path(config).read_text())
    assert isinstance(config, Mapping)
    if config.get("zero_optimization", {}).get("stage", 0) == 3:
        raise ValueError(f"config has zero_optimization.stage=3: {_ZERO3}")
