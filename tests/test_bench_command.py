"""`vas bench`: predictions as table and JSON, measurements on a tiny model, bad input in one line."""

from __future__ import annotations

import json

import pytest

from tests.tiny import tiny_llama
from vas_engine import LLM
from vas_engine.cli import FAILED, OK, USAGE, main
from vas_engine.commands import bench
from vas_engine.engine.cost import DEVICES, SHAPES, predict
from vas_engine.errors import VASError
from vas_engine.values import ValueNetwork, default_config, save_value

FAST = ["--device", "cpu", "--kv-cache-memory", "1MiB", "--load-format", "dummy"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def value(model, tmp_path_factory) -> str:
    llm = LLM(model, device="cpu", kv_cache_memory="1MiB", load_format="dummy")
    network = ValueNetwork(default_config("side", llm.lm, ["kind"])).bind(llm.lm)
    return str(save_value(tmp_path_factory.mktemp("value"), network))


def vas(capsys, *words) -> tuple[int, str, str]:
    code = main(["bench", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_prediction_for_every_combination(capsys):
    words = ["--predict", "llama-8b", "--gpu", "h200", "--batch", "1,64", "--context", "1024,8192"]
    kinds = ["--kind", "plain,reader,model", "--candidates", "5,20", "--values", "1,4"]
    code, out, _ = vas(capsys, *words, *kinds, "--json")
    assert code == OK
    report = json.loads(out)
    assert len(report["predictions"]) == 2 * 2 * (1 + 2 * 2 * 2)
    assert report["model"]["parameters"] == 8030261248
    last = report["predictions"][-1]
    assert (last["kind"], last["batch"], last["context"]) == ("model", 64, 8192)
    assert (last["candidates"], last["values"]) == (20, 4)
    first = report["predictions"][0]
    assert "network" not in first["parts"]
    direct = predict(SHAPES["llama-8b"], DEVICES["H200"], 1, 1024)
    assert first["tokens_per_second"] == direct.tokens_per_second
    code, table, _ = vas(capsys, *words, *kinds)
    assert code == OK
    assert f"{direct.tokens_per_second:.1f}" in table
    assert "206 rows" in table
    assert len([line for line in table.splitlines() if line.startswith("model ")]) == 16


def test_a_folder_its_values_and_measured_rates(model, value, capsys):
    words = [model, "--predict", "--value", f"kind={value}", "--gpu", "mine", "--dtype", "bfloat16", "--json"]
    code, out, _ = vas(capsys, *words, "--bandwidth", "1e9", "--flops", "1e8", "--step", "0", "--launch", "0")
    assert code == OK
    report = json.loads(out)
    assert report["model"]["parameters"] == sum(p.numel() for p in tiny_llama().parameters())
    plain, *_, guided = report["predictions"]
    assert (plain["kind"], guided["kind"]) == ("plain", "values")
    weights = plain["parts"]["weights"]
    assert weights["seconds"] == pytest.approx(weights["flops"] / 1e8)
    assert guided["parts"]["network"]["bytes"] > 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["llama-8b", "--predict"], FAILED, "name one: A100"),
        (["llama-8b", "--predict", "--gpu", "H20"], FAILED, "did you mean 'H200'"),
        (["llama-9b", "--predict", "--gpu", "H200"], FAILED, "did you mean 'llama-8b'"),
        (["llama-8b", "--predict", "--gpu", "H200", "--kind", "readers"], FAILED, "did you mean 'reader'"),
        (["llama-8b", "--predict", "--gpu", "H200", "--dtype", "int8"], FAILED, "dtype='int8'"),
        (["llama-8b", "--predict", "--batch", "1,x"], USAGE, "use positive integers"),
        (["llama-8b", "--predict", "--gpu", "H200", "--launch", "nan"], FAILED, "launch=nan"),
        (["llama-8b", "--predict", "--gpu", "H200", "--step", "-1"], FAILED, "step=-1.0"),
        (["llama-8b", "--new-tokens", "0"], FAILED, "--new-tokens=0"),
        (["nowhere", "--batch", "1,4", "--max-num-seqs", "2"], FAILED, "--max-num-seqs=2"),
    ],
)
def test_bad_input_is_one_line(words, code, message, capsys):
    try:
        found, _, err = vas(capsys, *words)
    except SystemExit as ended:
        found, err = ended.code, capsys.readouterr().err
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_measuring_with_the_prediction_beside_it(model, value, capsys):
    words = [model, *FAST, "--value", f"kind={value}", "--batch", "2", "--context", "8", "--new-tokens", "6"]
    code, out, _ = vas(capsys, *words, "--rounds", "1", "--candidates", "3", "--gpu", "H200", "--json")
    assert code == OK
    plain, guided = json.loads(out)["measurements"]
    assert (plain["kind"], guided["kind"], guided["candidates"]) == ("plain", "values", 3)
    assert plain["predicted"] > guided["predicted"] > plain["tokens_per_second"] > 0
    code, out, _ = vas(capsys, *words, "--rounds", "1")
    assert [line.split()[0] for line in out.splitlines()] == ["kind", "plain", "values"]


def test_only_steps_that_all_requests_decode_in_are_timed(model, monkeypatch):
    llm = LLM(model, device="cpu", load_format="dummy", max_num_seqs=3, max_num_batched_tokens=16, max_model_len=64)
    clock = [0.0]
    step, rows = llm.engine.step, []

    def counted():
        before = llm.engine.stats.model_rows
        events = step()
        rows.append(llm.engine.stats.model_rows - before)
        clock[0] += 0.5
        return events

    monkeypatch.setattr(llm.engine, "step", counted)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    # Three prompts of 20 tokens come in over several steps of at most 16 rows; then each step gives three tokens.
    assert bench.decode(llm, 3, 20, 0, steps=5) == 3 / 0.5
    # The last step only sees the requests off.
    assert rows[-6 - bench.WARM :] == [3] * (5 + bench.WARM) + [0]
    assert max(rows) > 3
    assert not llm.engine.has_unfinished
    with pytest.raises(VASError, match="max_model_len"):
        bench.decode(llm, 1, 20, 0, steps=60)
    assert not llm.engine.has_unfinished
