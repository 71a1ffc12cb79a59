import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pyarrow.parquet as parquet
import pytest
import torch

from vas_engine.cli import main
from vas_engine.engine.engine import Engine
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.training import collect as collecting
from vas_engine.training.branching import sample_branches
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.fit import FitConfig, head_for
from vas_engine.training.network import make_network
from vas_engine.training.rewards import FunctionReward, load_rewards, score
from vas_engine.training.rollouts import load_rollouts, load_states
from vas_engine.values.artifact import save_value
from vas_engine.values.config import HeadConfig

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


@pytest.mark.parametrize("stopped_at", [0, 12, 25])
def test_goes_on_after_an_interruption(llm, rewards, reference, tmp_path, monkeypatch, stopped_at):
    step, steps = llm.engine.step, []

    def interrupting():
        steps.append(1)
        if len(steps) == stopped_at + 1:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupting)
    with pytest.raises(KeyboardInterrupt):
        collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    monkeypatch.undo()
    assert not llm.engine.has_unfinished
    index = json.loads((tmp_path / "run" / "index.json").read_text())
    assert len(index["shards"]) < 3
    found = collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    assert found.rollouts == reference.rollouts


def test_finished_rollouts_are_not_sampled_again(llm, rewards, reference, tmp_path, monkeypatch):
    collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    monkeypatch.delattr(Engine, "step")
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


def test_beginnings_are_scored_too(llm, rewards, reference, tmp_path):
    config = replace(CONFIG, partial_rewards=3)
    parts = collect(llm, PROMPTS, rewards, tmp_path / "run", config, use_tqdm=False)
    assert [row.response_ids for row in parts] == [row.response_ids for row in reference]
    assert [row.rewards for row in parts] == [row.rewards for row in reference]
    for row in parts.rollouts[::4]:
        texts = [
            llm.generate(row.prompt, SamplingParams(max_tokens=cut, seed=row.seed), use_tqdm=False)[0].outputs[0].text
            for cut in range(3, len(row.response_ids), 3)
        ]
        expected = score(rewards[0], [row.prompt] * len(texts), texts)
        assert row.partial_rewards["vader"] == pytest.approx(expected)
    table = parts.partial_rewards(["length", "vader"])
    assert table.shape == (18, 2, 2)
    assert parts.header.part_tokens == 3
    short = [len(row.response_ids) <= 6 for row in parts]
    assert table[:, 1, 0].isnan().tolist() == short
    with pytest.raises(InvalidArgumentError, match="partial_rewards"):
        collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)


def test_a_reward_that_fails_on_a_beginning_says_whose(llm, reference, tmp_path):
    row = reference.rollouts[2]
    bad = llm.generate(row.prompt, SamplingParams(max_tokens=3, seed=row.seed), use_tqdm=False)[0].outputs[0].text
    broken = FunctionReward("broken", lambda p, r: float("nan") if r == bad else 0.0)
    with pytest.raises(TrainingDataError, match="gave nan") as caught:
        collect(llm, PROMPTS, [broken], tmp_path / "run", replace(CONFIG, partial_rewards=3), use_tqdm=False)
    assert "is the beginning of sample" in caught.value.__notes__[0]


def test_what_cannot_be_collected(llm, rewards, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"prompts\[1\].*1 to 31 tokens"):
        collect(llm, ["the", "the " * 40], rewards, tmp_path / "a", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        collect(llm, [], rewards, tmp_path / "a", CONFIG, use_tqdm=False)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InvalidArgumentError, match="no value is loaded"):
        collect(llm, PROMPTS, rewards, tmp_path / "a", replace(CONFIG, values={"mood": 1.0}), use_tqdm=False)
    assert not (tmp_path / "a").exists()
    collect(llm, PROMPTS, rewards, tmp_path / "c", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="prompts_sha256"):
        collect(llm, ["other", *PROMPTS[1:]], rewards, tmp_path / "c", CONFIG, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="samples"):
        CollectConfig(samples=0)


def test_a_reward_that_fails_late_keeps_the_shards_before_it(llm, rewards, reference, tmp_path):
    bad = reference.rollouts[14].response
    broken = FunctionReward("broken", lambda p, r: float("nan") if (p, r) == ("happy", bad) else 0.0)
    with pytest.raises(TrainingDataError, match="reward 'broken' gave nan for response 2") as caught:
        collect(llm, PROMPTS, [broken], tmp_path / "run", CONFIG, use_tqdm=False)
    assert "response 2 of its shard is sample 2 of prompt 2; shard 2 is not written" in caught.value.__notes__[0]
    assert not llm.engine.has_unfinished
    assert len(load_rollouts(tmp_path / "run")) == 12


def test_a_reward_that_raises_is_asked_no_more(llm, tmp_path):
    seen = []

    def fails(prompt, response):
        seen.append(prompt)
        raise ValueError("no")

    with pytest.raises(TrainingDataError, match=r"raised ValueError \(no\)"):
        collect(llm, PROMPTS, [FunctionReward("f", fails)], tmp_path / "run", CONFIG, use_tqdm=False)
    assert seen == ["the dog"]
    assert json.loads((tmp_path / "run" / "index.json").read_text())["shards"] == {}


def test_the_bar_moves_with_every_response(llm, rewards, tmp_path, monkeypatch):
    moved = []

    class Bar(collecting.tqdm):
        def update(self, n=1):
            moved.append(n)
            return super().update(n)

    monkeypatch.setattr(collecting, "tqdm", Bar)
    monkeypatch.setattr(llm.engine.scheduler, "max_num_seqs", 4)
    config = CollectConfig(samples=6, max_tokens=8, seed=3)
    collect(llm, PROMPTS, rewards, tmp_path / "run", config)
    assert sum(moved) == 18
    assert max(moved) <= 4  # never more than there are seats


def test_conversations_open_the_turn_of_the_assistant(llm, tmp_path):
    seen = []

    def judge(prompt, response):
        seen.append(prompt)
        return 0.0

    template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    chats = [
        [{"role": "user", "content": "the dog"}],
        [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the cat"}],
    ]
    llm.tokenizer.chat_template = template
    try:
        config = CollectConfig(samples=2, max_tokens=2)
        found = collect(llm, chats, [FunctionReward("j", judge)], tmp_path / "run", config, use_tqdm=False)
        for bad in (["a"], [{"content": "a"}], [*chats[0], "a"]):
            with pytest.raises(InvalidArgumentError, match="must be a"):
                collect(llm, [bad], [FunctionReward("j", judge)], tmp_path / "bad", config, use_tqdm=False)
    finally:
        llm.tokenizer.chat_template = None
    texts = ["user the dog assistant ", "user the dog assistant the cat"]
    assert [row.prompt for row in found] == [text for text in texts for _ in range(2)]
    assert sorted(map(str, seen)) == sorted(row.prompt for row in found)
    chats = [chat for chat in chats for _ in range(2)]
    assert sorted((prompt.messages for prompt in seen), key=len) == chats
    for rows in (found, load_rollouts(tmp_path / "run"), pickle.loads(pickle.dumps(found))):
        assert [row.prompt.messages for row in rows] == chats
    seen.clear()
    config = FitConfig(holdout=0.75, holdout_by="sample")
    sample_branches(llm, found, [FunctionReward("j", judge)], 3, 2, config, use_tqdm=False)
    assert {len(prompt.messages) for prompt in seen} == {1, 2}


@pytest.fixture(scope="module")
def value_folder(llm, tmp_path_factory):
    torch.manual_seed(0)
    network = make_network(llm.lm, "reader", [HeadConfig("x")], seed=0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return save_value(tmp_path_factory.mktemp("value"), network)


def test_guided_responses_come_with_their_log_ratio(model_folder, value_folder, rewards, reference, tmp_path):
    guided = LLM(model_folder, values={"v": value_folder}, device="cpu", dtype="float32", max_num_seqs=8)
    config = CollectConfig(samples=300, max_tokens=3, seed=3, values={"v": 0.7}, num_candidates=6)
    found = collect(guided, ["the dog"], rewards, tmp_path / "run", config, use_tqdm=False)
    policy = found.header.policy
    assert policy["values"] == {"v": 0.7}
    assert policy["num_candidates"] == 6
    assert set(policy["networks"]) == {"v"}
    for row in found.rollouts[::60]:
        params = SamplingParams(max_tokens=3, seed=row.seed, values={"v": 0.7}, num_candidates=6, prune=False)
        completion = guided.generate(row.prompt, params, use_tqdm=False)[0].outputs[0]
        assert completion.token_ids == row.response_ids
        expected = completion.cumulative_tilted_logprob - completion.cumulative_logprob
        assert row.log_ratio == pytest.approx(expected, abs=1e-3)
        assert sum(row.log_ratios) == pytest.approx(row.log_ratio, abs=1e-4)
        assert len(row.log_ratios) == len(row.response_ids)
    ratios = torch.tensor([row.log_ratio for row in found], dtype=torch.float64)
    assert ratios.mean() > 0.1  # an estimate of KL(pi || pi0)
    # Weighted back, responses of the guided policy have the frozen model's length.
    weights = (-ratios).exp()
    error = float(weights.std() / len(weights) ** 0.5)
    assert float(weights.mean()) == pytest.approx(1.0, abs=4 * error)
    with pytest.raises(InvalidArgumentError, match=r"policy values=\{'v': 0.7\}, not \{'v': 1.0\}"):
        collect(guided, ["the dog"], rewards, tmp_path / "run", replace(config, values={"v": 1.0}), use_tqdm=False)


def test_unguided_rollouts_keep_no_log_ratio(reference, tmp_path, llm, rewards):
    collect(llm, PROMPTS, rewards, tmp_path / "run", CONFIG, use_tqdm=False)
    names = parquet.read_table(tmp_path / "run" / "shard-00000.parquet").column_names
    assert not [name for name in names if name.startswith("log_ratio")]
    assert reference.header.policy == {}
    assert reference.rollouts[0].log_ratio is None


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


def test_command_collects_from_the_guided_policy(model_folder, value_folder, tmp_path, capsys):
    guided = ["--value", f"v={value_folder}", "--weight", "v=0.5", "--num-candidates", "4", "--tail", "drop"]
    words = command(model_folder, tmp_path, "--samples", "20", "--max-tokens", "4", "--json")
    assert main([*words, *guided]) == 0
    assert json.loads(capsys.readouterr().out)["kl"] > 0
    found = load_rollouts(tmp_path / "run")
    assert (found.header.policy["values"], found.header.policy["tail"]) == ({"v": 0.5}, "drop")
    assert found.header.settings["max_tokens"] == 4
    assert all(row.log_ratio is not None for row in found)
    assert main(words) == 1  # the same folder, without guidance
    assert "policy" in capsys.readouterr().err
    assert main([*words, "--tail", "drop"]) == 1
    assert "--tail='drop': is for guided sampling: add --weight" in capsys.readouterr().err
    assert main([*words, "--weight", "v=1"]) == 1
    assert "no value is loaded" in capsys.readouterr().err


def test_command_says_that_a_reward_is_constant(model_folder, tmp_path, capsys):
    words = command(model_folder, tmp_path, "--samples", "4", "--max-tokens", "4", "--reward", "flat=0.1 + 0*length")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "flat is the same for every response" in printed
    assert "length is the same" not in printed
    with pytest.raises(TrainingDataError, match=r"reward flat is 0\.1 for all 12 rollouts"):
        head_for(load_rollouts(tmp_path / "run"), "flat")


def test_command_reads_a_column_of_a_dataset(model_folder, tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": PROMPTS, "answer": ["x"] * 3}).save_to_disk(tmp_path / "data")
    words = command(model_folder, tmp_path, "--samples", "1", "--max-tokens", "2", "--json")
    words[words.index("--prompts") + 1] = str(tmp_path / "data")
    assert main(words) == 1
    assert "has question, answer: say which by --prompt-column" in capsys.readouterr().err
    assert main([*words, "--prompt-column", "question"]) == 0
    assert [row.prompt for row in load_rollouts(tmp_path / "run")] == PROMPTS


KILL = """
import os, signal, sys
import pyarrow.parquet as parquet
import vas_engine.training.collect, vas_engine.training.rollouts as rollouts
from vas_engine.cli import main
from vas_engine.engine.engine import Engine
from vas_engine.training import rewards

def dying(call, at, half=False):
    calls = []
    def called(*args, **options):
        calls.append(1)
        if len(calls) < at:
            return call(*args, **options)
        if half:
            call(*args, **options)
            os.truncate(args[1], 100)
        os.kill(os.getpid(), signal.SIGKILL)
    return called

def patch(moment):
    if moment == "step":
        Engine.step = dying(Engine.step, 5)
    if moment == "reward":
        vas_engine.training.collect.score_all = dying(rewards.score_all, 2)
    if moment == "half-written shard":
        parquet.write_table = dying(parquet.write_table, 2, half=True)
    if moment == "before the second shard has its name":
        os.replace = dying(os.replace, 4)
    if moment == "before the index names the second shard":
        os.replace = dying(os.replace, 5)

words = sys.argv[1:]
for moment in words.pop().split(", "):
    child = os.fork()
    if not child:
        patch(moment)
        os._exit(main([*words, "--out", moment]))
    print(moment, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sep=": ")
"""
MOMENTS = {
    "step": 0,
    "reward": 1,
    "half-written shard": 1,
    "before the second shard has its name": 1,
    "before the index names the second shard": 1,
}


def test_sigkill_at_any_moment_leaves_whole_shards(model_folder, tmp_path):
    words = command(model_folder, tmp_path, "--samples", "40", "--max-tokens", "8", "--shard-rows", "20", "--json")
    del words[words.index("--out") : words.index("--out") + 2]
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *words, ", ".join(MOMENTS)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert killed.stdout.splitlines() == [f"{moment}: {-signal.SIGKILL}" for moment in MOMENTS]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = load_rollouts(tmp_path / "whole").rollouts
    for moment, shards in MOMENTS.items():
        folder = tmp_path / moment
        index = json.loads((folder / "index.json").read_text())["shards"]
        assert (len(index), bool(list(folder.glob(".*.tmp")))) == (shards, "shard" in moment)
        for name in index:
            assert parquet.read_table(folder / name).equals(parquet.read_table(tmp_path / "whole" / name))
        assert main([*words, "--out", str(folder)]) == 0
        assert load_rollouts(folder).rollouts == whole
        assert not list(folder.glob(".*"))


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
    whole = load_rollouts(tmp_path / "run").rollouts
    assert len(whole) == 600
    assert all(row in whole for row in kept)
