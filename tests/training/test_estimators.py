"""Every way to train finds the exact values of a problem small enough to solve by dynamic programming."""

from dataclasses import replace

import pytest
import torch
from chain import EOS, ExactValue, sample, unexplained

from vas_engine.training.fit import FitConfig, fit, head_for
from vas_engine.training.network import make_network

# A reader sees all of such short texts and learns them in a few hundred steps.
STEPS = {"epochs": 20, "batch_tokens": 1024, "lr": 5e-3}
# A distribution takes more of them than a mean.
DISTRIBUTION = {"batch_tokens": 512, "lr": 1e-2}


@pytest.fixture(scope="module")
def rollouts(lm, solution):
    return sample(lm, solution, 1500)


def train(lm, rollouts, kind="reader", teacher=None, head=None, **settings):
    network = make_network(lm, kind, [head_for(rollouts, "points", **(head or {}))])
    config = FitConfig(**{**STEPS, **settings})
    return network, fit(lm, network, rollouts, config, teacher=teacher, use_tqdm=False)


TWO_HOT = {"distributional": True}
HL_GAUSS = {"distributional": True, "sigma": 0.75}
TAUGHT = {"teacher_candidates": 6, "teacher_positions": 3}


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        pytest.param({}, {}, id="monte-carlo"),
        pytest.param({}, {"lam": 0.7}, id="td-target"),
        pytest.param(TWO_HOT, DISTRIBUTION, id="two-hot", marks=pytest.mark.slow),
        pytest.param(HL_GAUSS, {"loss": "hl-gauss", **DISTRIBUTION}, id="hl-gauss"),
        pytest.param({}, {"lam": 0.0, "ema": 0.9}, id="td0-target", marks=pytest.mark.slow),
        pytest.param({}, {"lam": 0.7, "ema": 0.0}, id="td-without-target", marks=pytest.mark.slow),
        pytest.param(
            HL_GAUSS, {"loss": "hl-gauss", "lam": 0.7, **DISTRIBUTION}, id="hl-gauss-td", marks=pytest.mark.slow
        ),
        pytest.param(TWO_HOT, {"lam": 0.7, **DISTRIBUTION}, id="two-hot-td", marks=pytest.mark.slow),
        pytest.param(
            {"bounded": True}, {"lam": 0.9, "batch_tokens": 256, "epochs": 30}, id="bounded-td", marks=pytest.mark.slow
        ),
    ],
)
def test_converges_to_the_exact_values(lm, solution, rollouts, head, settings):
    network, report = train(lm, rollouts, head=head, **settings)
    assert unexplained(lm, network, solution) < 0.1
    # The state after EOS is known exactly: its value is the reward.
    assert unexplained(lm, network, solution, ends=EOS) < 0.1
    # The exact values explain 0.34 of the rewards' variance over all positions, and all of it at the end.
    assert 0.25 < report.heads["points"].r_squared < 0.45
    assert report.heads["points"].r_squared_last_quarter > 0.9


@pytest.mark.parametrize(
    ("head", "settings"),
    [
        ({}, {"consistency": 0.0}),
        ({}, {"consistency": 0.0, "lam": 0.0}),
        ({}, {"consistency": 3.0}),
        # Of two atoms the mean is the whole distribution.
        ({"distributional": True, "bins": 2}, {"consistency": 3.0}),
    ],
)
def test_a_critic_that_knows_the_rewards_of_beginnings_leads_to_the_exact_values(lm, solution, head, settings):
    parts = sample(lm, solution, 1500, every=1)
    network, report = train(lm, parts, head=head, **{"batch_tokens": 256, "lr": 2e-3, **settings})
    assert report.settings["critic"]
    assert unexplained(lm, network, solution) < 0.1
    # The critic's weights are no part of the value.
    assert report.parameters == sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_a_critic_draws_from_the_seed_alone(lm, solution):
    """What the caller has drawn before changes nothing, and what it draws after goes on as it would have."""
    parts, weights = sample(lm, solution, 200, every=1), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        network, _ = train(lm, parts, epochs=1)
        assert torch.equal(torch.rand(3), expected)
        weights.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(*weights)


def test_beginnings_teach_where_rewards_are_few(lm, solution):
    """The same responses, with and without their rewards on the way."""
    found = torch.zeros(2)
    for seed in range(3):
        few = sample(lm, solution, 300, seed, every=1)
        silent = few.__class__(replace(few.header, settings={}), few.rollouts)
        told, _ = train(lm, few, batch_tokens=256, lam=0.5, consistency=0.0)
        alone, _ = train(lm, silent, batch_tokens=256)
        found += torch.tensor([unexplained(lm, network, solution) for network in (told, alone)])
    assert found[0] < 0.85 * found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["side", "side-lookahead"])
def test_other_kinds_converge_too(lm, solution, rollouts, kind):
    network, _ = train(lm, rollouts, kind, batch_tokens=256, lr=2e-3)
    assert unexplained(lm, network, solution) < 0.1


def test_learns_from_a_teacher_what_few_returns_do_not_show(lm, solution):
    few = sample(lm, solution, 200)
    settings = {"epochs": 40, "batch_tokens": 256}
    taught, report = train(lm, few, teacher=ExactValue(solution), **settings, **TAUGHT)
    alone, _ = train(lm, few, **settings)
    assert unexplained(lm, taught, solution) < 0.08 < 0.15 < unexplained(lm, alone, solution)
    head = report.heads["points"]
    assert head.agreement > 0.9
    assert report.epochs[-1].agreement["points"] > report.epochs[0].agreement["points"]
    assert report.teacher == "action"


def test_a_teacher_of_distributions_is_followed(lm, solution):
    """A head with the teacher's atoms learns its distribution; the returns of few samples do not blur it."""
    few = sample(lm, solution, 200)
    head = {"distributional": True, "bins": 12}
    teacher = ExactValue(solution, head_for(few, "points", **head).support)
    network, _ = train(lm, few, head=head, teacher=teacher, epochs=40, batch_tokens=256, lr=1e-2, **TAUGHT)
    assert unexplained(lm, network, solution) < 0.08
    # The exact value of the prompt lies between two atoms, and so does its whole distribution now.
    wanted = network.heads.two_hot(0, torch.tensor(solution.values[()]))
    assert float((at_prompt(lm, network) - wanted).abs().sum()) < 0.3


@pytest.mark.slow
def test_a_distributional_head_learns_spread_from_returns_under_a_scalar_teacher(lm, solution, rollouts):
    network, _ = train(lm, rollouts, head=TWO_HOT, teacher=ExactValue(solution), epochs=8, **DISTRIBUTION, **TAUGHT)
    p, atoms = at_prompt(lm, network), network.heads.atoms(0)
    variance = float(p @ (atoms - p @ atoms).square())
    assert variance == pytest.approx(float(rollouts.rewards(["points"]).var()), rel=0.3)


@torch.no_grad()
def at_prompt(lm, network) -> torch.Tensor:
    """The distribution of the prompt's reward."""
    return network.train_values(lm, torch.tensor([[1, 2]]), torch.tensor([2]))[0, 1].softmax(-1)


def test_guided_rollouts_are_weighted_back_to_the_frozen_model(lm, solution):
    """Without their log-ratios the values would be those of the guided policy."""
    guided = sample(lm, solution, 3000, strength=0.35)
    weighted, _ = train(lm, guided, epochs=12, ratio_clip=30.0)
    blind = [r.__class__(**{**r.__dict__, "log_ratio": None, "log_ratios": None}) for r in guided]
    unweighted, _ = train(lm, guided.__class__(guided.header, blind), epochs=4)
    assert unexplained(lm, weighted, solution) < 0.15
    assert unexplained(lm, unweighted, solution) > 0.3
