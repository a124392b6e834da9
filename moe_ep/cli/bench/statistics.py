"""Medians of ratios with bootstrap intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

NUM_RESAMPLES = 10_000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A median and its confidence interval."""

    median: float
    low: float
    high: float


def median_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> Interval:
    """Median of ``values`` with its percentile bootstrap interval.

    Draws ``NUM_RESAMPLES`` samples with replacement, takes the median of each, and reports the quantiles
    (1 - level) / 2 and (1 + level) / 2 of those medians (Efron, 1979). The generator is seeded: the same values give
    the same interval.

    Args:
        values: at least one finite number, in any unit.
        level: share of the medians inside the interval, between 0 and 1.
        seed: seed of the resampling.

    Raises:
        ValueError: no values, or a level outside (0, 1).
    """
    if len(values) == 0:
        raise ValueError("values is empty; a median needs at least one value")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level} must lie between 0 and 1; 0.95 is usual")
    sample = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(sample.numel(), (NUM_RESAMPLES, sample.numel()), generator=generator)
    # NOTE: Tensor.median takes the lower of two middle values; the quantile takes their mean.
    medians = sample[draws].quantile(0.5, dim=1)
    low, high = medians.quantile(torch.tensor([(1.0 - level) / 2, (1.0 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(median=float(sample.quantile(0.5)), low=low, high=high)
