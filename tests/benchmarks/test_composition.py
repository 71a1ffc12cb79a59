"""The composition study's plan; its steps are commands that have tests of their own."""

import argparse
import re
from pathlib import Path

import pytest

from benchmarks.composition import REWARDS, mother, steps
from benchmarks.contest import portable
from vas_engine.commands import collect, evaluate, train


@pytest.fixture
def plan(tmp_path):
    return steps(argparse.Namespace(out=tmp_path, model=Path("model"), rollouts=4096, samples=8))


def parse(command, module):
    return module.add_parser(argparse.ArgumentParser().add_subparsers()).parse_args(command[4:])


def test_the_steps_are_commands_that_fit_together(plan, tmp_path):
    modules = [collect, train, train, evaluate, evaluate]
    sampled, *trained, composed, unlearnt = [parse(c, m) for (_, c), m in zip(plan, modules, strict=True)]
    assert sampled.samples * 8 == 4096
    assert [Path(args.out) for args in (sampled, *trained, composed, unlearnt)] == [folder for folder, _ in plan]
    assert all(Path(args.rollouts) == Path(sampled.out) for args in (*trained, composed, unlearnt))
    assert [args.reward for args in trained] == [list(REWARDS), ["sum"]]
    # What is composed has a value; the sum is followed by a value of its own; mothers are weighed negatively.
    assert {entry.partition("=")[2] for entry in composed.value} == {str(args.out) for args in trained}
    assert [axis.partition("=")[0] for axis in composed.grid] == list(REWARDS)
    assert max(unlearnt.weights) < 0
    assert unlearnt.best_of == []


def test_a_mother_is_a_word():
    assert [mother("", text) for text in ("His Mom came.", "moment", "The mother's hat")] == [1.0, 0.0, 1.0]


def test_commands_are_told_without_places():
    found = portable("/usr/bin/python3 -m x /tmp/out/rollouts", {"/tmp/out/": "", "/usr/bin/python3": "python"})
    assert not re.search(r"/tmp|/usr", found)
    assert found == "python -m x rollouts"
