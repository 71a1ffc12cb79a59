import json

import pytest
import torch
from chain import VOCABULARY, predict, sample

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.fit import FitConfig, fit, fit_all, head_for
from vas_engine.training.loss import value_loss
from vas_engine.training.network import make_network
from vas_engine.training.report import save_report
from vas_engine.training.rollouts import Header, Rollouts


@pytest.fixture(scope="module")
def rollouts(lm, solution):
    return sample(lm, solution, 1500)


def train(lm, rollouts, kind="side", config=None, **options):
    network = make_network(lm, kind, [head_for(rollouts, "points", **options)])
    return network, fit(lm, network, rollouts, config, use_tqdm=False)


def test_distribution_is_that_of_the_reward(lm, solution, rollouts):
    """At the start the head knows how the final reward is spread, not only its mean; also with λ < 1."""
    config = FitConfig(epochs=8, batch_tokens=512, lr=1e-2, lam=0.8)
    network, _ = train(lm, rollouts, "reader", config, distributional=True)
    tokens, lengths = torch.tensor([[1, 2]]), torch.tensor([2])
    with torch.no_grad():
        p = network.train_values(lm, tokens, lengths)[0, 1].softmax(-1)
    atoms = network.heads.atoms(0)
    variance = float(p @ (atoms - p @ atoms).square())
    assert variance == pytest.approx(float(rollouts.rewards(["points"]).var()), rel=0.2)


def test_discount(lm, rollouts):
    """The prompt's value with γ is the mean of γ^length reward."""
    network, _ = train(lm, rollouts, config=FitConfig(epochs=3, batch_tokens=256, gamma=0.5))
    expected = sum(0.5 ** len(r.response_ids) * r.rewards["points"] for r in rollouts) / len(rollouts)
    assert float(predict(lm, network, [()])[0, 0]) == pytest.approx(expected, abs=0.1)


def test_discounted_rewards_lie_within_a_head_made_for_them(lm, rollouts):
    """Rewards from 1 to 4, far from the end close to 0."""
    for options in ({"bounded": True}, {"distributional": True, "bins": 41}):
        head = head_for(rollouts, "length", gamma=0.5, **options)
        assert head.interval == (0.0, 4.0)
        network = make_network(lm, "side", [head])
        fit(lm, network, rollouts, FitConfig(epochs=2, batch_tokens=256, gamma=0.5), use_tqdm=False)
        expected = sum(0.5 ** len(r.response_ids) * r.rewards["length"] for r in rollouts) / len(rollouts)
        assert float(predict(lm, network, [()])[0, 0]) == pytest.approx(expected, abs=0.15)
        undiscounted = make_network(lm, "side", [head_for(rollouts, "length", **options)])
        with pytest.raises(InvalidArgumentError, match="widen it to hold 0"):
            fit(lm, undiscounted, rollouts, FitConfig(gamma=0.5), use_tqdm=False)
    # With a margin for HL-Gauss, and rewards below 0.
    support = head_for(rollouts, "length", distributional=True, gamma=0.5, sigma=0.75).support
    assert support.min < 0.0 < 4.0 < support.max
    debts = [
        r.__class__(**{**r.__dict__, "rewards": {"points": -2.0 - i}}) for i, r in enumerate(rollouts.rollouts[:3])
    ]
    header = Header({}, {}, {"points": {"bounds": None}})
    assert head_for(Rollouts(header, debts), "points", bounded=True, gamma=0.5).bounds == (-4.0, 0.0)
    assert head_for(Rollouts(header, debts), "points", bounded=True).bounds == (-4.0, -2.0)


def test_several_heads_and_networks_share_one_pass_of_the_base(lm, rollouts, monkeypatch):
    few = Rollouts(rollouts.header, rollouts.rollouts[:400])
    heads = [head_for(few, "points"), head_for(few, "length")]
    config = FitConfig(epochs=1, batch_tokens=512)
    together = [make_network(lm, "side", heads), make_network(lm, "reader", heads[1:], seed=1)]
    alone = [make_network(lm, "side", heads), make_network(lm, "reader", heads[1:], seed=1)]
    calls = []
    dense = lm.dense
    monkeypatch.setattr(lm, "dense", lambda *args, **options: calls.append(1) or dense(*args, **options))
    reports = fit_all(lm, together, few, config, use_tqdm=False)
    shared, calls[:] = len(calls), []
    separate = [fit(lm, network, few, config, use_tqdm=False) for network in alone]
    assert set(reports[0].heads) == {"points", "length"}
    for one, other in zip(together, alone, strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert reports[1].heads["length"].r_squared == pytest.approx(separate[1].heads["length"].r_squared, abs=1e-5)
    # Training steps are shared; one more call finds out what the second network reads.
    batches = sum(map(len, plan(few, config)))
    assert len(calls) - shared >= batches - 1


def plan(rollouts, config):
    from vas_engine.training.batches import plan_batches, split

    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts]
    train, _, _ = split(rollouts, config.holdout, config.holdout_by, config.seed)
    return [plan_batches(lengths, train, config.batch_tokens, torch.Generator().manual_seed(0))]


def test_same_seed_same_network_and_the_base_is_not_touched(lm, rollouts):
    few = Rollouts(rollouts.header, rollouts.rollouts[:300])
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    one, report = train(lm, few, config=FitConfig(epochs=2))
    two, again = train(lm, few, config=FitConfig(epochs=2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert report.heads == again.heads
    assert all(torch.equal(before[name], weight) for name, weight in lm.model.state_dict().items())


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_the_best_epoch_is_kept(lm, rollouts, ema):
    """Few rollouts and large steps overfit: later epochs are worse, and are not what remains."""
    few = Rollouts(rollouts.header, rollouts.rollouts[:60])
    settings = {"epochs": 30, "batch_tokens": 128, "holdout": 0.5, "lr": 1e-2, "ema": ema}
    _, report = train(lm, few, config=FitConfig(**settings))
    scores = [epoch.r_squared["points"] for epoch in report.epochs]
    assert report.best_epoch == 1 + max(range(30), key=scores.__getitem__)
    assert report.best_epoch < 30
    assert report.heads["points"].r_squared == pytest.approx(max(scores), abs=1e-6)
    _, patient = train(lm, few, config=FitConfig(**settings, patience=2))
    assert len(patient.epochs) == patient.best_epoch + 2 < 30


def test_the_average_is_what_is_judged_and_kept(lm, rollouts):
    """The same steps, and other weights: those of the average, which the report is about."""
    few = Rollouts(rollouts.header, rollouts.rollouts[:200])
    settings = {"epochs": 1, "batch_tokens": 128, "lr": 1e-2}
    plain, loud = train(lm, few, config=FitConfig(**settings))
    averaged, quiet = train(lm, few, config=FitConfig(**settings, ema=0.9))
    assert loud.epochs[0].train_loss == quiet.epochs[0].train_loss
    assert loud.heads != quiet.heads
    assert quiet.heads["points"].r_squared == quiet.epochs[0].r_squared["points"]
    assert not any(torch.equal(a, b) for a, b in zip(plain.parameters(), averaged.parameters(), strict=True))


def test_report_by_position_and_calibration(lm, rollouts):
    _, report = train(lm, rollouts, "reader", FitConfig(epochs=8, batch_tokens=512, lr=5e-3))
    head = report.heads["points"]
    states = sum(len(r.response_ids) + 1 for r in rollouts) / len(rollouts) * report.heldout_rollouts
    assert sum(part.count for part in head.by_position) == pytest.approx(states, rel=0.1)
    assert sum(part.count for part in head.calibration) == sum(part.count for part in head.by_position)
    # The prompt alone says nothing, the whole response everything.
    assert [part.start for part in head.by_position] == [0, 1, 2, 3, 4]
    assert head.by_position[0].r_squared < 0.05
    assert head.by_position[-1].r_squared > 0.8
    for part in head.calibration:
        assert abs(part.predicted - part.received) < 5 * part.error + 0.2
    predicted = [part.predicted for part in head.calibration]
    assert predicted == sorted(predicted)


def test_interrupted(lm, rollouts, monkeypatch):
    few = Rollouts(rollouts.header, rollouts.rollouts[:300])
    for keep in (False, True):
        network = make_network(lm, "side", [head_for(few, "points")])
        train_values, calls = network.train_values, []

        def interrupting(*args, train_values=train_values, calls=calls):
            calls.append(1)
            if len(calls) == 80:
                raise KeyboardInterrupt
            return train_values(*args)

        monkeypatch.setattr(network, "train_values", interrupting)
        config = FitConfig(epochs=50, batch_tokens=512, keep_on_interrupt=keep)
        if keep:
            report = fit(lm, network, few, config, use_tqdm=False)
            assert report.interrupted
            assert 0 < len(report.epochs) < 50
        else:
            with pytest.raises(KeyboardInterrupt):
                fit(lm, network, few, config, use_tqdm=False)


def test_what_cannot_be_trained_on(lm, rollouts):
    few = Rollouts(rollouts.header, rollouts.rollouts[:50])
    network = make_network(lm, "side", [head_for(few, "points")])
    constant = [r.__class__(**{**r.__dict__, "rewards": {"points": 2.0, "length": 1.0}}) for r in few]
    with pytest.raises(TrainingDataError, match="points is 2 for all 50 rollouts"):
        fit(lm, network, Rollouts(few.header, constant), use_tqdm=False)
    with pytest.raises(TrainingDataError, match="points is 2 for all 50"):
        head_for(Rollouts(few.header, constant), "points")
    header = Header({"architecture": "LlamaForCausalLM", "weights": "0"}, {}, few.header.rewards)
    with pytest.raises(TrainingDataError, match="sampled from another model"):
        fit(lm, network, Rollouts(header, few.rollouts), use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="did you mean 'points'"):
        head_for(few, "point")
    with pytest.raises(InvalidArgumentError, match="gamma=1"):
        train(lm, few, config=FitConfig(lam=0.5, gamma=0.9), distributional=True)
    for name, value in (("epochs", 0), ("lr", -1.0), ("lam", 2.0), ("holdout", 1.0), ("patience", 0)):
        with pytest.raises(InvalidArgumentError, match=name):
            FitConfig(**{name: value})


def test_empty_responses_count_as_states_of_the_prompt(lm, rollouts):
    rows = [r.__class__(**{**r.__dict__, "response_ids": []}) for r in rollouts.rollouts[:100]]
    _, report = train(lm, Rollouts(rollouts.header, rows), config=FitConfig(epochs=1))
    assert report.heads["points"].r_squared < 0.05  # nothing to go by: no better than a constant


def test_padding_does_not_reach_the_loss(lm, rollouts):
    """The loss of two rollouts in one padded batch is that of each by itself."""
    from vas_engine.training.batches import make_batch

    network = make_network(lm, "side", [head_for(rollouts, "points")])
    rewards = rollouts.rewards(["points"])
    short = next(i for i, r in enumerate(rollouts) if len(r.response_ids) == 2)
    long = next(i for i, r in enumerate(rollouts) if len(r.response_ids) == 4)

    def loss(indices):
        batch = make_batch(rollouts, indices, rewards, lm.device)
        output = network.train_values(lm, batch.token_ids, batch.lengths)
        losses = value_loss(network.heads, output, batch.rewards, batch.last, 0.8, 1.0)
        return losses[batch.mask].sum().item(), int(batch.mask.sum())

    (both, count), (a, count_a), (b, count_b) = loss([short, long]), loss([short]), loss([long])
    assert both == pytest.approx(a + b, rel=1e-4)
    assert (count, count_a, count_b) == (8, 3, 5)


def test_report_is_json(lm, rollouts, tmp_path):
    _, report = train(lm, Rollouts(rollouts.header, rollouts.rollouts[:100]), config=FitConfig(epochs=1))
    path = save_report(tmp_path, report)
    assert json.loads(path.read_text())["heads"]["points"]["reward"] == "points"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_chain_is_a_proper_problem(solution):
    """The exact solution's own consistency, and that it takes every token of the vocabulary."""
    ends = [p for p in solution.values if p not in solution.policy]
    assert sum(solution.reach[p] for p in ends) == pytest.approx(1.0)
    mean = sum(solution.reach[p] * solution.values[p] for p in ends)
    assert solution.values[()] == pytest.approx(mean)
    assert {p[-1] for p in ends} == set(range(VOCABULARY))
