"""What the comparison of one shot with rounds counts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.pruning import count_rows, main, select_steps, step_time
from vas_engine.sampling import prune


def test_one_shot_evaluates_what_the_engine_would() -> None:
    selection = select_steps(vocabulary=500, steps=64, candidates=12, seed=3)
    interval = 2.0
    # The tail's champion lies in the middle of the interval, as the engine's has a tilt of 0 in [-1, 1].
    bounds = np.full(64, -interval / 2), np.full(64, interval / 2)
    needed = prune(selection, *bounds, np.zeros(64, bool))
    at_tail = np.arange(needed.shape[1]) == selection.tail[:, None]
    expected = (needed & ~at_tail).sum(1)
    assert [sum(rounds) for rounds in count_rows(selection, interval, None, seed=0)] == expected.tolist()
    assert expected.max() > 2


@pytest.mark.parametrize("per_round", [1, 2, 4])
def test_rounds_evaluate_less_in_more_passes(per_round: int) -> None:
    selection = select_steps(vocabulary=500, steps=64, candidates=12, seed=3)
    once, rounds = (count_rows(selection, 3.0, size, seed=0) for size in (None, per_round))
    assert all(max(each, default=0) <= per_round for each in rounds)
    assert sum(map(sum, rounds)) < sum(map(sum, once))
    assert all(sum(few) <= sum(many) for few, many in zip(rounds, once, strict=True))
    assert max(map(len, once)) == 1 < max(map(len, rounds))


def test_a_batch_waits_for_its_slowest() -> None:
    seconds, passes, rows = step_time([[4], [1, 1, 1]], batch=2, seconds=lambda total: 10.0 + total)
    assert (seconds, passes, rows) == (37.0, 3, 3.5)


def test_the_command_on_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pruning.json"
    options = ["--setting", "tiny", "--kind", "reader", "model", "--batch", "2", "--repeats", "1", "--steps", "8"]
    assert main([*options, "--json", str(out)]) == 0
    lines = json.loads(out.read_text())["lines"]
    assert len(lines) == 2 * 3 * 4
    assert all(line["milliseconds"] > 0 for line in lines)
    assert "one shot" in capsys.readouterr().out
