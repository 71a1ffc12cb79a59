"""Pairs for DPO; TRL itself runs in an environment of its own."""

import random
from types import SimpleNamespace

import pytest

from benchmarks.finetune import _pairs, main


def rollout(prompt: int, reward: float) -> SimpleNamespace:
    ids = [prompt, int(reward)]
    return SimpleNamespace(prompt_index=prompt, prompt_ids=[prompt], response_ids=ids, rewards={"r": reward})


def test_the_better_of_two_rollouts_of_one_prompt_is_chosen():
    rollouts = [rollout(prompt, float(place % 4)) for prompt in range(3) for place in range(8)]
    pairs = _pairs(rollouts, "r", 300, random.Random(0))
    assert 150 < len(pairs) <= 300
    for pair in pairs:
        (prompt,) = pair["prompt_ids"]
        assert pair["chosen_ids"][0] == pair["rejected_ids"][0] == prompt
        assert pair["chosen_ids"][1] > pair["rejected_ids"][1]
    shares = [sum(pair["prompt_ids"] == [prompt] for pair in pairs) for prompt in range(3)]
    assert max(shares) - min(shares) <= 1


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    with pytest.raises(SystemExit, match="choose a new folder"):
        main(["dpo", "model", "--rollouts", "runs", "--reward", "r", "--out", str(tmp_path)])
