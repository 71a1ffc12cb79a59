from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from chain import sample

from vas_engine.errors import TrainingDataError
from vas_engine.training.batches import split
from vas_engine.training.critic import Critic
from vas_engine.training.fit import FitConfig, fit, head_for
from vas_engine.training.network import make_network
from vas_engine.training.rollouts import Header, Rollout, Rollouts

PARTS = 24


@pytest.fixture(scope="module")
def network(lm, solution):
    return make_network(lm, "side", [head_for(sample(lm, solution, 20), "points")])


def made(parts: torch.Tensor, finals: torch.Tensor) -> Rollouts:
    """Responses with partial rewards [N, PARTS], NaN behind their ends, one every token."""
    rows = []
    for index, (row, final) in enumerate(zip(parts, finals.tolist(), strict=True)):
        known = row[~row.isnan()].tolist()
        ids = [1] * (len(known) + 1)
        rows.append(Rollout("", "", [1], ids, "stop", 0, index, {"x": final}, partial_rewards={"x": known}))
    return Rollouts(Header({}, {"partial_rewards": 1, "max_tokens": PARTS + 1}, {"x": {}}), rows)


def accumulating(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One half a token, give or take: [N, PARTS] and the sums at the end [N]."""
    steps = 0.5 + 0.5 * torch.randn(count, PARTS + 1, generator=torch.Generator().manual_seed(seed))
    sums = steps.cumsum(1)
    return sums[:, :-1], sums[:, -1]


def test_what_is_earned_tells_more_than_the_mean_from_the_start(network):
    """Also of a reward that accumulates, of which a beginning has far less than any whole response."""
    rollouts = made(*accumulating(500))
    critic = Critic(network, rollouts, range(400), ["x"])
    finals = ((rollouts.rewards(["x"]).float() - critic.mean) / critic.std)[400:, None]
    share = (torch.arange(1, PARTS + 1) / critic.longest)[None, :, None].expand(100, -1, -1)
    with torch.no_grad():
        told = critic.partial[400:], critic.earned[400:]
        judged = critic(torch.zeros(100, PARTS, network.heads.width), *told, share)
    missed = (judged - finals).square().mean((0, 2)) / finals.square().mean()
    # At most what is left of a random walk, and a little for the share being less than the root of its variance.
    assert bool((missed < 1.05 - share[0, :, 0] ** 2).all())


def test_it_starts_from_what_beginnings_tell_be_it_nothing(network):
    """Of a reward that is how long a response will be, whatever it has earned so far."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, PARTS + 1, (2000,), generator=generator)
    parts = torch.randn(2000, PARTS, generator=generator)
    parts[torch.arange(PARTS) >= lengths[:, None]] = torch.nan
    critic = Critic(network, made(parts, lengths.float()), range(1000), ["x"])
    finals = (lengths.float() - critic.mean) / critic.std
    for place in range(PARTS // 2):
        known = finals[1000:][~parts[1000:, place].isnan()]
        missed = critic.earned[1000:, place, 0][~parts[1000:, place].isnan()] - known
        assert float(missed.square().mean()) < 1.05 * float(known.var())


def test_moments_are_those_of_the_rollouts_trained_on(network):
    parts, finals = accumulating(100)
    one = Critic(network, made(parts, finals), range(80), ["x"])
    parts[80:], finals[80:] = 100 * parts[80:], -finals[80:]
    other = Critic(network, made(parts, finals), range(80), ["x"])
    assert torch.equal(one.partial[:80], other.partial[:80])
    assert torch.equal(one.earned[:80], other.earned[:80])
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)


def test_what_is_seldom_is_not_blown_up(network):
    """A part that two responses have, and a yes that few have so early, count no more than at the end."""
    parts, finals = accumulating(200)
    parts[2:, -1] = torch.nan
    parts[1, -1] = parts[0, -1] + 1e-3
    few = Critic(network, made(parts, finals), range(180), ["x"])
    assert float(few.partial[:2, -1].abs().max()) < 1e-3
    yes = (torch.arange(200) % 2).float()[:, None].repeat(1, PARTS)
    yes[:, 0] = 0.0
    yes[0, 0] = 1.0
    rare = Critic(network, made(yes, yes[:, -1]), range(200), ["x"])
    assert float(rare.partial.abs().max()) < 2.1
    assert float(rare.earned[:, 0].abs().max()) < 0.5


def test_discounted_rewards_are_learnt_from_whole_rewards(lm, solution):
    """A critic would count from the rewards' mean, and teach mean + γ^k (R - mean)."""
    parts = sample(lm, solution, 100, every=1)
    plain = Rollouts(replace(parts.header, settings={}), parts.rollouts)
    found = []
    for rollouts in (parts, plain):
        network = make_network(lm, "side", [head_for(rollouts, "length")])
        with pytest.warns(UserWarning, match="gamma=0.5 leaves") if rollouts is parts else nullcontext():
            report = fit(lm, network, rollouts, FitConfig(epochs=1, gamma=0.5), use_tqdm=False)
        assert not report.settings["critic"]
        found.append(torch.cat([p.flatten() for p in network.parameters()]))
    assert torch.equal(*found)


def test_a_reward_that_training_never_sees_vary(lm, solution):
    few = sample(lm, solution, 50, every=1)
    _, heldout, _ = split(few, 0.2, "sample", 0)
    rows = [replace(r, rewards=r.rewards | {"points": float(i in heldout[1:])}) for i, r in enumerate(few)]
    rollouts = Rollouts(few.header, rows)
    network = make_network(lm, "side", [head_for(rollouts, "points")])
    with pytest.raises(TrainingDataError, match="training part"):
        fit(lm, network, rollouts, FitConfig(holdout=0.2, holdout_by="sample"), use_tqdm=False)
