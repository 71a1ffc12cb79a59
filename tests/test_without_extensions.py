"""A host without a compiler: the package installs and runs without its extensions, and says so."""

import json
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# One sequence of each sort: greedy, and drawn with all that the sampler does.
RUN = """
import json, sys
for name in sys.argv[1:]:
    sys.modules[f"vas_engine.{name}"] = None
import torch
from tests.engine.conftest import llama, network
from vas_engine import LLM, SamplingParams
from vas_engine.commands.info import describe_installation
lm = llama()
llm = LLM(lm.model, {"v": network("reader", lm)}, skip_tokenizer_init=True, device="cpu", kv_cache_memory="1MiB")
greedy = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
drawn = SamplingParams(seed=3, max_tokens=8, ignore_eos=True, top_p=0.9, repetition_penalty=1.2, logit_bias={4: 2.0})
guided = drawn.replace(values={"v": 2.0}, num_candidates=6, advantage_clip=0.5)
outputs = llm.generate([[1, 2, 3]] * 3, [greedy, drawn, guided], use_tqdm=False)
report = describe_installation()
tokens = [output.outputs[0].token_ids for output in outputs]
print(json.dumps([tokens, report["sampler"], report["attention on CPU"]]))
"""


def run(*absent: str) -> list:
    done = subprocess.run([sys.executable, "-c", RUN, *absent], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_reference_serves_where_nothing_was_built() -> None:
    tokens, *there = run()
    if there[0] == "reference":
        pytest.skip("the extensions are not built here")
    assert (there[0].split()[0], there[1]) == ("cpp", "cpp")
    assert run("_sampling", "_attention") == [tokens, "reference", "reference"]


def test_building_needs_no_torch() -> None:
    """Plain buffers are bound, so one build serves every version of torch."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
    assert not [name for name in needed if name.startswith("torch")]
    lines = [line for path in (ROOT / "csrc").iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    included = [line for line in lines if line.lstrip().startswith("#include")]
    assert included
    assert not [line for line in included if any(word in line for word in ("torch", "ATen", "c10"))]


def test_the_extensions_are_left_out_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    pytest.importorskip("pybind11", reason="the build tools are not installed")
    monkeypatch.chdir(ROOT)
    made = []
    monkeypatch.setattr(setuptools, "setup", lambda ext_modules: made.append([e.name for e in ext_modules]))
    for wanted in ("0", "1"):
        monkeypatch.setenv("VAS_ENGINE_WITHOUT_CPP", wanted)
        runpy.run_path("setup.py")
    assert made == [["vas_engine._sampling", "vas_engine._attention"], []]
