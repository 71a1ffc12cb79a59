"""What the engine launches goes through Triton's just-in-time compiler, which specialises for what it is given: a size
of 1 becomes a constant, whatever 16 divides is known to be so, an address may lie anywhere."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, PretrainedConfig

from benchmarks.gpu_decode import dummy_model
from benchmarks.reader_step import ReaderStep
from tests.emulation import EmulatedDevice, emulated
from tests.engine.conftest import KINDS, distributional, drain, engine, llama, network, tokens
from tests.kernels import launches
from vas_engine.engine.cost import SHAPES, network_config
from vas_engine.engine.engine import Engine
from vas_engine.model import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.values import HeadConfig, ValueNetwork
from vas_engine.values.config import default_config

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="launches are recorded on a device in software"),
]
PROCESSORS = 132
"""Of an H100 or H200; how work is cut depends on it."""
SIZES, CANDIDATES = (1, 8, 64), (1, 5, 20)
LARGE = SHAPES["llama-8b"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("triton")


def judged(recorded: list[launches.Launch], cache: Path, *options: str) -> list[Any]:
    """What a process of its own says of launches, for a Hopper."""
    settings = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, launches.__file__, "sm_90", *options], input=json.dumps(recorded), env=settings,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def compiled(recorded: list[launches.Launch], cache: Path, *options: str) -> list[dict[str, Any]]:
    """Reports of what it makes of them."""
    reports = judged(recorded, cache, *options)
    assert {report["launch"]["kernel"] for report in reports} == {launch["kernel"] for launch in recorded}
    return reports


def launched(device: EmulatedDevice) -> Counter[str]:
    """How often each kernel was launched."""
    return Counter(f"{kernel.__module__.rpartition('.')[2]}:{kernel.__qualname__}" for kernel, _ in device.launches)


# What is recorded


def capture(running: Engine) -> None:
    """Decode steps of some sizes: plain, guided by each network, by all."""
    assert running.graphs is not None
    with torch.inference_mode():
        for candidates in CANDIDATES:
            running.graphs.capture(
                max(SIZES), candidates, lambda shapes: [shape for shape in shapes if shape[1] in SIZES]
            )


def take_in(running: Engine, lengths: tuple[int, ...]) -> None:
    """Prompts; where nothing is computed they are all that runs, as their logits are refused."""
    for i, length in enumerate(lengths):
        values = dict.fromkeys(running.value_names[i : i + 2], 1.0) if i else {}
        params = SamplingParams(values=values, num_candidates=5, seed=i, top_p=0.9 if i % 2 else 1.0)
        running.add_request(str(i), [3 + (i + place) % 400 for place in range(length)], params)
        running.step()


def tiny(device: EmulatedDevice) -> None:
    """Real steps of every kind of network, in float32: kept as graphs, and those that cannot be."""
    lm = CausalLM.load(llama().model, device="cuda", attention_backend="triton")
    heads = (HeadConfig("plain", "plain"), distributional(name="of9"))
    running = engine(lm, {kind: network(kind, lm, heads if kind == "side" else None) for kind in KINDS}, graphs=True)
    asked: list[dict[str, Any]] = [
        {},
        {"values": {"reader": 1.0, "side.plain": 1.0, "side.of9": 1.0}},
        {"values": {"action": 1.0, "model": -1.0}},
    ]
    limited: list[dict[str, Any]] = [
        {"values": {"lookahead": 1.0, "side-lookahead": 0.5}},
        {"values": {"reader": 1.0}, "top_p": 0.9, "repetition_penalty": 1.1, "logit_bias": {3: 1.0}},
    ]
    for part in (asked, limited):
        for i, options in enumerate(part):
            params = SamplingParams(num_candidates=5, seed=i, max_tokens=3, ignore_eos=True, **options)
            running.add_request(str(i), list(range(1, 4 + i)), params)
        assert all(len(ids) == 3 for ids in tokens(drain(running)).values())
    assert running.stats.graph_steps
    assert {kernel.split(":")[0] for kernel in launched(device)} == {
        "candidate_attention", "candidate_input", "candidate_rows", "candidate_select", "kv_commit", "value_tilt"
    }  # fmt: skip


def large_model(device: EmulatedDevice, dtype: str) -> CausalLM:
    """Two layers of an 8B as far as kernels see it: what is multiplied by torch alone is narrow."""
    shape = replace(LARGE, layers=2, hidden=64, mlp=64, dtype=dtype)
    device.computes = True  # how layers attend and rotate is found out by trial
    lm = CausalLM.load(dummy_model(shape, torch.device("cuda"), 4096), device="cuda", attention_backend="triton")
    device.computes = False
    return lm


def large_network(kind: str, lm: CausalLM) -> ValueNetwork:
    config = network_config(LARGE, kind)
    layers = range(len(config.layers))
    with torch.device("cuda"):
        return ValueNetwork(config.replace(hidden_size=lm.hidden_size, layers=layers, states=(1, 2))).bind(lm)


def large(device: EmulatedDevice, dtype: str, block_size: int) -> None:
    lm = large_model(device, dtype)
    names = ("reader", "side", "lookahead", "action", *(f"reader-{i}" for i in (2, 3, 4)))
    running = Engine(
        lm, {name: large_network(name.split("-")[0], lm) for name in names}, graphs=True,
        num_blocks=16_384 // block_size, block_size=block_size, max_num_seqs=max(SIZES), max_num_batched_tokens=1024,
    )  # fmt: skip
    capture(running)
    take_in(running, (600, 30, 1, 1023, 7))


def reader_step(device: EmulatedDevice) -> None:
    """The kernel that no step uses yet."""
    for dtype in ("bfloat16", "float32"):
        lm = large_model(device, dtype)
        reader = large_network("reader", lm)
        for sequences in SIZES:
            for candidates in CANDIDATES:
                ReaderStep(lm, reader, [1000] * sequences, [candidates + 1] * sequences).whole()
    assert launched(device)["reader_step:_run"] == 2 * len(SIZES) * len(CANDIDATES)


def kernels(device: EmulatedDevice) -> None:
    """What functions may be asked for beside the engine's sizes; nothing is computed."""
    from vas_engine.kernels.candidate_attention import candidate_attention
    from vas_engine.kernels.candidate_select import candidate_select
    from vas_engine.kernels.kv_commit import kv_commit
    from vas_engine.kernels.paged_prefill import paged_prefill

    from vas_engine.sampling import SamplingArrays

    device.computes = False
    for dtype in ("bfloat16", "float32"):
        kinds = {"dtype": getattr(torch, dtype), "device": "cuda"}
        pages, heads = torch.empty(9, 16, 8, 128, **kinds), torch.empty(40, 8, 128, **kinds)
        at = torch.arange(40, device="cuda")
        for count in (1, 40):
            kv_commit([heads] * 2, [heads] * 2, [pages] * 2, [pages] * 2, at[:count], at[:count])
        q, zeros = torch.empty(40, 32, 128, **kinds), torch.zeros(1, 99, dtype=torch.int32, device="cuda")
        for window, softcap in ((0, 0.0), (16, 30.0)):
            for blocks in (99, 1):
                prefix = pages, pages, zeros[:, :blocks].contiguous(), at[:2].int() * 40, at.int() + 1
                options = {"scale": 0.1, "window": window, "softcap": softcap}
                paged_prefill(q, *prefix, **options)
                candidate_attention(q, *prefix, heads, heads, **options)
        for sequences, vocabulary, candidates in ((1, 128256, 64), (3, 500, 0), (64, 32000, 20), (1, 151936, 1)):
            arrays = SamplingArrays.build(
                sequences, seed=np.arange(sequences), num_candidates=candidates, top_p=[0.9, *[1.0] * (sequences - 1)]
            )
            logits = torch.empty(sequences, vocabulary, **kinds)
            candidate_select(logits, np.arange(sequences, dtype=np.int64), arrays)
    assert {"kv_commit:_commit", "candidate_attention:_merge", "candidate_select:_tile"} <= set(launched(device))


FAMILIES: dict[str, PretrainedConfig] = {
    "one head": LlamaConfig(num_attention_heads=1, num_key_value_heads=1, head_dim=128),
    "one kv head": LlamaConfig(num_attention_heads=8, num_key_value_heads=1, head_dim=64),
    "size 80": LlamaConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=80),
    "window and softcap": Gemma2Config(
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=64, query_pre_attn_scalar=256
    ),
}


def family(device: EmulatedDevice, config: PretrainedConfig, dtype: str) -> None:
    device.computes = True
    config.update({"vocab_size": 500, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2})
    lm = CausalLM.load(config, device="cuda", dtype=dtype, load_format="dummy", attention_backend="triton")
    device.computes = False
    several = (HeadConfig("plain"), HeadConfig("bounded", bounds=(-1.0, 1.0)), distributional(bins=51))
    networks = {
        "reader": ValueNetwork(default_config("reader", lm, several)).bind(lm),
        "side": ValueNetwork(default_config("side", lm, several[:1])).bind(lm),
    }
    running = Engine(lm, networks, graphs=True, num_blocks=200, max_num_seqs=max(SIZES), max_num_batched_tokens=1024)
    capture(running)
    take_in(running, (600, 30, 1))


WORK: dict[str, Callable[[EmulatedDevice], None]] = {
    "tiny": tiny,
    "kernels": kernels,
    "reader_step": reader_step,
    **{
        f"8B {dtype} blocks of {size}": lambda device, dtype=dtype, size=size: large(device, dtype, size)
        for dtype in ("bfloat16", "float32")
        for size in (16, 256)
    },
    **{
        f"{name} {dtype}": lambda device, config=config, dtype=dtype: family(device, config, dtype)
        for name, config in FAMILIES.items()
        for dtype in ("bfloat16", "float16", "float32")
    },
}


@functools.cache
def record(name: str) -> list[launches.Launch]:
    """What some work launches."""
    with emulated(processors=PROCESSORS) as device:
        WORK[name](device)
        return launches.encode(device.launches)


ORDINARY = ("tiny", "kernels", "8B bfloat16 blocks of 16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ORDINARY else pytest.mark.slow) for name in WORK]
)
def test_every_launch_compiles_without_spilling(name: str, cache: Path) -> None:
    reports = compiled(record(name), cache)
    assert not [f"{report['name']}: {report['problem']}" for report in reports if report["problem"]]


@pytest.mark.parametrize("name", ["tiny", "kernels", pytest.param("reader_step", marks=pytest.mark.slow)])
def test_kernels_compile_whatever_their_numbers_are(name: str, cache: Path) -> None:
    reports = compiled(record(name), cache, "--extremes")
    assert not [f"{report['name']}: {report['error']}" for report in reports if report["error"]]


def test_nothing_is_compiled_anew_for_where_arguments_lie(cache: Path) -> None:
    """Indices and selections are parts of larger buffers: whether 16 divides their addresses changes with the batch."""
    assert not judged(record("tiny"), cache, "--moved")
