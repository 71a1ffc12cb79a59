"""RemoteLLM over real servers on loopback: the exact policy, and what may go wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import math
import os
import re
import socket
import subprocess
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytest.importorskip("httpx", reason="models behind an API need pip install 'vas-engine[remote]'")
pytest.importorskip("fastapi", reason="the servers of these tests need pip install 'vas-engine[serve]'")

import httpx
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.engine.conftest import llama, network
from tests.engine.test_distribution import EOS, HORIZON, PROMPT, rewards
from tests.integrations.conftest import bound, plain_model
from tests.oracle import chi_squared_p, enumerate_policy, head_outputs
from tests.serving.conftest import serving
from vas_engine import LLM, InvalidArgumentError, SamplingParams
from vas_engine.cli import main
from vas_engine.integrations.remote import (
    EndpointAnswerError,
    EndpointError,
    EndpointUnavailableError,
    RemoteLLM,
    SpendLimitError,
)
from vas_engine.integrations.remote.journal import Journal
from vas_engine.integrations.remote.policy import Policy
from vas_engine.integrations.remote.values import Ask
from vas_engine.prompts import read_prompt
from vas_engine.values.artifact import save_value
from vas_engine.values.value_model import ValueModel

LETTERS = ["a", "b", "c", "d", "</s>"]
TEXT = "".join(LETTERS[token] for token in PROMPT)


def letter_tokenizer(letters: list[str] = LETTERS) -> PreTrainedTokenizerFast:
    """Token i is a letter; the last one ends a text."""
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=letters[-1], clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def upstream(world) -> Iterator[str]:
    """A server of this engine over the enumerable model, without any values."""
    llm = LLM(plain_model(world.lm), tokenizer=letter_tokenizer(), kv_cache_memory="8MiB")
    with serving(llm, max_waiting=4096) as served:
        yield served.url + "/v1"


def remote(world, url: str, **options) -> RemoteLLM:
    settings = {"value_tokenizers": {"": letter_tokenizer()}, "backoff": 0.0, **options}
    return RemoteLLM(url, "tiny", {"": world.network("model")}, **settings)


def outcome(text: str, finish_reason: str) -> tuple[int, ...]:
    return (*(LETTERS.index(letter) for letter in text), *([EOS] if finish_reason == "stop" else []))


CASES = [
    {"values": {"ones": 2.0, "ended": -2.5}, "num_candidates": 3},
    {"values": {"ones": -2.5, "ended": 2.0}, "num_candidates": 2, "baseline": "candidate-mean", "advantage_clip": 0.8},
    {"values": {"ones": 2.0, "ended": -2.5}, "num_candidates": 3, "tail": "drop", "temperature": 0.7},
    {"values": {"ones": -3.0}, "num_candidates": 5, "tilt": "optimal"},
    {"values": {}, "num_candidates": 1},
]


def check_frequencies(world, llm: RemoteLLM, case: dict, samples: int) -> None:
    params = SamplingParams(max_tokens=HORIZON, n=samples, seed=7, **case)
    net = world.network("model")
    expected = enumerate_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, PROMPT, HORIZON, {EOS})
    outputs = llm.generate(TEXT, params, use_tqdm=False)[0].outputs
    counts = Counter(outcome(o.text, o.finish_reason) for o in outputs)
    assert chi_squared_p(counts, expected, samples) > 1e-4
    base = enumerate_policy(world.lm, {}, SamplingParams(), PROMPT, HORIZON, {EOS})
    if case["values"]:
        assert chi_squared_p(counts, base, samples) < 1e-4
    for output in outputs:
        known = math.log(base[outcome(output.text, output.finish_reason)])
        assert output.cumulative_logprob == pytest.approx(known, abs=1e-3)
    if "temperature" not in case:
        # The mean over the draws of log pi - log pi0, and the exact sum of the steps, agree.
        gained = [o.cumulative_tilted_logprob - o.cumulative_logprob for o in outputs]
        spread = (sum((g - o.kl) ** 2 for g, o in zip(gained, outputs, strict=True)) / samples) ** 0.5
        assert sum(gained) - sum(o.kl for o in outputs) == pytest.approx(0, abs=4 * spread * samples**0.5 + 1e-6)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_frequencies_follow_the_guided_policy(world, upstream, case: dict) -> None:
    check_frequencies(world, remote(world, upstream), case, 120)


def test_frequencies_of_token_ids(world, upstream) -> None:
    check_frequencies(world, remote(world, upstream, tokenizer=letter_tokenizer()), CASES[0], 120)


def test_the_tail_gets_its_share_whatever_the_normaliser() -> None:
    """Over the endpoint's own draw, inside and outside of the candidates, the tail is taken with pi(tail)."""
    log_probs = np.log([0.4, 0.2, 0.1])
    for tilt in ([1.0, 0.5, 0.0], [-2.0, -1.0, 0.3], [0.0, 0.0, 0.0], [-30.0, -30.0, -30.0]):
        policy = Policy(log_probs, np.array(tilt), SamplingParams())
        z = (np.exp(log_probs) * np.exp(tilt)).sum() + 0.3
        assert policy.log_z == pytest.approx(math.log(z))
        assert 0.3 * policy.tail_chance(True) + 0.7 * policy.tail_chance(False) == pytest.approx(0.3 / z)
        pi = np.exp(log_probs) * np.exp(tilt) / z
        kl = (pi * (np.array(tilt) - math.log(z))).sum() + 0.3 / z * -math.log(z)
        assert policy.kl == pytest.approx(kl)


@pytest.mark.slow
@pytest.mark.parametrize("ids", [False, True], ids=["as-text", "as-ids"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_frequencies_of_many_samples(world, upstream, case: dict, ids: bool) -> None:
    check_frequencies(world, remote(world, upstream, tokenizer=letter_tokenizer() if ids else None), case, 1000)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def widened(model: LlamaForCausalLM, width: int = 32) -> LlamaForCausalLM:
    """The same function with longer heads, zero in what is new, for servers that have no kernel for short ones."""
    config = copy.deepcopy(model.config)
    old, heads = config.head_dim, config.num_attention_heads
    config.head_dim = width
    wide = LlamaForCausalLM(config)
    pairs = torch.arange(old // 2) * (width // old)  # where a rotation of the same frequency is
    places = torch.cat([pairs, pairs + width // 2])
    state = model.state_dict()
    for name, weight in state.items():
        rows = weight.T if name.endswith("o_proj.weight") else weight
        if "self_attn" in name:
            longer = rows.new_zeros(len(rows) // old, width, rows.shape[1])
            longer[:, places] = rows.reshape(-1, old, rows.shape[1])
            # Attention divides by the root of the width.
            longer *= (width / old) ** 0.5 if name.endswith("q_proj.weight") else 1.0
            rows = longer.flatten(0, 1)
        state[name] = rows.T if name.endswith("o_proj.weight") else rows
    assert len(state["model.layers.0.self_attn.q_proj.weight"]) == heads * width
    wide.load_state_dict(state)
    return wide.eval()


def llama_cpp(folder: Path, port: int) -> list[str]:
    return [str(Path(__file__).with_name("llama_cpp_server.py")), str(folder), str(folder / "model.gguf"), str(port)]


def vllm(folder: Path, port: int) -> list[str]:
    options = ["--model", str(folder), "--served-model-name", "tiny", "--port", str(port), "--dtype", "float32"]
    options += ["--max-model-len", "128", "--enforce-eager", "--gpu-memory-utilization", "0.1"]
    return ["-m", "vllm.entrypoints.openai.api_server", *options]


@pytest.fixture(
    scope="module", params=[("VAS_LLAMA_PYTHON", llama_cpp), ("VAS_VLLM_PYTHON", vllm)], ids=["llama", "vllm"]
)
def theirs(request, world, tmp_path_factory) -> Iterator[tuple[str, dict]]:
    """Another project's server over the enumerable model: its address and how RemoteLLM is to speak to it."""
    variable, command = request.param
    python = os.environ.get(variable)
    if not python:
        pytest.skip(f"{variable} names no interpreter with that server")
    folder, port = tmp_path_factory.mktemp("theirs"), free_port()
    model = plain_model(world.lm)
    (model if command is llama_cpp else widened(model)).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}/v1"
    log = folder / "log"
    with (
        log.open("w") as out,
        subprocess.Popen([python, *command(folder, port)], stdout=out, stderr=out, env=environment) as running,
    ):
        try:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + "/models").status_code == 200:
                        break
                assert running.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
            # llama.cpp reads and tells texts, and cuts the distribution unless it is told not to; vLLM knows ids.
            plain = {"extra_body": {"top_k": 0, "min_p": 0, "repeat_penalty": 1}}
            yield url, plain if command is llama_cpp else {"tokenizer": letter_tokenizer()}
        finally:
            running.terminate()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_frequencies_over_other_servers(world, theirs, case: dict) -> None:
    url, options = theirs
    check_frequencies(world, remote(world, url, **options), case, 300)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reward_rises_over_other_servers(world, theirs) -> None:
    url, options = theirs
    check_reward_rises(remote(world, url, **options))


def test_reward_rises_with_the_weight(world, upstream) -> None:
    check_reward_rises(remote(world, upstream))


def check_reward_rises(llm: RemoteLLM) -> None:
    means = []
    for weight in (-4.0, 0.0, 4.0):
        params = SamplingParams(max_tokens=HORIZON, n=60, seed=1, values={"ones": weight}, num_candidates=4)
        outputs = llm.generate(TEXT, params, use_tqdm=False)[0].outputs
        means.append(sum(rewards(outcome(o.text, o.finish_reason))[0] for o in outputs) / 60)
    assert means[0] + 0.15 < means[1] < means[2] - 0.15


def test_values_and_greedy_tokens_are_the_engines(world, upstream) -> None:
    own = {"": bound_copy(world)}
    local = LLM(plain_model(world.lm), own, tokenizer=letter_tokenizer(), kv_cache_memory="8MiB")
    params = SamplingParams(max_tokens=HORIZON, temperature=0.0, values={"ones": 2.0, "ended": 0.5}, num_candidates=4)
    expected = local.generate(TEXT, params, use_tqdm=False)[0].outputs[0]
    for tokenizer in (None, letter_tokenizer()):
        llm = remote(world, upstream, tokenizer=tokenizer)
        output = llm.generate(TEXT, params, use_tqdm=False)[0].outputs[0]
        assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)
        for name in ("ones", "ended"):
            assert output.values[name] == pytest.approx(expected.values[name], abs=1e-4)
            assert output.prompt_values[name] == pytest.approx(expected.prompt_values[name], abs=1e-4)
        assert output.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-4)


def bound_copy(world):
    """The fitted value model again, with pages of its own."""
    fitted = world.network("model")
    twin = ValueModel.create(plain_model(fitted.lm_of_values), world.lm, fitted.config.heads, head_hidden=16)
    twin.heads.load_state_dict(copy.deepcopy(fitted.heads.state_dict()))
    return twin.eval()


def test_a_value_with_another_tokenizer_reads_the_same_text(world, upstream) -> None:
    """Letters in another order, and pairs of letters: candidates re-encode to other tokens than the endpoint's."""
    merges = [(x, y) for x in "abcd" for y in "abcd"]
    vocabulary = {token: i for i, token in enumerate([*"dcba", *(x + y for x, y in merges), "</s>"])}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    lm = llama(vocab=len(vocabulary))
    net = network("model", lm)
    llm = RemoteLLM(upstream, "tiny", {"v": net}, value_tokenizers={"v": tokenizer})
    candidates = [("a", None, False), ("b", None, False), ("", None, True)]
    for text in ("b", "bd", "bda", "bdac", "bd"):
        [(_, values)] = llm.values.tilts([Ask("key", text, None, candidates, SamplingParams(values={"v": 1.0}))])
        end = tokenizer.eos_token_id
        rows = [tokenizer.encode(t) for t in (text, text + "a", text + "b")] + [[*tokenizer.encode(text), end]]
        assert values[:, 0].tolist() == pytest.approx(head_outputs(lm, net, rows)[:, 0].tolist(), abs=1e-4)
    output = llm.generate(TEXT, SamplingParams(max_tokens=4, values={"v": 1.0}, num_candidates=3), use_tqdm=False)
    assert output[0].error is None


def test_sequences_share_a_pass_and_errors_are_their_own(world, upstream, monkeypatch) -> None:
    """What waits while a pass runs is one pass; what cannot be valued, and who has gone, disturb nobody."""
    llm = remote(world, upstream)
    guided = SamplingParams(values={"ones": 2.0, "ended": 1.0})
    candidates = [("a", None, False), ("b", None, False)]
    asks = [Ask(text, text, None, candidates, guided) for text in ("a", "ab", "abc", "b", "ca")]
    too_long = Ask("long", "a" * 300, None, candidates, guided)
    alone = [llm.values.tilts([ask])[0] for ask in asks]
    for ask in asks:
        llm.values.forget(ask.key)
    cache = llm.values._readers[0].cache
    passes: list[list[str]] = []
    begun, go_on = threading.Event(), threading.Event()
    run = llm.values.tilts

    def watched(given):
        begun.set()
        assert go_on.wait(30)
        passes.append([ask.key for ask in given])
        return run(given)

    monkeypatch.setattr(llm.values, "tilts", watched)

    async def main() -> list:
        async with llm.session() as session:
            first = asyncio.create_task(session.tilt(asks[0]))
            await asyncio.to_thread(begun.wait, 30)
            others = [asyncio.create_task(session.tilt(ask)) for ask in (*asks[1:], too_long)]
            await asyncio.sleep(0)  # all of them have asked
            others[-2].cancel()
            await asyncio.gather(others[-2], return_exceptions=True)
            go_on.set()
            return await asyncio.gather(first, *others, return_exceptions=True)

    results = asyncio.run(main())
    assert passes[:2] == [["a"], ["ab", "abc", "b", "long"]]
    assert passes[2:] == [["ab"], ["abc"], ["b"], ["long"]]  # each by itself, to find out whose error it is
    for (tilt, values), (own_tilt, own_values) in zip(results[:4], alone, strict=False):
        assert tilt == pytest.approx(own_tilt, abs=1e-5)
        assert values == pytest.approx(own_values, abs=1e-5)
    assert isinstance(results[4], asyncio.CancelledError)
    assert isinstance(results[5], InvalidArgumentError)
    for ask in asks[:4]:
        llm.values.forget(ask.key)
    assert sorted(cache._free) == list(range(cache._blocks))


# -- a server that fails -----------------------------------------------------------------------------------


class Faulty(ThreadingHTTPServer):
    """Passes requests on to a real server, except for the faults it is told of, in order.

    Attributes:
        faults: what to do with the next requests. poison: the same for every request with a prompt. received: bodies
            so far. lives: requests until it dies; None: never. listing: of its models; None: the real server's. most:
            alternatives that it tells; None: as many as are asked for.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.client = httpx.Client(timeout=60)
        self.target = upstream
        self.faults: list = []
        self.poison: dict = {}
        self.received: list[dict] = []
        self.lives: int | None = None
        self.listing: dict | None = None
        self.most: int | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Faulty

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        if self.server.listing is not None:
            self._answer(200, json.dumps(self.server.listing).encode(), {})
            return
        answer = self.server.client.get(self.server.target + self.path)
        self._answer(answer.status_code, answer.content, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.received.append(json.loads(body))
            fault = self.server.faults.pop(0) if self.server.faults else None
            fault = self.server.poison.get(self.server.received[-1]["prompt"], fault)
            if self.server.lives is not None:
                self.server.lives -= 1
                fault = "gone" if self.server.lives < 0 else fault
        if fault == "gone":
            self.close_connection = True
            return
        if fault == "slow":
            self.close_connection = True
            time.sleep(1.0)
            return
        if isinstance(fault, tuple):
            self._answer(*fault)
            return
        asked = json.loads(body)
        if self.server.most is not None:
            asked["logprobs"] = min(asked["logprobs"], self.server.most)
        answer = self.server.client.post(self.server.target + "/completions", json=asked)
        self._answer(answer.status_code, answer.content, {}, cut=fault == "cut")

    def _answer(self, status: int, content: bytes, headers: dict, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


@pytest.fixture
def faulty(upstream) -> Iterator[Faulty]:
    server = Faulty(upstream)
    yield server
    server.shutdown()
    server.server_close()
    server.client.close()


PARAMS = SamplingParams(max_tokens=HORIZON, values={"ones": 1.0, "ended": -8.0}, num_candidates=3, seed=4)
PROMPTS = [TEXT, "ab", "ca", "d"]


def texts(outputs) -> list[tuple]:
    return [(o.outputs[0].text, o.outputs[0].finish_reason) for o in outputs]


def test_every_passing_fault_is_tried_again(world, upstream, faulty) -> None:
    expected = texts(remote(world, upstream).generate(PROMPTS, PARAMS, use_tqdm=False))
    faulty.faults = [
        (429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0"}),
        (429, b"", {"Retry-After": formatdate(time.time() - 5, usegmt=True)}),
        (503, b"<html>busy</html>", {}),
        (200, b'{"choices": [{"te', {}),
        (200, b"[1, 2]", {}),
        "cut",
        "gone",
    ]
    llm = remote(world, faulty.url, max_retries=9)
    assert texts(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    assert llm.spent.retries == 7
    assert llm.spent.requests == len(faulty.received)
    assert llm.spent.tokens > 0


def test_an_answer_that_takes_too_long_is_asked_for_again(world, upstream, faulty) -> None:
    expected = texts(remote(world, upstream).generate(PROMPTS, PARAMS, use_tqdm=False))
    faulty.faults = ["slow"]
    llm = remote(world, faulty.url, timeout=0.5, max_retries=9)
    assert texts(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    assert llm.spent.retries >= 1  # more where the machine is slow as well


def test_a_retry_after_is_waited_for(world, faulty, monkeypatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds, *rest):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("vas_engine.integrations.remote.endpoint.sleep", noted)
    faulty.faults = [(429, b"", {"Retry-After": "7"}), (500, b"", {}), (429, b"", {"Retry-After": "nan"})]
    llm = remote(world, faulty.url, backoff=4.0)
    llm.generate(TEXT, PARAMS, use_tqdm=False)
    assert waits[0] == 7
    assert 4 <= waits[1] <= 8 <= waits[2] <= 16
    faulty.faults = [(429, b"", {"Retry-After": "86400"})]
    with pytest.raises(EndpointUnavailableError, match="429") as raised:
        llm.generate(TEXT, PARAMS, use_tqdm=False)
    assert "asks to wait 86400 s" in str(raised.value.__notes__)


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ((401, b'{"error": {"message": "no such key"}}', {}), EndpointError, "401.*no such key"),
        ((400, b'{"error": "logprobs too large"}', {}), EndpointError, "logprobs too large"),
        ((200, b'{"choices": []}', {}), EndpointAnswerError, "no log-probabilities"),
        ((200, b'{"choices": [{"text": "a", "logprobs": null}]}', {}), EndpointAnswerError, "must offer"),
        (
            (
                200,
                b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [2.5], "top_logprobs": [{}]}}]}',
                {},
            ),
            EndpointAnswerError,
            "2.5 is no log-probability",
        ),
        (
            (
                200,
                b'{"choices": [{"text": " a", "logprobs": {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": '
                b'[{"a": -1}]}}]}',
                {},
            ),
            EndpointAnswerError,
            "writes the token ' a' as 'a'",
        ),
        ((200, b"cut", {}), EndpointAnswerError, "is no JSON"),
        ((500, b"", {}), EndpointUnavailableError, "500"),
        ("gone", EndpointUnavailableError, "no answer"),
    ],
)
def test_what_stays_wrong_is_a_typed_error_of_that_request_alone(world, faulty, fault, error, told) -> None:
    llm = remote(world, faulty.url, max_retries=2)
    faulty.poison = {TEXT: fault}
    with pytest.raises(error, match=told) as raised:
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    failed, *rest = raised.value.outputs
    assert type(failed.error) is error
    assert failed.outputs[0].finish_reason == "error"
    assert all(output.error is None and output.finished for output in rest)


@pytest.mark.parametrize("prompt", ["", "a\ud83d", [0, 1]], ids=["empty", "no-text", "ids-without-tokenizer"])
def test_a_bad_prompt_among_good_ones_fails_alone(world, upstream, prompt) -> None:
    llm = remote(world, upstream)
    expected = texts(llm.generate(PROMPTS, PARAMS, use_tqdm=False))
    failed, *rest = llm.generate([prompt, *PROMPTS], PARAMS, use_tqdm=False, on_error="return")
    assert isinstance(failed.error, InvalidArgumentError)
    assert failed.outputs[0].finish_reason == "error"
    assert texts(rest) == expected


def test_half_characters_among_the_alternatives_are_left_out(world, faulty) -> None:
    """JSON writes half of a character as one escape of a pair."""
    alternatives = b'{"\\ud83d": -0.1, "a": -3.0}'
    answer = b'{"choices": [{"text": "a", "finish_reason": "length", "logprobs": {"tokens": ["a"], '
    answer += b'"token_logprobs": [-3.0], "top_logprobs": [' + alternatives + b"]}}]}"
    faulty.poison = {TEXT: (200, answer, {})}
    params = SamplingParams(max_tokens=1, num_candidates=2, temperature=0.0, tail="drop")
    assert remote(world, faulty.url).generate(TEXT, params, use_tqdm=False)[0].outputs[0].text == "a"


@pytest.mark.parametrize("pause", [0.0, 0.02])
def test_what_is_new_comes_once_however_slowly_it_is_read(world, upstream, pause) -> None:
    llm = remote(world, upstream)
    told, ids = [""] * 4, [[] for _ in range(4)]

    async def main() -> list:
        async with llm.session() as session:
            async for output in session.stream(read_prompt(TEXT), PARAMS.replace(n=4)):
                for completion in output.outputs:
                    told[completion.index] += completion.delta_text
                    ids[completion.index] += completion.delta_token_ids
                await asyncio.sleep(pause)
            return output.outputs

    outputs = asyncio.run(main())
    assert told == [output.text for output in outputs]
    assert ids == [output.token_ids for output in outputs]


def record(completion) -> tuple:
    """A completion to compare, but for rounding."""
    numbers = [completion.kl, *completion.values["ones"], *completion.values["ended"]]
    rounded = [None if math.isnan(number) else round(number, 3) for number in numbers]
    return completion.text, completion.finish_reason, rounded


def test_nothing_that_was_paid_for_is_lost(world, upstream, faulty, tmp_path) -> None:
    """An upstream that dies in the middle; then a journal cut off anywhere."""
    params = PARAMS.replace(n=2)
    expected = remote(world, upstream).generate(PROMPTS, params, use_tqdm=False)
    wanted = [record(c) for o in expected for c in o.outputs]
    state = tmp_path / "state.jsonl"
    faulty.lives = 9
    llm = remote(world, faulty.url, state_file=state, max_retries=1)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False, on_error="return")
    assert any(isinstance(output.error, EndpointUnavailableError) for output in outputs)
    steps = len(state.read_text().splitlines()) - 1
    assert 0 < steps <= 9
    total = sum(len(c.token_ids) for o in expected for c in o.outputs)

    def resume() -> tuple[list, int]:
        faulty.lives, faulty.received = None, []
        outputs = remote(world, faulty.url, state_file=state).generate(PROMPTS, params, use_tqdm=False)
        found = [record(c) for o in outputs for c in o.outputs]
        return found, len(faulty.received)

    found, asked = resume()
    assert found == wanted
    assert asked >= total - steps
    assert asked < total + 8  # draws of the tail may need further ones
    found, asked = resume()
    assert (found, asked) == (wanted, 0)
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) * 2 // 3])
    assert resume()[0] == wanted
    assert resume() == (wanted, 0)
    assert state.read_bytes().count(b"\n") == whole.count(b"\n")


def test_a_step_is_in_the_file_before_the_next_is_asked_for(tmp_path) -> None:
    journal = Journal(tmp_path / "state.jsonl", {})
    for count in (2, 3):
        journal.add("key", {"text": "a"})
        assert (tmp_path / "state.jsonl").read_text().count("\n") == count  # what a kill would leave
    journal.close()


def test_a_journal_of_something_else_is_refused(world, upstream, tmp_path) -> None:
    state = tmp_path / "state.jsonl"
    remote(world, upstream, state_file=state, seed=3).generate(TEXT, PARAMS, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="seed=3, not 4"):
        remote(world, upstream, state_file=state, seed=4).generate(TEXT, PARAMS, use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="begun with extra_body"):
        remote(world, upstream, state_file=state, seed=3, extra_body={"top_k": 0}).generate(TEXT, PARAMS)
    state.write_text("a story\n")
    with pytest.raises(InvalidArgumentError, match="is no journal"):
        remote(world, upstream, state_file=state).generate(TEXT, PARAMS, use_tqdm=False)


def test_an_endpoint_that_tells_fewer_alternatives_than_asked_for_is_told_of_once(world, faulty) -> None:
    params = PARAMS.replace(seed=None, max_tokens=2)
    faulty.most = 2
    with pytest.warns(UserWarning, match="told 2 alternatives where 3 were asked for") as told:
        remote(world, faulty.url, seed=1).generate(PROMPTS, params, use_tqdm=False)
    assert len(told) == 1
    faulty.most = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        remote(world, faulty.url, seed=1).generate(PROMPTS, params, use_tqdm=False)
        # Fewer, but all that can come.
        top = {"a": math.log(0.75), "b": math.log(0.25)}
        logprobs = {"tokens": ["a"], "token_logprobs": [top["a"]], "top_logprobs": [top]}
        choice = {"text": "a", "finish_reason": "length", "logprobs": logprobs}
        faulty.faults = [(200, json.dumps({"choices": [choice]}).encode(), {})]
        remote(world, faulty.url, seed=1).generate(TEXT, params.replace(max_tokens=1), use_tqdm=False)


def test_ceilings_end_the_run_with_what_there_is(world, faulty) -> None:
    llm = remote(world, faulty.url, max_requests=5, concurrency=2)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False, on_error="return")
    assert len(faulty.received) == llm.spent.requests == 5
    errors = [output.error for output in outputs if output.error is not None]
    assert errors
    assert all(isinstance(error, SpendLimitError) for error in errors)
    assert sum(len(output.outputs[0].token_ids) for output in outputs) > 0
    llm = remote(world, faulty.url, max_spent_tokens=6, concurrency=1)
    with pytest.raises(SpendLimitError, match="max_spent_tokens=6"):
        llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert 6 <= llm.spent.tokens <= 6 + 1 + HORIZON + len(TEXT)


def test_the_rate_is_kept(world, upstream, monkeypatch) -> None:
    clock = [100.0]
    starts: list[float] = []
    sleep = asyncio.sleep

    async def pass_time(seconds, *rest):
        starts.append(clock[0] + seconds)
        await sleep(0)

    module = "vas_engine.integrations.remote.endpoint"
    monkeypatch.setattr(f"{module}.sleep", pass_time)
    monkeypatch.setattr(f"{module}.monotonic", lambda: clock[0])
    remote(world, upstream, requests_per_second=4.0).generate(PROMPTS, PARAMS, use_tqdm=False)
    assert len(starts) >= 6
    assert starts == pytest.approx([100 + i / 4 for i in range(len(starts))])


def test_stop_strings_seeds_and_repeats(world, upstream) -> None:
    llm = remote(world, upstream, seed=2)
    params = SamplingParams(max_tokens=8, values={"ones": 4.0}, num_candidates=4, stop=["bb", "zz"], n=6)
    first, second = llm.generate([TEXT, TEXT], params, use_tqdm=False)
    again = llm.generate([TEXT, TEXT], params, use_tqdm=False)
    assert [c.text for c in first.outputs] == [c.text for c in again[0].outputs]
    assert [c.text for c in first.outputs] != [c.text for c in second.outputs]
    stopped = [c for c in [*first.outputs, *second.outputs] if c.stop_reason == "bb"]
    assert stopped
    assert all("bb" not in c.text and c.finish_reason == "stop" for c in stopped)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_tokens": None}, "every token is a request"),
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"temperature": 0.5}, "tail='drop'"),
        ({"values": {"two": 1.0}}, "did you mean 'ones'|known: ended, ones"),
    ],
)
def test_what_an_endpoint_cannot_do_is_named_before_any_request(world, options: dict, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named):
        remote(world, "http://127.0.0.1:9/v1").generate(TEXT, SamplingParams(**{"max_tokens": 4, **options}))


def test_no_parameters_at_all_are_not_the_default_ones(world) -> None:
    with pytest.raises(InvalidArgumentError, match="give one for all prompts, or 2"):
        remote(world, "http://127.0.0.1:9/v1").generate(PROMPTS[:2], [])
    with pytest.raises(InvalidArgumentError, match=r"sampling_params\[1\]=3: must be SamplingParams"):
        remote(world, "http://127.0.0.1:9/v1").generate(PROMPTS[:2], [PARAMS, 3])


def test_values_that_cannot_serve_are_named(world, tmp_path) -> None:
    model = plain_model(world.lm)
    save_value(tmp_path / "side", bound("side", model))
    save_value(tmp_path / "model", bound("model", model), letter_tokenizer())
    with pytest.raises(InvalidArgumentError, match="kind 'side'"):
        RemoteLLM("http://localhost/v1", "tiny", {"kind": tmp_path / "side"})
    with pytest.raises(InvalidArgumentError, match="holds no tokenizer"):
        RemoteLLM("http://localhost/v1", "tiny", {"kind": tmp_path / "model"})
    other = letter_tokenizer(["d", "c", "b", "a", "</s>"])
    with pytest.raises(InvalidArgumentError, match="trained with another tokenizer"):
        RemoteLLM("http://localhost/v1", "tiny", {"kind": tmp_path / "model"}, value_tokenizers={"kind": other})
    with pytest.raises(InvalidArgumentError, match="no such value"):
        RemoteLLM("http://localhost/v1", "tiny", value_tokenizers={"kind": other})
    for address in ("localhost:8000", "http://", "http://localhost:port/v1", "http://[::1/v1", "ftp://localhost/v1"):
        with pytest.raises(InvalidArgumentError, match="http://host:port/v1"):
            RemoteLLM(address, "tiny")
    for key in ("key\n", "schl\u00fcssel"):
        with pytest.raises(InvalidArgumentError, match="api_key") as raised:
            RemoteLLM("http://localhost/v1", "tiny", api_key=key)
        assert key not in str(raised.value)
    with pytest.raises(InvalidArgumentError, match="did you mean 'max_requests'"):
        RemoteLLM("http://localhost/v1", "tiny", max_request=4)
    for limit in (
        {"timeout": 0},
        {"max_retries": -1},
        {"concurrency": 0},
        {"requests_per_second": 0},
        {"max_wait": None},
    ):
        with pytest.raises(InvalidArgumentError, match=f"{next(iter(limit))}={next(iter(limit.values()))}: must be"):
            RemoteLLM("http://localhost/v1", "tiny", **limit)
    RemoteLLM("http://localhost/v1", "tiny", backoff=0, max_retries=0, max_requests=None)


def test_the_command_line(world, upstream, tmp_path, capsys) -> None:
    save_value(tmp_path / "value", bound_copy(world), letter_tokenizer())
    letter_tokenizer().save_pretrained(tmp_path / "tokenizer")
    state, folder = str(tmp_path / "state.jsonl"), str(tmp_path / "tokenizer")
    command = [
        "generate", "--api-base", upstream, "--api-model", "tiny", TEXT, "ab", "--max-tokens", "3", "--seed", "4",
        "--value", str(tmp_path / "value"), "--value-tokenizer", folder, "--weight", "ones=1", "--weight", "ended=-8",
        "--num-candidates", "3", "--state-file", state, "--json",
    ]  # fmt: skip
    assert main(command) == 0
    first = capsys.readouterr()
    texts_of = [json.loads(line)["outputs"][0]["text"] for line in first.out.splitlines()]
    expected = remote(world, upstream).generate([TEXT, "ab"], PARAMS, use_tqdm=False)
    assert texts_of == [output.outputs[0].text for output in expected]
    assert "tokens charged" in first.err
    assert main(command) == 0
    assert "vas: 0 requests" in capsys.readouterr().err
    assert main([*command[:-3], "--tokenizer", folder, "--show-values", "--max-requests", "1"]) == 1
    shown = capsys.readouterr()
    assert "token\tended\tones" in shown.out or "token\tones\tended" in shown.out
    assert "max_requests=1 is reached" in shown.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "MODEL=None"),
        (["--api-base", "http://127.0.0.1:9/v1", "text"], "--api-model"),
        (["--api-base", "http://127.0.0.1:9/v1", "--api-model", "m", "text", "--device", "cpu"], "--device"),
        (["--api-base", "http://127.0.0.1:9/v1", "--api-model", "m", "text", "--chat"], "--chat"),
        (["--api-base", "http://127.0.0.1:9/v1", "--api-model", "m", "text", "--api-body", "[1]"], "--api-body"),
        (["--api-base", "http://127.0.0.1:9/v1", "--api-model", "m", "text"], "max_tokens"),
    ],
)
def test_the_command_line_names_what_is_wrong(options, told, capsys) -> None:
    assert main(["generate", *options]) == 1
    assert re.search(told, capsys.readouterr().err)
