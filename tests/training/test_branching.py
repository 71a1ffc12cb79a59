import pytest
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.llm import LLM
from vas_engine.training.branching import explainable, judge_branches, load_rollout_rewards, sample_branches
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.fit import FitConfig, fit, head_for
from vas_engine.training.network import make_network
from vas_engine.training.rewards import FunctionReward, load_rewards, score


def test_noise_is_taken_out():
    """Values of known quality against few noisy returns of each state."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(4000, generator=generator, dtype=torch.float64)
    returns = true[:, None] + 3.0 * torch.randn(4000, 4, generator=generator, dtype=torch.float64)
    share, perfect = explainable(true, returns)
    assert share == pytest.approx(0.1, abs=0.02)
    assert perfect == pytest.approx(1.0, abs=0.1)
    # Half of the deviation left out leaves a quarter of the variance unexplained.
    assert explainable(0.5 * true, returns)[1] == pytest.approx(0.75, abs=0.1)
    assert explainable(torch.zeros(4000, dtype=torch.float64), returns)[1] == pytest.approx(0.0, abs=0.1)
    # Taken at face value, the perfect values would explain three tenths of the means' variance.
    means = returns.mean(1)
    naive = 1 - float((true - means).square().mean() / means.var())
    assert naive < 0.4


def test_nothing_to_explain():
    returns = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    assert explainable(torch.zeros(3), returns) == (0.0, None)


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder, device="cpu", max_num_seqs=16)


@pytest.fixture(scope="module")
def rollouts(llm, tmp_path_factory):
    rewards = load_rewards(["words=length", "twice=words * 2"])
    config = CollectConfig(samples=100, max_tokens=12, seed=5, shard_rows=64)
    prompts = ["good dog", "the cat ran and"]
    return collect(llm, prompts, rewards, tmp_path_factory.mktemp("runs") / "run", config, use_tqdm=False)


def test_completions_go_on_from_held_out_states(llm, rollouts):
    rewards = load_rollout_rewards(rollouts, ["twice"])
    assert [reward.name for reward in rewards] == ["twice"]
    config = FitConfig(holdout=0.3, epochs=2)
    branches = sample_branches(llm, rollouts, rewards, points=12, samples=3, config=config, use_tqdm=False)
    assert branches.rewards["twice"].shape == branches.lengths.shape == (12, 3)
    whole = [[*r.prompt_ids, *r.response_ids] for r in rollouts]
    for ids, position in zip(branches.token_ids, branches.positions.tolist(), strict=True):
        assert any(ids == text[: len(ids)] and len(ids) < len(text) for text in whole)
        assert position <= 11
    # No response is longer than those that were collected.
    assert int((branches.positions[:, None] + branches.lengths).max()) <= 12
    network = make_network(llm.lm, "reader", [head_for(rollouts, "twice")])
    report = fit(llm.lm, network, rollouts, config, use_tqdm=False)
    found = judge_branches(llm.lm, network, report, branches).heads["twice"].branching
    assert (found.points, found.samples) == (12, 3)
    assert 0 <= found.explainable <= 1
    assert sum(part.count for part in found.by_position) <= 12
    again = sample_branches(llm, rollouts, rewards, points=12, samples=3, config=config, use_tqdm=False)
    assert torch.equal(again.rewards["twice"], branches.rewards["twice"])


def test_rewards_see_whole_responses(llm, rollouts):
    seen: list[tuple[str, str]] = []

    def note(prompts, responses):
        """Each reward is the place where the texts lie."""
        seen.extend(zip(prompts, responses, strict=True))
        return [float(len(seen) - len(responses) + place) for place in range(len(responses))]

    branches = sample_branches(llm, rollouts, [FunctionReward("x", note, batched=True)], 12, 3, use_tqdm=False)
    prompts = {r.prompt: r.prompt_ids for r in rollouts}
    for state, lengths, places in zip(branches.token_ids, branches.lengths, branches.rewards["x"], strict=True):
        for length, place in zip(lengths.tolist(), places.tolist(), strict=True):
            prompt, response = seen[int(place)]
            begun = state[len(prompts[prompt]) :]
            assert state[: len(prompts[prompt])] == prompts[prompt]
            assert response.startswith(llm.tokenizer.decode(begun, skip_special_tokens=True))
            # The tokenizer joins words, of at most five letters.
            assert len(response) <= 5 * (len(begun) + length)
    assert len(seen) == 36


def test_whole_texts_are_rewarded_again(llm, tmp_path):
    """Also where no reward of the list is a plain one."""
    rewards = load_rewards(["twice=length * 2", "both=ensemble:mean(length, characters)"], whole_text=True)
    config = CollectConfig(samples=2, max_tokens=4)
    found = load_rollout_rewards(collect(llm, ["good dog"], rewards, tmp_path / "run", config, use_tqdm=False))
    for reward, again in zip(rewards, found, strict=True):
        assert score(again, ["good dog"], ["ran"]) == score(reward, ["good dog"], ["ran"])
        assert score(again, ["good dog"], ["ran"]) > score(again, [""], ["ran"])
        assert again.spec == reward.spec


@pytest.mark.parametrize(("points", "samples", "said"), [(2, 1, "branch_samples"), (10**6, 4, "branch_points")])
def test_too_few_of_either(llm, rollouts, points, samples, said):
    with pytest.raises(InvalidArgumentError, match=said):
        sample_branches(llm, rollouts, [], points, samples, use_tqdm=False)
