"""Auxiliary losses of a router: pure functions of its probabilities and counts.

Letters: T tokens, E experts, K choices per token, B sequences, S tokens per sequence. f_i is the share of all choices
that went to expert i, P_i the mean probability of expert i; counts carry no gradient.

Convention: ``scope="rank"`` is the loss of this rank's own batch. ``scope="group"`` returns, on every rank, the loss of
the whole batch of the group, with gradients that are exact for it once gradients are *averaged* over the ranks of the
group, as DDP and FSDP do. So a loss of either scope is added to a rank's loss like any other term. Both are linear in
the probabilities, so a rank needs the others' sums but no gradient from them: one sum over ranks forward, none
backward.

A ProcessGroup sums with its own all-reduce: on a GPU it is queued on the device and the host does not wait; on a CPU
the host waits for as long as the group's timeout lets it, and a failure is what torch raises. A Buffer sums over its
control plane on the host: the wait is bounded by ``timeout_s``, a missing rank is named, and an error of one rank that
is told through the Buffer reaches all.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_ep.buffer import Buffer
from moe_ep.layers.operators import sum_over_ranks


@dataclass(frozen=True, kw_only=True)
class RouterLosses:
    """Coefficients of the auxiliary losses; 0 leaves a loss out.

    Attributes:
        aux: of the load balance loss over the batch (Switch Transformer, arXiv 2101.03961, eq. 4, for K choices).
        seq_aux: of the load balance loss over each sequence (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20).
        z: of the mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5).
    """

    aux: float = 0.0
    seq_aux: float = 0.0
    z: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"{name}_loss_coef is {value}: a coefficient is at least 0; use 0 to leave it out")

    def __bool__(self) -> bool:
        return self.aux > 0 or self.seq_aux > 0 or self.z > 0

    def __call__(
        self,
        logits: torch.Tensor,
        probs: torch.Tensor,
        counts: torch.Tensor,
        top_k: int,
        group: dist.ProcessGroup | Buffer | None,
    ) -> dict[str, torch.Tensor]:
        """Computes the losses that have a coefficient, multiplied by it.

        Args:
            logits: [B, S, E] fp32 or fp64, differentiable.
            probs: [B, S, E], rows that sum to 1, differentiable.
            counts: int64 [B, E] choices of each sequence.
            top_k: K.
            group: the ranks whose tokens make the batch; None for this rank's own. With a group, or with the Buffer
                of one, the call is collective and waits as the module says.

        Returns:
            0-dim tensors under the names ``aux_loss``, ``seq_aux_loss`` and ``z_loss``; 0 for an empty batch.

        Raises:
            MoeEpError: with a Buffer, whatever its exchanges raise.
        """
        num_seqs, seq_len, _ = probs.shape
        sums = probs.sum(1)
        seq_sum = balance_loss(counts, sums, seq_len, top_k).sum()
        z_sum = logits.logsumexp(-1).square().sum()
        num_seqs = num_seqs if seq_len else 0
        terms = _Terms(counts.sum(0), sums.sum(0), seq_sum, z_sum, num_seqs * seq_len, num_seqs)
        losses = terms.losses(top_k) if group is None else _group_losses(terms, top_k, group)
        names, coefs = ("aux_loss", "seq_aux_loss", "z_loss"), (self.aux, self.seq_aux, self.z)
        return {name: coef * loss for name, coef, loss in zip(names, coefs, losses, strict=True) if coef > 0}


@dataclass(frozen=True)
class _Terms:
    """Sums over a batch from which its losses follow."""

    counts: torch.Tensor
    prob_sums: torch.Tensor
    seq_sum: torch.Tensor
    z_sum: torch.Tensor
    num_tokens: int | torch.Tensor
    num_seqs: int | torch.Tensor

    def losses(self, top_k: int) -> tuple[torch.Tensor, ...]:
        return (
            balance_loss(self.counts, self.prob_sums, self.num_tokens, top_k),
            self.seq_sum / _at_least_one(self.num_seqs),
            self.z_sum / _at_least_one(self.num_tokens),
        )

    def pack(self) -> torch.Tensor:
        """fp64 [2E + 4]: exact for counts, and one sum over ranks for all."""
        numbers = self.prob_sums.new_tensor([self.num_tokens, self.num_seqs], dtype=torch.float64)
        parts = (self.counts, self.prob_sums, self.seq_sum[None], self.z_sum[None])
        return torch.cat([*(part.detach().double() for part in parts), numbers])


def _group_losses(terms: _Terms, top_k: int, group: dist.ProcessGroup | Buffer) -> tuple[torch.Tensor, ...]:
    packed = terms.pack()
    if isinstance(group, Buffer):
        packed, scale = sum_over_ranks(packed, group), group.group_size
    else:
        dist.all_reduce(packed, group=group)
        scale = dist.get_world_size(group)
    num_experts = terms.counts.shape[0]
    counts, prob_sums, rest = packed.split([num_experts, num_experts, 4])
    seq_sum, z_sum, num_tokens, num_seqs = rest.unbind()
    whole = _Terms(counts, prob_sums, seq_sum, z_sum, num_tokens, num_seqs)
    share = _Terms(counts, terms.prob_sums, terms.seq_sum, terms.z_sum, num_tokens, num_seqs)
    # The value is the whole batch's; the gradient is this rank's share of it, times the ranks it will be averaged over.
    pairs = zip(whole.losses(top_k), share.losses(top_k), strict=True)
    return tuple(value.to(part.dtype) + (part - part.detach()) * scale for value, part in pairs)


def balance_loss(
    counts: torch.Tensor, prob_sums: torch.Tensor, num_tokens: int | torch.Tensor, top_k: int
) -> torch.Tensor:
    """E * sum_i f_i * P_i: 1 when choices or probabilities are even, up to E / K when all agree on the same experts.

    Args:
        counts: choices per expert [..., E], of any dtype.
        prob_sums: summed probabilities per expert [..., E], differentiable.
        num_tokens: tokens that were summed; 0 gives 0.
        top_k: choices per token.

    Returns:
        [...] of the dtype of ``prob_sums``.
    """
    num_tokens = _at_least_one(num_tokens)
    shares = counts.to(torch.float64) * (counts.shape[-1] / top_k) / num_tokens / num_tokens
    return (shares.to(prob_sums.dtype) * prob_sums).sum(-1)


def count_choices(topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
    """int64 [..., E] choices per expert of ``topk_idx`` [..., n], without waiting for the device; -1 is not counted."""
    counts = topk_idx.new_zeros(*topk_idx.shape[:-1], num_experts + 1)
    counts.scatter_add_(-1, topk_idx.remainder(num_experts + 1), torch.ones_like(topk_idx))
    return counts[..., :num_experts]


def _at_least_one(number: int | torch.Tensor) -> int | torch.Tensor:
    return number.clamp(min=1) if isinstance(number, torch.Tensor) else max(number, 1)
