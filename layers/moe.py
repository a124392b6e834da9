"""The whole MoE layer: router, exchange, experts, shared expert."""

import contextlib
from typing import Any, Literal, NoReturn, overload

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moe_ep.buffer import Buffer
from moe_ep.config import Capacity
from moe_ep.dispatcher import Dispatched, TokenDispatcher
from moe_ep.errors import MoeEpError
from moe_ep.layers.experts import Activation, ExpertWeights, GroupedExperts
from moe_ep.layers.operators import count
from moe_ep.layers.router import Routing, TopKRouter
from moe_ep.layers.shared import SharedExpert
from moe_ep.layers.state import StateDict, gather_full_state_dict, load_full_state_dict
from moe_ep.untraced import untraced


class MoELayer(nn.Module):
    """A mixture-of-experts layer whose experts are spread over the ranks of a group.

    Every parameter is drawn from (seed, layer_idx) and, for an expert, its number: the same model for every number of
    ranks. Router and weights compute in fp32; rows and expert GEMMs take the input's dtype, or autocast's. Outside
    autocast the input has the dtype of the expert parameters.

    Expert parameters belong to this rank alone (``allreduce = False``): keep them out of data-parallel averaging with
    ``ignore_experts_in_ddp(model)`` before DDP, or ``ignored_params=set(layer.experts.parameters())`` in FSDP2's
    ``fully_shard``, and divide their gradients with ``scale_expert_gradients``, which says why. FSDP2 shards the layer
    as one unit: the halves of the shared expert are called from this layer's forward, not through its own. Do so
    without ``mp_policy``, which would cast the input but not the ignored experts; for mixed precision use
    ``moe_ep.integrations.fsdp.apply_ep`` instead.

    Auxiliary losses enter the gradient by themselves, on the edge of the router weights, scaled by
    ``router.loss_scale``; under checkpointing, DDP and pipelines nothing else is needed. With ``scope="group"`` they
    are summed over the ranks: on a CPU through the dispatcher's Buffer, with ``timeout_s`` and the errors of its
    exchanges; on a GPU and in a router of another class by the group's own all-reduce, which the group's own timeout
    bounds.

    ``torch.compile`` works, with ``fullgraph=True`` where ``num_chunks=1``; exchanges are then synchronous and
    ``late_wgrad`` has no effect. More chunks, and without ``fullgraph`` each dispatch, break the graph.

    Args:
        group: ProcessGroup or 1-D DeviceMesh over which the experts are spread; None for one rank with all of them.
        hidden_size: H.
        intermediate_size: I of the routed experts.
        num_experts: E, a multiple of the ranks.
        top_k: K.
        router: a router of H, E and K, whose routing may hold -1 for no choice; None makes a :class:`TopKRouter` with
            ``router_options``.
        shared_intermediate_size: I of the shared expert; 0 for none.
        shared_gate: give the shared expert a sigmoid gate.
        activation: of all experts, see :class:`GroupedExperts`.
        num_chunks: exchange and compute the tokens in this many parts, so that a part's exchanges run beside another's
            GEMMs. The same on all ranks, whatever their tokens. ``capacity`` then holds for each part.
        late_wgrad: compute the experts' weight gradients under the reversed dispatch; exact.
        weights: ``"experts"`` multiplies rows before the second GEMM, ``"combine"`` in combine, which keeps y for it.
        layout: ``"expanded"``, ``"compact"`` (needs ``weights="experts"``) or ``"slab"``.
        alignment: of the groups of expanded rows.
        capacity: None for exact sizes, or a :class:`moe_ep.Capacity`.
        on_overflow: ``"raise"`` or ``"drop"``.
        max_tokens_per_rank: most tokens of a forward on any rank; slabs need it.
        backend: of the exchanges.
        sm_budget: SMs that GEMMs leave to exchanges in flight, see :class:`moe_ep.TokenDispatcher`.
        timeout_s: of the exchanges, seconds.
        seed: of the parameters.
        layer_idx: which layer of the model this is.
        device: of the parameters; ``"meta"`` needs ``to_empty`` and ``reset_parameters`` later.
        dtype: of the expert parameters; None is torch's default. The router's are fp32, or fp64 when this is.
        **router_options: keyword arguments of :class:`TopKRouter`.

    Attributes:
        router: the router.
        experts: this rank's :class:`GroupedExperts`.
        shared_expert: a :class:`SharedExpert` or None.
        dispatcher: the :class:`moe_ep.TokenDispatcher`.
        tokens_per_expert: int64 [E], choices this rank made since :meth:`reset_stats`; a buffer outside state dicts,
            filled without waiting for the device, not counted twice under activation checkpointing.

    Example:
        >>> layer = MoELayer(None, hidden_size=16, intermediate_size=32, num_experts=4, top_k=2)
        >>> y = layer(torch.randn(2, 3, 16))
        >>> tuple(y.shape), int(layer.tokens_per_expert.sum())
        ((2, 3, 16), 12)
    """

    tokens_per_expert: torch.Tensor

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        router: TopKRouter | None = None,
        shared_intermediate_size: int = 0,
        shared_gate: bool = False,
        activation: Activation = "swiglu",
        num_chunks: int = 1,
        late_wgrad: bool = False,
        weights: Literal["combine", "experts"] = "experts",
        layout: Literal["expanded", "compact", "slab"] = "expanded",
        alignment: int = 1,
        capacity: Capacity | None = None,
        on_overflow: Literal["raise", "drop"] = "raise",
        max_tokens_per_rank: int | None = None,
        backend: Literal["auto", "torch", "cuda"] = "auto",
        sm_budget: int | None = None,
        timeout_s: float | None = None,
        seed: int = 0,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ) -> None:
        super().__init__()
        if num_chunks < 1:
            raise ValueError(f"num_chunks is {num_chunks}: it must be at least 1; 1 exchanges all tokens at once")
        if router is not None and router_options:
            raise ValueError(f"router and {sorted(router_options)} are both given: give these options to the router")
        if router is not None:
            _check_router(router, hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        dtype = dtype or torch.get_default_dtype()
        self.hidden_size, self.num_experts, self.num_chunks = hidden_size, num_experts, num_chunks
        self.dispatcher = TokenDispatcher(
            group,
            num_experts=num_experts,
            hidden_size=hidden_size,
            top_k=top_k,
            dtype=dtype,
            layout=layout,
            alignment=alignment,
            weights=weights,
            capacity=capacity,
            on_overflow=on_overflow,
            max_tokens_per_rank=None if max_tokens_per_rank is None else -(-max_tokens_per_rank // num_chunks),
            backend=backend,
            sm_budget=sm_budget,
            timeout_s=timeout_s,
        )
        # What hooks are told.
        self.dispatcher.layer = layer_idx
        common: dict[str, Any] = {"seed": seed, "layer_idx": layer_idx, "device": device}
        if router is None:
            router_dtype = torch.promote_types(dtype, torch.float32)
            router = TopKRouter(hidden_size, num_experts, top_k, **{"dtype": router_dtype, **common, **router_options})
        self.router = router
        num_local_experts = self.dispatcher.num_local_experts
        self.experts = GroupedExperts(
            num_local_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            first_expert=self.dispatcher.rank * num_local_experts,
            activation=activation,
            late_wgrad=late_wgrad,
            dtype=dtype,
            **common,
        )
        self.shared_expert: SharedExpert | None = None
        if shared_intermediate_size:
            shared_options = {"gate": shared_gate, "activation": activation, "dtype": dtype, **common}
            self.shared_expert = SharedExpert(hidden_size, shared_intermediate_size, **shared_options)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.register_buffer("tokens_per_expert", counts, persistent=False)

    @overload
    def forward(self, x: torch.Tensor, *, return_losses: Literal[False] = False) -> torch.Tensor: ...

    @overload
    def forward(self, x: torch.Tensor, *, return_losses: Literal[True]) -> tuple[torch.Tensor, StateDict]: ...

    def forward(self, x: torch.Tensor, *, return_losses: bool = False) -> torch.Tensor | tuple[torch.Tensor, StateDict]:
        """Routes every token to its experts and sums what they return. Collective over the group.

        Args:
            x: [..., H]; all but the last two dimensions count sequences for ``seq_aux_loss``. Ranks may differ in size
                and may have no tokens.
            return_losses: return the auxiliary losses, differentiable, instead of attaching them; the caller adds them.

        Returns:
            [..., H] of the rows' dtype; with ``return_losses`` also the losses by name, 0-dim, times coefficients.

        Raises:
            ValueError: no tensor, wrong last dimension or dtype, here; the other ranks get PeerAbortedError. They do
                for whatever else this rank's router raises, unless they sum losses by an all-reduce of the group, which
                waits for this rank. What is raised while ``torch.compile`` traces one graph is not told.
            MoeEpError: whatever the exchange raises.
        """
        group = self._loss_group()
        try:
            dtype = self._rows_dtype(x)
        # Here and below, whatever it is: peers wait for this rank.
        except Exception as error:
            self._refuse(error, group, return_losses)
        try:
            routing = self.router(x, group=group, return_losses=return_losses)
        except MoeEpError:
            raise
        except Exception as error:
            self._refuse(error)
        count(self.tokens_per_expert, routing.tokens_per_expert)
        tokens = x.reshape(-1, self.hidden_size).contiguous()
        in_one = self.num_chunks == 1 and (torch.compiler.is_compiling() or self.dispatcher.group_size == 1)
        out = (self._synchronous if in_one else self._pipelined)(tokens, routing, self.experts.weights(dtype), dtype)
        if out.shape != x.shape:
            # Not a view to autograd: FSDP2 loses its backward hook when a view that a module returned changes in place.
            out = torch.ops.aten._unsafe_view(out, x.shape)
        return (out, routing.losses) if return_losses else out

    def reset_parameters(self) -> None:
        """Draws all parameters anew and zeroes all counters; works after ``to_empty``."""
        for part in (self.router, self.experts, self.shared_expert):
            if part is not None:
                part.reset_parameters()
        self.reset_stats()

    def reset_stats(self) -> None:
        """Zeroes ``tokens_per_expert``."""
        self.tokens_per_expert.zero_()

    def update_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """:meth:`TopKRouter.update_bias` over ``group``, by default the expert-parallel one: per optimizer step."""
        self.router.update_bias(self.dispatcher.group if group is None else group)

    def set_group(self, group: dist.ProcessGroup | DeviceMesh | None) -> None:
        """Attaches a group after ``torch.load``. This rank must hold the place in it that it held when it was saved.

        Raises:
            ValueError: another number of ranks, or another rank; load a full state dict into a new layer instead.
        """
        self.dispatcher.set_group(group)
        place = self.dispatcher.rank * self.dispatcher.num_local_experts
        sizes = (self.dispatcher.num_local_experts, place)
        if sizes != (self.experts.num_local_experts, self.experts.first_expert):
            raise ValueError(
                f"group has {self.dispatcher.group_size} ranks and this is rank {self.dispatcher.rank}, but the layer"
                f" holds {self.experts.extra_repr()}: build a new layer and call load_full_state_dict"
            )

    def gather_full_state_dict(self) -> StateDict:
        """The unsharded layer's state dict, on every rank; collective. See :mod:`moe_ep.layers.state`."""
        return gather_full_state_dict(self, self.dispatcher.group)

    def load_full_state_dict(self, full: StateDict) -> None:
        """Loads this rank's slice of a full state dict; names as in ``state_dict()``."""
        load_full_state_dict(self, full, self.dispatcher.group)

    def extra_repr(self) -> str:
        return f"num_chunks={self.num_chunks}"

    def _loss_group(self) -> dist.ProcessGroup | Buffer | None:
        """Over what the router sums its losses; the same on all ranks, whatever their input."""
        group, device = self.dispatcher.group, self.experts.w_gate_up.device
        if group is None or device.type != "cpu":
            return group
        return self.dispatcher.buffer if isinstance(self.router, TopKRouter) else group

    def _refuse(
        self, error: Exception, group: dist.ProcessGroup | Buffer | None = None, return_losses: bool = False
    ) -> NoReturn:
        """Raises an error of this rank's input after telling the peers.

        Args:
            error: what is wrong.
            group: over which the peers' routers may be summing losses with a collective of their own, which cannot
                carry an error: this rank takes part in it with no tokens. None where it did already.
            return_losses: of the forward.
        """
        if isinstance(group, dist.ProcessGroup):
            weight = self.experts.w_gate_up
            nothing = torch.empty(0, self.hidden_size, device=weight.device, dtype=weight.dtype)
            # What is wrong may show here again.
            with torch.no_grad(), contextlib.suppress(Exception):
                self.router(nothing, group=group, return_losses=return_losses)
        self.dispatcher._live().refuse("plan" if self.num_chunks > 1 else "dispatch", error)

    def _rows_dtype(self, x: torch.Tensor) -> torch.dtype:
        if not isinstance(x, torch.Tensor):
            raise ValueError(f"x is {type(x).__name__}: pass a tensor [..., {self.hidden_size}]")
        if x.dim() == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"x has shape {list(x.shape)}: its last dimension must be hidden_size={self.hidden_size}")
        # Autocast leaves fp64 alone, here as in torch.
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        if x.dtype != self.experts.w_gate_up.dtype:
            raise ValueError(
                f"x is {x.dtype} but the experts are {self.experts.w_gate_up.dtype}: cast one of them, or use autocast"
            )
        return x.dtype

    def _synchronous(
        self, tokens: torch.Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype
    ) -> torch.Tensor:
        """One exchange with nothing beside it: no pending objects for a compiler, no overhead for one rank."""
        routed = self.dispatcher.dispatch(tokens.to(dtype), routing.topk_idx, routing.topk_weights)
        out = self.dispatcher.combine(self._experts(routed, weights), routed.handle, self._combine_weights(routed))
        return out if self.shared_expert is None else out + self.shared_expert(tokens)

    @untraced
    def _pipelined(
        self, tokens: torch.Tensor, routing: Routing, weights: ExpertWeights, dtype: torch.dtype
    ) -> torch.Tensor:
        """The order of calls is the schedule of forward and, reversed, of backward."""
        base, extra = divmod(tokens.shape[0], self.num_chunks)
        sizes = [base + (i < extra) for i in range(self.num_chunks)]
        rows, ids = tokens.to(dtype).split(sizes), routing.topk_idx.split(sizes)
        row_weights = routing.topk_weights.split(sizes)
        planned = self.dispatcher.plan(list(ids)) if self.num_chunks > 1 else [None]
        pending = self.dispatcher.dispatch_async(rows[0], ids[0], row_weights[0], planned[0])
        hidden = None if self.shared_expert is None else self.shared_expert.first_half(tokens)
        combines = []
        for i in range(self.num_chunks):
            arriving = pending
            if i + 1 < self.num_chunks:
                chunk = rows[i + 1], ids[i + 1], row_weights[i + 1]
                pending = self.dispatcher.dispatch_async(*chunk, planned[i + 1])
            own = weights.late() if self.experts.late_wgrad else weights
            routed = arriving.wait()
            y = self._experts(routed, own)
            combines.append(self.dispatcher.combine_async(y, routed.handle, self._combine_weights(routed)))
        shared = None if self.shared_expert is None or hidden is None else self.shared_expert.second_half(hidden)
        outs = [combine.wait() for combine in combines]
        out = outs[0] if self.num_chunks == 1 else torch.cat(outs)
        return out if shared is None else out + shared

    def _experts(self, routed: Dispatched, weights: ExpertWeights) -> torch.Tensor:
        layout, capacity = self.dispatcher.layout, self.dispatcher.capacity
        counts = routed.tokens_per_expert_list
        fixed = layout == "expanded" and capacity is not None and capacity.rows is None
        return self.experts(
            routed.x,
            routed.expert_ends,
            routed.weights if self.dispatcher.weights == "experts" else None,
            topk_idx=routed.topk_idx if layout == "compact" else None,
            tokens_per_expert=routed.tokens_per_expert,
            num_copies=sum(counts) if layout == "compact" and counts is not None else None,
            rows_per_expert=routed.x.shape[0] // self.experts.num_local_experts if fixed else None,
            weights=weights,
        )

    def _combine_weights(self, routed: Dispatched) -> torch.Tensor | None:
        return routed.weights if self.dispatcher.weights == "combine" else None


def _check_router(router: nn.Module, **sizes: int) -> None:
    """Compares sizes of a given router with the layer's, where it says them."""
    for name, wanted in sizes.items():
        value = getattr(router, name, wanted)
        if value != wanted:
            raise ValueError(
                f"router has {name}={value}: it must be the layer's {name}={wanted}; build the router with that, or "
                f"pass {name}={value} to the layer"
            )
