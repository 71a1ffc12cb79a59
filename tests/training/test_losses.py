from types import SimpleNamespace

import pytest
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.model.branches import Branches
from vas_engine.training.average import Average
from vas_engine.training.batches import make_batch
from vas_engine.training.distill import Lesson, Teacher, differences
from vas_engine.training.fit import FitConfig, head_for
from vas_engine.training.loss import consistency_loss
from vas_engine.training.returns import importance_weights, r_squared
from vas_engine.training.rollouts import Header, Rollout, Rollouts
from vas_engine.values.config import HeadConfig, Support, ValueConfig
from vas_engine.values.heads import Heads


def heads(support: Support) -> Heads:
    head = HeadConfig("v", support=support)
    return Heads(ValueConfig(kind="lookahead", heads=(head,), hidden_size=4, vocab_size=9, states=(1,)), 4)


def rollouts(rewards: list[float]) -> Rollouts:
    rows = [Rollout("", "", [1], [2, 3, 4], "stop", 0, index, {"x": reward}) for index, reward in enumerate(rewards)]
    return Rollouts(Header({}, {}, {"x": {}}), rows)


@pytest.mark.parametrize("sigma", [0.3, 0.75, 2.0])
def test_hl_gauss_is_a_gaussian_over_bins(sigma):
    made, target = heads(Support(-1.0, 3.0, 41)), torch.tensor([0.0, 0.537, 1.9])
    p = made.spread(0, target, sigma)
    exact = torch.distributions.Normal(target[:, None].double(), sigma * 0.1)
    edges = torch.linspace(-1.05, 3.05, 42, dtype=torch.float64)
    torch.testing.assert_close(p.double(), exact.cdf(edges).diff(dim=-1), atol=2e-6, rtol=0)
    torch.testing.assert_close(p @ made.atoms(0), target, atol=0.1 * 0.1, rtol=0)
    assert bool((p >= 0).all())


def test_hl_gauss_at_the_edges_of_its_support():
    p = heads(Support(0.0, 1.0, 11)).spread(0, torch.tensor([0.0, 1.0, 7.0, -3.0]), 0.75)
    torch.testing.assert_close(p.sum(-1), torch.ones(4))
    torch.testing.assert_close(p[0], p[1].flip(0))
    torch.testing.assert_close(p[2:], p[:2].flip(0))
    assert int(p[0].argmax()) == 0


def test_support_leaves_room_for_a_gaussian():
    data = rollouts([0.0, 0.2, 1.0])
    narrow = head_for(data, "x", distributional=True).support
    assert (narrow.min, narrow.max, narrow.bins) == (0.0, 1.0, 51)
    wide = head_for(data, "x", distributional=True, sigma=0.75, bins=57).support
    assert wide.bins == 57
    made = heads(wide)
    p = made.spread(0, torch.tensor([0.0, 1.0]), 0.75)
    torch.testing.assert_close(p @ made.atoms(0), torch.tensor([0.0, 1.0]), atol=1e-3, rtol=0)
    # 57 atoms are fifty steps of the reward's range and three on each side.
    assert wide.min == pytest.approx(-3 / 50)
    with pytest.raises(InvalidArgumentError, match="bins=7"):
        head_for(data, "x", distributional=True, sigma=0.75, bins=7)


def test_average_follows_and_stands_in():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = Average([parameter], decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 30):
        with torch.no_grad():
            parameter.add_(torch.tensor([1.0, -1.0, 2.0]))
        decay = min(0.5, step / (step + 10))
        expected = decay * expected + (1 - decay) * parameter.detach()
        average.update()
    live = parameter.detach().clone()
    with average.standing_in():
        torch.testing.assert_close(parameter.detach(), expected)
    torch.testing.assert_close(parameter.detach(), live)
    assert not torch.allclose(live, expected)


def test_importance_weights_are_those_of_the_tokens_to_come():
    weights = importance_weights(torch.tensor([0.5, -1.0, 2.0]), clip=10.0)
    torch.testing.assert_close(weights, torch.tensor([-1.5, -1.0, -2.0, 0.0]).exp())
    assert importance_weights(torch.tensor([-9.0]), clip=4.0).tolist() == [4.0, 1.0]


def test_weights_of_a_batch_go_into_its_mean_and_into_r_squared():
    data = rollouts([1.0, 2.0])
    rows = [
        data.rollouts[0],
        data.rollouts[1].__class__(**{**data.rollouts[1].__dict__, "log_ratios": [0.0, 0.0, 5.0]}),
    ]
    data = Rollouts(data.header, rows)
    batch = make_batch(data, [0, 1], data.rewards(["x"]), torch.device("cpu"))
    small = float(torch.tensor(-5.0).exp())
    assert batch.weights[0].tolist() == [1.0] * 4
    assert batch.weights[1].tolist() == pytest.approx([small, small, small, 1.0])
    losses = torch.tensor([1.0, 3.0])[:, None, None].expand(2, 4, 1)
    assert batch.mean(losses).tolist() == pytest.approx([(4 + 3 * (1 + 3 * small)) / (5 + 3 * small)])
    # A row that counts three times is a row that is there three times.
    values, targets = torch.randn(5, 1), torch.randn(5, 1)
    repeated = torch.tensor([0, 1, 2, 3, 4, 4, 4])
    weighted = r_squared(values, targets, torch.tensor([1.0, 1, 1, 1, 3]))
    torch.testing.assert_close(weighted, r_squared(values[repeated], targets[repeated]))


def test_a_teacher_counts_levels_and_differences_apart():
    """Shares of what the teacher's values vary by; the square splits into the two."""
    config = ValueConfig(kind="action", heads=(HeadConfig("x"),), hidden_size=4, vocab_size=9, states=(1,), width=1)
    known = Heads(config, 1)
    teacher = Teacher(SimpleNamespace(heads=known, eval=lambda: None), None, FitConfig())
    teacher.levels, teacher.spreads = torch.tensor([4.0]), torch.tensor([0.25])
    data = rollouts([1.0, 2.0])
    batch = make_batch(data, [0, 1], data.rewards(["x"]), torch.device("cpu"))
    branches = Branches(torch.tensor([[0, 1], [2, 0]]), torch.zeros(2, 2, 3, dtype=torch.int64))
    weights = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [[0.1, 0.8, 0.1], [0.0, 0.0, 0.0]]])
    generator = torch.Generator().manual_seed(0)
    states, there = torch.randn(2, 4, 1, generator=generator), torch.randn(2, 2, 3, 1, generator=generator)
    lesson = Lesson(branches, weights, states, there)

    def loss(states, there):
        return float(teacher.loss(known, torch.cat([states, there.flatten(1, 2)], 1), lesson, batch))

    assert loss(states, there) == 0.0
    assert loss(states + 2.0, there) == pytest.approx(0.5 * 4 / 4)
    # A shift of all candidates of a state is a level; the state that does not exist counts for nothing.
    assert loss(states, there + 2.0) == pytest.approx(0.5 * 4 / 4)
    off = torch.randn(2, 2, 3, 1, generator=generator)
    apart = differences(off, weights).sum() / 3
    level = (weights[..., None] * off).sum(2).square().sum() / 3
    assert float(apart + level) == pytest.approx(float((weights[..., None] * off.square()).sum() / 3))
    assert loss(states, there + off) == pytest.approx(float(0.5 * level / 4 + 0.5 * apart / 0.25), rel=1e-5)
    off[1, 1] += 100.0
    assert loss(states, there + off) == pytest.approx(float(0.5 * level / 4 + 0.5 * apart / 0.25), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ema": 1.0}, "ema"),
        ({"loss": "hlgauss"}, "hl-gauss"),
        ({"sigma": 0.0}, "sigma"),
        ({"teacher_share": 1.5}, "teacher_share"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"cache_memory": "1 mile"}, "cache_memory"),
        ({"lr": float("nan")}, "lr"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(InvalidArgumentError, match=said):
        FitConfig(**settings)


def test_consistency_is_on_where_a_critic_is():
    for settings, partial, expected in (
        ({}, True, 50.0),
        ({}, False, 0.0),
        ({"lam": 1.0}, True, 0.0),
        ({"consistency": 3.0}, True, 3.0),
        ({"consistency": 3.0}, False, 3.0),
    ):
        assert FitConfig(**settings).for_rollouts(partial).consistency == expected


def test_consistency_is_the_squared_step_to_a_next_state_taken_as_given():
    values = torch.tensor([[[1.0], [3.0], [4.0], [9.0]]], requires_grad=True)
    losses = consistency_loss(values, torch.tensor([2]), gamma=0.5)
    assert losses[0, :, 0].tolist() == [0.5 * (1 - 1.5) ** 2, 0.5 * (3 - 2) ** 2, 0.0, 0.0]
    losses.sum().backward()
    assert values.grad[0, :, 0].tolist() == [1 - 1.5, 3 - 2, 0.0, 0.0]
