"""OpenTelemetry spans of requests, by the conventions for generative models; without any text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

# What the journal tells -> attributes of the span; the latencies' names are vLLM's.
_ATTRIBUTES = {
    "request_id": "gen_ai.request.id",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "finish_reasons": "gen_ai.response.finish_reasons",
    "time_to_first_token": "gen_ai.latency.time_to_first_token",
    "seconds": "gen_ai.latency.e2e",
    "value_evaluations": "vas.value_evaluations",
    "limited_tokens": "vas.limited_tokens",
    "kl": "vas.kl",
    "method": "http.request.method",
    "route": "http.route",
    "status": "http.response.status_code",
}


def make_tracer(endpoint: str) -> Any:
    """A tracer that sends spans to an OTLP/HTTP endpoint such as "http://localhost:4318/v1/traces"."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "vas_engine"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider.get_tracer("vas_engine.serving")


def start_span(tracer: Any, scope: Scope) -> Any:
    """A context manager of a server span, child of the caller's where its headers name one."""
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    context = TraceContextTextMapPropagator().extract(headers)
    return tracer.start_as_current_span("request", context=context, kind=SpanKind.SERVER)


def describe(span: Any, told: Mapping[str, Any]) -> None:
    """Puts what the journal tells on the span."""
    from opentelemetry.trace import StatusCode

    if told.get("route"):
        span.update_name(f"{told['method']} {told['route']}")
    for name, attribute in _ATTRIBUTES.items():
        if told.get(name) is not None:
            span.set_attribute(attribute, told[name])
    if told["status"] >= 500:
        span.set_status(StatusCode.ERROR)
