"""The one generator of routings: tests and benchmarks draw from the same distributions."""

import torch

KINDS = ("uniform", "zipf", "one", "empty", "holes")
ZIPF_EXPONENT = 1.0
HOLE_PROBABILITY = 0.3


def make_routing(
    num_tokens: int, top_k: int, num_experts: int, *, kind: str = "uniform", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw which experts each token chooses, none twice, and with what weight.

    Args:
        num_tokens: T, may be 0.
        top_k: K, at most ``num_experts``.
        num_experts: E.
        kind: ``uniform``: every expert equally likely. ``zipf``: popularity falls as 1/rank, in an order that the seed
            permutes. ``one``: all tokens choose expert ``seed % E`` first and, for K > 1, the K - 1 experts after it.
            ``empty``: every choice is -1. ``holes``: uniform, and 30 % of the choices are -1.
        seed: of the draw; the same arguments give the same routing on every machine.

    Returns:
        ``topk_idx`` int64 [T, K] (-1 = no choice) and ``topk_weights`` fp32 [T, K], positive, summing to 1 over the K
        choices of a token before holes are cut out; 0 where the choice is -1.

    Raises:
        ValueError: unknown ``kind``, or K > E.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not known: use one of {', '.join(KINDS)}")
    if top_k > num_experts:
        raise ValueError(f"top_k={top_k} exceeds num_experts={num_experts}: a token cannot choose an expert twice")
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    if kind == "one":
        chosen = (seed + torch.arange(top_k)) % num_experts
        topk_idx = chosen.expand(num_tokens, top_k).clone()
    else:
        popularity = torch.ones(num_experts, dtype=torch.float64)
        if kind == "zipf":
            popularity /= (torch.randperm(num_experts, generator=generator) + 1.0) ** ZIPF_EXPONENT
        # The K largest of log p + Gumbel noise are a draw of K experts without replacement.
        noise = torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float64).clamp_(1e-12, 1 - 1e-12)
        topk_idx = (popularity.log() - (-noise.log()).log()).topk(top_k, dim=1).indices
    if kind == "empty":
        topk_idx = torch.full_like(topk_idx, -1)
    if kind == "holes":
        topk_idx[torch.rand(num_tokens, top_k, generator=generator) < HOLE_PROBABILITY] = -1
    return topk_idx, weights.masked_fill(topk_idx < 0, 0.0).float()


def uneven_tokens(num_tokens: int, num_ranks: int, seed: int = 0) -> list[int]:
    """Token counts per rank with the mean ``num_tokens``; with more than one rank, rank ``seed % R`` has none."""
    if num_ranks == 1:
        return [num_tokens]
    generator = torch.Generator().manual_seed(seed)
    total = num_tokens * num_ranks
    others = num_ranks - 1
    cuts = torch.randint(0, total + 1, (others - 1,), generator=generator).sort().values.tolist()
    counts = [end - begin for begin, end in zip([0, *cuts], [*cuts, total], strict=True)]
    counts.insert(seed % num_ranks, 0)
    return counts
