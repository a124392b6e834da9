"""One MoE layer on one rank, forward and backward, against the same mathematics written plainly."""

import torch
from torch.nn import functional as F

from moe_ep.cli.bench.cases import Case
from moe_ep.cli.bench.timing import Contest, Rank
from moe_ep.layers import MoELayer


class PlainMoE(torch.nn.Module):
    """A single-process MoE layer as one writes it around ``grouped_mm``: no dispatcher, no groups of processes.

    Softmax router in fp32 with normalised weights, tokens sorted by expert, two grouped GEMMs with SwiGLU between, the
    rows weighted before the second GEMM, and one indexed sum back.

    Args:
        gate: router weight [E, H].
        gate_up: stacked weights [E, 2 I, H], gate first, each like that of ``torch.nn.Linear``.
        down: stacked weights [E, H, I].
        top_k: K.
    """

    def __init__(self, gate: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int) -> None:
        super().__init__()
        self.gate = torch.nn.Parameter(gate.detach().clone())
        self.gate_up = torch.nn.Parameter(gate_up.detach().clone())
        self.down = torch.nn.Parameter(down.detach().clone())
        self.top_k = top_k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        scores = F.linear(x.float(), self.gate.float()).softmax(-1)
        weights, topk_idx = scores.topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        choices = topk_idx.flatten()
        order = torch.argsort(choices, stable=True)
        ends = torch.bincount(choices, minlength=self.gate.shape[0]).cumsum(0).to(torch.int32)
        token = order // self.top_k
        gate, up = F.grouped_mm(x[token], self.gate_up.mT, offs=ends).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * weights.flatten()[order].unsqueeze(1).to(x.dtype)
        rows = F.grouped_mm(hidden, self.down.mT, offs=ends)
        return torch.zeros_like(x).index_add(0, token, rows)


class Trial:
    """One layer with its input: forward, then backward, as the two stages of a contest."""

    def __init__(self, layer: torch.nn.Module, x: torch.Tensor, grad_out: torch.Tensor) -> None:
        self.layer = layer
        self.x = x.clone().requires_grad_()
        self.grad_out = grad_out

    def forward(self, _: object) -> torch.Tensor:
        return self.layer(self.x)

    def backward(self, out: object) -> None:
        """Gradients are dropped first, so that backward writes them instead of adding to them."""
        assert isinstance(out, torch.Tensor)
        self.x.grad = None
        self.layer.zero_grad(set_to_none=True)
        out.backward(self.grad_out)


def layer_contest(rank: Rank, case: Case) -> Contest:
    """Prepare a ``MoELayer`` with all experts on this rank and the plain layer with copies of its weights.

    The inner size of an expert is H.
    """
    shape, dtype = case.shape, case.torch_dtype
    layer = MoELayer(
        None,
        hidden_size=shape.hidden,
        intermediate_size=shape.hidden,
        num_experts=shape.experts,
        top_k=shape.top_k,
        backend="torch",
        seed=case.seed,
        device=rank.device,
        dtype=dtype,
    )
    plain = PlainMoE(layer.router.weight, layer.experts.w_gate_up, layer.experts.w_down, shape.top_k)
    generator = torch.Generator().manual_seed(case.seed)
    x, grad_out = (torch.randn(case.tokens, shape.hidden, generator=generator).to(rank.device, dtype) for _ in range(2))
    ours, baseline = Trial(layer, x, grad_out), Trial(plain, x, grad_out)

    def check() -> tuple[float, bool]:
        outs = ours.forward(None), baseline.forward(None)
        ours.backward(outs[0])
        baseline.backward(outs[1])
        pairs = (
            outs,
            (ours.x.grad, baseline.x.grad),
            (layer.router.weight.grad, plain.gate.grad),
            (layer.experts.w_gate_up.grad, plain.gate_up.grad),
            (layer.experts.w_down.grad, plain.down.grad),
        )
        differences = [_relative(a, b) for a, b in pairs]
        return max(differences), max(differences) <= _bound(case)

    return Contest(
        stages=("forward", "backward"),
        ours=(ours.forward, ours.backward),
        baseline=(baseline.forward, baseline.backward),
        check=check,
    )


def _relative(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    """Norm of the difference over the norm of ``b``."""
    assert a is not None
    assert b is not None
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def _bound(case: Case) -> float:
    """How far two orders of the same arithmetic may part, as a share of the norm.

    Sums of n rounded terms part by about sqrt(n) epsilons; here n is at most the tokens of a weight gradient or the
    products of a GEMM, and five such steps follow each other.
    """
    terms = max(case.tokens, 2 * case.shape.hidden)
    return 5 * terms**0.5 * torch.finfo(case.torch_dtype).eps
