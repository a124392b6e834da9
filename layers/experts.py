"""The experts of one rank: stacked weights, one grouped GEMM for all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from moe_ep.layers.functions import (
    ExpandRows,
    ExpertLinear,
    GatedActivation,
    GradientSlot,
    LateGradient,
    ReduceRows,
    ScaleGradient,
    undefined_rows,
)
from moe_ep.layers.seeding import assign, seeded_uniform

Activation = str | Callable[[torch.Tensor], torch.Tensor]
_GATED = ("swiglu", "geglu")


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one forward: cast to the rows' dtype, gradients now or late.

    Attributes:
        gate_up: [e, 2I, H].
        down: [e, H, I].
        gate_up_slot: where the backward leaves the operands of a late weight gradient; None computes it at once.
        down_slot: likewise.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_slot: GradientSlot | None = None
    down_slot: GradientSlot | None = None

    def late(self) -> "ExpertWeights":
        """The same weights, whose gradients are computed where this call stands in the forward's order.

        Called between Launch and Wait of a dispatch, the weight GEMMs of the backward run under the reversed exchange.
        Good for one forward of the experts.
        """
        slots = [GradientSlot() if weight.requires_grad else None for weight in (self.gate_up, self.down)]
        gate_up, down = (
            weight if slot is None else LateGradient.apply(weight, slot)
            for weight, slot in zip((self.gate_up, self.down), slots, strict=True)
        )
        return ExpertWeights(gate_up, down, *slots)


class GroupedExperts(nn.Module):
    """Gated MLPs ``down(act(gate) * up)`` of the experts ``first_expert .. first_expert + e - 1``.

    Weights are stacked like those of ``torch.nn.Linear``: ``w_gate_up`` [e, 2I, H] (gate rows first) and ``w_down``
    [e, H, I]. Those of expert i are drawn from a generator seeded by (seed, layer_idx, i): the same model for every
    number of ranks. Both carry ``allreduce = False``: they belong to this rank, and data-parallel wrappers must leave
    them out.

    Args:
        num_local_experts: e.
        hidden_size: H.
        intermediate_size: I.
        first_expert: global number of the first expert here.
        activation: ``"swiglu"``, ``"geglu"`` (exact gelu), or a callable from [..., 2I] to [..., I] that works row by
            row; its rows past the counts may be NaN.
        late_wgrad: split the backward, so that :class:`MoELayer` computes weight gradients under the reversed dispatch.
            Ignored while compiling.
        seed: of the parameters.
        layer_idx: which layer of the model this is.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        ep_dim: dimension of the parameters' mesh over which experts are spread, where parameters are DTensors of all E
            experts; None where they are tensors of the local ones.
        gradient_scale: multiplies the parameters' gradients, 1.0 at first.

    Example:
        >>> experts = GroupedExperts(2, hidden_size=16, intermediate_size=32)
        >>> rows, ends = torch.randn(5, 16), torch.tensor([3, 5], dtype=torch.int32)
        >>> tuple(experts(rows, ends).shape)
        (5, 16)
    """

    def __init__(
        self,
        num_local_experts: int,
        *,
        hidden_size: int,
        intermediate_size: int,
        first_expert: int = 0,
        activation: Activation = "swiglu",
        late_wgrad: bool = False,
        seed: int = 0,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        sizes = {"num_local_experts": num_local_experts, "hidden_size": hidden_size}
        for name, size in {**sizes, "intermediate_size": intermediate_size}.items():
            if size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1")
        self.num_local_experts, self.first_expert = num_local_experts, first_expert
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.late_wgrad = activation, late_wgrad
        self.seed, self.layer_idx = seed, layer_idx
        self.ep_dim: str | None = None
        self.gradient_scale = 1.0
        e, width = num_local_experts, 2 * intermediate_size
        self.w_gate_up = nn.Parameter(torch.empty(e, width, hidden_size, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(e, hidden_size, intermediate_size, device=device, dtype=dtype))
        self._mark_parameters()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws every expert's parameters anew from (seed, layer_idx, expert); works after ``to_empty``."""
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            shape, key = tuple(parameter.shape[1:]), (self.seed, self.layer_idx)
            experts = range(self.first_expert, self.first_expert + self.num_local_experts)
            value = torch.stack([seeded_uniform(shape, shape[1], *key, i, name) for i in experts])
            assign(parameter, value, self.ep_dim)

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The local weights cast to ``dtype``, to be used by one or several forwards under the same autocast."""
        return ExpertWeights(self._local(self.w_gate_up).to(dtype), self._local(self.w_down).to(dtype))

    def forward(
        self,
        rows: torch.Tensor,
        expert_ends: torch.Tensor,
        row_weights: torch.Tensor | None = None,
        *,
        topk_idx: torch.Tensor | None = None,
        tokens_per_expert: torch.Tensor | None = None,
        num_copies: int | None = None,
        rows_per_expert: int | None = None,
        weights: ExpertWeights | None = None,
    ) -> torch.Tensor:
        """Runs each row through its expert. Waits for the device only where ``F.grouped_mm`` does not apply.

        Args:
            rows: expanded [N, H], compact [N, H] with ``topk_idx``, or slab [e, C, H]. Rows past an expert's count
                (slab) or past ``expert_ends[-1]`` may hold anything and come out as anything, but reach no other row
                and no gradient of a parameter.
            expert_ends: int32 [e], end of each expert's group; not read for slabs and compact rows.
            row_weights: multiplied in before the second GEMM, in the layout of ``Dispatched.weights``: expanded [N],
                compact [N, K], slab [e, C]. None multiplies nothing; compact rows need it.
            topk_idx: int64 [N, K], local expert of each choice or -1, compact rows only; the result sums over choices.
            tokens_per_expert: int32 [e], rows of each expert; slabs and compact rows need it.
            num_copies: compact rows only: the sum of ``tokens_per_expert`` where the host knows it. None computes
                N * min(K, e) rows.
            rows_per_expert: expanded rows in groups of this fixed size, padding rows zero: computed as a batched GEMM.
            weights: what :meth:`weights` returned, to share a cast or for late gradients; None takes the parameters.

        Returns:
            A tensor of the shape and dtype of ``rows``.
        """
        weights = weights or self.weights(rows.dtype)
        if topk_idx is not None:
            return self._compact(rows, row_weights, topk_idx, tokens_per_expert, num_copies, weights)
        if rows.dim() == 3:
            return self._slab(rows, row_weights, tokens_per_expert, weights)
        if rows_per_expert is not None:
            shape = (self.num_local_experts, rows_per_expert)
            row_weights = None if row_weights is None else row_weights.view(shape)
            return self._run(rows.view(*shape, rows.shape[1]), row_weights, None, weights).view_as(rows)
        return self._run(rows, row_weights, expert_ends, weights)

    def extra_repr(self) -> str:
        last = self.first_expert + self.num_local_experts - 1
        return f"experts {self.first_expert}..{last}, {self.hidden_size}, {self.intermediate_size}"

    def _mark_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.allreduce = False  # type: ignore[attr-defined]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # to_empty makes new parameters, without the mark of the old ones; so does deepcopy.
        self._mark_parameters()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()

    def _local(self, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        return weight if self.gradient_scale == 1.0 else ScaleGradient.apply(weight, self.gradient_scale)

    def _run(
        self, rows: torch.Tensor, row_weights: torch.Tensor | None, bounds: torch.Tensor | None, weights: ExpertWeights
    ) -> torch.Tensor:
        hidden = ExpertLinear.apply(rows, weights.gate_up, bounds, weights.gate_up_slot)
        hidden = activate(hidden, row_weights, self.activation)
        return ExpertLinear.apply(hidden, weights.down, bounds, weights.down_slot)

    def _slab(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        counts: torch.Tensor | None,
        weights: ExpertWeights,
    ) -> torch.Tensor:
        if counts is None:
            raise ValueError("tokens_per_expert is None: slabs need it to tell rows that count; pass Dispatched's")
        if row_weights is not None:
            # The fill stands in the graph so that undefined rows give weights no gradient.
            row_weights = row_weights.masked_fill(undefined_rows(counts, rows.shape[1]), 0)
        return self._run(rows, row_weights, counts, weights)

    def _compact(
        self,
        rows: torch.Tensor,
        row_weights: torch.Tensor | None,
        topk_idx: torch.Tensor,
        counts: torch.Tensor | None,
        num_copies: int | None,
        weights: ExpertWeights,
    ) -> torch.Tensor:
        if counts is None or row_weights is None:
            name = "tokens_per_expert" if counts is None else "row_weights"
            raise ValueError(f"{name} is None: compact rows need it; pass Dispatched's")
        top_k = topk_idx.shape[1]
        if num_copies is None:
            num_copies = topk_idx.shape[0] * min(top_k, self.num_local_experts)
        # A stable sort keeps the order (source rank, token) inside each expert; -1 goes last.
        ids = topk_idx.flatten()
        order = torch.where(ids < 0, self.num_local_experts, ids).argsort(stable=True)
        choices = order[:num_copies]
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        places = torch.where(ids < 0, -1, places).view_as(topk_idx)
        sources = choices.div(top_k, rounding_mode="floor")
        copy_weights = row_weights.masked_fill(topk_idx < 0, 0).flatten().index_select(0, choices)
        ends = counts.cumsum(0, dtype=torch.int32)
        copies = self._run(ExpandRows.apply(rows, sources, places), copy_weights, ends, weights)
        return ReduceRows.apply(copies, sources, places)


def activate(hidden: torch.Tensor, row_weights: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """Applies an activation and multiplies rows by their weights.

    Args:
        hidden: [..., 2I], gate first.
        row_weights: [...] or None.
        activation: as for :class:`GroupedExperts`.

    Returns:
        [..., I] of the dtype of ``hidden``.
    """
    if isinstance(activation, str) and not torch.compiler.is_compiling():
        return GatedActivation.apply(hidden, row_weights, activation)
    out = _gated(hidden, activation) if isinstance(activation, str) else activation(hidden)
    if out.shape != (*hidden.shape[:-1], hidden.shape[-1] // 2):
        expected = [*hidden.shape[:-1], hidden.shape[-1] // 2]
        raise ValueError(f"activation returned shape {list(out.shape)}: it must map [..., 2I] to [..., I] = {expected}")
    return out if row_weights is None else (out * row_weights.unsqueeze(-1)).to(hidden.dtype)


def _gated(hidden: torch.Tensor, kind: str) -> torch.Tensor:
    """The formula of GatedActivation in plain operators, which a compiler fuses."""
    gate, up = hidden.chunk(2, -1)
    return (F.silu(gate) if kind == "swiglu" else F.gelu(gate)) * up


def check_activation(activation: Activation) -> None:
    """Raises ValueError unless ``activation`` names a gated activation or is callable."""
    if not callable(activation) and activation not in _GATED:
        raise ValueError(f"activation is {activation!r}: it must be 'swiglu', 'geglu' or a callable on [..., 2I]")
