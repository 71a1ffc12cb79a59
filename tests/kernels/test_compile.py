"""Every kernel compiles as it ships for GPUs that are not here; what spills is found out."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vas_engine.kernels import compile as ahead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# x - sum(x) holds all of a thread's values at once: 4 of them, or 256 on NVIDIA and 128 on AMD, where the size of
# the block leaves fewer registers than that.
TOY = """
import json, sys
import triton, triton.language as tl
from vas_engine.kernels.compile import Report, Variant, compile_variant

@triton.jit
def centre(source, target, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(source + place, place < n)
    tl.store(target + place, x - tl.sum(x, 0), place < n)

def variant(name, block, signature=None):
    signature = signature or {"source": "*fp32", "target": "*fp32", "n": "i32"}
    return Variant(name, centre, signature, {"BLOCK": block}, num_warps=16, aligned=("source", "target"))

if __name__ == "__main__":
    targets = ("sm_80", "sm_90", "sm_100", "gfx942")
    reports = [compile_variant(variant(name, block), target)
               for name, block in (("lean", 2048), ("fat", 131072)) for target in targets]
    print(json.dumps([[r.name, r.target, r.registers, r.threads, r.spills, r.problem] for r in reports]))
    try:
        compile_variant(variant("untyped", 128, {"source": "*fp32", "target": "*fp32"}), "sm_90")
    except ValueError as error:
        print(json.dumps(str(error)))
"""


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """A process that compiles: an interpreted kernel has no binary, and a cache would hide what is compiled."""
    settings = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    settings["TRITON_CACHE_DIR"] = str(folder / "cache")
    return subprocess.run([sys.executable, *command], env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("target", list(ahead.TARGETS))
def test_every_kernel_compiles_without_spilling(target: str, tmp_path: Path) -> None:
    done = run(["-m", "vas_engine.kernels.compile", "--target", target, "--json", "--jobs", "2"], tmp_path)
    assert done.stdout, done.stderr
    reports = json.loads(done.stdout)
    assert not [f"{report['name']}: {report['problem']}" for report in reports if report["problem"]]
    assert done.returncode == 0
    assert {report["target"] for report in reports} == {target}
    compiled = {report["name"].split()[0] for report in reports}
    assert {"candidate_attention", "candidate_select", "candidate_input", "value_head_tilt"} <= compiled
    assert {"paged_prefill", "kv_commit", "write_pages", "reader_step"} <= compiled
    assert all(0 < report["registers"] <= 512 and report["threads"] for report in reports)


def test_a_spilling_kernel_is_found_out(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY, encoding="utf-8")
    done = run([str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, target, registers, threads, spills, problem in json.loads(lines[0]):
        assert registers > 0
        assert threads == (1024 if target == "gfx942" else 512)
        assert (spills > 0) == (name == "fat"), (name, target)
        assert problem == (f"spills {spills} bytes" if name == "fat" else None)
    assert "['n']" in json.loads(lines[1])


def test_a_problem_fails_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fine = ahead.Report("toy", "gfx942", registers=40, shared_bytes=64 * 1024, threads=256)
    greedy = ahead.Report("toy", "gfx942", registers=40, shared_bytes=64 * 1024 + 1, threads=256)
    for report, code, words in ((fine, 0, ""), (greedy, 1, "65536 are there")):
        monkeypatch.setattr(ahead, "compile_all", lambda *_, report=report: [report])
        assert ahead.main([]) == code
        assert words in capsys.readouterr().out
    monkeypatch.setattr(ahead, "compile_all", lambda *_: [])
    assert ahead.main(["--kernel", "nothing"]) == 2
