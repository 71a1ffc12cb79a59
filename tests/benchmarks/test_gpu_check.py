"""The check for GPUs, as far as it goes without one: its parts and limits, its clock, its benchmarks at toy size."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from vas_engine.kernels import compile as ahead

from benchmarks import (
    attention_peers,
    gpu_check,
    gpu_clock,
    gpu_decode,
    gpu_kernels,
    gpu_parity,
    gpu_peers,
    reader_step,
    record,
)
from benchmarks.gpu_check import FAILED, NO_GPU, OK, PARTS, Part
from vas_engine.engine.cost import SHAPES

CPU = torch.device("cpu")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is said to be there, and parts that are little programs."""
    programs = {
        "good": Part(60, "", ("-c", "print('3 passed')"), counts=True),
        "bad": Part(60, "", ("-c", "raise SystemExit('broken')")),
        "slow": Part(3, "", ("-I", "-S", "-c", "import time; print('begun', flush=True); time.sleep(600)")),
        "bare": Part(60, "", ("-c", ""), needs="a_module_nobody_has"),
        "wrapped": Part(60, "", ("-c", ""), wrapper=("a-program-nobody-has",)),
        "refused": Part(60, "", ("-c", "print('not on this machine'); exit(9)"), ("env",), refusal="not on this"),
        "timed": Part(60, "", ("-c", "print('{seconds} {out}')"), counts=True),
        "quiet": Part(60, "", ("-c", "print('a line of no interest')")),
    }
    monkeypatch.setattr(gpu_check, "PARTS", programs)
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)


def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", "--out", str(tmp_path)],
        cwd=gpu_check.ROOT,
        env={"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == NO_GPU
    assert done.stderr.splitlines() == ["gpu-check: torch sees no GPU here; nothing was run"]
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_parts_are_listed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in PARTS)
    with pytest.raises(SystemExit) as caught:
        gpu_check.main(["--part", "parity", "mind"])
    assert caught.value.code == 2
    assert "mind" in capsys.readouterr().err
    makefile = (gpu_check.ROOT / "Makefile").read_text()
    assert "-m benchmarks.gpu_check $(if $(PART),--part $(PART))" in makefile


@pytest.mark.usefixtures("scripts")
def test_each_part_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path)]) == FAILED
    parts = {part["part"]: part for part in json.loads((tmp_path / "gpu_check.json").read_text())["parts"]}
    assert {name: part["state"] for name, part in parts.items()} == {
        "good": "ok",
        "bad": "FAILED",
        "slow": "FAILED",
        "bare": "skipped",
        "wrapped": "skipped",
        "refused": "skipped",
        "timed": "ok",
        "quiet": "ok",
    }
    assert parts["good"]["note"] == "3 passed"
    assert parts["bad"]["note"] == "broken"
    assert parts["slow"]["note"] == "stopped after 3 s; begun"
    assert 3 <= parts["slow"]["seconds"] < 300
    assert "a_module_nobody_has" in parts["bare"]["note"]
    assert "a-program-nobody-has" in parts["wrapped"]["note"]
    assert parts["timed"]["note"] == f"40 {tmp_path}"  # begins nothing in its last 20 s
    assert parts["quiet"]["note"] == ""
    assert capsys.readouterr().out.splitlines()[-1].startswith("quiet")


@pytest.mark.usefixtures("scripts")
def test_the_time_of_all_parts_is_bounded(tmp_path: Path) -> None:
    assert gpu_check.main(["--out", str(tmp_path), "--part", "good", "timed"]) == OK
    outcomes = gpu_check.check(["slow", "timed"], 1.2, tmp_path)
    assert [done.state for done in outcomes] == ["FAILED", "skipped"]
    assert "s are left" in outcomes[1].note


def test_what_a_bare_checkout_lacks_is_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vas_engine").mkdir()
    (tmp_path / "vas_engine" / "__init__.py").touch()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("here = True\n")
    link = tmp_path / "vas_engine" / "kernels"
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    with gpu_check.kernels_in_place():
        assert not link.exists()  # installed: nothing to do
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with gpu_check.kernels_in_place():
        found = subprocess.run(
            [sys.executable, "-S", "-c", "import vas_engine.kernels as k; print(k.here)"], cwd=tmp_path, text=True,
            capture_output=True,
        )  # fmt: skip
        assert found.stdout == "True\n", found.stderr
    assert not link.exists()
    assert not link.is_symlink()


def test_calls_take_turns_and_are_timed() -> None:
    seen: list[int] = []
    series = gpu_clock.seconds_per_call([lambda i=i: seen.append(i) for i in range(3)], CPU, 0.01)
    assert len(series) >= 5
    assert all(seconds >= 0 for seconds in series)
    assert {0, 1, 2} == set(seen)
    assert seen[-3:] in ([0, 1, 2], [1, 2, 0], [2, 0, 1])
    assert gpu_clock.Budget(-1).left < 0 < gpu_clock.Budget(5).left <= 5
    assert record.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}
    ceilings = gpu_clock.measure_ceilings(CPU)
    assert ceilings.bandwidth > 0 < ceilings.flops


def test_bytes_of_a_case() -> None:
    case = gpu_kernels.AttentionCase(32, 8192, 20)
    # K and V of 32 prefixes in bfloat16; 640 rows of queries and of results.
    assert case.bytes == 2 * 32 * 8192 * 8 * 128 * 2 + 2 * 640 * 4096 * 2
    assert gpu_kernels.SamplerCase(8, 1000, 20).bytes == 16_000


def test_kernels_are_measured_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    options = ["--device", "cpu", "--small", "--backend", "reference", "--json", str(out)]
    assert gpu_kernels.main(options) == OK
    report = json.loads(out.read_text())
    attention, sampler, *others, reader = report["results"]
    assert [row["kernel"] for row in others] == ["value_head_tilt", "candidate_input", "kv_commit", "paged_prefill"]
    assert all(row["of_copy_bandwidth"] > 0 for row in others)
    assert others[0]["of_matrix_rate"] > 0 < others[-1]["of_matrix_rate"]
    assert "its parts" in reader["skipped"]
    assert attention["times_faster"] > 0 < sampler["of_copy_bandwidth"]
    assert {"machine", "versions", "commit", "time", "ceilings"} <= set(report)
    assert attention["peers"]["sdpa"]["times_faster"] > 0
    out_text = capsys.readouterr().out
    assert "candidate_attention" in out_text
    assert f"sdpa {attention['peers']['sdpa']['times_faster']:.1f}" in out_text
    assert gpu_kernels.main([*options, "--seconds", "0"]) == OK
    assert "out of time" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "spoiled"),
    [
        ("candidate_attention", "q"),
        ("value_head_tilt", "features"),
        ("candidate_input", "places"),
        ("kv_commit", "rows"),
        ("paged_prefill", "prefix_lens"),
    ],
)
def test_a_wrong_kernel_is_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kernel: str, spoiled: str
) -> None:
    load = gpu_kernels.load

    def load_wrong(name: str, backend: str) -> object:
        right = load(name, backend)
        return right if name != kernel else lambda **given: right(**{**given, spoiled: given[spoiled].flip(0)})

    monkeypatch.setattr(gpu_kernels, "load", load_wrong)
    options = ["--device", "cpu", "--small", "--backend", "reference", "--json", str(tmp_path / "out.json")]
    assert gpu_kernels.main(options) == FAILED
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert "differs from the reference" in rows[kernel]["failed"]
    assert [name for name, row in rows.items() if "failed" in row] == [kernel]


def test_every_kernel_has_cases() -> None:
    """All that compile ahead of time; write_pages and the layout of rows are parts of others' steps."""
    modules = {"value_tilt": "value_head_tilt"}
    named = {modules.get(name, name) for name in ahead.MODULES} - {"candidate_rows"}
    assert gpu_kernels.CASES.keys() == gpu_kernels.SMALL.keys() == named
    for name in named - {"reader_step"}:
        assert gpu_kernels.load(name, "reference")


def test_a_wrong_peer_is_no_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Judged on requests whose blocks lie scattered; what it does wrong fails nothing of ours."""

    def shifted(given: dict[str, Any]) -> Any:
        return attention_peers.sdpa({**given, "block_tables": given["block_tables"].roll(1, 1)})

    found = {"sdpa": attention_peers.sdpa, "shifted": shifted}
    monkeypatch.setattr(gpu_kernels, "peers", lambda device: found)
    options = ["--device", "cpu", "--small", "--backend", "reference", "--json", str(tmp_path / "out.json")]
    assert gpu_kernels.main(options) == OK
    judged = json.loads((tmp_path / "out.json").read_text())["results"][0]["peers"]
    assert "times_faster" in judged["sdpa"]
    assert "differs from the reference" in judged["shifted"]["failed"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_fit_the_benchmark(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    script = (
        "import sys, tests.kernels.conftest\n"  # chooses the interpreter where there is no GPU
        "from benchmarks import gpu_kernels, gpu_clock\n"
        "sys.exit(gpu_kernels.main(sys.argv[1:]))"
    )
    options = ["--device", "cpu", "--small", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", script, *options],
        cwd=gpu_check.ROOT,
        env={"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())["results"]
    assert all("seconds" in row for row in results)
    assert all(peer["times_faster"] > 0 for peer in results[-1]["peers"].values())
    assert list(results[-1]["peers"]) == ["its parts"]
    assert "its parts" in done.stdout


def test_a_compiled_reader_is_the_same_reader() -> None:
    lm, network = reader_step.base_and_reader("tiny", CPU)
    step = reader_step.ReaderStep(lm, network, [20, 3], [3, 2])
    (plain, _), (compiled, _) = step.parts(), step.parts(reader_step.compiled_reader("tiny", CPU))
    torch.testing.assert_close(compiled.values, plain.values)
    assert plain.values.std() > 0


def test_files_with_tests_for_a_gpu_are_found() -> None:
    found = gpu_check.gpu_tests()
    assert {"tests/engine/test_gpu.py", "tests/kernels/test_triton_select.py"} <= set(found)
    assert "tests/benchmarks/test_gpu_check.py" not in found


def test_files_of_tests_run_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs and one that fails take nothing of the others along."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # which take seconds to load
    mark = "import pytest, time\n@pytest.mark.gpu\n"
    texts = {
        "good": "def test_a(): pass\n@pytest.mark.gpu\ndef test_b(): pass\n",
        "bad": "def test_c(): assert 0\n",
        "hangs": "def test_d(): time.sleep(600)\n",
        "none": "def test_e(): pass\n",
    }
    files = []
    for name, text in texts.items():
        files.append(str(tmp_path / f"test_{name}.py"))
        Path(files[-1]).write_text(text if name == "none" else mark + text)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: of a GPU\n")
    assert gpu_parity.main([*files, "--jobs", "4", "--seconds", "12"]) == FAILED
    *_, last = capsys.readouterr().out.splitlines()
    assert "2 passed" in last
    assert "2 failed" in last
    assert sorted(Path(file).name for file in last.rpartition("see ")[2].split(", ")) == [
        "test_bad.py",
        "test_hangs.py",
    ]
    assert gpu_parity.main([files[0], files[3]]) == OK


def test_the_rate_of_steps_in_which_all_decode() -> None:
    # Two requests, a token a second each; the second begins three seconds later.
    moments = [[float(n) for n in range(10)], [float(n) for n in range(3, 13)]]
    assert gpu_peers.steady_rate(moments, 2, warm=2) == pytest.approx(2.0)
    with pytest.raises(RuntimeError, match="ended before"):
        gpu_peers.steady_rate([moments[0], [20.0 + n for n in range(10)]], 2, warm=2)
    with pytest.raises(RuntimeError, match="1 requests of 2"):
        gpu_peers.steady_rate(moments[:1], 2, warm=2)


def test_decoding_is_measured_beside_its_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    sizes = ["--context", "24", "--batch", "2", "1", "--candidates", "3", "--steps", "3", "--rounds", "1"]
    sizes += ["--device", "cpu", "--shape", "tiny", "--json", str(out)]
    # What is compiled takes a minute, and other tests compile.
    kinds = [k for k in gpu_decode.KINDS if k not in gpu_decode.PEERS and not k.startswith("compiled")]
    assert gpu_decode.main([*sizes, "--kinds", *kinds]) == OK
    report = json.loads(out.read_text())
    places = [(row["kind"], row["batch"], row["candidates"]) for row in report["results"]]
    assert places == [(kind, b, 0 if kind in gpu_decode.PLAIN else 3) for kind in kinds for b in (1, 2)]
    for row in report["results"]:
        assert row["tokens_per_second"]["median"] > 0
        assert (row["ratio_to_plain"] == 1) == (row["kind"] == "plain")
        assert row["of_roofline"] > 0
    assert "reader-4" in capsys.readouterr().out
    assert gpu_decode.main([*sizes, "--seconds", "0"]) == OK
    assert "no time" in capsys.readouterr().out


@pytest.mark.slow  # transformers starts and stops its continuous batching in every call
def test_peers_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    sizes = ["--context", "24", "--batch", "2", "1", "--candidates", "3", "5", "--steps", "3", "--rounds", "1"]
    sizes += ["--device", "cpu", "--shape", "tiny", "--json", str(out)]
    assert gpu_decode.main([*sizes, "--kinds", "hf-guided", "hf-batch"]) == OK
    rows = json.loads(out.read_text())["results"]
    places = [(row["kind"], row["batch"], row["candidates"]) for row in rows]
    assert places == [("hf-guided", 2, 5), ("hf-batch", 1, 0), ("hf-batch", 2, 0)]
    assert all(row["tokens_per_second"]["median"] > 0 for row in rows)
    assert "hf-batch" in capsys.readouterr().out


def test_four_values_are_four_networks() -> None:
    counts = {kind: len(gpu_decode.networks_of(SHAPES["llama-135m"], kind)) for kind in gpu_decode.KINDS}
    assert counts.pop("reader-4") == 4
    without = {*gpu_decode.PLAIN, *gpu_decode.PEERS}
    assert counts == {kind: int(kind not in without) for kind in counts}


def test_tables_of_a_run_are_those_it_wrote(tmp_path: Path) -> None:
    report = {"ceilings": {"bandwidth": 4e12, "flops": 8e14}, "results": []}
    (tmp_path / "gpu_decode.json").write_text(json.dumps(report))
    now = (tmp_path / "gpu_decode.json").stat().st_mtime
    assert "4000 GB/s" in gpu_check.results(tmp_path, now - 1)
    assert gpu_check.results(tmp_path, now + 1) == ""
