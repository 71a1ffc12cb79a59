"""What networks read of the frozen model: run in every batch, kept in memory, or saved with the rollouts."""

import pytest
import torch
from chain import ExactValue, build_lm, sample, solve

from vas_engine.errors import TrainingDataError
from vas_engine.training.fit import FitConfig, fit_all, head_for
from vas_engine.training.network import make_network

SETTINGS = {"epochs": 3, "batch_tokens": 512}


@pytest.fixture(scope="module")
def lm():
    return build_lm()


@pytest.fixture(scope="module")
def rollouts(lm):
    return sample(lm, solve(lm), 200)


def train(lm, rollouts, kinds, states=None, teacher=None, sizes=None, **settings):
    heads = [head_for(rollouts, "points")]
    networks = [make_network(lm, kind, heads, **(sizes or {})) for kind in kinds]
    config = FitConfig(**SETTINGS, **settings)
    reports = fit_all(lm, networks, rollouts, config, states=states, teacher=teacher, use_tqdm=False)
    assert len({report.base for report in reports}) == 1
    return networks, reports[0].base


def calls_of(lm, monkeypatch) -> list[int]:
    """Rows of each run of the model from now on, runs for candidates left out."""
    rows, dense = [], lm.dense

    def counting(tokens, *args, **options):
        if options.get("branches") is None:
            rows.append(tokens.numel())
        return dense(tokens, *args, **options)

    monkeypatch.setattr(lm, "dense", counting)
    return rows


def assert_same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kinds", [["reader", "side"], ["lookahead"], ["action", "side-lookahead"]])
def test_states_in_memory_are_those_of_the_model(lm, rollouts, monkeypatch, kinds):
    run, source = train(lm, rollouts, kinds, cache_memory="0")
    assert source == "model"
    rows = calls_of(lm, monkeypatch)
    kept, source = train(lm, rollouts, kinds)
    assert source == "memory"
    # One run over all rollouts, with a little padding, and one to find candidates for the held-out tenth.
    tokens = sum(len(r.prompt_ids) + len(r.response_ids) for r in rollouts)
    assert tokens <= sum(rows) < 1.3 * tokens
    assert_same(run, kept)


def test_too_little_memory_runs_the_model(lm, rollouts):
    assert train(lm, rollouts, ["reader"], cache_memory="20kB")[1] == "model"


def final_states(lm, rollouts) -> list[torch.Tensor]:
    return [lm.dense(torch.tensor([[*r.prompt_ids, *r.response_ids]])).last_hidden[0] for r in rollouts]


@pytest.mark.parametrize("kind", ["action", "lookahead"])
def test_saved_states_stand_for_the_model(lm, rollouts, monkeypatch, kind):
    states, last = final_states(lm, rollouts), {"states": [lm.num_layers]}
    run, _ = train(lm, rollouts, [kind], sizes=last, cache_memory=0)
    rows = calls_of(lm, monkeypatch)
    saved, source = train(lm, rollouts, [kind], states, sizes=last)
    assert (source, rows) == ("saved", [])
    assert_same(run, saved)
    # A network that reads another layer needs the model.
    assert train(lm, rollouts, [kind], states, cache_memory=0)[1] == "model"


def test_saved_states_serve_a_teacher_of_an_action_head(lm, rollouts, monkeypatch):
    """The base model's candidates come from its final states."""
    teacher, last = ExactValue(solve(lm)), {"states": [lm.num_layers]}
    run, _ = train(lm, rollouts, ["action"], teacher=teacher, sizes=last, cache_memory=0)
    states = final_states(lm, rollouts)
    rows = calls_of(lm, monkeypatch)
    saved, source = train(lm, rollouts, ["action"], states, teacher, last)
    assert (source, rows) == ("saved", [])
    assert_same(run, saved)


def test_states_of_other_rollouts_are_refused(lm, rollouts):
    states = final_states(lm, rollouts)
    with pytest.raises(TrainingDataError, match="rollout 3"):
        train(lm, rollouts, ["action"], [*states[:3], states[3][:1], *states[4:]])


def test_a_lookahead_network_learns_from_a_teacher(lm, rollouts):
    """Its candidates are run through the base model, beside another network that needs none of that."""
    heads = [head_for(rollouts, "points")]
    teacher = ExactValue(solve(lm))
    config = FitConfig(epochs=30, batch_tokens=256, lr=5e-3, teacher_candidates=6, teacher_positions=2)
    networks = [make_network(lm, kind, heads) for kind in ("lookahead", "action")]
    reports = fit_all(lm, networks, rollouts, config, teacher=teacher, use_tqdm=False)
    for report in reports:
        assert report.heads["points"].agreement > 0.5
