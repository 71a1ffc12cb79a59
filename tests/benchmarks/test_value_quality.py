"""The study of values: its plan, what it judges on, and one small run."""

import json

import pytest

from benchmarks.value_quality import OPENINGS, RECIPE, main, plan, unseen, value_folder
from tests.conftest import shared_model
from vas_engine.training.batches import split
from vas_engine.training.config import FitConfig
from vas_engine.training.rollouts import Header, Rollout, Rollouts


def test_runs_have_names_and_folders_of_their_own_and_teachers_that_come_first(tmp_path):
    runs = plan(131_072)
    assert len({value_folder(tmp_path, run.name) for run in runs}) == len(runs)
    names = [run.name for run in runs]
    assert all({run.teacher, run.value} <= {*names[:place], None} for place, run in enumerate(runs))
    assert all(FitConfig(**RECIPE | run.settings) for run in runs)
    assert {run.samples for run in runs if run.kind == "model"} == {2_048, 8_192, 32_768, 65_536, 131_072}


@pytest.mark.parametrize("part", [40, 400, 800])
def test_values_are_judged_on_what_none_has_learnt_from(part):
    rows = [Rollout("", "", [i // 100], [2], "stop", 0, i // 100, {"x": 0.0}) for i in range(100 * len(OPENINGS))]
    rollouts = Rollouts(Header({}, {}, {"x": {}}), rows)
    own = range(0, 800, 800 // part)
    found = unseen(rollouts, own)
    learnt = set(split(rollouts, 0.1, "auto", 0)[0])
    assert not set(found) & learnt
    assert part == 800 or not set(found) & set(own)
    assert len(found) >= 0.3 * (800 - len(learnt))
    places = [index % 100 for index in found]
    assert places == sorted(places)


@pytest.mark.slow
def test_a_reward_of_yes_or_no_from_nothing(tmp_path, capsys):
    model = shared_model("stories260K")
    runs = ["model, 256", "model, 256, two atoms"]
    command = [str(model), "--out", str(tmp_path / "study"), "--json", str(tmp_path / "found.json")]
    command += ["--reward", "mother=benchmarks.composition:mother", "--rollouts", "256", "--responses", "2"]
    command += ["--strengths", "1", "--only", *runs]
    assert main(command) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["reward"] == "mother=benchmarks.composition:mother"
    assert [run["run"]["name"] for run in found["runs"]] == runs
    assert [[point["tilt"] for point in run["points"]] for run in found["runs"]] == [["mean"], ["mean", "optimal"]]
    assert all(run["training"]["settings"]["critic"] for run in found["runs"])
    assert (tmp_path / "found.svg").exists()
    # Nothing is done again.
    assert main(command) == 0
    assert json.loads((tmp_path / "found.json").read_text())["runs"] == found["runs"]
