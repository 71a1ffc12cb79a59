"""The vLLM plugin in vLLM itself, in an interpreter of its own that has both: VAS_VLLM_PYTHON names it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle import chi_squared_p, enumerate_policy
from vas_engine import LLM, SamplingParams
from vas_engine.model.lm import CausalLM
from vas_engine.values import ValueModel, save_value
from vas_engine.values.config import HeadConfig

PYTHON = os.environ.get("VAS_VLLM_PYTHON")
WORKER = Path(__file__).with_name("vllm_worker.py")
VOCAB = 24
PROMPTS = [[3, 4, 5], [1], [7, 7, 2, 9, 8, 1, 3], [10, 4]]
MIX = [
    {"seed": 1, "values": {"a": 2.0}},
    {"seed": 2, "values": {"a": -1.0, "b": 0.7}, "top_p": 0.9, "num_candidates": 5},
    {"temperature": 0.0, "values": {"b": 1.5}},
    {
        "seed": 4,
        "temperature": 0.7,
        "values": {"a": 1.0},
        "repetition_penalty": 1.3,
        "tail": "drop",
        "num_candidates": 4,
    },
]
EXTRA = {"values": "vas_weights", "num_candidates": "vas_candidates", "tail": "vas_tail"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VAS_VLLM_PYTHON names no interpreter with vLLM and vas-engine"),
]


def _llama(folder: Path, seed: int, layers: int) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=VOCAB - 1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model and two value models: (folder, {name: folder}, engine)."""
    root = tmp_path_factory.mktemp("vllm")
    base = _llama(root / "base", 0, 2)
    lm = CausalLM.load(str(base), "cpu", "float32")
    folders = {}
    for seed, name in enumerate("ab", 1):
        value = ValueModel.create(str(_llama(root / f"backbone-{name}", seed, 1)), lm, [HeadConfig(name, name)])
        with torch.no_grad():
            value.heads.output.weight.normal_(std=0.3)
        save_value(root / name, value)
        folders[name] = str(root / name)
    return str(base), folders, LLM(str(base), folders, skip_tokenizer_init=True, dtype="float32", max_model_len=128)


def _run(made, calls: list[dict], *interface: str, **engine) -> dict:
    base, folders, _ = made
    job = {"model": base, "values": folders, "engine": {"max_model_len": 128, **engine}, "calls": calls}
    done = subprocess.run(
        [PYTHON, str(WORKER), *interface],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _theirs(options: dict, **more) -> dict:
    """Our SamplingParams' arguments as vLLM's."""
    extra = {EXTRA[name]: value for name, value in options.items() if name in EXTRA}
    plain = {name: value for name, value in options.items() if name not in EXTRA}
    return plain | more | ({"extra_args": extra} if extra else {})


def _ours(made, prompts: list, options: list[dict], max_tokens: int) -> list[list[int]]:
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, **each) for each in options]
    return [output.outputs[0].token_ids for output in made[2].generate(prompts, params, use_tqdm=False)]


def test_tokens_are_the_engines_and_errors_name_the_fix(made):
    """Mixed weights and plain requests in one batch; n > 1 as sequences of their own; wrong arguments."""
    plain = {"temperature": 0.0}
    prompts, options = [*PROMPTS, [5, 6]], [*MIX, plain]
    several = {**MIX[0], "n": 3}
    bad = [
        {"extra_args": {"vas_weights": {"aa": 1.0}}},
        {"extra_args": {"vas_weights": {"a": 1.0}, "vas_candidate": 3}},
        {"extra_args": {"vas_weights": "a"}},
    ]
    text = {"seed": 1, "max_tokens": 30, "ignore_eos": True, "extra_args": {"vas_weights": "a=2"}}
    result = _run(
        made,
        [
            {"prompts": prompts, "params": [_theirs(o, max_tokens=30, ignore_eos=True) for o in options]},
            {"prompts": [[5, 6]], "params": [{"temperature": 0.0, "max_tokens": 30, "ignore_eos": True}]},
            {"prompts": PROMPTS[:1], "params": [_theirs(several, max_tokens=30, ignore_eos=True)]},
            {"prompts": PROMPTS[:1], "params": [text]},
            *({"prompts": [[1]], "params": [each]} for each in bad),
        ],
    )["calls"]
    mixed = [completions[0] for completions in result[0]]
    assert mixed[:4] == _ours(made, PROMPTS, MIX, 30)
    assert mixed[4] == result[1][0][0]
    children = result[2][0]
    assert len({tuple(tokens) for tokens in children}) == 3
    alone = [_ours(made, PROMPTS[:1], [{**MIX[0], "seed": MIX[0]["seed"] + i}], 30)[0] for i in range(3)]
    assert children == alone
    assert result[3][0][0] == mixed[0]
    for call, needle in zip(
        result[4:], ("did you mean 'a'", "did you mean 'vas_candidates'", "name=weight"), strict=True
    ):
        assert needle in call["error"]


def test_preempted_requests_keep_their_tokens(made):
    prompts = [[1 + i % 9, 2, 3] for i in range(12)]
    options = [{"seed": i, "values": {"a": 2.0, "b": 0.1 * i}} for i in range(12)]
    call = {"prompts": prompts, "params": [_theirs(o, max_tokens=60, ignore_eos=True) for o in options]}
    result = _run(made, [call], num_gpu_blocks_override=16, block_size=32, enable_prefix_caching=False)
    assert result["preemptions"] > 0
    assert [completions[0] for completions in result["calls"][0]] == _ours(made, prompts, options, 60)


def test_distribution(made):
    _, folders, llm = made
    networks = {name: (llm.values[name], 0) for name in folders}
    count, options = 1500, {"values": {"a": 1.2, "b": -0.8}, "num_candidates": 5}
    expected = enumerate_policy(llm.lm, networks, SamplingParams(**options), [3, 4], 2, ())
    params = [_theirs(options, seed=seed, max_tokens=2, ignore_eos=True) for seed in range(count)]
    result = _run(made, [{"prompts": [[3, 4]] * count, "params": params}])
    counts: dict = {}
    for completions in result["calls"][0]:
        counts[tuple(completions[0])] = counts.get(tuple(completions[0]), 0) + 1
    assert chi_squared_p(counts, expected, count) > 1e-3
    plain = enumerate_policy(llm.lm, {}, SamplingParams(), [3, 4], 2, ())
    assert chi_squared_p(counts, plain, count) < 1e-9


def test_model_runner_v2_interface(made):
    """Rows are not requests, slots are recycled, preempted requests filled again: still the engine's tokens."""
    plain = {"temperature": 0.0}
    # V2 has put penalties into the logits before a processor sees them; here nobody has.
    guided = [{name: value for name, value in options.items() if name != "repetition_penalty"} for options in MIX]
    prompts, options = [*PROMPTS, [5, 6]], [*guided, plain]
    call = {"prompts": prompts, "params": [_theirs(o, max_tokens=12) for o in options]}
    result = _run(made, [call], "v2")
    assert [completions[0] for completions in result["calls"][0]] == _ours(made, prompts, options, 12)
