"""`vas train` from end to end, on a random model of sixteen words."""

import json
import re

import pytest
from transformers import AutoTokenizer
from transformers.utils import logging

from vas_engine.cli import main
from vas_engine.errors import TrainingDataError
from vas_engine.model.fingerprint import vocabulary_hash
from vas_engine.training import base, branching, plots
from vas_engine.training.config import FitConfig
from vas_engine.training.course import Course


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / "prompts.txt").write_text("good dog\nthe cat ran and\n")
    command = ["collect", str(model_folder), "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "run")]
    options = ["--reward", "mood=vader", "--reward", "words=length", "--samples", "100", "--max-tokens", "12"]
    assert main([*command, *options, "--hidden-states", "--device", "cpu"]) == 0
    return folder


@pytest.fixture
def train(model_folder, runs, capsys):
    def train(*options: str, out: str) -> tuple[int, str, str]:
        common = ["train", str(model_folder), "--rollouts", str(runs / "run"), "--out", str(runs / out)]
        capsys.readouterr()
        status = main([*common, "--device", "cpu", "--epochs", "2", "--holdout", "0.3", *options])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return train


def test_a_teacher_and_two_pupils(train, runs, model_folder):
    options = ("--kind", "model", "--backbone", str(model_folder), "--lora-rank", "2", "--no-plot")
    status, out, _ = train(*options, "--json", out="strong")
    assert status == 0
    report = json.loads(out)
    assert (report["kind"], report["base"], set(report["heads"])) == ("model", "none", {"mood", "words"})
    pupils = ("--kind", "reader", "--kind", "side", "--reward", "words", "--teacher", str(runs / "strong"))
    status, out, _ = train(*pupils, "--branch-points", "4", "--branch-samples", "3", out="taught")
    assert status == 0
    assert "of the teacher's differences" in out
    for kind in ("reader", "side"):
        files = {path.name for path in (runs / "taught" / kind).iterdir()}
        assert files == {"config.json", "value.safetensors", "training.json", "training.png"}
        report = json.loads((runs / "taught" / kind / "training.json").read_text())
        assert (report["kind"], report["teacher"], report["base"]) == (kind, "model", "memory")
        head = report["heads"]["words"]
        assert head["agreement"] is not None
        assert head["branching"]["points"] == 4
        assert sum(part["count"] for part in head["calibration"]) == sum(part["count"] for part in head["by_position"])
    assert {path.name for path in (runs / "taught").iterdir()} == {"reader", "side"}
    assert (runs / "taught" / "side" / "training.png").read_bytes().startswith(b"\x89PNG")


def test_saved_states_and_a_distribution(train, runs, model_folder):
    options = ("--kind", "action", "--states", "2", "--distributional", "--loss", "hl-gauss", "--bins", "21")
    status, out, _ = train(*options, "--lam", "0.9", "--json", out="spread")
    assert status == 0
    report = json.loads(out)
    assert (report["base"], report["settings"]["loss"], report["settings"]["ema"]) == ("saved", "hl-gauss", 0.99)
    config = json.loads((runs / "spread" / "config.json").read_text())
    assert [head["support"]["bins"] for head in config["heads"]] == [21, 21]
    # What it belongs to, the tokenizer too: another one is refused.
    assert config["base"]["vocabulary"] == vocabulary_hash(AutoTokenizer.from_pretrained(model_folder))


def test_discounted_values_reach_down_to_0(runs, model_folder):
    """However large the rewards are that there were."""
    rollouts = ["--prompts", str(runs / "prompts.txt"), "--reward", "many=length + 10", "--samples", "40"]
    collect = ["collect", str(model_folder), *rollouts, "--max-tokens", "8", "--out", str(runs / "many")]
    assert main([*collect, "--device", "cpu"]) == 0
    options = ["--kind", "action", "--bounded", "--gamma", "0.5", "--epochs", "1", "--holdout", "0.3", "--no-plot"]
    train = ["train", str(model_folder), "--rollouts", str(runs / "many"), "--out", str(runs / "discounted")]
    assert main([*train, *options, "--device", "cpu"]) == 0
    [head] = json.loads((runs / "discounted" / "config.json").read_text())["heads"]
    assert head["bounds"][0] == 0.0


def test_saved_states_are_read_for_those_who_need_no_more(train, monkeypatch):
    monkeypatch.setattr(base, "read_states", None)
    assert train("--kind", "side", "--epochs", "1", "--no-plot", out="unread")[0] == 0


def test_interrupted_and_resumed(train, runs, monkeypatch):
    evaluate, calls = Course.evaluate, []

    def interrupting(self):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(Course, "evaluate", interrupting)
    status, _, err = train(out="resumed")
    assert status == 130
    assert "--resume goes on" in err
    assert "checkpoint.json" in {path.name for path in (runs / "resumed").iterdir()}
    monkeypatch.undo()
    status, _, err = train(out="resumed")
    assert status != 0
    assert "--resume" in err
    assert train("--resume", out="resumed")[0] == 0
    assert train(out="whole")[0] == 0
    weights = [(runs / name / "value.safetensors").read_bytes() for name in ("resumed", "whole")]
    assert weights[0] == weights[1]
    assert not list((runs / "resumed").glob("checkpoint*"))
    status, _, err = train("--resume", out="resumed")
    assert status != 0
    assert "exists already" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--bins", "9"), "--distributional"),
        (("--kind", "side", "--kind", "side"), "name each kind once"),
        (("--lora-rank", "2"), "only a network of kind 'model'"),
        (("--reward", "mod"), "did you mean 'mood'"),
        (("--teacher", "nowhere"), "no such folder"),
        (("--branch-points", "5000"), "branch_points=5000: must be at least 2 and at most"),
        (("--branch-points", "0"), "branch_points=0"),
        (("--branch-points", "4", "--branch-samples", "1"), "branch_samples=1"),
    ],
)
def test_what_cannot_work(train, runs, monkeypatch, options, said):
    monkeypatch.setattr(Course, "run", None)  # no epoch begins
    status, _, err = train(*options, out="nothing")
    assert status != 0
    assert said in err
    assert not (runs / "nothing").exists()


def test_bars_of_loading_stay_out_of_logs(train):
    logging.enable_progress_bar()
    _, _, err = train("--reward", "mod", out="nothing")
    assert "did you mean 'mood'" in err
    assert "Loading" not in err


def test_what_is_trained_outlives_branches_that_fail(train, runs, monkeypatch):
    def fail(*args, **options):
        raise TrainingDataError("no reward today")

    monkeypatch.setattr(branching, "sample_branches", fail)
    options = ("--branch-points", "4", "--branch-samples", "2", "--no-plot")
    assert train(*options, out="kept")[0] != 0
    assert {"config.json", "value.safetensors", "training.json"} < {path.name for path in (runs / "kept").iterdir()}
    monkeypatch.undo()
    assert train(*options, "--resume", out="kept")[0] == 0
    report = json.loads((runs / "kept" / "training.json").read_text())
    assert report["heads"]["words"]["branching"]["points"] == 4
    assert not list((runs / "kept").glob("checkpoint*"))


def test_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert re.search(rf"--epochs N most passes over the rollouts \(default {FitConfig().epochs}\)", text)
    assert "--loss two-hot|hl-gauss of distributional heads (default two-hot)" in text
    assert "default None" not in text


def test_plots_need_matplotlib_only_when_asked_for(train, monkeypatch, runs):
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    assert train("--epochs", "1", out="plain")[0] == 0
    assert not (runs / "plain" / "training.png").exists()
    status, _, err = train("--plot", "--epochs", "1", out="asked")
    assert status != 0
    assert "vas-engine[plot]" in err


def test_rewards_of_beginnings_bring_a_critic(model_folder, runs, tmp_path, capsys):
    command = ["collect", str(model_folder), "--prompts", str(runs / "prompts.txt"), "--out", str(tmp_path / "run")]
    options = ["--reward", "words=length", "--samples", "40", "--max-tokens", "8", "--partial-rewards", "2"]
    assert main([*command, *options, "--device", "cpu"]) == 0
    train = ["train", str(model_folder), "--rollouts", str(tmp_path / "run"), "--device", "cpu", "--kind", "side"]
    settings = ["--epochs", "1", "--holdout", "0.3", "--lam", "0.7", "--no-plot"]
    capsys.readouterr()
    assert main([*train, *settings, "--out", str(tmp_path / "value")]) == 0
    assert "KL efficiency" in capsys.readouterr().out
    report = json.loads((tmp_path / "value" / "training.json").read_text())
    chosen = {name: report["settings"][name] for name in ("critic", "lam", "consistency")}
    assert chosen == {"critic": True, "lam": 0.7, "consistency": 50.0}
    assert report["heads"]["words"]["advantages"]["responses"] == 24
    # The critic stays behind.
    assert {path.name for path in (tmp_path / "value").iterdir()} == {
        "config.json",
        "value.safetensors",
        "training.json",
    }
