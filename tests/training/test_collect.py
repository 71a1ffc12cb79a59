import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from vas_engine.cli import main
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.rewards import FunctionReward, load_rewards, score
from vas_engine.training.rollouts import load_rollouts, load_states

PROMPTS = ["the dog", "the cat ran and", "happy"]
CONFIG = CollectConfig(samples=6, max_tokens=8, seed=3, shard_rows=5)


@pytest.fixture(scope="module")
def llm(model_folder):
    return LLM(model_folder, device="cpu", dtype="float32", max_num_seqs=4)


@pytest.fixture
def rewards():
    return load_rewards(["vader", "length"])


@pytest.fixture(scope="module")
def reference(llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return collect(llm, PROMPTS, load_rewards(["vader", "length"]), folder, CONFIG, use_tqdm=False)


def test_rows_are_samples_of_the_model_and_their_rewards(llm, reference, rewards):
    assert [row.prompt for row in reference] == [prompt for prompt in PROMPTS for _ in range(6)]
    assert len({row.seed for row in reference}) == 18
    for row in reference.rollouts[::5]:
        output = llm.generate(row.prompt, SamplingParams(max_tokens=8, seed=row.seed), use_tqdm=False)[0]
        assert output.prompt_token_ids == row.prompt_ids
        assert output.outputs[0].token_ids == row.response_ids
        assert output.outputs[0].text == row.response
    for reward in rewards:
        expected = score(reward, [r.prompt for r in reference], [r.response for r in reference])
        assert [row.rewards[reward.name] for row in reference] == expected
    assert reference.header.rewards["vader"] == {"spec": "vader", "bounds": [-1.0, 1.0]}


def test_eos_is_part_of_the_response_and_not_of_its_text(reference):
    reasons = {row.finish_reason for row in reference}
    assert reasons == {"stop", "length"}
    for row in reference:
        assert (row.finish_reason == "stop") == (row.response_ids[-1] == 1)
        assert "</s>" not in row.response
        assert row.finish_reason == "stop" or len(row.response_ids) == 8


@pytest.mark.parametrize("stopped_at", [0, 1, 3])
def test_goes_on_after_an_interruption(llm, rewards, reference, tmp_path, monkeypatch, stopped_at):
    generate, shards = llm.generate, []

    def interrupting(*args, **options):
        if len(shards) == stopped_at:
            raise KeyboardInterrupt
        shards.append(1)
        return generate(*args, **options)

    monkeypatch.setattr(llm, "generate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    monkeypatch.setattr(llm, "generate", generate)
    found = collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    assert found.rollouts == reference.rollouts
    assert len(shards) == stopped_at


def test_finished_rollouts_are_not_sampled_again(llm, rewards, reference, tmp_path, monkeypatch):
    collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    monkeypatch.delattr(LLM, "generate")
    assert collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False).rollouts == reference.rollouts


def test_shards_do_not_matter(llm, rewards, reference, tmp_path):
    config = CollectConfig(samples=6, max_tokens=8, seed=3, shard_rows=100)
    assert collect(llm, PROMPTS, rewards, tmp_path / "run", config, use_tqdm=False).rollouts == reference.rollouts


def test_hidden_states_are_those_of_the_model(llm, rewards, reference, tmp_path):
    config = CollectConfig(samples=6, max_tokens=8, seed=3, shard_rows=10, hidden_states=True)
    found = collect(llm, PROMPTS, rewards, tmp_path / "run", config, use_tqdm=False)
    assert found.rollouts == reference.rollouts
    states = [*load_states(tmp_path / "run", 0), *load_states(tmp_path / "run", 1)]
    assert len(states) == len(found)
    for row, state in zip(found, states, strict=True):
        tokens = torch.tensor([row.prompt_ids + row.response_ids])
        assert torch.allclose(state, llm.lm.dense(tokens).last_hidden[0], atol=1e-5)


def test_what_cannot_be_collected(llm, rewards, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\].*1 to 31 tokens"):
        collect(llm, ["the", "the " * 40], rewards, tmp_path / "a", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        collect(llm, [], rewards, tmp_path / "a", CONFIG, use_tqdm=False)
    assert not (tmp_path / "a").exists()
    broken = FunctionReward("broken", lambda p, r: float("nan"))
    with pytest.raises(TrainingDataError, match="reward 'broken' gave nan for response 0") as caught:
        collect(llm, PROMPTS, [broken], tmp_path / "b", CONFIG, use_tqdm=False)
    assert "responses 0 to 4" in caught.value.__notes__[0]
    collect(llm, PROMPTS, rewards, tmp_path / "c", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="prompts_sha256"):
        collect(llm, ["other", *PROMPTS[1:]], rewards, tmp_path / "c", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="samples"):
        CollectConfig(samples=0)


def command(model_folder, tmp_path, *options):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    arguments = ["collect", str(model_folder), "--prompts", str(prompts), "--reward", "mood=vader"]
    return [*arguments, "--reward", "length", "--out", str(tmp_path / "run"), *options]


def test_commands_from_prompts_to_a_value_that_guides(model_folder, tmp_path, capsys):
    words = command(model_folder, tmp_path, "--samples", "40", "--max-tokens", "8", "--json")
    assert main(words) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rollouts"] == 120
    assert set(summary["rewards"]) == {"mood", "length"}
    for kind, extra in (
        ("side", []),
        ("reader", ["--distributional", "--layers", "1"]),
        ("action", ["--width", "32"]),
    ):
        out = tmp_path / kind
        words = [
            "train",
            str(model_folder),
            "--rollouts",
            str(tmp_path / "run"),
            "--kind",
            kind,
            "--out",
            str(out),
        ]
        assert main([*words, "--reward", "length", "--epochs", "1", "--batch-tokens", "256", "--json", *extra]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report == json.loads((out / "training.json").read_text())
        assert report["heads"]["length"]["reward"] == "length"
        assert main(words) == 1
        assert "exists already" in capsys.readouterr().err
        guided = LLM(model_folder, values={"v": out}, device="cpu")
        params = SamplingParams(values={"v": 2.0}, num_candidates=4, max_tokens=4, seed=0)
        completion = guided.generate("the", params, use_tqdm=False)[0].outputs[0]
        assert len(completion.values["v"]) == len(completion.token_ids)


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(model_folder, tmp_path):
    words = command(
        model_folder, tmp_path, "--samples", "200", "--max-tokens", "20", "--shard-rows", "20", "--seed", "1"
    )
    code = "import sys; from vas_engine.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    index = tmp_path / "run" / "index.json"  # what names a shard makes it count
    while process.poll() is None and not (index.exists() and "shard-00001" in index.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    kept = load_rollouts(tmp_path / "run")
    assert 40 <= len(kept) < 600
    assert not list((tmp_path / "run").glob(".*"))
    assert main([*words, "--json"]) == 0
    whole = load_rollouts(tmp_path / "run")
    assert len(whole) == 600
    assert whole.rollouts[: len(kept)] == kept.rollouts
