"""Means with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vas_engine.errors import InvalidArgumentError

__all__ = ["Estimate", "estimate_mean"]

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval ``[low, high]``, of ``count`` samples (NaN: it has none)."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {(self.high - self.low) / 2:.3f}"


def estimate_mean(samples: Sequence[float] | torch.Tensor, groups: Sequence[int] | None = None) -> Estimate:
    """Estimate a mean, by the normal approximation (of use from a few dozen samples or groups on).

    Args:
        samples: numbers.
        groups: which of them belong together, such as the samples of one prompt. The interval then is for
            other prompts like these too (the cluster-robust standard error), not only for more of the same.

    Raises:
        InvalidArgumentError: no samples, or groups of another length.
    """
    numbers = torch.as_tensor(samples, dtype=torch.float64).flatten()
    count = len(numbers)
    if count == 0:
        raise InvalidArgumentError("samples", [], "give at least one")
    mean = float(numbers.mean())
    deviations = numbers - mean
    if groups is not None:
        if len(groups) != count:
            raise InvalidArgumentError("groups", f"[{len(groups)}]", f"give one per sample ({count})")
        _, places = torch.unique(torch.as_tensor(groups), return_inverse=True)
        deviations = torch.zeros(int(places.max()) + 1, dtype=torch.float64).index_add_(0, places, deviations)
    units = len(deviations)
    if units < 2:
        return Estimate(mean, math.nan, math.nan, count)
    error = math.sqrt(float(deviations.square().sum()) * units / (units - 1)) / count
    return Estimate(mean, mean - NORMAL_95 * error, mean + NORMAL_95 * error, count)
