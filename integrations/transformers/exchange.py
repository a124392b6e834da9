"""Tokens to the ranks of their experts, the framework's own experts on what arrived, and the results back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_ep import TokenDispatcher
from moe_ep.results import Dispatched

# (rows [R, H], local expert ids [R, 1], weights [R, 1]) -> [R, H]
ExpertsForward = Callable[[Tensor, Tensor, Tensor], Tensor]


class ExpertExchange:
    """What one experts module needs to reach the experts of other ranks. Not a module: it has no state to save.

    Args:
        group: ranks that together hold all experts; 1-D where it is a mesh. All layers share the group's Buffer.
        num_experts: E, of all ranks together.
        layer: name that events of the dispatchers carry; None takes a number.
        backend: of the dispatchers.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh,
        num_experts: int,
        layer: str | None = None,
        backend: str = "auto",
    ) -> None:
        self.group = group
        self.num_experts = num_experts
        self.layer = layer
        self.backend = backend
        self._dispatchers: dict[tuple[torch.dtype, int, int, str], TokenDispatcher] = {}

    @property
    def dispatchers(self) -> list[TokenDispatcher]:
        """Those made so far: one per dtype of rows, number of choices, and place of the weights; usually one."""
        return list(self._dispatchers.values())

    def __call__(
        self, experts_forward: ExpertsForward, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Collective over the group, also in backward.

        Args:
            experts_forward: computes this rank's experts; its dtype is that of its rows.
            hidden_states: [T, H], this rank's tokens, in any number.
            top_k_index: [T, K] int64 global expert ids.
            top_k_weights: [T, K] router weights.

        Returns:
            [T, H] weighted sums in the dtype of ``hidden_states``.
        """
        # As wide as the rows: multiplied with each row as the framework does, and only sums are left to combine. Wider:
        # the framework's products stay wide until they are summed, and so do combine's.
        wide = top_k_weights.dtype.itemsize > hidden_states.dtype.itemsize
        dispatcher = self._dispatcher(hidden_states, top_k_index.shape[1], "combine" if wide else "experts")
        carried = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        with _without_autocast(hidden_states.device.type):
            routed = dispatcher.dispatch(
                hidden_states.contiguous(), top_k_index.contiguous(), top_k_weights.to(carried).contiguous()
            )
        if wide:
            factors = torch.ones_like(routed.weights, dtype=hidden_states.dtype)
        else:
            factors = routed.weights.to(top_k_weights.dtype)
        y = _apply(experts_forward, routed, factors)
        with _without_autocast(hidden_states.device.type):
            return dispatcher.combine(y.contiguous(), routed.handle, routed.weights if wide else None)

    def _dispatcher(self, hidden_states: Tensor, top_k: int, weights: str) -> TokenDispatcher:
        key = (hidden_states.dtype, hidden_states.shape[1], top_k, weights)
        if key not in self._dispatchers:
            dispatcher = TokenDispatcher(
                self.group,
                num_experts=self.num_experts,
                hidden_size=hidden_states.shape[1],
                top_k=top_k,
                dtype=hidden_states.dtype,
                weights=weights,
                backend=self.backend,
            )
            dispatcher.layer = self.layer if self.layer is not None else dispatcher.layer
            self._dispatchers[key] = dispatcher
        return self._dispatchers[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertExchange:
        # Groups do not copy; a copied dispatcher shares its Buffer.
        copy = ExpertExchange(self.group, self.num_experts, self.layer, self.backend)
        copy._dispatchers = {key: d.__deepcopy__(memo) for key, d in self._dispatchers.items()}
        return copy


def _apply(experts_forward: ExpertsForward, routed: Dispatched, factors: Tensor) -> Tensor:
    """The framework's experts on the rows that arrived, each with one choice."""
    rows = routed.x
    if routed.num_rows == 0:
        # Experts without rows still get gradients, zeros, on this rank: what reduces them waits for every rank.
        one = torch.zeros(1, 1, dtype=torch.int64, device=rows.device)
        return experts_forward(rows.sum(0, keepdim=True), one, factors.new_ones(1, 1))[:0]
    local = torch.arange(routed.tokens_per_expert.numel(), device=rows.device)
    ids = local.repeat_interleave(routed.tokens_per_expert, output_size=routed.num_rows)
    return experts_forward(rows, ids.unsqueeze(1), factors.unsqueeze(1))


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Rows travel in the dtype that the framework hands to its experts."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
