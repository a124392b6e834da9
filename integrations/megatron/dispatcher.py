"""Megatron's six dispatcher stages on ``moe_ep.TokenDispatcher``."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor, nn

from moe_ep import Capacity, DispatchHandle, TokenDispatcher
from moe_ep.integrations.megatron.settings import (
    alignment,
    check_choices,
    check_config,
    hidden_size,
    padded_rows,
    weight_dtype,
)
from moe_ep.results import Dispatched, PendingCombine, PendingDispatch


class EPTokenDispatcher(MoETokenDispatcher):
    """Moves tokens of a Megatron MoE layer; takes the place of ``MoEAlltoAllTokenDispatcher``.

    Constructing one is collective over the ranks that share the layer's experts. It has no parameters and no buffers.
    One forward may be between two stages at a time, as Megatron's own dispatchers have it; any number may wait for
    their backward.

    Args:
        num_local_experts: e, experts of this rank.
        local_expert_indices: their global ids, consecutive.
        config: ``TransformerConfig`` with ``moe_token_dispatcher_type="alltoall"``.
        pg_collection: process groups with ``ep``, ``expt_tp`` and ``tp_ep``.
        backend: of the exchanges: ``"auto"``, ``"torch"`` or ``"cuda"``.

    Raises:
        ValueError: for settings that cannot work; names the remedy.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any,
        backend: str = "auto",
        **_: Any,
    ) -> None:
        check_config(config)
        super().__init__(config=config, pg_collection=pg_collection)
        check_choices(config.moe_router_topk, self.tp_size)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        self.num_experts = config.num_moe_experts
        self.backend = backend
        self.ep_rank = self.ep_group.rank()
        # Experts that are split over expert_tensor_parallel_size ranks take every token on each of them.
        self.group = self.tp_ep_group if self.tp_size > 1 else self.ep_group
        # Inference switches these two while it runs.
        self.drop_and_pad = config.moe_pad_expert_input_to_capacity
        self.moe_expert_capacity_factor = config.moe_expert_capacity_factor
        # Later releases read these.
        self.use_nccl_stream = False
        self.cudagraph_attrs = ["topk_idx"]
        # NOTE: a schedule that runs stages as nodes empties the storages that pass between them.
        self._stages_are_freed = bool(config.overlap_moe_expert_parallel_comm)
        self._exchanges: dict[tuple[torch.dtype, int | None], TokenDispatcher] = {}
        self._exchange = self._exchange_for(config.params_dtype, None)

        self.topk_idx: Tensor | None = None
        self._hidden_shape: torch.Size | None = None
        self._tokens_per_expert: Tensor | None = None
        self._handle: DispatchHandle | None = None
        self._pending_dispatch: PendingDispatch | None = None
        self._pending_combine: PendingCombine | None = None

    @property
    def backend_name(self) -> str:
        """The backend in use."""
        return self._exchange.backend_name

    def set_shared_experts(self, shared_experts: nn.Module) -> None:
        """Run these beside the exchanges: their first GEMM beside dispatch, their second beside combine."""
        super().set_shared_experts(shared_experts)
        if shared_experts.use_shared_expert_gate:
            self.cudagraph_attrs.append("shared_experts.gate_score")
        self.cudagraph_attrs.append("shared_experts.cached_fc1_input")

    # Stages, in the order in which MoELayer calls them

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the routing map into choices; local.

        Args:
            hidden_states: [S / TP, B, H].
            routing_map: bool [T, E], T = S / TP * B.
            probs: [T, E].

        Returns:
            Tokens [T, H] and their K choices' probabilities [T, K] fp32.
        """
        self._hidden_shape = hidden_states.shape
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.topk_idx, chosen = self._choices(routing_map, probs, weight_dtype(tokens.dtype))
        return tokens.clone() if self._stages_are_freed else tokens, chosen

    def token_dispatch(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Send tokens to the ranks of their experts.

        Args:
            hidden_states: [T, H].
            probs: [T, K].
            async_finish: without effect: the current stream waits for what it reads.
            allocate_on_comm_stream: without effect.

        Returns:
            Rows [R, H] grouped by local expert and their probabilities [R]; the arguments again where shared experts
            run beside the exchange, which ``dispatch_postprocess`` then waits for.
        """
        assert self.topk_idx is not None
        topk_idx, probs = self._over_tensor_parallel(self.topk_idx, probs)
        tokens = hidden_states.contiguous()
        self._exchange = self._exchange_for(tokens.dtype, self._rows_per_expert(tokens.shape[0]))
        if self.shared_experts is not None:
            self._pending_dispatch = self._exchange.dispatch_async(tokens, topk_idx, probs)
            return hidden_states, probs
        return self._received(self._exchange.dispatch(tokens, topk_idx, probs))

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hand the rows to the experts.

        Args:
            hidden_states: what ``token_dispatch`` returned.
            probs: likewise.

        Returns:
            Rows [R, H], int64 [e] rows per expert on the CPU, and the rows' probabilities [R], differentiable.
        """
        if self._pending_dispatch is not None:
            assert self.shared_experts is not None
            self.shared_experts.linear_fc1_forward_and_act()
            hidden_states, probs = self._received(self._pending_dispatch.wait())
            self._pending_dispatch = None
        elif self._stages_are_freed:
            hidden_states = hidden_states.clone()
        tokens_per_expert, self._tokens_per_expert = self._tokens_per_expert, None
        assert tokens_per_expert is not None
        return hidden_states, tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Rows [R, H] as the experts returned them."""
        return hidden_states

    def token_combine(
        self, hidden_states: Tensor, async_finish: bool = True, allocate_on_comm_stream: bool = True
    ) -> Tensor:
        """Bring rows home and sum them per token, accumulated in fp32.

        Args:
            hidden_states: [R, H], weighted by the experts.
            async_finish: without effect.
            allocate_on_comm_stream: without effect.

        Returns:
            [T, H]; the argument again where shared experts run beside the exchange, which ``combine_postprocess`` then
            waits for.
        """
        handle, self._handle = self._handle, None
        assert handle is not None
        if self.shared_experts is not None:
            self._pending_combine = self._exchange.combine_async(hidden_states.contiguous(), handle)
            return hidden_states
        return self._exchange.combine(hidden_states.contiguous(), handle)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] as [S / TP, B, H], the shared experts' output added where they ran beside the exchanges."""
        assert self._hidden_shape is not None
        if self._pending_combine is None:
            return hidden_states.view(self._hidden_shape)
        assert self.shared_experts is not None
        self.shared_experts.linear_fc2_forward()
        self.shared_experts.post_forward_comm()
        hidden_states = self._pending_combine.wait()
        self._pending_combine = None
        return hidden_states.view(self._hidden_shape) + self.shared_experts.get_output()

    # Members that later releases of Megatron-Core call

    def get_expert_zero_copy_buffers(self) -> tuple[None, None]:
        """No buffer that experts could write into: rows are ordinary tensors."""
        return None, None

    def check_over_budget(self) -> None:
        """Nothing is dropped behind the router's back: there is no budget to exceed."""

    # Internals

    def _exchange_for(self, dtype: torch.dtype, per_expert: int | None) -> TokenDispatcher:
        """The exchange for rows of a dtype, with a fixed number of rows per expert or exact sizes; made once."""
        key = (dtype, per_expert)
        if key not in self._exchanges:
            self._exchanges[key] = TokenDispatcher(
                self.group,
                num_experts=self.num_experts * self.tp_size,
                hidden_size=hidden_size(self.config),
                top_k=self.config.moe_router_topk * self.tp_size,
                dtype=dtype,
                alignment=alignment(self.config),
                weights="experts",
                backend=self.backend,
                capacity=None if per_expert is None else Capacity(per_expert=per_expert),
            )
        return self._exchanges[key]

    def _rows_per_expert(self, num_tokens: int) -> int | None:
        if not self.drop_and_pad:
            return None
        factor = self.moe_expert_capacity_factor
        assert factor is not None
        return padded_rows(self.config, num_tokens, factor, self.group.size())

    def _choices(self, routing_map: Tensor, probs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ids int64 [T, K], -1 = no choice, and probabilities [T, K] of the routing map's ones."""
        top_k = self.config.moe_router_topk
        if not self.drop_and_pad:
            # Without a wait for the device. Pads of drop-and-pad are choices that the experts never see.
            torch._assert_async(
                (routing_map.sum(1) <= top_k).all(),
                f"the router chose more than moe_router_topk={top_k} experts for a token: raise moe_router_topk",
            )
        scores, ids = probs.detach().masked_fill(~routing_map, -1.0).topk(top_k, dim=1, sorted=False)
        return ids.masked_fill(scores < 0, -1), probs.gather(1, ids).to(dtype)

    def _over_tensor_parallel(self, topk_idx: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Choices of every rank that holds a part of the chosen expert; combine then sums the parts."""
        if self.tp_size == 1:
            return topk_idx, probs
        ranks = topk_idx // self.num_local_experts * self.tp_size
        parts = [(ranks + part) * self.num_local_experts for part in range(self.tp_size)]
        local = topk_idx % self.num_local_experts
        ids = torch.cat([(part + local).masked_fill(topk_idx < 0, -1) for part in parts], dim=1)
        return ids, probs.repeat(1, self.tp_size)

    def _received(self, routed: Dispatched) -> tuple[Tensor, Tensor]:
        self._handle = routed.handle
        self._tokens_per_expert = self._rows_of_experts(routed)
        return routed.x, routed.weights

    def _rows_of_experts(self, routed: Dispatched) -> Tensor:
        if routed.tokens_per_expert_list is None:
            rows = routed.num_rows // self.num_local_experts
            return torch.full((self.num_local_experts,), rows, dtype=torch.int64, device="cpu")
        step = self._exchange.alignment
        aligned = [-(-count // step) * step for count in routed.tokens_per_expert_list]
        return torch.tensor(aligned, dtype=torch.int64, device="cpu")
