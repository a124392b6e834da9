"""torchtitan's MoE with moe_ep's exchanges: ``--override.imports moe_ep.integrations.torchtitan.dispatcher``.

The override replaces the token dispatcher of every MoE layer in the config tree; router, experts, shared experts, bias
updates, sharding and checkpoints stay torchtitan's. ``selective_ac``, a second override, keeps the results of exchanges
when torchtitan recomputes activations selectively, as it does for dispatchers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ep.dispatcher import TokenDispatcher
from moe_ep.handle import DispatchHandle
from moe_ep.integrations.versions import require

require("torchtitan", at_least="0.3.0", below="0.4")

# NOTE: below the check, so that a version without these names is named by it and not by a failing import.
import spmd_types as spmd  # noqa: E402
from torchtitan.config import derive, override  # noqa: E402
from torchtitan.distributed.activation_checkpoint import SelectiveAC  # noqa: E402
from torchtitan.models.common.token_dispatcher import (  # noqa: E402
    AllToAllTokenDispatcher,
    BaseEPTokenDispatcher,
    DeepEPTokenDispatcher,
    HybridEPTokenDispatcher,
    MinimalAsyncEPTokenDispatcher,
    TorchAOTokenDispatcher,
)


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """What ``combine`` needs of a dispatch.

    Attributes:
        handle: the plan of the exchange.
        weights: fp32 [R] router scores beside the rows; an edge of the graph.
    """

    handle: DispatchHandle
    weights: Tensor


class MoeEpTokenDispatcher(BaseEPTokenDispatcher):
    """torchtitan's token dispatcher over :class:`moe_ep.TokenDispatcher`; also of a single rank, where EP is off.

    The shape suffixes are torchtitan's: T tokens, D hidden, K choices, E experts, e local experts, R received rows.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseEPTokenDispatcher.Config):
        """Attributes: ``pad_multiple`` starts expert groups at multiples of it; the others are TokenDispatcher's."""

        pad_multiple: int | None = None
        backend: str = "auto"
        num_sms: int | None = None
        timeout_s: float | None = None
        validate: bool | None = None

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.pad_multiple = config.pad_multiple
        self._settings = {name: getattr(config, name) for name in ("backend", "num_sms", "timeout_s", "validate")}
        self._exchange: TokenDispatcher | None = None

    def init_buffer(self) -> None:
        """The mesh is new: what was made for another one is dropped. The hidden size is known at the first dispatch."""
        self._exchange = None

    def dispatch(
        self,
        x_TD: Tensor,  # noqa: N803
        topk_scores_TK: Tensor,  # noqa: N803
        topk_expert_ids_TK: Tensor,  # noqa: N803
        num_local_tokens_per_expert_E: Tensor,  # noqa: N803
    ) -> tuple[Tensor, Tensor, RoutedTokens]:
        """Rows of this rank's tokens to the ranks of their experts; T may differ among ranks.

        Args:
            x_TD: rows.
            topk_scores_TK: router scores; gradients flow back to them through ``combine``.
            topk_expert_ids_TK: int64 expert ids.
            num_local_tokens_per_expert_E: counts of this rank's choices; only its dtype is used.

        Returns:
            Rows grouped by local expert [R, D], rows of each group [e] (padded ones included), and what ``combine``
            needs.
        """
        if spmd.is_type_checking():
            raise ValueError(
                "debug.spmd_typechecking is on: moe_ep's operators carry no SPMD types; check the types with "
                "torchtitan's own dispatcher, then train without the check"
            )
        exchange = self._exchange_for(x_TD)
        topk_scores = topk_scores_TK.float().contiguous()
        routed = exchange.dispatch(x_TD.contiguous(), topk_expert_ids_TK.contiguous(), topk_scores)
        counts = routed.tokens_per_expert
        if self.pad_multiple is not None:
            counts = torch.diff(routed.expert_ends, prepend=torch.zeros_like(counts[:1]))
        counts = counts.to(num_local_tokens_per_expert_E.dtype)
        return routed.x, counts, RoutedTokens(handle=routed.handle, weights=routed.weights)

    def combine(self, routed_output_RD: Tensor, metadata: RoutedTokens, x_TD: Tensor) -> Tensor:  # noqa: N803
        """Expert outputs [R, D] home: [T, D], each token's sum weighted by its scores, accumulated in fp32."""
        assert self._exchange is not None
        return self._exchange.combine(routed_output_RD.contiguous(), metadata.handle, metadata.weights).to(x_TD.dtype)

    def _exchange_for(self, x: Tensor) -> TokenDispatcher:
        self._prepare(x.shape[-1], x.dtype)
        assert self._exchange is not None
        return self._exchange

    @torch.compiler.assume_constant_result
    def _prepare(self, hidden_size: int, dtype: torch.dtype) -> bool:
        """Make the dispatcher at the first rows, whose size no config of a dispatcher tells; collective then.

        NOTE: run as it is where torch.compile traces the layer, at each trace, and never by the compiled code.
        """
        if self._exchange is None:
            self._exchange = TokenDispatcher(
                self.ep_mesh,
                num_experts=self.num_experts,
                hidden_size=hidden_size,
                top_k=self.top_k,
                dtype=dtype,
                alignment=self.pad_multiple or 1,
                **self._settings,
            )
        elif self._exchange.dtype != dtype:
            self._exchange.to(dtype)
        return True


class ExchangeSavingAC(SelectiveAC):
    """torchtitan's selective activation checkpointing, which keeps what exchanges gave instead of repeating them."""

    @dataclass(kw_only=True, slots=True)
    class Config(SelectiveAC.Config):
        """As torchtitan's."""

    def get_save_ops(self) -> set:
        """torchtitan's operators and those of this package."""
        return super().get_save_ops() | {torch.ops.moe_ep.dispatch.default, torch.ops.moe_ep.combine.default}


@override(target=BaseEPTokenDispatcher.Config, description="Exchange the tokens of MoE layers through moe_ep.")
def dispatcher(cfg: BaseEPTokenDispatcher.Config, **settings: Any) -> MoeEpTokenDispatcher.Config:
    """The override to list in ``--override.imports``; ``settings`` are fields of ``MoeEpTokenDispatcher.Config``.

    Raises:
        ValueError: for a setting of the replaced dispatcher that this one does not have, or an unknown setting.
    """
    _check_replaced(cfg)
    return derive(cfg, MoeEpTokenDispatcher.Config, **settings)


@override(target=SelectiveAC.Config, description="Save the results of moe_ep's exchanges.")
def selective_ac(cfg: SelectiveAC.Config) -> ExchangeSavingAC.Config:
    """To be listed too where ``activation_checkpoint`` is selective."""
    return derive(cfg, ExchangeSavingAC.Config)


def _check_replaced(cfg: BaseEPTokenDispatcher.Config) -> None:
    if isinstance(cfg, DeepEPTokenDispatcher.Config) and cfg.cudagraphable:
        raise ValueError(
            "cudagraphable=True cannot be kept: this dispatcher receives exactly the rows that are routed, and waits "
            "for their number; build the model without it, or keep DeepEP's dispatcher for inference"
        )
    if isinstance(cfg, HybridEPTokenDispatcher.Config) and cfg.non_blocking_capacity_factor is not None:
        raise ValueError(
            f"non_blocking_capacity_factor={cfg.non_blocking_capacity_factor} cannot be kept: this dispatcher drops no "
            "token and waits for the number of rows; leave it None, or keep HybridEP's dispatcher"
        )
    if type(cfg) not in _REPLACED:
        raise ValueError(
            f"{type(cfg).__qualname__} is not one of torchtitan's own dispatchers, and what it does beyond them would "
            f"be lost: give the model one of {', '.join(sorted(one.__qualname__ for one in _REPLACED))}"
        )


_REPLACED = {
    AllToAllTokenDispatcher.Config,
    DeepEPTokenDispatcher.Config,
    HybridEPTokenDispatcher.Config,
    MinimalAsyncEPTokenDispatcher.Config,
    TorchAOTokenDispatcher.Config,
}
