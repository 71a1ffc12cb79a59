"""Logs and spans: one for every request, and never a word of what was asked or answered."""

from __future__ import annotations

import io
import json
import logging

import pytest

from tests.serving.conftest import Served, serving
from vas_engine.serving.logs import JsonFormatter, TextFormatter

SECRET = "xyzzy plugh"
GUIDED = {"vas_weights": {"kind": 1.0}, "vas_return_kl": True, "max_tokens": 5, "ignore_eos": True}


@pytest.fixture
def lines(served: Served):
    """The server's log as it would be written."""
    logger, stream = logging.getLogger("vas_engine.serving"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.DEBUG)

    def read() -> list[dict]:
        served.check_idle()  # by the event loop: a request's line comes after its answer
        return [json.loads(line) for line in stream.getvalue().splitlines()]

    yield read
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_line_for_every_request(served: Served, lines) -> None:
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": SECRET, **GUIDED})
    served.post("/v1/completions", {"model": "tiny", "prompt": SECRET, **GUIDED, "n": 2, "stream": True})
    served.post("/v1/completions", {"model": "tiny", "prompt": SECRET * 100})
    served.post("/v1/completions", {"model": SECRET, "prompt": SECRET, "stop": SECRET, "user": SECRET})
    served.post(f"/{SECRET}", {})
    with served.client() as client:
        client.get("/health")
    whole, stream, long, wrong, nowhere, health = (line for line in lines() if line["event"] == "request")
    assert whole["request_id"] == answer.headers["x-request-id"]
    assert (whole["route"], whole["status"], whole["stream"]) == ("/v1/completions", 200, False)
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (len(SECRET), 5)
    assert whole["value_evaluations"] > 0
    assert whole["kl"] > 0
    assert 0 < whole["time_to_first_token"] < whole["seconds"]
    assert (stream["stream"], stream["completion_tokens"], stream["finish_reasons"]) == (True, 10, ["length"] * 2)
    assert (long["status"], wrong["status"], nowhere["status"]) == (400, 404, 404)
    assert nowhere["route"] is None
    assert health["level"] == "debug"
    assert "xyzzy" not in json.dumps(lines())
    assert answer.json()["choices"][0]["text"] not in json.dumps(lines())


def test_text_for_people() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "status": 200, "route": None})
    assert TextFormatter().format(record).endswith("info request status=200")


def test_refusals_are_counted(served: Served) -> None:
    def count() -> float:
        with served.client() as client:
            for line in client.get("/metrics").text.splitlines():
                if line.startswith('vas:refused_requests_total{model_name="tiny",status="404"}'):
                    return float(line.split()[-1])
        return 0.0

    before = count()
    served.post("/v1/completions", {"model": "other", "prompt": "a"})
    assert count() == before + 1


def test_spans() -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(tracer=provider.get_tracer("test")) as served:
        body = {"model": "tiny", "prompt": SECRET, **GUIDED}
        served.post("/v1/completions", body, headers={"traceparent": parent})
        served.post("/v1/completions", {**body, "stream": True})
        served.post("/v1/completions", {**body, "n": 0})
        served.check_idle()
    first, second, third = exporter.get_finished_spans()
    assert first.name == "POST /v1/completions"
    assert first.context.trace_id == 0x0AF7651916CD43DD8448EB211C80319C
    assert second.context.trace_id != first.context.trace_id
    for span in (first, second):
        assert span.attributes["gen_ai.request.model"] == "tiny"
        assert span.attributes["gen_ai.usage.input_tokens"] == len(SECRET)
        assert span.attributes["gen_ai.usage.output_tokens"] == 5
        assert span.attributes["vas.value_evaluations"] > 0
        assert "xyzzy" not in span.to_json()
    assert third.attributes["http.response.status_code"] == 400
