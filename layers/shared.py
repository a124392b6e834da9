"""The expert that every token visits, in two halves that run beside the exchanges of the routed ones."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from moe_ep.layers.experts import activate, check_activation
from moe_ep.layers.seeding import assign, seeded_uniform


class SharedExpert(nn.Module):
    """A gated MLP over all tokens: ``down(act(gate) * up)``, optionally times ``sigmoid(x @ gate.T)`` per token.

    Args:
        hidden_size: H.
        intermediate_size: I.
        gate: multiply each token's output by a learned sigmoid gate (Qwen2-MoE).
        activation: ``"swiglu"``, ``"geglu"``, or a callable from [..., 2I] to [..., I] that works row by row.
        seed: of the parameters.
        layer_idx: which layer of the model this is.
        device: of the parameters.
        dtype: of the parameters.

    Example:
        >>> shared = SharedExpert(16, 32, gate=True)
        >>> x = torch.randn(5, 16)
        >>> bool(torch.equal(shared(x), shared.second_half(shared.first_half(x))))
        True
    """

    w_gate: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        gate: bool = False,
        activation: str | Callable[[torch.Tensor], torch.Tensor] = "swiglu",
        seed: int = 0,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.activation, self.seed, self.layer_idx = activation, seed, layer_idx
        self.w_gate_up = nn.Parameter(torch.empty(2 * intermediate_size, hidden_size, device=device, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(hidden_size, intermediate_size, device=device, dtype=dtype))
        weight = nn.Parameter(torch.empty(1, hidden_size, device=device, dtype=dtype)) if gate else None
        self.register_parameter("w_gate", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew from (seed, layer_idx); works after ``to_empty``."""
        for name, parameter in self.named_parameters(recurse=False):
            if not parameter.is_meta:
                key = (self.seed, self.layer_idx, f"shared.{name}")
                assign(parameter, seeded_uniform(tuple(parameter.shape), parameter.shape[1], *key))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [T, H] to [T, H]."""
        return self.second_half(self.first_half(x))

    def first_half(self, x: torch.Tensor) -> torch.Tensor:
        """First GEMM, activation and gate: ``x`` [T, H] to [T, I]."""
        gate = None if self.w_gate is None else F.linear(x, self.w_gate).squeeze(-1).sigmoid()
        return activate(F.linear(x, self.w_gate_up), gate, self.activation)

    def second_half(self, hidden: torch.Tensor) -> torch.Tensor:
        """Second GEMM: ``hidden`` [T, I] to [T, H]."""
        return F.linear(hidden, self.w_down)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.intermediate_size}, gate={self.w_gate is not None}"
