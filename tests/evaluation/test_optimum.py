import math

import numpy as np
import pytest

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.optimum import Optimum

BASE = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])
REWARDS = np.array([-1.0, 0.0, 0.5, 2.0])
"""Two prompts, four responses, the rewards of the responses."""


def pools(size: int = 20000) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [REWARDS[generator.choice(4, size, p=base)] for base in BASE]


def tilted(strength: float, rewards: np.ndarray = REWARDS) -> tuple[np.ndarray, np.ndarray]:
    """Mean reward and KL of each prompt under pi0 exp(strength rewards)."""
    policy = BASE * np.exp(strength * rewards)
    policy /= policy.sum(1, keepdims=True)
    return policy @ REWARDS, (policy * np.log(policy / BASE)).sum(1)


@pytest.mark.parametrize("strength", [-2.0, -0.5, 0.3, 1.0, 2.0])
def test_the_optimal_policy_is_efficient(strength):
    rewards, kl = tilted(strength)
    found = Optimum(pools()).efficiency(rewards, kl)
    assert found.mean == pytest.approx(1.0, abs=0.04)
    assert found.low <= found.mean <= found.high


def test_another_policy_is_not():
    """One that follows a wrong reward, and one that spends its nats on one prompt only."""
    optimum = Optimum(pools())
    rewards, kl = tilted(1.0, np.array([-1.0, 0.0, 2.0, 0.5]))
    assert 0 < optimum.efficiency(rewards, kl).mean < 0.7
    rewards, kl = tilted(2.0)
    plain, _ = tilted(0.0)
    lopsided = optimum.efficiency([rewards[0], plain[1]], [kl[0], 0.0])
    assert 0.3 < lopsided.mean < 0.95


def test_gaussian_rewards():
    """The optimum of a standard Gaussian reward pays r^2 / 2 nats for a mean of r, up or down."""
    optimum = Optimum([np.random.default_rng(seed).normal(size=20000) for seed in range(4)])
    for reward in (-2.0, -1.0, 0.5, 1.0, 2.0):
        assert optimum.kl_at(reward) == pytest.approx(reward**2 / 2, rel=0.05, abs=0.01)
    assert math.isnan(optimum.kl_at(5.0))
    kl, rewards = optimum.curve()
    assert kl == sorted(kl)
    assert rewards == sorted(rewards)
    downwards = optimum.curve(upwards=False)[1]
    assert downwards == sorted(downwards, reverse=True)


def test_nothing_to_say():
    optimum = Optimum(pools(200))
    assert math.isnan(optimum.efficiency([0.0, 0.0], [0.0, 0.0]).mean)
    assert math.isnan(Optimum([[1.0, 1.0]]).kl_at(2.0))
    assert math.isnan(Optimum([pools()[0]]).efficiency([0.0], [0.1]).low)
    with pytest.raises(InvalidArgumentError, match="one mean for each of 2 prompts"):
        optimum.efficiency([0.0], [0.0])
    with pytest.raises(InvalidArgumentError, match="samples of every prompt"):
        Optimum([])
