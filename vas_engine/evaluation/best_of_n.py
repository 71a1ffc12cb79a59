"""Best-of-n: draw n responses from the base, keep the one of the highest reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.estimate import Estimate, estimate_mean

__all__ = ["best_of_n", "best_of_n_kl_bound", "expected_best", "selection_weights"]


def selection_weights(scores: Sequence[float] | torch.Tensor, n: int) -> torch.Tensor:
    """Chance of each response of a pool of N >= n to be kept by best-of-n, over all subsets of n.

    The i-th lowest is the highest of C(i - 1, n - 1) of the C(N, n) subsets. Any mean under these weights is the
    unbiased estimate of that quantity under best-of-n.

    Args:
        scores: N numbers; equal ones share their chances.

    Returns:
        float64 [N], sums to 1.

    Raises:
        InvalidArgumentError: n outside 1..N.
    """
    numbers = torch.as_tensor(scores, dtype=torch.float64).flatten()
    size = len(numbers)
    if not 1 <= n <= size:
        raise InvalidArgumentError("n", n, f"use 1 to {size}, the number of samples per prompt")
    _, level, count = torch.unique(numbers, return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    reached = torch.cat([torch.zeros(1, dtype=torch.float64), _cumulative(size, n)])
    return ((reached[last] - reached[last - count]) / count)[level]


@lru_cache(maxsize=64)
def _cumulative(size: int, n: int) -> torch.Tensor:
    """Chance that the best of n is among the lowest i of the pool, i = 1..size: C(i, n) / C(size, n)."""
    chances, ways, total = [0.0] * (n - 1), 1, math.comb(size, n)
    for i in range(n, size + 1):
        chances.append(ways / total)
        ways = ways * (i + 1) // (i + 1 - n)
    return torch.tensor(chances, dtype=torch.float64)


def expected_best(pool: Sequence[float] | torch.Tensor, n: int) -> float:
    """Expected highest of n rewards, unbiased, from a pool of N >= n independent ones.

    Raises:
        InvalidArgumentError: n outside 1..N.
    """
    rewards = torch.as_tensor(pool, dtype=torch.float64).flatten()
    return float(rewards @ selection_weights(rewards, n))


def best_of_n(pools: Sequence[Sequence[float]], n: int) -> Estimate:
    """Mean reward of best-of-n over prompts, with its interval over prompts.

    Args:
        pools: the rewards of each prompt's samples, at least n of them; more make the estimate sharper.
    """
    return estimate_mean([expected_best(pool, n) for pool in pools])


def best_of_n_kl_bound(n: int) -> float:
    """Upper bound on KL(best-of-n || base) in nats: log n - (n - 1) / n.

    It is the divergence where all rewards differ and no response is likely (Beirami et al. 2024); else the
    true one is smaller. So it is never a measurement.
    """
    arguments.integer("n", n, 1)
    return math.log(n) - (n - 1) / n
