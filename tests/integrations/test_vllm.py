"""The vLLM plugin in vLLM itself, in an interpreter of its own that has both: VAS_VLLM_PYTHON names it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.oracle import chi_squared_p, enumerate_policy
from vas_engine import LLM, SamplingParams
from vas_engine.model.lm import CausalLM
from vas_engine.values import ValueModel, ValueNetwork, default_config, save_value
from vas_engine.values.config import HeadConfig

PYTHON = os.environ.get("VAS_VLLM_PYTHON")
WORKER, TRITON_CPU = (Path(__file__).with_name(name) for name in ("vllm_worker.py", "triton_cpu.py"))
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
HEADS = [  # an action head, alone and beside value models
    {"seed": 5, "values": {"h": 3.0}, "baseline": "candidate-mean"},
    {"seed": 6, "values": {"h": -4.0, "a": 1.0}, "tail": "drop", "num_candidates": 6, "top_p": 0.9},
    {"temperature": 0.0, "values": {"h": 5.0}, "tail": "drop"},
]
MASKED = [  # by what vLLM does to the logits before a processor sees them
    {
        "seed": 7,
        "values": {"a": 2.0},
        "logit_bias": {20: -100.0, 5: 3.0},
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    {"seed": 8, "temperature": 0.7, "values": {"b": 1.0}, "min_tokens": 6, "stop_token_ids": [1, 12, 20]},
    {"seed": 9, "values": {"a": 3.0}, "allowed_token_ids": [1, 4, 6, 9, 20]},
    {"seed": 10, "values": {"a": -2.0}, "_bad_words_token_ids": [[12], [1]]},
]
EXTRA = {
    "values": "vas_weights",
    "num_candidates": "vas_candidates",
    "tail": "vas_tail",
    "baseline": "vas_baseline",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="VAS_VLLM_PYTHON names no interpreter with vLLM and vas-engine"),
]


def _llama(folder: Path, seed: int, layers: int, vocab: int = VOCAB) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=vocab - 1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base model, two value models and an action head: (folder, {name: folder}, engine)."""
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
    for name, states in (("h", (2,)), ("middle", (1, 2))):
        head = ValueNetwork(default_config("action", lm, [HeadConfig("h", "h")]).replace(states=states)).bind(lm)
        with torch.no_grad():
            head.heads.output.weight.normal_(std=0.5)
        save_value(root / name, head)
    folders["h"] = str(root / "h")
    return str(base), folders, LLM(str(base), folders, skip_tokenizer_init=True, dtype="float32", max_model_len=128)


def _run(made, calls: list[dict], runner: str = "v1", **engine) -> dict:
    base, folders, _ = made
    job = {"model": base, "values": folders, "engine": {"max_model_len": 128, **engine}, "calls": calls}
    done = subprocess.run(
        [PYTHON, str(WORKER), runner],
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


def _banning(options: dict) -> dict:
    """vLLM's allowed tokens and bad words as our biases."""
    plain = {**options}
    allowed, bad = plain.pop("allowed_token_ids", None), plain.pop("_bad_words_token_ids", ())
    banned = [token for (token,) in bad] if allowed is None else sorted(set(range(VOCAB)) - {*allowed})
    return plain | ({"logit_bias": dict.fromkeys(banned, float("-inf"))} if banned else {})


def _ours(made, prompts: list, options: list[dict], max_tokens: int) -> list[list[int]]:
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, **_banning(each)) for each in options]
    return [output.outputs[0].token_ids for output in made[2].generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_tokens_are_the_engines_and_errors_name_the_fix(made, runner: str):
    """Mixed weights, action heads, masks and plain requests in one batch of few slots, prompts in pieces; n > 1 as
    sequences of their own; wrong arguments."""
    plain = {"temperature": 0.0}
    guided = [*MIX, *HEADS, *MASKED]
    prompts, options = [*PROMPTS, *PROMPTS, *PROMPTS[:3], [5, 6]], [*guided, plain]
    # V1 takes the draw on a piece back, which torch's generators on CPUs do not allow.
    pieces = {"max_num_batched_tokens": 4} if runner == "v2" else {}
    several = {**MIX[0], "n": 3}
    bad = [
        {"extra_args": {"vas_weights": {"aa": 1.0}}},
        {"extra_args": {"vas_weights": {"a": 1.0}, "vas_candidate": 3}},
        {"extra_args": {"vas_weights": "a"}},
        {"extra_args": {"vas_weights": {"h": 1.0}}},
        {"extra_args": {"vas_weights": {"a": 1.0}, "vas_tilt": "optimal"}},
    ]
    text = {"seed": 1, "max_tokens": 20, "ignore_eos": True, "extra_args": {"vas_weights": "a=2"}}
    outcome = _run(
        made,
        [
            {"prompts": prompts, "params": [_theirs(o, max_tokens=20, ignore_eos=True) for o in options]},
            {"prompts": [[5, 6]], "params": [{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}]},
            {"prompts": PROMPTS[:1], "params": [_theirs(several, max_tokens=20, ignore_eos=True)]},
            {"prompts": PROMPTS[:1], "params": [text]},
            *({"prompts": [[1]], "params": [each]} for each in bad),
        ],
        runner,
        max_num_seqs=4,
        **pieces,
    )
    result = outcome["calls"]
    mixed = [completions[0] for completions in result[0]]
    assert mixed[:-1] == _ours(made, prompts[:-1], guided, 20)
    assert mixed[-1] == result[1][0][0]
    assert outcome["held"] <= 4
    children = result[2][0]
    assert len({tuple(tokens) for tokens in children}) == 3
    alone = [_ours(made, PROMPTS[:1], [{**MIX[0], "seed": MIX[0]["seed"] + i}], 20)[0] for i in range(3)]
    assert children == alone
    assert result[3][0][0] == mixed[0]
    for call, needle in zip(
        result[4:],
        ("did you mean 'a'", "did you mean 'vas_candidates'", "name=weight", "candidate-mean", "scalar"),
        strict=True,
    ):
        assert needle in call["error"]


@pytest.mark.parametrize("ahead", [False, True], ids=["", "async"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_preempted_requests_keep_their_tokens(made, runner: str, ahead: bool):
    """Also where vLLM schedules a step before it has read the last one's tokens, as it does on GPUs, and reads them
    back from when on a request with penalties joins, as the last one does here."""
    prompts = [[1 + i % 9, 2, 3] for i in range(13)]
    options = [{"seed": i, "values": {"a": 2.0, "b": 0.1 * i}} for i in range(10)]
    options += [{"seed": i, "values": {"h": 3.0}, "baseline": "candidate-mean"} for i in (10, 11)]
    options += [{"seed": 12, "values": {"a": 1.0}, "repetition_penalty": 1.3}]
    lengths = [8] + [40] * 11 + [20]
    params = [_theirs(o, max_tokens=n, ignore_eos=True) for o, n in zip(options, lengths, strict=True)]
    engine = {"max_num_seqs": 12, "num_gpu_blocks_override": 16, "block_size": 32, "enable_prefix_caching": False}
    result = _run(made, [{"prompts": prompts, "params": params}], runner, async_scheduling=ahead, **engine)
    assert result["preemptions"] > 0
    expected = [tokens[:n] for tokens, n in zip(_ours(made, prompts, options, 40), lengths, strict=True)]
    assert [completions[0] for completions in result["calls"][0]] == expected


@pytest.mark.parametrize(("runner", "count", "length"), [("v1", 1500, 2), ("v2", 500, 1)])  # interpreted: slow
def test_distribution(made, runner: str, count: int, length: int):
    llm = made[2]
    networks = {name: (llm.values[name], 0) for name in "ab"}
    options = {"values": {"a": 1.2, "b": -0.8}, "num_candidates": 5}
    expected = enumerate_policy(llm.lm, networks, SamplingParams(**options), [3, 4], length, ())
    params = [_theirs(options, seed=seed, max_tokens=length, ignore_eos=True) for seed in range(count)]
    result = _run(made, [{"prompts": [[3, 4]] * count, "params": params}], runner)
    counts: dict = {}
    for completions in result["calls"][0]:
        counts[tuple(completions[0])] = counts.get(tuple(completions[0]), 0) + 1
    assert chi_squared_p(counts, expected, count) > 1e-3
    plain = enumerate_policy(llm.lm, {}, SamplingParams(), [3, 4], length, ())
    assert chi_squared_p(counts, plain, count) < 1e-9


def test_action_heads_in_a_compiled_model(made):
    """They read the states that logits are made of, which vLLM does not compile."""
    plain = {"temperature": 0.0}
    prompts, options = [*PROMPTS[:3], [5, 6], PROMPTS[3]], [*HEADS, plain, MIX[0]]
    call = {"prompts": prompts, "params": [_theirs(o, max_tokens=20, ignore_eos=True) for o in options]}
    result = _run(made, [call], enforce_eager=False)["calls"][0]
    assert [completions[0] for completions in result] == _ours(made, prompts, options, 20)
    unguided = _ours(made, prompts[:3], [{**o, "values": None} for o in HEADS], 20)
    assert all(completions[0] != other for completions, other in zip(result, unguided, strict=False))


def test_a_head_on_other_states_is_refused(made):
    base, folders, llm = made
    other = str(Path(folders["h"]).with_name("middle"))
    with pytest.raises(AssertionError, match=r"reads the hidden states \[1, 2\].*--states 2"):
        _run((base, {"middle": other}, llm), [])


@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_the_server(made, tmp_path, runner: str):
    """Weights over HTTP: mixed requests at once, n > 1, wrong arguments, names that only the engine knows."""
    base, folders, _ = made
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", base, "--served-model-name", "m", "--port", str(port), "--skip-tokenizer-init"]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128"]
    words += ["--additional-config", json.dumps({"vas_values": folders})]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    start = ["-m", "vllm.entrypoints.openai.api_server"] if runner == "v1" else [str(TRITON_CPU)]

    def ask(prompt: list[int], options: dict, **more) -> httpx.Response:
        theirs = _theirs(options, max_tokens=20, ignore_eos=True)
        weights = ",".join(f"{name}={weight}" for name, weight in theirs["extra_args"].pop("vas_weights").items())
        extra = {**theirs.pop("extra_args"), "vas_weights": weights, **more}
        body = {"model": "m", "prompt": prompt, "return_token_ids": True, "detokenize": False, "vllm_xargs": extra}
        return client.post("/v1/completions", json=body | theirs)

    with (
        log.open("w") as out,
        subprocess.Popen(
            [PYTHON, *start, *words], stdout=out, stderr=out, env=environment, start_new_session=True
        ) as server,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                assert server.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
            prompts, options = [*PROMPTS, *PROMPTS[:3]], [*MIX, *HEADS]
            answers = list(pool.map(ask, prompts, options))
            assert [answer.status_code for answer in answers] == [200] * len(answers), answers[0].text
            tokens = [answer.json()["choices"][0]["token_ids"] for answer in answers]
            assert tokens == _ours(made, prompts, options, 20)
            several = ask(PROMPTS[0], {**MIX[0], "n": 2}).json()["choices"]
            alone = [_ours(made, PROMPTS[:1], [{**MIX[0], "seed": MIX[0]["seed"] + i}], 20)[0] for i in range(2)]
            assert [choice["token_ids"] for choice in several] == alone
            wrong = ask(PROMPTS[0], MIX[0], vas_candidate=3)
            assert wrong.status_code == 400
            assert "did you mean 'vas_candidates'" in wrong.text
            # This process was not told the names: the engine ends the request, and goes on.
            unknown = ask(PROMPTS[0], {"values": {"aa": 1.0}}).json()["choices"][0]["token_ids"]
            assert unknown == [VOCAB - 1] * len(unknown)
            assert ask(PROMPTS[0], MIX[0]).json()["choices"][0]["token_ids"] == tokens[0]
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    assert "did you mean 'a'" in log.read_text()
    assert ("Using V2 Model Runner" in log.read_text()) == (runner == "v2")


def test_documentation(tmp_path):
    """The page's example as it is written, by vLLM's own interpreter."""
    from tests.integrations.test_documentation import examples
    from tests.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    for part, seed in (("model", 0), ("other", 1)):
        _llama(tmp_path / part, seed, 1, len(tokenizer))
        tokenizer.save_pretrained(tmp_path / part)
    lm = CausalLM.load(tmp_path / "model", "cpu", "float32")
    save_value(tmp_path / "value", ValueModel.create(tmp_path / "other", lm, ["kind"], tokenizer), tokenizer)
    names = f"MODEL, VALUE = {str(tmp_path / 'model')!r}, {str(tmp_path / 'value')!r}\n"
    script = tmp_path / "example.py"
    script.write_text(names + examples("vllm.md") + "\nprint('tokens:', len(output.token_ids))\n")
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([PYTHON, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 1 <= int(done.stdout.split("tokens:")[1]) <= 20
