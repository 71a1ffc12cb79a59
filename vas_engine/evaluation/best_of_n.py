"""Best-of-n: draw n responses from the base, keep the one of the highest reward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.estimate import Estimate, estimate_mean

__all__ = ["best_of_n", "best_of_n_kl_bound", "expected_best"]


def expected_best(pool: Sequence[float] | torch.Tensor, n: int) -> float:
    """Expected highest of n rewards, unbiased, from a pool of N >= n independent ones.

    The mean of the maximum over all subsets of n: the i-th smallest of the pool is the highest of
    C(i - 1, n - 1) of the C(N, n) subsets.

    Raises:
        InvalidArgumentError: n outside 1..N.
    """
    rewards = torch.as_tensor(pool, dtype=torch.float64).flatten().sort().values
    size = len(rewards)
    if not 1 <= n <= size:
        raise InvalidArgumentError("n", n, f"use 1 to {size}, the number of samples per prompt")
    subsets = math.comb(size, n)
    weights = [math.comb(rank, n - 1) / subsets for rank in range(size)]
    return float(rewards @ torch.tensor(weights, dtype=torch.float64))


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
    if n < 1:
        raise InvalidArgumentError("n", n, "use a positive integer")
    return math.log(n) - (n - 1) / n
