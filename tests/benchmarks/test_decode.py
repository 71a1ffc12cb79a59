"""The measuring loop: order of runs, ratios, goals, the command on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.contenders import Decoding, names
from benchmarks.decode import Goal, main, measure, report


class Clock:
    """A contender of known speed that notes its runs in a common list."""

    def __init__(self, name: str, rate: float, diary: list[tuple[str, int, int]]) -> None:
        self.name, self.rate, self.diary = name, rate, diary

    def run(self, prompts: list[list[int]], decoding: Decoding, seed: int) -> tuple[float, int]:
        self.diary.append((self.name, len(prompts), decoding.new_tokens))
        tokens = len(prompts) * decoding.new_tokens
        return tokens / self.rate, tokens

    def close(self) -> None:
        pass


def test_everybody_runs_in_turn_in_another_order_each_round() -> None:
    diary: list[tuple[str, int, int]] = []
    contenders = [Clock(name, 10.0, diary) for name in "abc"]
    measure(contenders, [1, 2], 3, prompt_tokens=4, vocab_size=50, decoding=Decoding(new_tokens=8))
    order = ["".join(name for name, _, _ in diary[i : i + 3]) for i in range(0, len(diary), 3)]
    assert order == ["abc", "abc", "bca", "bca", "cab", "cab", "abc", "abc"]
    assert {tokens for _, _, tokens in diary[6:]} == {8}
    assert {tokens for _, _, tokens in diary[:6]} == {4}  # warming up


def test_ratios_are_taken_within_a_round() -> None:
    # The machine is half as fast in the second round: rates spread, the ratio does not.
    rates = {("vas-plain", 1): [100.0, 50.0, 100.0], ("vas-side", 1): [90.0, 45.0, 90.0]}
    row = report(rates)[1]
    assert row["tokens_per_second"]["min"] == 45.0
    assert row["ratio_to_plain"] == {"median": 0.9, "min": 0.9, "max": 0.9, "rounds": [0.9] * 3}
    assert Goal("vas-side", "vas-plain", 1, 0.85).judge(rates)["met"]
    assert not Goal("vas-side", "vas-plain", 1, 0.95).judge(rates)["met"]
    assert Goal("vas-side", "vas-plain", 16, 0.85).judge(rates) is None


def test_a_contender_that_stops_early_is_no_result() -> None:
    lazy = Clock("lazy", 1.0, [])
    lazy.run = lambda prompts, decoding, seed: (1.0, 3)
    with pytest.raises(RuntimeError, match="lazy generated 3 tokens where 4"):
        measure([lazy], [1], 1, prompt_tokens=4, vocab_size=50, decoding=Decoding(new_tokens=8))


def test_the_command_measures_everybody_on_tiny_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    options = ["--setting", "tiny", "--rounds", "1", "--new-tokens", "4", "--batch", "2", "--json", str(out)]
    assert main(options) == 0
    result = json.loads(out.read_text())
    assert {row["contender"] for row in result["results"]} == set(names())
    assert all(row["tokens_per_second"]["median"] > 0 for row in result["results"])
    assert {"machine", "versions", "commit", "settings", "time"} <= set(result)
    printed = capsys.readouterr().out
    assert all(name in printed for name in names())


def test_an_unknown_contender_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--contenders", "vas-mind"])
    assert "vas-mind: known are vas-plain" in capsys.readouterr().err
