"""Rewards in a process of their own: what they do there stays there."""

import pytest

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.rewards import ChatPrompt, RewardProcess, load_rewards, score, score_all
from vas_engine.training.rollouts import load_rollouts

CODE = """
import os, re, sys, time

def noisy(prompt, response):
    print("printed by a reward")
    sys.stdout.flush()
    os.write(1, b"and past Python\\n")
    assert sys.stdin.read() == ""
    return len(response)

def nan(prompt, response):
    return float("nan") if response == "bad" else 1.0

def text(prompt, response):
    return "much"

def raises(prompt, response):
    raise RuntimeError("oh no")

def dies(prompt, response):
    os._exit(7)

def sleeps(prompt, response):
    while response == "sleep":
        time.sleep(60)
    return 1.0

def stuck(prompt, response):
    # Hours of one call into C that keeps Python's lock.
    return float(re.match("(a|a)*b", response) is None) if response.startswith("aaa") else 0.0

def roles(prompt, response):
    return len(getattr(prompt, "messages", []))
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "odd_rewards_for_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def started(*names, **options):
    return RewardProcess([f"{name}=odd_rewards_for_test:{name}" for name in names], **options)


def test_equals_rewards_in_this_process():
    specs = ["vader", "both=vader + 0.1*length", "ensemble:min(vader, distinct-words)"]
    texts = ["A good day", "", "Sad \N{GRINNING FACE} \ud800 bad\nnews"] * 20
    with RewardProcess(specs) as process:
        ours = load_rewards(specs)
        assert [(r.name, r.spec, r.bounds) for r in process.rewards] == [(r.name, r.spec, r.bounds) for r in ours]
        assert score_all(process.rewards, [""] * 60, texts) == score_all(ours, [""] * 60, texts)


def test_conversations_arrive_whole():
    chat = ChatPrompt("text", [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with started("roles") as process:
        assert score(process.rewards[0], ["a", chat], ["", ""]) == [0.0, 2.0]


def test_what_a_reward_prints_is_not_taken_for_its_answer(capfd):
    with started("noisy") as process:
        assert score(process.rewards[0], ["", ""], ["abc", "a"]) == [3.0, 1.0]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "printed by a reward" in captured.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "reward 'nan' gave nan for response 1: return a finite number"),
        ("text", r"reward 'text' gave 'much' \(str\)"),
        ("raises", r"reward 'raises' raised RuntimeError \(oh no\) for response"),
        ("dies", "reward 'dies' lost its process, which ended with status 7"),
    ],
)
def test_failures_are_named_as_in_this_process(name, message):
    with started(name) as process, pytest.raises(TrainingDataError, match=message):
        score(process.rewards[0], [""] * 3, ["good one", "bad", "good too"])


def test_unknown_rewards_are_refused_at_once():
    with pytest.raises(InvalidArgumentError, match="did you mean 'length'"):
        RewardProcess(["lenght"])
    with pytest.raises(InvalidArgumentError, match="above 0"):
        RewardProcess(["length"], timeout=0)


@pytest.mark.parametrize(("name", "text"), [("sleeps", "sleep"), ("stuck", "a" * 60)])
def test_what_hangs_ends_in_an_error_that_says_so(name, text, capfd):
    with started(name, timeout=2) as process:
        assert len(score(process.rewards[0], ["", ""], ["fine", "too"])) == 2
        with pytest.raises(TrainingDataError, match=rf"reward '{name}' gave no answer for .* within 2 s"):
            score(process.rewards[0], [""], [text])
        with pytest.raises(TrainingDataError, match="lost its process"):
            score(process.rewards[0], [""], ["fine"])
    assert f"in {name}" in capfd.readouterr().err  # where it stood


def test_a_collection_keeps_what_came_before_the_hang(model_folder, tmp_path):
    from vas_engine.llm import LLM

    llm = LLM(model_folder, device="cpu", dtype="float32", max_num_seqs=4)
    prompts = ["the", "dog", "cat", "ran", "and", "sat", "love", "happy"]
    config = CollectConfig(samples=4, max_tokens=6, seed=1, shard_rows=4)
    whole = collect(llm, prompts, load_rewards(["length"]), tmp_path / "whole", config, use_tqdm=False)
    (tmp_path / "hanging_reward_for_test.py").write_text(
        "import time\ndef judge(p, r):\n    while p == 'happy':\n        time.sleep(60)\n    return 1.0"
    )
    with RewardProcess(["hanging_reward_for_test:judge"], timeout=2) as process:  # noqa: SIM117
        with pytest.raises(TrainingDataError, match="'judge' gave no answer") as caught:
            collect(llm, prompts, process.rewards, tmp_path / "run", config, use_tqdm=False)
    assert "shard 7 is not written, finished ones are kept" in caught.value.__notes__[0]
    kept = [row.response_ids for row in load_rollouts(tmp_path / "run")]
    assert kept
    assert kept == [row.response_ids for row in whole][: len(kept)]
    assert not llm.engine.has_unfinished


def test_the_process_ends_with_its_parent():
    process = started("nan")
    process.close()
    assert process._process.returncode == 0
    process.close()  # again is harmless
