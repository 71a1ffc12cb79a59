"""The efficiency of advantages on a problem whose exact values are known."""

import pytest
import torch
from chain import ExactValue, sample

from vas_engine.training.advantages import Advantages, Candidates
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import make_batch


@pytest.fixture(scope="module")
def rollouts(lm, solution):
    return sample(lm, solution, 3000)


class Changed(ExactValue):
    """The exact values with something done to them."""

    def __init__(self, solution, change):
        super().__init__(solution)
        self.change = change

    def train_values(self, lm, tokens, lengths, branches=None):
        values = super().train_values(lm, tokens, lengths, branches)
        return self.change(values, tokens, branches)


def judge(lm, rollouts, network):
    rewards = rollouts.rewards(["points"])
    base, judge = FrozenBase(lm, []), Advantages(rollouts, rewards)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(rollouts), 500):
        batch = make_batch(rollouts, range(start, start + 500), rewards, lm.device)
        base.take(batch)
        judge.add(base, network, batch, Candidates.find(base, batch, generator))
    [report] = judge.reports()
    return report


def test_exact_values_waste_nothing(lm, solution, rollouts):
    report = judge(lm, rollouts, ExactValue(solution))
    assert report.efficiency == pytest.approx(1.0, abs=0.06)
    assert report.gain == pytest.approx(1.0, abs=0.06)
    assert report.spread == pytest.approx(1.0, abs=0.06)
    assert report.drift < 1e-6
    assert report.responses == 3000


def test_neither_scale_nor_a_shift_of_whole_states_changes_it(lm, solution, rollouts):
    exact = judge(lm, rollouts, ExactValue(solution))
    doubled = judge(lm, rollouts, Changed(solution, lambda values, *_: 2 * values))
    assert doubled.efficiency == pytest.approx(exact.efficiency, rel=0.05)
    assert doubled.spread == pytest.approx(4 * exact.spread, rel=1e-3)


def test_values_without_meaning_and_values_turned_round(lm, solution, rollouts):
    def noise(values, tokens, branches):
        return torch.randn(values.shape, generator=torch.Generator().manual_seed(1))

    assert abs(judge(lm, rollouts, Changed(solution, noise)).efficiency) < 0.05
    assert judge(lm, rollouts, Changed(solution, lambda values, *_: -values)).efficiency < -0.9


def test_credit_that_comes_late_is_drift(lm, solution, rollouts):
    """A value that does not see the last token knows the level of a state, and nothing of its candidates."""

    def late(values, tokens, branches):
        states, candidates = branches.split(values)
        before = states.gather(1, branches.places[..., None])[:, :, None].expand_as(candidates)
        return torch.cat([states[:, :1], states[:, :-1], before.flatten(1, 2)], 1)

    assert judge(lm, rollouts, Changed(solution, late)) is None

    def half(values, tokens, branches):
        return 0.5 * (values + late(values, tokens, branches))

    report = judge(lm, rollouts, Changed(solution, half))
    assert report.drift > 0.1
    assert report.gain == pytest.approx(0.5, abs=0.05)
    assert report.gain == pytest.approx(0.5, abs=0.05)
    assert report.efficiency == pytest.approx(1.0, abs=0.1)


def test_one_response_to_a_prompt_says_nothing(lm, solution):
    few = sample(lm, solution, 40)
    alone = few.__class__(
        few.header,
        [r.__class__(**{**r.__dict__, "prompt_ids": [i // 36, i // 6 % 6, i % 6]}) for i, r in enumerate(few)],
    )
    rewards = alone.rewards(["points"])
    judge = Advantages(alone, rewards)
    base = FrozenBase(lm, [])
    batch = make_batch(alone, range(40), rewards, lm.device)
    base.take(batch)
    judge.add(base, ExactValue(solution), batch, Candidates.find(base, batch, torch.Generator().manual_seed(0)))
    assert judge.reports() == [None]
