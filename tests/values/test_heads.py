"""Heads: means, optimal utilities, bounds and losses against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate

from vas_engine.errors import InvalidArgumentError
from vas_engine.values import HeadConfig, Heads, Support, ValueConfig

PLAIN = HeadConfig("plain", mean=0.5, std=2.0)
BOUNDED = HeadConfig("bounded", bounds=(-1.0, 3.0))
DIST = HeadConfig("dist", support=Support(-2.0, 1.0, 7))


def make(*heads: HeadConfig, **settings) -> Heads:
    config = ValueConfig("lookahead", heads, hidden_size=6, vocab_size=5, states=(1,), width=6, **settings)
    torch.manual_seed(0)
    return Heads(config, 6)


def test_outputs_are_laid_out_head_by_head() -> None:
    heads = make(PLAIN, DIST, BOUNDED)
    assert [(s.start, s.stop) for s in heads.slices] == [(0, 1), (1, 8), (8, 9)]
    output = heads(torch.randn(4, 6))
    assert output.shape == (4, 9)
    assert heads.mean(output).shape == (4, 3)
    assert heads.names == ["plain", "dist", "bounded"]
    assert heads.distributional == [False, True, False]
    assert heads.bounds == [(-math.inf, math.inf), (-2.0, 1.0), (-1.0, 3.0)]


def test_means_in_the_rewards_units() -> None:
    heads = make(PLAIN, BOUNDED, DIST)
    output = torch.randn(5, 9)
    values = heads.mean(output)
    atoms = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0]
    for row in range(5):
        raw = output[row].double()
        assert float(values[row, 0]) == pytest.approx(0.5 + 2.0 * float(raw[0]), abs=1e-5)
        assert float(values[row, 1]) == pytest.approx(-1 + 4 / (1 + math.exp(-float(raw[1]))), abs=1e-5)
        p = [math.exp(float(x)) for x in raw[2:]]
        expected = sum(a * b for a, b in zip(p, atoms, strict=True)) / sum(p)
        assert float(values[row, 2]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weight", [-8.0, -0.5, 0.0, 0.7, 5.0, 60.0])
def test_optimal_utility_is_the_log_mean_of_the_exponential(weight: float) -> None:
    heads = make(DIST)
    output = torch.randn(4, 7) * 2
    utilities = heads.utility(output, torch.full((4, 1), weight), torch.ones(4, dtype=torch.bool))
    p = torch.softmax(output.double(), -1)
    z = torch.linspace(-2, 1, 7, dtype=torch.float64)
    for row in range(4):
        total = math.fsum(float(a) * math.exp(weight * float(b)) for a, b in zip(p[row], z, strict=True))
        assert float(utilities[row, 0]) == pytest.approx(math.log(total), abs=1e-4, rel=1e-5)


def test_optimal_utility_converges_to_the_integral() -> None:
    """Many atoms of a density on an interval give its log-moment-generating function, by quadrature."""
    support = Support(-1.0, 2.0, 2001)
    heads = make(HeadConfig("dist", support=support))
    z = torch.linspace(-1, 2, 2001, dtype=torch.float64)
    density = -((z - 0.3) ** 2) / 0.18
    utilities = heads.utility(density.float()[None], torch.tensor([[1.7]]), torch.tensor([True]))
    norm = integrate.quad(lambda x: math.exp(-((x - 0.3) ** 2) / 0.18), -1, 2)[0]
    mean = integrate.quad(lambda x: math.exp(-((x - 0.3) ** 2) / 0.18 + 1.7 * x), -1, 2)[0]
    assert float(utilities[0, 0]) == pytest.approx(math.log(mean / norm), abs=1e-3)


def test_rows_choose_their_tilt() -> None:
    heads = make(PLAIN, DIST)
    output = torch.randn(3, 8)
    weights = torch.tensor([[2.0, 1.0], [0.0, 3.0], [-1.0, 0.0]])
    optimal = torch.tensor([False, True, False])
    utilities = heads.utility(output, weights, optimal)
    mean = heads.mean(output) * weights
    torch.testing.assert_close(utilities[[0, 2]], mean[[0, 2]])
    assert float(utilities[1, 0]) == 0
    # Jensen: the optimal tilt of a distribution that is not a point is above the mean one.
    assert float(utilities[1, 1]) > float(mean[1, 1]) + 0.05


def test_optimal_tilt_of_a_scalar_head_is_refused() -> None:
    heads = make(PLAIN, DIST)
    with pytest.raises(InvalidArgumentError, match="plain"):
        heads.utility(torch.randn(1, 8), torch.ones(1, 2), torch.tensor([True]))


def test_bounds_are_never_left() -> None:
    heads = make(BOUNDED, DIST, HeadConfig("odd", bounds=(0.1, 0.7)))
    output = torch.randn(20000, 9) * torch.logspace(-3, 4, 20000).unsqueeze(1)
    values = heads.mean(output)
    for column, (low, high) in enumerate(heads.bounds):
        low32, high32 = torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
        assert bool((values[:, column] >= low32).all()), heads.names[column]
        assert bool((values[:, column] <= high32).all()), heads.names[column]
    assert float(values[:, 0].max()) == 3.0
    assert float(values[:, 0].min()) == -1.0


def test_loss_is_least_at_the_truth() -> None:
    """Gradient descent on the loss finds the mean of scalar heads and the distribution of the other."""
    heads = make(PLAIN, BOUNDED, DIST)
    targets = torch.tensor([[-1.0], [0.5], [0.5], [1.0]]).expand(4, 3)
    output = torch.zeros(1, 9, requires_grad=True)
    optimiser = torch.optim.Adam([output], lr=0.05)
    for _ in range(1500):
        optimiser.zero_grad()
        heads.loss(output.expand(4, 9), targets).mean(0).sum().backward()
        optimiser.step()
    torch.testing.assert_close(heads.mean(output.detach()), torch.full((1, 3), 0.25), atol=0.02, rtol=0)
    p = torch.softmax(output.detach()[0, 2:], 0)
    torch.testing.assert_close(p, torch.tensor([0, 0, 0.25, 0, 0, 0.5, 0.25]), atol=0.02, rtol=0)


def test_two_hot_keeps_the_mean() -> None:
    heads = make(DIST)
    target = torch.tensor([-2.0, -1.9, 0.1, 1.0, -7.0, 9.0, 0.75])
    p = heads.two_hot(0, target)
    torch.testing.assert_close(p.sum(-1), torch.ones(7))
    torch.testing.assert_close(p @ heads.atoms(0), target.clamp(-2, 1), atol=1e-5, rtol=0)
    assert bool(((p > 1e-6).sum(-1) <= 2).all())


def test_output_is_float32_of_bfloat16_features() -> None:
    assert make(PLAIN, head_hidden=4)(torch.randn(2, 6).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Support(0, 1, 1), "support.bins"),
        (lambda: Support(1, 1, 5), "support"),
        (lambda: Support(0, math.inf, 5), "support"),
        (lambda: HeadConfig("v", bounds=(2.0, 1.0)), "head.bounds"),
        (lambda: HeadConfig("v", bounds=(0.0, 1.0), support=Support(0, 1, 3)), "head.bounds"),
        (lambda: HeadConfig("v", std=0.0), "head.std"),
        (lambda: HeadConfig("v", mean=math.nan), "head.mean"),
        (lambda: HeadConfig(""), "head.name"),
    ],
)
def test_heads_that_cannot_work(build, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        build()
