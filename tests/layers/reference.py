"""The unsharded MoE layer as plain loops, written without the layers: what every test compares against."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

Params = dict[str, torch.Tensor]
Activation = Callable[[torch.Tensor], torch.Tensor]


def gated_mlp(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, act: Activation = F.silu) -> torch.Tensor:
    """x [T, H], gate_up [2I, H], down [H, I] to [T, H]."""
    width = gate_up.shape[0] // 2
    return (act(x @ gate_up[:width].T) * (x @ gate_up[width:].T)) @ down.T


def softmax_routing(x: torch.Tensor, weight: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Chosen experts and normalised weights, one token after another."""
    all_ids, all_weights = [], []
    for token in x:
        probs = (weight @ token).softmax(0)
        ids = probs.detach().argsort(descending=True)[:top_k]
        all_ids.append(ids)
        all_weights.append(probs[ids] / probs[ids].sum())
    if not all_ids:
        return torch.zeros(0, top_k, dtype=torch.int64), x.new_zeros(0, top_k) + 0 * weight.sum()
    return torch.stack(all_ids), torch.stack(all_weights)


def moe(x: torch.Tensor, params: Params, top_k: int, act: Activation = F.silu) -> torch.Tensor:
    """The layer's output for all tokens x [T, H], with a full state dict."""
    ids, weights = softmax_routing(x, params["router.weight"], top_k)
    out = torch.zeros_like(x)
    for expert in range(params["experts.w_down"].shape[0]):
        y = gated_mlp(x, params["experts.w_gate_up"][expert], params["experts.w_down"][expert], act)
        share = (weights * (ids == expert)).sum(1)
        out = out + share[:, None] * y
    if "shared_expert.w_down" in params:
        y = gated_mlp(x, params["shared_expert.w_gate_up"], params["shared_expert.w_down"], act)
        if "shared_expert.w_gate" in params:
            y = y * torch.sigmoid(x @ params["shared_expert.w_gate"].T)
        out = out + y
    return out


def switch_loss(probs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """E * sum_i f_i P_i, expert by expert; probs [T, E], ids [T, K]."""
    num_tokens, num_experts = probs.shape
    total = probs.new_zeros(())
    for expert in range(num_experts):
        share = (ids == expert).sum().item() / (num_tokens * ids.shape[1])
        total = total + num_experts * share * probs[:, expert].sum() / num_tokens
    return total


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of log(sum(exp(logits)))^2."""
    return logits.exp().sum(1).log().pow(2).mean()
