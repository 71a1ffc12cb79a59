"""`vas evaluate` from end to end."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tests.evaluation.conftest import PROMPTS, word_model, word_tokenizer
from vas_engine.cli import FAILED, INTERRUPTED, OK, main
from vas_engine.llm import LLM
from vas_engine.training.rollouts import load_rollouts
from vas_engine.values.artifact import save_value
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model, prompts, and a bounded value of each of two rewards."""
    root = tmp_path_factory.mktemp("evaluate")
    word_model().save_pretrained(root / "model")
    word_tokenizer().save_pretrained(root / "model")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    llm = LLM(str(root / "model"), device="cpu")
    torch.manual_seed(0)
    for name in ("characters", "readability"):
        head = HeadConfig(name, name, bounds=(-30.0, 30.0))
        network = ValueNetwork(default_config("side", llm.lm, [head])).bind(llm.lm, llm.tokenizer)
        folder = save_value(root / name, network, llm.tokenizer)
        (folder / "training.json").write_text(json.dumps({"seconds": 12.5, "train_rollouts": 300}))
    return root


def words(folders, out, *more: str) -> list[str]:
    command = f"evaluate {folders}/model --prompts {folders}/prompts.txt --reward characters --out {out}"
    sizes = "--samples 4 --pool 32 --max-tokens 5 --best-of 2 8 --num-candidates 4"
    return [*command.split(), *sizes.split(), *more]


def test_everything_is_written(folders, tmp_path, capsys):
    import pyarrow.parquet as parquet

    value = f"characters={folders}/characters"
    more = ["--value", value, "--weights", "1", "4", "--method", "vas", "args", "args-greedy", "fudge", "--json"]
    assert main(words(folders, tmp_path / "out", *more)) == OK
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == record
    labels = [point["label"] for point in record["sections"][0]["points"]]
    methods = ("vas", "args", "args-greedy", "fudge")
    assert labels == ["base", "best of 2", "best of 8", *(f"{m} {w}" for m in methods for w in (1, 4))]
    assert all(label in err for label in labels)
    points = {point["label"]: point for point in record["sections"][0]["points"]}
    assert points["vas 1"]["training"] == {"seconds": 12.5, "rollouts": 300}
    assert points["base"]["training"] == {}
    assert points["args-greedy 4"]["settings"]["temperature"] == 0.0
    assert points["fudge 1"]["kl"]["mean"] > 0
    lines = {(line["method"], line["n"]) for line in record["sections"][0]["headlines"]}
    assert lines == {(m, n) for m in methods for n in (2, 8)}
    assert parquet.read_table(tmp_path / "out" / "points.parquet").num_rows == len(labels)
    responses = parquet.read_table(tmp_path / "out" / "responses.parquet").to_pylist()
    assert len(responses) == 4 * (32 + 8 * 4)
    assert all(len(row["response"]) == row["reward.characters"] for row in responses)
    for name in ("kl.png", "flops.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_methods_of_many_requests_and_policies(folders, tmp_path, capsys):
    """A policy of other weights is far from the base; the base as a policy is not."""
    word_model(seed=1).save_pretrained(tmp_path / "tuned")
    more = ["--value", f"characters={folders}/characters", "--method", "blockwise", "mcts", "--weights", "2"]
    more += ["--blocks", "2", "4", "--block-tokens", "2", "--simulations", "3", "--json"]
    more += ["--policy", f"tuned={tmp_path}/tuned", "--policy", f"same:0.5={folders}/model"]
    assert main(words(folders, tmp_path / "out", *more)) == OK
    points = {p["label"]: p for p in json.loads(capsys.readouterr().out)["sections"][0]["points"]}
    assert {"blockwise 2", "blockwise 4", "mcts 2", "tuned", "same 0.5"} < set(points)
    assert points["blockwise 4"]["kl_kind"] == "bound"
    assert points["mcts 2"]["kl_kind"] == "exact"
    assert points["mcts 2"]["settings"]["simulations"] == 3
    assert points["tuned"]["kl"]["mean"] > 1.0
    assert points["same 0.5"]["kl"]["mean"] == pytest.approx(0.0, abs=1e-5)
    assert points["same 0.5"]["strength"] == 0.5
    assert points["tuned"]["perplexity"] > points["base"]["perplexity"]
    # A draft of two blocks for each that stays costs about twice the rows.
    assert points["blockwise 4"]["flops_per_token"] > 2 * points["base"]["flops_per_token"]


def test_compositions_in_one_batch(folders, tmp_path, capsys):
    more = ["--reward", "readability", "--method", "vas", "--weights", "2", "--json"]
    for name in ("characters", "readability"):
        more += ["--value", f"{name}={folders}/{name}"]
    more += ["--grid", "characters=-2,0,2", "readability=0,2"]
    assert main(words(folders, tmp_path / "out", *more)) == OK
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert [section["name"] for section in record["sections"]] == ["characters", "readability"]
    labels = [p["label"] for p in record["sections"][0]["points"]]
    assert labels == ["base", "best of 2 by characters", "best of 8 by characters", "vas characters 2"]
    fronts = record["fronts"]
    assert [p["label"] for p in fronts["composition"]] == [
        "characters -2, readability +0",
        "characters -2, readability +2",
        "characters +0, readability +2",
        "characters +2, readability +0",
        "characters +2, readability +2",
    ]
    both = fronts["composition"][-1]
    scales = record["settings"]["scales"]
    assert both["objective"] == {name: pytest.approx(2 / scale) for name, scale in scales.items()}
    # One value of it alone is the same request, alone or in the mixed batch.
    alone = record["sections"][0]["points"][-1]
    assert fronts["composition"][3]["rewards"] == alone["rewards"]
    assert len(fronts["best of 8 by the sum"]) == 5
    assert "* characters +2" in err or "* characters -2" in err or "* characters +0" in err
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_collected_samples_are_a_pool(folders, tmp_path, capsys):
    """The rewards and likelihoods of rollouts, at the cost of samples made now."""
    collected = (
        f"collect {folders}/model --prompts {folders}/prompts.txt --reward characters --samples 40 --max-tokens 5"
    )
    assert main([*collected.split(), "--out", str(tmp_path / "rollouts")]) == OK
    rewards = [rollout.rewards["characters"] for rollout in load_rollouts(tmp_path / "rollouts")]
    capsys.readouterr()
    more = ["--rollouts", str(tmp_path / "rollouts"), "--pool", "16", "--json"]
    assert main(words(folders, tmp_path / "out", *more)) == OK
    base, *best = json.loads(capsys.readouterr().out)["sections"][0]["points"]
    assert base["responses"] == 40
    assert base["score"]["mean"] == pytest.approx(sum(rewards) / len(rewards))
    assert 1.0 < base["perplexity"] < 10.0
    assert best[-1]["score"]["mean"] > base["score"]["mean"]
    assert base["model_rows_per_token"] < 1.5
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert record["settings"]["pool"] == 16
    # Without --pool a few fresh samples tell what the rollouts cost.
    without = [word for word in words(folders, tmp_path / "few", *more[:2]) if word not in ("--pool", "32")]
    assert main(without) == OK
    assert json.loads((tmp_path / "few" / "evaluation.json").read_text())["settings"]["pool"] == 4
    capsys.readouterr()
    (tmp_path / "other.txt").write_text("a a a\n")
    for changed, message in (
        (["--max-tokens", "6"], "max_tokens=5, here it is 6"),
        (["--best-of", "64"], "the rollouts have 40 responses"),
        (["--prompts", str(tmp_path / "other.txt")], "no response to prompt 0"),
    ):
        assert main(words(folders, tmp_path / "more", *more, *changed)) == FAILED
        assert message in capsys.readouterr().err


def test_conversations_are_what_collecting_made_of_them(folders, tmp_path, capsys, monkeypatch):
    """The assistant's turn is opened or continued, and rewards see the messages."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}d{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    word_model().save_pretrained(tmp_path / "model")
    question = {"role": "user", "content": "a b"}
    chats = [[question], [question, {"role": "assistant", "content": "c"}]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"prompt": chat}) + "\n" for chat in chats))
    (tmp_path / "turns.py").write_text("def count(prompt, response):\n    return len(prompt.messages)\n")
    monkeypatch.chdir(tmp_path)
    common = f"{tmp_path}/model --prompts chats.jsonl --reward turns:count --max-tokens 3 --samples 4".split()
    assert main(["collect", *common, "--out", "run"]) == OK
    assert main(["evaluate", *common, "--rollouts", "run", "--pool", "4", "--best-of", "2", "--out", "out"]) == OK
    capsys.readouterr()


def test_bad_arguments_are_named_before_any_work(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(LLM, "generate", None)  # nothing is sampled
    value = ["--value", f"characters={folders}/characters"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for more, message in (
        ([*value, "--method", "agrs"], "did you mean 'args'"),
        ([*value, "--best-of", "64"], "use at most --pool 32"),
        (["--value", f"x={folders}/readability"], "give --reward readability=SPEC"),
        ([*value, "--grid", "characters=1,2"], "at least two rewards"),
        ([*value, "--grid", "length=1,2"], "no value steers this reward"),
        ([*value, "--grid", "characters=1,x"], "write REWARD=W,W"),
        ([*value, "--policy", "tuned"], "write NAME=FOLDER"),
        ([*value, "--policy", "tuned=/no/such/folder"], "/no/such/folder holds no model"),
        ([*value, "--out", str(tmp_path / "full")], "choose a new folder"),
        ([*value, "--tail", "foo"], "must be one of 'keep', 'drop'"),
        ([*value, "--tilt", "optimal"], "has a scalar head"),
        ([*value, "--method", "vas", "qsharp"], "has a scalar head"),
        ([*value, "--weights", "1", "1"], "label='vas 1': would be measured twice"),
        ([*value, "--method", "blockwise", "--blocks", "2", "2"], "label='blockwise 2': would be measured twice"),
        ([*value, "--blocks", "0"], "--blocks=0: must be at least 1"),
        ([*value, "--best-of", "0"], "--best-of=0: must be at least 1"),
        ([*value, "--policy", f"base={folders}/model"], "label='base': would be measured twice"),
        ([*value, "--limit", "-1"], "--limit=-1: must be at least 1"),
        ([*value, "--weights", "nan"], "--weights=nan: must be finite"),
    ):
        assert main(words(folders, tmp_path / "out", *more)) == FAILED
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_scalar_value_is_no_probability(folders, tmp_path, capsys, llm):
    network = ValueNetwork(default_config("side", llm.lm, [HeadConfig("characters", "characters")]))
    llm_of_folder = LLM(str(folders / "model"), device="cpu")
    save_value(tmp_path / "scalar", network.bind(llm_of_folder.lm, llm_of_folder.tokenizer), llm_of_folder.tokenizer)
    more = ["--value", f"characters={tmp_path}/scalar", "--method", "fudge"]
    assert main(words(folders, tmp_path / "out", *more)) == FAILED
    assert "train it --bounded or --distributional" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(folders, tmp_path):
    """Interrupted while it samples: no folder, no temporary one, exit code 130."""
    command = [*words(folders, tmp_path / "out"), "--pool", "20000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vas_engine.cli", *command], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    seen = ""
    while "generate:" not in seen:  # the engine's progress bar: sampling has begun
        piece = process.stderr.read(1)
        assert piece, seen
        seen += piece
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == INTERRUPTED, rest
    assert "interrupted" in rest
    assert list(tmp_path.iterdir()) == []
