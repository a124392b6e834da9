"""The router: scores, choices, weights, balance."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moe_ep.buffer import Buffer
from moe_ep.layers.functions import AttachLoss
from moe_ep.layers.losses import RouterLosses, count_choices
from moe_ep.layers.operators import after, count
from moe_ep.layers.seeding import assign, seeded_uniform

# Keeps the normalisation of sigmoid scores finite where all of a token's scores vanish (DeepSeek-V3's constant).
_TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router decided.

    Attributes:
        topk_idx: int64 [T, K], global expert of each choice, no expert twice in a row.
        topk_weights: fp32 (fp64 for fp64 input) [T, K], differentiable, auxiliary losses attached unless returned.
        tokens_per_expert: int64 [E], choices of this batch per expert.
        losses: auxiliary losses by name, 0-dim, multiplied by their coefficients; detached where they are attached to
            the weights.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    tokens_per_expert: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)


class TopKRouter(nn.Module):
    """Chooses K of E experts per token, in fp32 whatever the input's dtype or autocast (fp64 stays fp64).

    The weight [E, H] is drawn from a generator seeded by (seed, layer_idx): the same on every rank.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K, at most the experts of ``topk_groups`` groups.
        score_function: ``"softmax"`` over the experts or ``"sigmoid"`` of each logit.
        normalize_weights: divide the chosen scores by their sum. With K = 1 weights are then 1 and give no gradient.
        weight_scale: factor on the weights.
        num_groups: equal groups of consecutive experts, of which each token may use ``topk_groups`` only. A group's
            score is the sum of its best max(1, K // topk_groups) scores (DeepSeek-V3: best 2).
        topk_groups: groups a token may use.
        use_correction_bias: add a bias buffer to the scores for the choice, not for the weights (arXiv 2408.15664).
        bias_update_rate: step of :meth:`update_bias`.
        aux_loss_coef: coefficient of the load balance loss over the batch.
        seq_aux_loss_coef: coefficient of the load balance loss over each sequence.
        z_loss_coef: coefficient of the squared log-sum-exp of the logits.
        scope: ``"rank"`` computes losses over this rank's tokens, ``"group"`` over those of all ranks of the group;
            :mod:`moe_ep.layers.losses` states the convention. ``"group"`` costs one small sum over ranks per forward.
        force_balance: choose experts round-robin instead of by score, for benchmarks; weights stay differentiable.
        seed: of the parameters.
        layer_idx: which layer of the model this is; another layer draws other numbers.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        loss_scale: float or 0-dim tensor on the device, factor of attached losses' gradients. Set it, before the
            forward, to what the caller's own loss is multiplied by before ``backward()``: GradScaler's scale, 1 /
            accumulation steps.
        correction_bias: fp32 [E], persistent, fp32 also after ``.to(dtype)``; None unless used.

    Example:
        >>> router = TopKRouter(16, 8, 2, score_function="sigmoid", aux_loss_coef=0.01)
        >>> routing = router(torch.randn(5, 16))
        >>> tuple(routing.topk_idx.shape), routing.topk_weights.dtype, sorted(routing.losses)
        ((5, 2), torch.float32, ['aux_loss'])
    """

    correction_bias: torch.Tensor | None
    bias_counts: torch.Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: Literal["softmax", "sigmoid"] = "softmax",
        normalize_weights: bool = True,
        weight_scale: float = 1.0,
        num_groups: int = 1,
        topk_groups: int = 1,
        use_correction_bias: bool = False,
        bias_update_rate: float = 1e-3,
        aux_loss_coef: float = 0.0,
        seq_aux_loss_coef: float = 0.0,
        z_loss_coef: float = 0.0,
        scope: Literal["rank", "group"] = "rank",
        force_balance: bool = False,
        seed: int = 0,
        layer_idx: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        _check_choice("score_function", score_function, ("softmax", "sigmoid"))
        _check_choice("scope", scope, ("rank", "group"))
        _check_groups(num_experts, top_k, num_groups, topk_groups)
        self.hidden_size, self.num_experts, self.top_k = hidden_size, num_experts, top_k
        self.score_function, self.normalize_weights, self.weight_scale = score_function, normalize_weights, weight_scale
        self.num_groups, self.topk_groups = num_groups, topk_groups
        self.bias_update_rate = bias_update_rate
        self.loss_coefs = RouterLosses(aux=aux_loss_coef, seq_aux=seq_aux_loss_coef, z=z_loss_coef)
        self.scope, self.force_balance = scope, force_balance
        self.seed, self.layer_idx = seed, layer_idx
        self.loss_scale: float | torch.Tensor = 1.0
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        bias = torch.empty(num_experts, device=device, dtype=torch.float32) if use_correction_bias else None
        counts = torch.empty(num_experts, device=device, dtype=torch.int64) if use_correction_bias else None
        self.register_buffer("correction_bias", bias)
        self.register_buffer("bias_counts", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew from (seed, layer_idx) and zeroes the buffers; works after ``to_empty``."""
        if self.weight.is_meta:
            return
        shape = (self.num_experts, self.hidden_size)
        assign(self.weight, seeded_uniform(shape, self.hidden_size, self.seed, self.layer_idx, "router"))
        if self.correction_bias is not None and self.bias_counts is not None:
            self.correction_bias.zero_()
            self.bias_counts.zero_()

    def forward(
        self, x: torch.Tensor, *, group: dist.ProcessGroup | Buffer | None = None, return_losses: bool = False
    ) -> Routing:
        """Routes a batch. Never waits for the device, but where losses are summed through a Buffer.

        Args:
            x: [..., S, H] floating point; all but the last two dimensions count sequences, [T, H] is one sequence, [H]
                is one token.
            group: ranks of ``scope="group"``; the call is then collective while losses are computed. A ProcessGroup
                all-reduces, on its device; a Buffer sums on the host, with the bound and the errors of its exchanges.
                None: this rank.
            return_losses: return the losses differentiable instead of attaching them to the weights.

        Returns:
            The routing of the T = prod(x.shape[:-1]) tokens. Losses are computed in training mode, or when returned.
        """
        seq_len, num_seqs = x.shape[-2] if x.dim() > 1 else 1, math.prod(x.shape[:-2])
        # Sizes are spelled out: -1 is ambiguous for an empty batch.
        logits = self._logits(x.reshape(num_seqs, seq_len, x.shape[-1]))
        scores = logits.softmax(-1) if self.score_function == "softmax" else logits.sigmoid()
        topk_idx = self._choose(scores.detach())
        counts = count_choices(topk_idx.flatten(1), self.num_experts)
        losses = {}
        if self.loss_coefs and (self.training or return_losses):
            probs = scores if self.score_function == "softmax" else scores / (scores.sum(-1, keepdim=True) + _TINY)
            losses = self.loss_coefs(logits, probs, counts, self.top_k, group if self.scope == "group" else None)
        weights = self._weights(scores, topk_idx).flatten(0, 1)
        if losses and not return_losses:
            weights = AttachLoss.apply(weights, sum(losses.values()) * self.loss_scale)
            losses = {name: loss.detach() for name, loss in losses.items()}
        topk_idx, counts = topk_idx.flatten(0, 1), counts.sum(0)
        if losses and self.scope == "group" and isinstance(group, Buffer):
            topk_idx = after(topk_idx, losses.values())
        if self.bias_counts is not None and self.training:
            count(self.bias_counts, counts)
        return Routing(topk_idx=topk_idx, topk_weights=weights, tokens_per_expert=counts, losses=losses)

    @torch.no_grad()
    def update_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """Moves the correction bias against the imbalance since the last call: once per optimizer step.

        ``bias += rate * sign(mean count - count)``, with counts of training forwards (a recomputation under activation
        checkpointing does not count twice) summed over ``group``, the ranks that hold copies of this router; collective
        when a group is given. Does nothing without a bias.
        """
        if self.correction_bias is None or self.bias_counts is None:
            return
        if group is not None:
            dist.all_reduce(self.bias_counts, group=group)
        counts = self.bias_counts.double()
        self.correction_bias += torch.sign(counts.mean() - counts).float() * self.bias_update_rate
        self.bias_counts.zero_()

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, {self.num_experts}, top_k={self.top_k}, score_function={self.score_function!r}"

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def _choose(self, scores: torch.Tensor) -> torch.Tensor:
        """int64 [B, S, K] chosen experts for ``scores`` [B, S, E]."""
        if self.force_balance:
            num_seqs, seq_len, _ = scores.shape
            choices = torch.arange(num_seqs * seq_len * self.top_k, device=scores.device)
            return choices.remainder(self.num_experts).view(num_seqs, seq_len, self.top_k)
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        if self.topk_groups < self.num_groups:
            scores = self._mask_groups(scores)
        return scores.topk(self.top_k, dim=-1).indices

    def _mask_groups(self, scores: torch.Tensor) -> torch.Tensor:
        grouped = scores.unflatten(-1, (self.num_groups, -1))
        best = grouped.topk(max(1, self.top_k // self.topk_groups), dim=-1).values.sum(-1)
        kept = best.topk(self.topk_groups, dim=-1).indices
        dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
        return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)

    def _weights(self, scores: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
        weights = scores.gather(-1, topk_idx)
        if self.normalize_weights:
            weights = weights / (weights.sum(-1, keepdim=True) + _TINY)
        return weights if self.weight_scale == 1.0 else weights * self.weight_scale

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A sign update of 1e-3 would be lost in bfloat16, so the bias follows moves to a device but not to a dtype.
        bias = self.correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.correction_bias is not None and self.correction_bias.dtype != bias.dtype:
            self.correction_bias = bias.to(self.correction_bias.device)
        return self


def set_loss_scale(model: nn.Module, scale: float | torch.Tensor) -> None:
    """Sets :attr:`TopKRouter.loss_scale` of every router in ``model``, for the forwards that follow."""
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.loss_scale = scale


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(map(repr, choices))}")


def _check_groups(num_experts: int, top_k: int, num_groups: int, topk_groups: int) -> None:
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"top_k is {top_k}: it must lie between 1 and num_experts = {num_experts}; choose fewer experts"
        )
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups is {num_groups}: it must divide num_experts = {num_experts} evenly")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups is {topk_groups}: it must lie between 1 and num_groups = {num_groups}")
    group_size = num_experts // num_groups
    if top_k > topk_groups * group_size:
        raise ValueError(
            f"top_k is {top_k}: {topk_groups} groups of {group_size} experts do not hold that many; raise topk_groups"
        )
