"""The demonstration from end to end, on a few texts."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import pytest

from vas_engine.demo.showcase import ShowcaseConfig, curves, run_showcase, save_plot, table, terminal_plot
from vas_engine.errors import InvalidArgumentError

SMALL = ShowcaseConfig(
    samples=24,
    epochs=1,
    eval_prompts=2,
    pool=8,
    guided_samples=2,
    strengths=(2.0, 6.0),
    best_of=(4, 8),
    max_tokens=64,
    shown=16.0,
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory):
    lines: list[str] = []
    out = tmp_path_factory.mktemp("demo")
    return run_showcase(SMALL, out, lines.append, use_tqdm=False), out, lines


def test_every_way_to_decode_is_measured(shown) -> None:
    result, _, _ = shown
    labels = [row.label for row in result.rows]
    assert labels[0] == "plain"
    assert sum(label.startswith("guided") for label in labels) == 2 * len(SMALL.strengths) + 4
    assert sum(label.startswith("best of") for label in labels) == 2 * len(SMALL.best_of)
    plain = result.rows[0]
    assert plain.kl == 0.0
    assert plain.value_rows == 0.0
    for row in result.rows[1:]:
        assert row.kl > 0
        if row.label.startswith("best of"):
            n = int(re.search(r"\d+", row.label).group())
            # What is kept may be longer or shorter than the n - 1 that are not.
            assert plain.model_rows * n / 2 < row.model_rows < plain.model_rows * n * 2
            assert row.tokens_per_second * row.model_rows == pytest.approx(plain.tokens_per_second * plain.model_rows)
        else:
            # A side network costs the base model nothing but its own row a token.
            assert row.model_rows < 1.5
            assert row.value_rows > 5


def test_stronger_weights_go_further_from_the_model(shown) -> None:
    result, _, _ = shown
    for name in result.reward_names:
        kl, reward = curves(result, name)["guided"]
        assert kl == sorted(kl)
        assert len(reward) == len(SMALL.strengths) + 1


def test_texts_of_one_prompt_and_seed_differ_by_their_wishes(shown) -> None:
    result, _, lines = shown
    texts = {entry["label"]: entry["text"] for entry in result.texts}
    assert len(texts) == 6
    assert len(set(texts.values())) > 1
    assert all(text.startswith(SMALL.prompts[0]) for text in texts.values())
    assert any(texts["plain"] in line for line in lines)


def test_results_are_written_and_drawn(shown) -> None:
    result, out, _ = shown
    assert json.loads((out / "showcase.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert (out / "value" / "value.safetensors").exists()
    save_plot(result, out / "frontier.png")
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert "best of 8 by mood" in table(result)
    assert "guided" in terminal_plot(result)


def test_errors_that_one_prompt_does_not_tell_are_left_out(shown) -> None:
    result, _, _ = shown
    rows = [replace(row, errors=dict.fromkeys(row.errors, math.nan)) for row in result.rows]
    found = replace(result, rows=rows)
    assert "nan" not in table(found)
    assert "±" in table(result)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"][0]["errors"]["mood"] is None


def test_settings_that_cannot_work() -> None:
    with pytest.raises(InvalidArgumentError, match=r"kind='modle': must be one of .* 'side'"):
        ShowcaseConfig(kind="modle")
    with pytest.raises(InvalidArgumentError, match="no conversations"):
        ShowcaseConfig(prompts=[[{"role": "user", "content": "Hi"}]])
    with pytest.raises(InvalidArgumentError, match="exactly two"):
        ShowcaseConfig(rewards=("mood=vader",))
    with pytest.raises(InvalidArgumentError, match="pool"):
        ShowcaseConfig(pool=16)
