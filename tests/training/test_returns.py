import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vas_engine.errors import InvalidArgumentError
from vas_engine.training.returns import discounted_rewards, lambda_returns, r_squared


def brute_force(values: list[float], reward: float, last: int, lam: float, gamma: float) -> list[float]:
    """The definition: (1-λ) Σ_n λ^(n-1) n-step return + λ^(L-p-1) Monte Carlo return."""
    known = [*values[:last], reward]
    returns = [0.0] * len(values)
    returns[last] = reward
    for p in range(last):
        steps = last - p
        total = lam ** (steps - 1) * gamma**steps * reward
        for n in range(1, steps):
            total += (1 - lam) * lam ** (n - 1) * gamma**n * known[p + n]
        returns[p] = total
    return returns


@settings(max_examples=60, deadline=None)
@given(
    lam=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lasts=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    seed=st.integers(0, 100),
)
def test_equals_the_definition(lam, gamma, lasts, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(lasts), 7, 2, dtype=torch.float64, generator=generator)
    rewards = torch.randn(len(lasts), 2, dtype=torch.float64, generator=generator)
    returns = lambda_returns(values, rewards, torch.tensor(lasts), lam, gamma)
    for row, last in enumerate(lasts):
        for m in range(2):
            expected = brute_force(values[row, :, m].tolist(), float(rewards[row, m]), last, lam, gamma)
            assert returns[row, :, m].tolist() == pytest.approx(expected, abs=1e-12)


def test_only_known_values_are_bootstrapped_from():
    """Between them the return goes on as it is."""
    values = torch.tensor([5.0, 1.0, 7.0, 3.0, 9.0])[None, :, None]
    known = torch.tensor([[False, True, False, True, False]])
    returns = lambda_returns(values, torch.tensor([[8.0]]), torch.tensor([4]), 0.5, 1.0, known)
    # Past position 3: half its value, half the reward.
    beyond = 0.5 * 3.0 + 0.5 * 8.0
    assert returns[0, :, 0].tolist() == [0.5 * 1.0 + 0.5 * beyond, beyond, beyond, 8.0, 8.0]
    everywhere = lambda_returns(values, torch.tensor([[8.0]]), torch.tensor([4]), 0.5, 0.9, torch.ones(1, 5).bool())
    assert torch.equal(everywhere, lambda_returns(values, torch.tensor([[8.0]]), torch.tensor([4]), 0.5, 0.9))


def test_padding_and_the_value_at_the_end_are_not_read():
    values = torch.randn(1, 5, 1)
    values[0, 2:] = torch.nan
    returns = lambda_returns(values, torch.tensor([[2.0]]), torch.tensor([2]), 0.5)
    assert returns[0, 2:, 0].tolist() == [2.0, 0.0, 0.0]
    assert bool(torch.isfinite(returns).all())


def test_no_gradient_goes_into_targets():
    values = torch.randn(1, 4, 1, requires_grad=True)
    assert not lambda_returns(values, torch.ones(1, 1), torch.tensor([3]), 0.5).requires_grad


def test_monte_carlo_discounts_by_the_way_to_the_end():
    returns = discounted_rewards(torch.tensor([[8.0]]), torch.tensor([3]), 5, 0.5)
    assert returns[0, :, 0].tolist() == [1.0, 2.0, 4.0, 8.0, 0.0]


@pytest.mark.parametrize("arguments", [{"lam": 1.5}, {"gamma": -0.1}, {"lam": float("nan")}])
def test_factors_are_checked(arguments):
    with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
        lambda_returns(torch.zeros(1, 2, 1), torch.zeros(1, 1), torch.tensor([1]), **arguments)


def test_r_squared():
    targets = torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    mean = targets.mean(0).expand_as(targets)
    assert r_squared(targets, targets)[0] == 1.0
    assert r_squared(mean, targets)[0] == 0.0
    assert bool(r_squared(targets, targets)[1].isnan())
    halfway = (targets + mean) / 2
    assert float(r_squared(halfway, targets)[0]) == pytest.approx(0.75)
