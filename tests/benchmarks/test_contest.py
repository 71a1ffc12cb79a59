"""The contest's plan; its steps are commands that have tests of their own."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from benchmarks.contest import POLICIES, carry_out, main, run, steps
from benchmarks.value_quality import main as study
from tests.conftest import shared_model
from vas_engine.commands.evaluate import add_parser


def make_plan(out, **changes):
    given = {"rollouts": 4096, "steps": 10, "env": None, "method": ["args"], "samples": 8, "pupils": None}
    given |= {"policies": POLICIES, "lr": "5e-4", "pool": None}
    return steps(argparse.Namespace(out=out, model=Path("model"), **given | changes))


@pytest.fixture
def plan(tmp_path):
    return make_plan(tmp_path)


def test_what_is_decoded_is_what_was_made(plan, tmp_path):
    *made, (_, evaluate) = plan
    parser = add_parser(argparse.ArgumentParser().add_subparsers())
    args = parser.parse_args(evaluate[4:])
    assert {entry.partition("=")[2] for entry in args.policy} == {str(folder) for folder, _ in made[1:]}
    assert {entry.partition("=")[0] for entry in args.value} == {"model", "reader", "side"}
    # The strong value has all rollouts, and the study is told to make just these.
    assert any(entry.endswith("values/model_4096") for entry in args.value)
    assert "model, 4096" in made[0][1]
    assert args.rollouts == str(tmp_path / "study" / "rollouts")


def test_what_is_not_wanted_is_left_out(tmp_path):
    (_, train), (_, evaluate) = make_plan(tmp_path, policies=[], pupils=["side, distilled"], pool=64)
    assert train[train.index("--only") + 1 : train.index("--no-decoding")] == ["model, 4096", "side, distilled"]
    assert [entry.partition("=")[0] for entry in evaluate if "values" in entry] == ["model", "side"]
    assert not {"--policy", "--rollouts"} & set(evaluate)


def test_a_step_that_is_done_is_not_done_again_and_one_that_fails_ends_it(tmp_path):
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    assert run(tmp_path, failing) == 0.0
    with pytest.raises(SystemExit, match="3"):
        run(tmp_path / "missing", failing)
    with pytest.raises(SystemExit, match="3"):
        run(None, failing)


def test_seconds_add_up_over_what_was_begun_again(tmp_path):
    made = tmp_path / "made"
    plan = [
        (made, [sys.executable, "-c", f"import pathlib; pathlib.Path({str(made)!r}).mkdir()"]),
        (None, [sys.executable, "-c", ""]),
    ]
    once, twice = carry_out(tmp_path, plan), carry_out(tmp_path, plan)
    assert 0 < once["made"] == twice["made"]
    assert 0 < once[""] < twice[""]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_contest_from_nothing(tmp_path):
    """What is trained can be decoded in all the ways that are asked for by default."""
    model, out = shared_model("stories260K"), tmp_path / "out"
    sizes = ["--rollouts", "1024", "--samples", "1", "--pupils", "side, distilled", "--policies"]
    assert main([str(model), "--out", str(out), *sizes, "--json", str(tmp_path / "contest.json")]) == 0
    found = json.loads((tmp_path / "contest.json").read_text())
    [section] = found["sections"]
    methods = {point["method"] for point in section["points"]}
    assert {f"{method} {value}" for method in ("vas", "args", "blockwise") for value in ("model", "side")} <= methods
    assert all(seconds > 0 for seconds in found["seconds"].values())


def test_a_contest_stops_where_a_step_fails(tmp_path, capfd):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "no-model"), "--out", str(tmp_path / "out"), "--rollouts", "64"])
    assert (tmp_path / "out" / "openings.txt").exists()
    assert "no-model" in capfd.readouterr().err
    assert not (tmp_path / "out" / "dpo_0.1").exists()


def test_runs_of_the_study_are_named_exactly(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study(["model", "--out", str(tmp_path), "--rollouts", "4096", "--only", "model, 4097"])
    assert "there are: model, 4096; model, 2048;" in capsys.readouterr().err
