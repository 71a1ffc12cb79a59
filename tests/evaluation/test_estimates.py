import itertools
import math

import pytest
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.best_of_n import best_of_n, best_of_n_kl_bound, expected_best, selection_weights
from vas_engine.evaluation.estimate import estimate_mean


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_expected_best_is_the_mean_over_subsets(n):
    pool = [0.3, -1.0, 2.5, 2.5, 0.0, 1.1]
    subsets = [max(subset) for subset in itertools.combinations(pool, n)]
    assert expected_best(pool, n) == pytest.approx(sum(subsets) / len(subsets))


def test_expected_best_of_many():
    """Uniform rewards: the highest of n is n / (n + 1) on average."""
    pools = torch.rand(400, 64, generator=torch.Generator().manual_seed(0)).tolist()
    found = best_of_n(pools, 16)
    assert found.low < 16 / 17 < found.high
    assert found.high - found.low < 0.01


def test_n_beyond_the_pool_is_refused():
    for n in (0, 3):
        with pytest.raises(InvalidArgumentError, match="use 1 to 2"):
            expected_best([1.0, 2.0], n)


def test_kl_bound_is_reached_by_distinct_rewards():
    """On a uniform base over many outcomes of distinct rewards the best of n has this divergence."""
    n, size = 4, 20000
    cumulative = torch.arange(size + 1, dtype=torch.float64) / size
    best = (cumulative**n).diff()
    kl = float((best * (best * size).log()).nansum())
    assert best_of_n_kl_bound(n) == pytest.approx(kl, abs=1e-3)
    assert best_of_n_kl_bound(1) == 0.0


def test_intervals_cover():
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(400):
        found = estimate_mean(torch.randn(50, generator=generator) * 3 + 1)
        hits += found.low <= 1 <= found.high
    assert 0.92 < hits / 400 < 0.97


def test_grouped_intervals_cover_and_plain_ones_would_not():
    generator = torch.Generator().manual_seed(0)
    groups = [number // 10 for number in range(400)]
    hits = {"grouped": 0, "plain": 0}
    for _ in range(300):
        shared = torch.randn(40, generator=generator).repeat_interleave(10)
        samples = shared + torch.randn(400, generator=generator)
        for name, found in (("grouped", estimate_mean(samples, groups)), ("plain", estimate_mean(samples))):
            hits[name] += found.low <= 0 <= found.high
    assert 0.9 < hits["grouped"] / 300 < 0.98
    assert hits["plain"] / 300 < 0.8


def test_one_sample_has_no_interval():
    found = estimate_mean([2.0])
    assert found.mean == 2.0
    assert math.isnan(found.low)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        estimate_mean([])


def test_selection_weights_carry_other_measures():
    """The expected length of the best of 3, over all subsets; ties are broken evenly."""
    pool, lengths = [0.0, 2.0, 1.0, 2.0, -1.0], [3.0, 10.0, 5.0, 20.0, 7.0]
    total, subsets = 0.0, list(itertools.combinations(range(5), 3))
    for subset in subsets:
        high = max(pool[i] for i in subset)
        best = [i for i in subset if pool[i] == high]
        total += sum(lengths[i] for i in best) / len(best)
    weights = selection_weights(pool, 3)
    assert float(weights @ torch.tensor(lengths, dtype=torch.float64)) == pytest.approx(total / len(subsets))
    assert float(selection_weights(torch.arange(4096.0), 128).sum()) == pytest.approx(1.0)
