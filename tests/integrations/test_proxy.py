"""`vas serve --upstream`: any client gets the guided model of an endpoint behind the server."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("httpx", reason="models behind an API need pip install 'vas-engine[remote]'")
pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")

import httpx

from tests.engine.test_distribution import EOS, HORIZON, PROMPT
from tests.integrations.conftest import plain_model
from tests.integrations.test_remote import CASES, TEXT, Faulty, bound_copy, letter_tokenizer, outcome, remote
from tests.oracle import chi_squared_p, enumerate_policy
from tests.serving.conftest import TEMPLATE, Served, serving
from tests.serving.test_faults import StepGate, raw_request, until
from tests.serving.test_generation import events
from vas_engine import LLM, SamplingParams
from vas_engine.cli import main
from vas_engine.integrations.remote import RemoteLLM
from vas_engine.serving.settings import Limits
from vas_engine.values.artifact import save_value

GUIDED = {"vas_weights": {"ones": 2.0, "ended": -2.5}, "vas_candidates": 3}
ASKED = {"model": "guided", "prompt": TEXT, "max_tokens": HORIZON, "seed": 4, **GUIDED}
PARAMS = SamplingParams(values=GUIDED["vas_weights"], num_candidates=3, max_tokens=HORIZON, seed=4)


def upstream_llm(world) -> LLM:
    return LLM(plain_model(world.lm), tokenizer=letter_tokenizer(), kv_cache_memory="8MiB")


def endless_tokenizer():
    tokenizer = letter_tokenizer(list("abcde"))
    tokenizer.eos_token, tokenizer.chat_template = None, TEMPLATE
    return tokenizer


def endless_llm(world) -> LLM:
    """The same model, whose last token ends nothing."""
    model = plain_model(world.lm)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    return LLM(model, tokenizer=endless_tokenizer(), kv_cache_memory="8MiB")


@contextlib.contextmanager
def proxying(world, url: str, tokenizer=None, settings: dict | None = None, **options) -> Iterator[Served]:
    """A server in front of an endpoint, which it leaves idle."""
    llm = RemoteLLM(
        url,
        "tiny",
        {"": bound_copy(world)},
        tokenizer=tokenizer,
        value_tokenizers={"": letter_tokenizer()},
        **{"backoff": 0.0, "max_retries": 1, **options},
    )
    with serving(llm, **{"model_name": "guided", **(settings or {})}) as served:
        yield served
        asyncio.run_coroutine_threadsafe(served.state.worker.idle(), served.server._loop).result(60)


@pytest.fixture(scope="module")
def upstream(world) -> Iterator[Served]:
    with serving(upstream_llm(world), max_waiting=4096) as served:
        yield served


@pytest.fixture(scope="module")
def behind(world, upstream) -> Iterator[Served]:
    """A proxy that continues texts."""
    with proxying(world, upstream.url + "/v1", settings={"limits": Limits(n=200)}) as served:
        yield served


@pytest.fixture(scope="module")
def by_ids(world, upstream) -> Iterator[Served]:
    """A proxy that continues token ids."""
    with proxying(world, upstream.url + "/v1", letter_tokenizer(), {"limits": Limits(n=200)}) as served:
        yield served


@pytest.fixture
def faulty(upstream) -> Iterator[Faulty]:
    server = Faulty(upstream.url + "/v1")
    yield server
    server.shutdown()
    server.server_close()
    server.client.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def ask(served: Served, path: str = "/v1/completions", **body) -> dict:
    answer = served.post(path, {"model": "guided", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize(("server", "ids"), [("behind", False), ("by_ids", True)])
def test_a_proxy_says_whether_it_takes_token_ids(world, request, server: str, ids: bool) -> None:
    """A client that has the tokenizer continues as ids where that goes, and as text where the proxy does."""
    served = request.getfixturevalue(server)
    # No more candidates than this model has tokens, behind the proxy neither.
    few = {"vas_candidates": 4}
    client = RemoteLLM(served.url + "/v1", "guided", tokenizer=letter_tokenizer(), max_retries=0, extra_body=few)
    params = SamplingParams(max_tokens=3, seed=1, num_candidates=4, tail="drop")
    output = client.generate("ab", params, use_tqdm=False)[0].outputs[0]
    assert client.tells_ids is ids
    assert output.token_ids[0] >= 0 if ids else output.token_ids == [-1] * len(output.token_ids)
    assert output.finish_reason in ("stop", "length")


# -- the guided model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["behind", "by_ids"])
def test_it_samples_the_guided_policy(world, request, server: str) -> None:
    served, net, samples = request.getfixturevalue(server), world.network("model"), 120
    params = SamplingParams(max_tokens=HORIZON, **CASES[0])
    expected = enumerate_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, PROMPT, HORIZON, {EOS})
    choices = ask(served, prompt=TEXT, n=samples, seed=7, max_tokens=HORIZON, **GUIDED)["choices"]
    counts = Counter(outcome(choice["text"], choice["finish_reason"]) for choice in choices)
    assert chi_squared_p(counts, expected, samples) > 1e-4
    base = enumerate_policy(world.lm, {}, SamplingParams(), PROMPT, HORIZON, {EOS})
    assert chi_squared_p(counts, base, samples) < 1e-4


def test_answers_are_those_of_the_remote_model(world, upstream, behind, by_ids) -> None:
    for served, tokenizer in ((behind, None), (by_ids, letter_tokenizer())):
        llm = remote(world, upstream.url + "/v1", tokenizer=tokenizer)
        expected = llm.generate(TEXT, PARAMS.replace(n=2, logprobs=2), use_tqdm=False)[0]
        asked = {**ASKED, "n": 2, "logprobs": 2, "vas_return_values": True, "vas_return_kl": True}
        whole = ask(served, **asked, vas_return_candidates=2)
        tokens = expected.metrics.generated_tokens
        assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": tokens, "total_tokens": 2 + tokens}
        assert whole["vas"]["value_evaluations"] == expected.metrics.value_evaluations > 0
        chunks = events(served.post("/v1/completions", {**asked, "stream": True}).text)
        for choice, completion in zip(whole["choices"], expected.outputs, strict=True):
            assert (choice["text"], choice["finish_reason"]) == (completion.text, completion.finish_reason)
            assert choice["vas"]["kl"] == pytest.approx(completion.kl, abs=1e-4)
            known = [token if token >= 0 else None for token in completion.token_ids]
            assert choice["vas"]["token_ids"] == known
            assert (None in known) == (tokenizer is None)
            drawn = [next(iter(position.values())) for position in completion.logprobs]
            assert choice["logprobs"]["token_logprobs"] == pytest.approx([e.logprob for e in drawn], abs=1e-4)
            told = choice["logprobs"]["vas_tilted_token_logprobs"]
            assert sum(told) == pytest.approx(completion.cumulative_tilted_logprob, abs=1e-3)
            assert all(len(tops) == 2 for tops in choice["logprobs"]["top_logprobs"])
            parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            assert len(parts) > 1
            assert parts[-1]["finish_reason"] == choice["finish_reason"]


def test_log_probabilities_are_the_engines(world, by_ids, behind) -> None:
    """Of every alternative, with its value and before and after the tilt: as an engine of our own tells them."""
    own = LLM(plain_model(world.lm), {"": bound_copy(world)}, tokenizer=letter_tokenizer(), kv_cache_memory="8MiB")
    asked = {**ASKED, "temperature": 0.0, "vas_return_candidates": 4}
    with serving(own, model_name="guided") as local:
        expected = ask(local, **asked)["choices"][0]["vas"]["candidates"]
    for served in (by_ids, behind):
        found = ask(served, **asked)["choices"][0]["vas"]["candidates"]
        assert [len(position) for position in found] == [len(position) for position in expected]
        for ours, theirs in zip(
            [c for position in found for c in position], [c for position in expected for c in position], strict=True
        ):
            assert ours["id"] == (theirs["id"] if served is by_ids else None)
            assert ours["token"] == theirs["token"]
            for name in ("logprob", "tilted_logprob"):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-3)
            if ours["values"]:  # the engine looks at the best of the tail as well
                assert ours["values"] == pytest.approx(theirs["values"], abs=1e-3)


def test_a_greedy_completion_asks_for_no_more_than_servers_show(world, faulty) -> None:
    """As many alternatives as candidates, and one more only where the tail could win."""
    asked = {"prompt": TEXT, "temperature": 0.0, "max_tokens": HORIZON}
    with proxying(world, faulty.url) as served:
        ask(served, **asked, vas_weights={"ones": 0.01}, vas_candidates=4)
        assert {body["logprobs"] for body in faulty.received} == {4}
        faulty.received.clear()
        ask(served, **asked, vas_weights={"ones": -9.0, "ended": -9.0}, vas_candidates=2)
        assert {body["logprobs"] for body in faulty.received} == {2, 3}


def test_the_openai_client(world) -> None:
    openai = pytest.importorskip("openai")
    messages = [{"role": "user", "content": "ab"}]
    with (
        serving(endless_llm(world)) as theirs,
        proxying(world, theirs.url + "/v1", endless_tokenizer()) as served,
        openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        until(lambda: served.llm.max_model_len is not None)
        card = client.models.list().data[0]
        assert (card.id, card.max_model_len, card.vas_values) == ("guided", 128, ["ones", "ended"])
        assert card.vas_scales["ones"]["interval"] == [0.0, 3.0]
        steered = {"vas_weights": {"ones": 2.0}, "vas_candidates": 4}
        asked = {"model": "guided", "messages": messages, "seed": 1, "extra_body": steered}
        whole = client.chat.completions.create(max_tokens=5, **asked)
        chunks = list(client.chat.completions.create(max_tokens=5, stream=True, **asked))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == whole.choices[0].message.content
        until_full = client.chat.completions.create(**asked)
        assert until_full.choices[0].finish_reason == "length"
        assert until_full.usage.total_tokens == 128  # the endpoint's context
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(max_tokens=5, **asked, top_p=0.5)
        assert refused.value.param == "top_p"


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"top_k": 3}, "top_k", "taken as it is"),
        ({"logit_bias": {"1": 5}}, "logit_bias", "taken as it is"),
        ({"presence_penalty": 1.0}, "presence_penalty", "taken as it is"),
        ({"min_tokens": 2}, "min_tokens", "taken as it is"),
        ({"ignore_eos": True}, "ignore_eos", "taken as it is"),
        ({"vas_min_candidates": 2}, "vas_min_candidates", "taken as it is"),
        ({"temperature": 0.5}, "temperature", "tail='drop'"),
        ({"priority": 1}, "priority", "leave it out"),
        ({"cache_salt": "mine"}, "cache_salt", "leave it out"),
        ({"vas_weights": {"one": 1.0}}, "vas_weights", "did you mean 'ones'"),
        ({"prompt": [1, 3]}, "prompt", "tokenizer"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [1, 3], "echo": True}, "tokens", "no tokenizer"),
        ({"model": "tiny"}, "model", "'guided' is"),
    ],
)
def test_what_it_cannot_do_is_named(behind, body: dict, param: str, told: str) -> None:
    answer = behind.post("/v1/completions", {**ASKED, **body})
    assert answer.status_code == (404 if param == "model" else 400), answer.text
    assert answer.json()["error"]["param"] == param
    assert told in answer.json()["error"]["message"]


def test_without_a_tokenizer_there_is_no_chat(behind) -> None:
    messages = [{"role": "user", "content": "ab"}]
    answer = behind.post("/v1/chat/completions", {"model": "guided", "messages": messages})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    answer = behind.post("/tokenize", {"prompt": "ab"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")


def test_metrics_and_the_admin_key(world, upstream) -> None:
    with proxying(world, upstream.url + "/v1", settings={"admin_key": "root", "api_keys": ("key",)}) as served:
        key, root = ({"Authorization": f"Bearer {name}"} for name in ("key", "root"))
        assert served.post("/v1/completions", ASKED).status_code == 401
        profile = {"weights": {"ones": 2.0}}
        with served.client(headers=root) as client:
            assert client.put("/admin/profiles/gentle", json=profile).status_code == 200
            assert client.get("/admin/values").status_code == 404  # they are loaded when it starts
        body = {**ASKED, "n": 3, "vas_profile": "gentle", "vas_weights": {"ended": 1.0}}
        answer = served.post("/v1/completions", body, headers=key).json()
        assert answer["vas"]["weights"] == {"ones": 2.0, "ended": 1.0}
        with served.client(headers=key) as client:
            lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
        tokens = answer["usage"]["completion_tokens"]
        assert float(lines['vllm:generation_tokens_total{model_name="guided"}']) == tokens
        assert float(lines['vas:upstream_requests_total{model_name="guided"}']) >= tokens
        assert float(lines['vas:upstream_tokens_total{model_name="guided"}']) > 0
        assert float(lines['vllm:time_to_first_token_seconds_count{model_name="guided"}']) == 1


def test_requests_come_and_go_while_they_are_counted(world, monkeypatch) -> None:
    """/metrics is written in a thread of its own."""
    with proxying(world, "http://127.0.0.1:9/v1") as served:
        backend = served.state.worker

        class Counted:
            @property
            def completions(self) -> int:
                backend._runs[Counted()] = None  # the event loop takes in another at this very moment
                return 1

        with monkeypatch.context() as patch:
            patch.setattr(backend, "_runs", {Counted(): None})
            assert backend.totals().gauges["vllm:num_requests_running"][1] == 1


# -- when something goes wrong -------------------------------------------------------------------------------


def answering(choice: str) -> tuple[int, bytes, dict]:
    """An endpoint that says this of the next token."""
    return 200, b'{"choices": [{"finish_reason": null, %s}]}' % choice.encode(), {}


ONE = '"logprobs": {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1}]}'
FAULTS = [
    ("gone", 503, "upstream_unavailable", "5"),
    ("slow", 504, "upstream_timeout", "5"),
    ((429, b"{}", {"Retry-After": "77"}), 503, "upstream_unavailable", "77"),
    ((503, b"<html>", {}), 503, "upstream_unavailable", "5"),
    ((500, b"", {}), 502, "upstream_error", "5"),
    ((200, b'{"choices": [{"te', {}), 502, "upstream_error", "5"),
    ((200, b'{"choices": []}', {}), 502, "upstream_error", "5"),
    ("cut", 503, "upstream_unavailable", "5"),
    ((401, b'{"error": {"message": "no such key"}}', {}), 502, "upstream_error", "5"),
    ((400, b'{"error": {"message": "too long"}}', {}), 400, "upstream_refused", None),
    ((429, b"{}", {"Retry-After": "inf"}), 503, "upstream_unavailable", "5"),
    ((429, b"{}", {"Retry-After": "nan"}), 503, "upstream_unavailable", "5"),
    ((503, b"{}", {"Retry-After": "1e300"}), 503, "upstream_unavailable", "5"),
    ((503, b"{}", {"Retry-After": "Mon, 99 Jan 99999999999999999999 00:00:00 GMT"}), 503, "upstream_unavailable", "5"),
    ((200, b"[" * 100_000, {}), 502, "upstream_error", "5"),
    ((500, b"[" * 100_000, {}), 502, "upstream_error", "5"),
    (answering('"text": 7, ' + ONE), 502, "upstream_error", "5"),
    (answering(r'"text": "\ud800", ' + ONE.replace('"a"', r'"\ud800"')), 502, "upstream_error", "5"),
    (answering('"text": "a", ' + ONE.replace("-1", "NaN")), 502, "upstream_error", "5"),
    (answering('"text": "a", "vas": {"candidates": [[{"id": "x", "token": "a", "logprob": -1}]]}, ' + ONE),
     502, "upstream_error", "5"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fault", "status", "code", "again"), FAULTS)
def test_a_failing_endpoint_has_a_status_of_its_own(proxy_of_faulty, faulty, fault, status, code, again, stream):
    """Also for streams: the status waits for the first token."""
    served, expected = proxy_of_faulty
    faulty.poison = {TEXT: fault}
    client = served.state.worker._session.endpoint._client
    patient, client.timeout = client.timeout, 0.5 if fault == "slow" else client.timeout
    answer = served.post("/v1/completions", {**ASKED, "stream": stream})
    client.timeout = patient
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], answer.headers.get("Retry-After")) == (status, code, again)
    assert "127.0.0.1" not in error["message"]
    assert "no such key" not in error["message"]
    assert ("too long" in error["message"]) == (status == 400)
    faulty.poison = {}
    assert ask(served, **ASKED)["choices"][0]["text"] == expected


@pytest.fixture
def proxy_of_faulty(world, upstream, faulty) -> Iterator[tuple[Served, str]]:
    """A proxy in front of the failing server, and the text of ASKED."""
    output = remote(world, upstream.url + "/v1").generate(TEXT, PARAMS, use_tqdm=False)[0].outputs[0]
    with proxying(world, faulty.url, max_wait=10.0) as served:
        yield served, output.text


def test_passing_faults_are_not_seen(proxy_of_faulty, faulty) -> None:
    served, expected = proxy_of_faulty
    for fault in ("gone", "cut", (429, b"", {"Retry-After": "0"}), (200, b"[", {})):
        faulty.faults = [fault]
        assert ask(served, **ASKED)["choices"][0]["text"] == expected


def test_an_endpoint_that_dies_in_the_middle(proxy_of_faulty, faulty) -> None:
    served, expected = proxy_of_faulty
    body = {**ASKED, "vas_weights": {"ended": -40.0}, "vas_candidates": 5, "max_tokens": 30, "stream": True}
    faulty.lives = 12
    chunks = events(served.post("/v1/completions", body).text)
    assert chunks[-1]["error"]["code"] == "upstream_unavailable"
    assert len("".join(chunk["choices"][0]["text"] for chunk in chunks[:-1])) == 12
    answer = served.post("/v1/completions", {**body, "stream": False})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    faulty.lives = None
    assert ask(served, **ASKED)["choices"][0]["text"] == expected


def test_it_starts_before_its_endpoint(world, upstream) -> None:
    with proxying(world, "http://127.0.0.1:9/v1") as served:
        answer = served.post("/v1/completions", ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_unavailable")
        served.llm.base_url = upstream.url + "/v1"
        served.state.worker._session.endpoint.base_url = upstream.url + "/v1"
        assert ask(served, **ASKED)["choices"][0]["text"]
        assert served.llm.max_model_len == 128


def test_ceilings_are_told(world, upstream) -> None:
    with proxying(world, upstream.url + "/v1", max_requests=2) as served:
        answer = served.post("/v1/completions", {**ASKED, "n": 4})
        assert answer.status_code == 429
        assert answer.json()["error"]["type"] == "insufficient_quota"
        assert served.llm.spent.requests == 2


def test_a_client_that_goes_ends_the_work_upstream(world) -> None:
    llm = endless_llm(world)
    gate = StepGate(llm)
    with serving(llm) as theirs, proxying(world, theirs.url + "/v1") as served, served.client() as client:
        body = {**ASKED, "vas_candidates": 5, "max_tokens": 50}
        gate.permit(6)
        with client.stream("POST", "/v1/completions", json={**body, "n": 3, "stream": True}) as stream:
            lines = stream.iter_lines()  # kept: the connection closes with it
            assert "text_completion" in next(lines)
            until(lambda: gate.arrived == 7)  # nothing gets on any more
            sent = served.llm.spent.requests
        until(lambda: served.state.worker.open_completions == 0)
        gate.open()
        until(lambda: theirs.state.worker.open_completions == 0)
        assert served.llm.spent.requests <= sent + 3
        until(lambda: not served.llm.values._readers[0].cache._sequences)
        # One that waits for a whole answer as well.
        gate = StepGate(llm)
        connection = raw_request(served, **{**ASKED, "ignore_eos": False})
        until(lambda: gate.arrived == 1)
        connection.close()
        until(lambda: served.state.worker.open_completions == 0)
        gate.open()


def test_a_deadline_ends_it_with_what_it_has(world) -> None:
    llm = endless_llm(world)
    gate = StepGate(llm)
    with serving(llm) as theirs, proxying(world, theirs.url + "/v1") as served:
        gate.permit(1)
        body = {**ASKED, "vas_candidates": 5, "max_tokens": 50, "vas_deadline_ms": 300}
        choice = ask(served, **body)["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
        assert len(choice["text"]) <= 1
        gate.open()


def test_a_full_server_refuses(world, pool) -> None:
    llm = upstream_llm(world)
    gate = StepGate(llm)
    with (
        serving(llm) as theirs,
        proxying(world, theirs.url + "/v1", settings={"max_waiting": 1}, concurrency=2) as served,
    ):
        taken = [pool.submit(ask, served, **ASKED) for _ in range(3)]
        until(lambda: served.state.worker.open_completions == 3)
        answer = served.post("/v1/completions", ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        gate.open()
        assert len({future.result()["choices"][0]["text"] for future in taken}) == 1


# -- as a command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory) -> tuple[str, str]:
    """A value and a tokenizer."""
    made = tmp_path_factory.mktemp("proxy")
    save_value(made / "value", copy.deepcopy(bound_copy(world)), letter_tokenizer())
    letter_tokenizer().save_pretrained(made / "tokenizer")
    return str(made / "value"), str(made / "tokenizer")


@contextlib.contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen, dict]]:
    command = [sys.executable, "-m", "vas_engine.cli", "serve", "--port", "0", "--json", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "THEIR_KEY": "secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stdout is not None
            ready = json.loads(running.stdout.readline())
            yield running, ready
        finally:
            running.kill()


def test_sigterm_finishes_what_was_accepted(world, folders, pool) -> None:
    """Over an endpoint with a key and a single model, whose name need not be given."""
    llm = upstream_llm(world)
    gate = StepGate(llm)
    value, tokenizer = folders
    options = ["--value", value, "--value-tokenizer", tokenizer, "--upstream-key-env", "THEIR_KEY"]
    with (
        serving(llm, api_keys=("secret",)) as theirs,
        process("--upstream", theirs.url + "/v1", *options) as (running, ready),
    ):
        assert (ready["model"], sorted(ready["values"])) == ("tiny", ["ended", "ones"])
        body = {**ASKED, "model": "tiny"}
        taken = [pool.submit(httpx.post, ready["url"] + "/v1/completions", json=body, timeout=60) for _ in range(3)]
        until(lambda: theirs.state.worker.open_completions == 3)
        with httpx.Client(base_url=ready["url"], timeout=60) as client:
            running.send_signal(signal.SIGTERM)
            until(lambda: client.get("/health").status_code == 503)
            refused = client.post("/v1/completions", json=body)
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
        gate.open()
        assert len({future.result().json()["choices"][0]["text"] for future in taken}) == 1
        assert running.wait(60) == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "MODEL=None: give a folder or hub name, or --upstream URL"),
        (["model", "--upstream", "http://127.0.0.1:9/v1"], "MODEL='model': not with --upstream"),
        (["--upstream", "127.0.0.1:9"], "http://host:port/v1"),
        (["--upstream", "http://127.0.0.1:9/v1", "--max-retries", "0"], "no answer"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-key-env", "NOBODYS_KEY"], "no such variable"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m", "--itl-slo", "30ms"], "--itl-slo"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m", "--device", "cpu"], "--device"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m", "--salt-per-key"], "--salt-per-key"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m", "--values-dir", "."], "--values-dir"),
        (["--upstream", "http://127.0.0.1:9/v1", "--upstream-model", "m", "--upstream-body", "["], "--upstream-body"),
    ],
)
def test_the_command_line_names_what_is_wrong(options: list[str], told: str, capsys) -> None:
    assert main(["serve", *options]) == 1
    assert told in capsys.readouterr().err


def test_one_of_several_models_has_to_be_named(faulty, capsys) -> None:
    faulty.listing = {"data": [{"id": "one"}, {"id": "two"}]}
    assert main(["serve", "--upstream", faulty.url]) == 1
    assert "--upstream-model=None: say which of the endpoint's models to serve: one, two" in capsys.readouterr().err
