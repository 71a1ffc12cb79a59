"""What comes out of the server is what the engine gives offline, in OpenAI's form."""

from __future__ import annotations

import json

import pytest

from tests.engine.conftest import distributional, network
from tests.engine.test_output import Strict
from tests.serving.conftest import TEMPLATE, Served, make_llm, serving
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.model import CausalLM

GUIDED = {"vas_weights": {"kind": 3.0, "long": -2.0}, "vas_candidates": 8}


@pytest.fixture(scope="module")
def offline() -> LLM:
    """The same model and values, without a server."""
    return make_llm()


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 5, "max_tokens": 12, **changes})


def guided_params(**changes) -> SamplingParams:
    return params(values=GUIDED["vas_weights"], num_candidates=8, **changes)


def run(llm: LLM, prompt, sampling: SamplingParams):
    return llm.generate(prompt, sampling, use_tqdm=False)[0].outputs


def events(text: str) -> list[dict]:
    """The JSON of a stream's events; it has to end by [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def stream(served: Served, path: str, **body) -> list[dict]:
    answer = served.post(path, {"model": "tiny", "stream": True, **body})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def refused(served: Served, param: str | None, path: str = "/v1/completions", status: int = 400, **body) -> str:
    base = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    answer = served.post(path, {"model": "tiny", **base, **body})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param, error
    return error["message"]


# -- the same as offline -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [{}, GUIDED])
def test_completion_equals_the_offline_one(served: Served, offline: LLM, weights: dict) -> None:
    expected = run(offline, "Once", guided_params() if weights else params())[0]
    body = served.complete("Once", seed=5, max_tokens=12, vas_return_values=True, **weights)
    choice = body["choices"][0]
    assert choice["text"] == expected.text
    assert choice["vas"]["token_ids"] == expected.token_ids
    assert choice["finish_reason"] == expected.finish_reason
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
    assert (body["vas"]["value_evaluations"] > 0) == bool(weights)
    for name, series in choice["vas"]["values"].items():
        assert series == pytest.approx(expected.values[name], abs=1e-4)
        assert choice["vas"]["prompt_values"][name] == pytest.approx(expected.prompt_values[name], abs=1e-4)


def test_stream_is_the_whole_in_parts(served: Served) -> None:
    asked = {"prompt": ["Once", "upon"], "n": 2, "seed": 5, "max_tokens": 9, "vas_return_values": True, **GUIDED}
    whole = served.complete(**asked)
    chunks = stream(served, "/v1/completions", **asked)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for choice in whole["choices"]:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, series in choice["vas"]["values"].items():
            streamed = [v for part in parts for v in part["vas"]["values"][name]]
            assert streamed == pytest.approx(series, abs=1e-4)
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [choice["finish_reason"]]
        assert parts[0]["vas"]["prompt_values"].keys() == {"kind", "long"}
    assert [chunk.get("vas") for chunk in chunks] == [None] * (len(chunks) - 1) + [whole["vas"]]


def test_usage_comes_last_when_asked_for(served: Served) -> None:
    asked = {"prompt": "Once", "seed": 5, "max_tokens": 3}
    chunks = stream(served, "/v1/completions", **asked, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert all(chunk["choices"] for chunk in chunks[:-1])


def test_chat_runs_the_template(served: Served, offline: LLM) -> None:
    prompt = "[system]Be brief.[user]Hi you[bot]"
    expected = run(offline, prompt, params())[0].text
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    asked = {"model": "tiny", "messages": messages, "seed": 5, "max_completion_tokens": 12}
    body = served.post("/v1/chat/completions", asked).json()
    assert body["choices"][0]["message"] == {"role": "assistant", "content": expected, "refusal": None}
    chunks = stream(served, "/v1/chat/completions", **asked)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == expected
    assert served.post("/tokenize", {"messages": messages}).json()["tokens"] == list(prompt.encode())


def test_sampling_controls_arrive(served: Served, offline: LLM) -> None:
    controls = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [70, 71],
        "skip_special_tokens": False,
        "stop": ["Q", "7"],
        "include_stop_str_in_output": True,
    }
    for seed in range(4):
        expected = run(offline, "Once", params(seed=seed, logit_bias={65: 3.0, 66: -100.0}, max_tokens=40, **controls))[
            0
        ]
        bias = {"65": 3, "66": -100}
        choice = served.complete("Once", seed=seed, logit_bias=bias, max_tokens=40, **controls)["choices"][0]
        assert choice["text"] == expected.text
        assert (choice["finish_reason"], choice["stop_reason"]) == (expected.finish_reason, expected.stop_reason)


def test_value_controls_arrive(served: Served, offline: LLM) -> None:
    for tail, baseline, clip in (("drop", "state", 0.2), ("keep", "candidate-mean", 1.0)):
        sampling = guided_params(tail=tail, baseline=baseline, advantage_clip=clip, report_kl=True)
        expected = run(offline, "Once", sampling)[0]
        asked = {"vas_tail": tail, "vas_baseline": baseline, "vas_clip": clip, "vas_return_kl": True, **GUIDED}
        choice = served.complete("Once", seed=5, max_tokens=12, **asked)["choices"][0]
        assert choice["text"] == expected.text
        assert choice["vas"]["kl"] == pytest.approx(expected.kl, rel=1e-4)
    assert "distributional" in refused(served, "vas_tilt", vas_tilt="optimal", **GUIDED)


def test_the_optimal_tilt_arrives() -> None:
    def made() -> LLM:
        value = network("reader", CausalLM.load(tiny_llama()), (distributional(),))
        return LLM(tiny_llama(), {"v": value}, device="cpu", kv_cache_memory="4MiB", tokenizer=byte_tokenizer())

    expected, mean = (run(made(), "Once", params(values={"v": 4.0}, tilt=tilt))[0].text for tilt in ("optimal", "mean"))
    with serving(made()) as served:
        asked = {"seed": 5, "max_tokens": 12, "vas_weights": {"v": 4.0}}
        assert served.complete("Once", vas_tilt="optimal", **asked)["choices"][0]["text"] == expected != mean
        assert served.complete("Once", **asked)["choices"][0]["text"] == mean


def test_token_ids_as_prompt_and_echo(served: Served) -> None:
    by_text = served.complete("Once", seed=1, echo=True)["choices"][0]["text"]
    assert by_text.startswith("Once")
    assert served.complete(list(b"Once"), seed=1, echo=True)["choices"][0]["text"] == by_text
    chunks = stream(served, "/v1/completions", prompt=[list(b"Once")], seed=1, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == by_text


# -- several completions -------------------------------------------------------------------------------------


def test_best_of_keeps_the_most_probable_per_token(served: Served, offline: LLM) -> None:
    found = run(offline, "Once", params(n=6, max_tokens=30))
    merit = sorted(found, key=lambda c: c.cumulative_logprob / len(c.token_ids), reverse=True)
    body = served.complete("Once", seed=5, n=2, best_of=6, max_tokens=30)
    assert [choice["text"] for choice in body["choices"]] == [c.text for c in merit[:2]]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == sum(len(c.token_ids) for c in found)


def test_best_of_by_a_served_value(served: Served, offline: LLM) -> None:
    found = run(offline, "Once", params(n=6, max_tokens=30, values={"kind": 0.0}))
    best = max(found, key=lambda c: c.values["kind"][-1])
    body = served.complete("Once", seed=5, best_of=6, max_tokens=30, vas_best_of="kind")
    assert body["choices"][0]["text"] == best.text
    assert "streamed" in refused(served, "best_of", best_of=2, stream=True)
    assert "at least n" in refused(served, "best_of", best_of=2, n=3)
    refused(served, "vas_weights", best_of=2, vas_best_of="nobody")


# -- log-probabilities ---------------------------------------------------------------------------------------


def test_best_of_where_no_token_came_in_time(served: Served) -> None:
    counted = 'vllm:request_success_total{finished_reason="length",model_name="tiny"}'

    def count() -> float:
        with served.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counted))

    before = count()
    answer = served.complete(n=1, best_of=3, vas_best_of="kind", vas_deadline_ms=1e-6)
    assert [choice["stop_reason"] for choice in answer["choices"]] == ["deadline"]
    assert answer["choices"][0]["text"] == ""
    assert count() == before + 3


def test_a_request_that_can_never_be_taken_in_is_told_so() -> None:
    with serving(make_llm(max_num_seqs=2), max_waiting=3) as small:
        assert "never takes more than 5" in refused(small, "n", n=6)
        assert "never takes more than 5" in refused(small, "n", prompt=["a", "b"], n=3)
        assert "never takes more than 5" in refused(small, "n", "/v1/chat/completions", n=6)
        assert len(small.complete(n=5, max_tokens=2)["choices"]) == 5


def test_logprobs_before_and_after_the_tilt(served: Served, offline: LLM) -> None:
    expected = run(offline, "Once", guided_params(logprobs=3))[0]
    asked = {"seed": 5, "max_tokens": 12, "vas_return_candidates": 3, **GUIDED}
    choice = served.complete("Once", logprobs=2, **asked)["choices"][0]
    told = choice["logprobs"]
    drawn = [entry[token] for entry, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert told["token_logprobs"] == pytest.approx([d.logprob for d in drawn], abs=1e-4)
    assert told["vas_tilted_token_logprobs"] == pytest.approx([d.tilted_logprob for d in drawn], abs=1e-4)
    assert all(len(top) == 2 for top in told["top_logprobs"])
    assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    assert sum(told["token_logprobs"]) == pytest.approx(choice["vas"]["cumulative_logprob"], abs=1e-4)
    for position, candidates in enumerate(choice["vas"]["candidates"]):
        assert candidates[0]["id"] == expected.token_ids[position]
        assert len(candidates) in (3, 4)
        for candidate in candidates:
            entry = expected.logprobs[position][candidate["id"]]
            assert candidate["logprob"] == pytest.approx(entry.logprob, abs=1e-4)
            assert candidate["tilted_logprob"] == pytest.approx(entry.tilted_logprob, abs=1e-4)
            assert candidate["values"] == pytest.approx(entry.values, abs=1e-4)
        values = {name: series[position] for name, series in expected.values.items()}
        assert candidates[0]["values"] == pytest.approx(values, abs=1e-4)
    messages = [{"role": "user", "content": "Hi"}]
    asked = {"messages": messages, "logprobs": True, "top_logprobs": 2, "max_tokens": 4, "ignore_eos": True}
    body = {"model": "tiny", **asked, **GUIDED}
    content = served.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    assert all(len(entry["top_logprobs"]) == 2 and entry["vas_tilted_logprob"] is not None for entry in content)


def test_values_of_candidates_are_what_steers(offline: LLM) -> None:
    """log pi - log pi0 differs between two candidates by exactly w (V(a) - V(b))."""
    sampling = params(values={"kind": 2.0}, num_candidates=6, logprobs=5)
    for entries in run(offline, "Once", sampling)[0].logprobs:
        tilts = [
            (entry.tilted_logprob - entry.logprob, 2.0 * entry.values["kind"])
            for entry in entries.values()
            if entry.rank is not None
        ]
        assert len(tilts) == 5
        assert [t - tilts[0][0] for t, _ in tilts] == pytest.approx([v - tilts[0][1] for _, v in tilts], abs=1e-4)


# -- what is refused -----------------------------------------------------------------------------------------


def test_errors_name_the_field(served: Served) -> None:
    assert "did you mean 'temperature'" in refused(served, "temprature", temprature=1)
    assert "did you mean 'vas_weights'" in refused(served, "vas_weight", vas_weight={"kind": 1})
    assert "did you mean 'kind'" in refused(served, "vas_weights", vas_weights={"knd": 1})
    assert "less than or equal to 1" in refused(served, "top_p", top_p=2)
    assert "must be at most max_tokens" in refused(served, "min_tokens", min_tokens=9, max_tokens=3)
    assert "is no token" in refused(served, "prompt", prompt=[9999])
    assert "is empty" in refused(served, "prompt", prompt="")
    assert "is empty" in refused(served, "prompt", prompt=[])
    assert "max_model_len=128" in refused(served, "prompt", prompt="a" * 128)
    assert "Unicode" in refused(served, "prompt", prompt="a\ud800")
    assert "drop logprobs" in refused(served, "echo", echo=True, logprobs=1)
    assert "'tiny' is" in refused(served, "model", status=404, model="gpt-4")
    refused(served, "priority", priority=-1)
    chat = "/v1/chat/completions"
    assert "set logprobs" in refused(served, "top_logprobs", chat, top_logprobs=1)
    surrogate = [{"role": "user", "content": "a\ud800"}]
    assert "Unicode" in refused(served, "messages", chat, messages=surrogate)
    refused(served, "response_format", chat, response_format={"type": "json_object"})
    refused(served, "tools", chat, tools=[])
    with served.client() as client:
        answer = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "invalid_json"
        assert client.get("/v1/completions").status_code == 405
        assert client.get("/nowhere").json()["error"]["code"] == "not_found"


def test_a_bad_prompt_in_a_list_leaves_nothing_behind(served: Served) -> None:
    refused(served, "prompt", prompt=["good", "a" * 128], max_tokens=50)


def test_chat_without_a_template_says_what_to_do() -> None:
    with serving(make_llm(tokenizer=byte_tokenizer())) as bare:
        message = refused(bare, "messages", "/v1/chat/completions")
        assert "no chat template" in message
        assert "--chat-template" in message
    with serving(make_llm(tokenizer=byte_tokenizer()), chat_template=TEMPLATE) as given:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        assert given.post("/tokenize", {"messages": body["messages"]}).json()["count"] == len("[user]a[bot]")


# -- the rest ------------------------------------------------------------------------------------------------


def test_information(served: Served) -> None:
    with served.client() as client:
        card = client.get("/v1/models").json()["data"][0]
        assert (card["id"], card["max_model_len"], card["vas_values"]) == ("tiny", 128, ["kind", "long"])
        assert client.get("/v1/models/tiny").json() == card
        assert client.get("/v1/models/..%2F..%2Fetc%2Fpasswd").status_code == 404
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/version").json()["version"]
        for elsewhere in ("/docs", "/redoc"):  # FastAPI's pages run scripts of a CDN
            assert client.get(elsewhere).status_code == 404
    tokens = served.post("/tokenize", {"prompt": "héllo", "return_token_strs": True}).json()
    assert tokens["tokens"] == list("héllo".encode())
    assert len(tokens["token_strs"]) == tokens["count"] == 6
    assert served.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": "héllo"}
    assert served.post("/detokenize", {"tokens": [99999]}).status_code == 400


def test_ids_beyond_the_tokenizer_are_replacement_marks() -> None:
    """A model may have more tokens than its tokenizer."""
    with serving() as strict:
        strict.state._tokenizer = Strict()
        assert strict.post("/detokenize", {"tokens": [72, 256, 105]}).json() == {"prompt": "H\ufffdi"}
        assert strict.complete([72, 256, 105], echo=True, max_tokens=1)["choices"][0]["text"].startswith("H\ufffdi")


def test_metrics_count(served: Served) -> None:
    def read() -> dict[str, float]:
        with served.client() as client:
            lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    before = read()
    served.complete("Once upon a time", max_tokens=7, n=2, ignore_eos=True, vas_return_kl=True, **GUIDED)
    served.check_idle()
    after = read()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    label = '{model_name="tiny"}'
    assert gained(f"vllm:generation_tokens_total{label}") == 14
    assert gained(f"vllm:prompt_tokens_total{label}") == 16
    assert gained(f"vllm:time_to_first_token_seconds_count{label}") == 1
    assert gained(f"vllm:inter_token_latency_seconds_count{label}") == 6
    assert gained(f"vllm:e2e_request_latency_seconds_count{label}") == 1
    assert gained('vllm:request_success_total{finished_reason="length",model_name="tiny"}') == 2
    assert gained(f"vas:completion_kl_nats_count{label}") == 2
    assert gained(f"vas:value_evaluations_total{label}") > 0
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{gauge}{label}"] == 0
    assert gained(f"vllm:prefix_cache_queries_total{label}") == 15  # the last token is computed in any case
    assert after[f"vas:value_evaluations_per_token{label}"] > 0
    assert after[f"vas:rows_per_step{label}"] >= 1
    assert {f"vllm:num_preemptions_total{label}", f"vllm:prefix_cache_hits_total{label}"} <= after.keys()
    assert f"vas:pruned_share{label}" in after
