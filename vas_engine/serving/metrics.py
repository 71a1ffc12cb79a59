"""Prometheus metrics: vLLM's names where the meaning is the same, `vas:` for what only this engine has."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from vas_engine.outputs import RequestOutput
from vas_engine.serving.backend import Backend

_LABELS = ("model_name",)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_LATENCY = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
_NATS = (0.01, 0.1, 0.3, 1, 2, 3, 5, 8, 12, 20, 50, 100)


class Metrics:
    """What a server counts; an `Observer` of its backend."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._labels = (model_name,)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=self.registry).labels(*self._labels)

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            made = Counter(name, text, _LABELS + labels, registry=self.registry)
            return made if labels else made.labels(*self._labels)

        self._first = histogram("vllm:time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self._between = histogram("vllm:inter_token_latency_seconds", "Between two tokens of a completion", _BETWEEN)
        self._latency = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token", _LATENCY)
        self._prompts = histogram("vllm:request_prompt_tokens", "Tokens of a prompt", _LENGTHS)
        self._generated = histogram("vllm:request_generation_tokens", "Tokens generated for a request", _LENGTHS)
        self._success = counter("vllm:request_success", "Completions that ended, by reason", ("finished_reason",))
        self._prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of requests taken in")
        self._kl = histogram("vas:completion_kl_nats", "Exact KL of a completion, where it was asked for", _NATS)
        self._steps = histogram("vas:step_seconds", "Time of an engine step", _STEP)
        self._failed = counter("vas:failed_steps", "Steps that raised and took their requests down")
        self._refused = counter("vas:refused_requests", "Requests refused, by HTTP status", ("status",))
        self.stuck = Gauge(
            "vas:engine_stuck", "1 while a step takes longer than it may", _LABELS, registry=self.registry
        )
        self.stuck = self.stuck.labels(*self._labels)

    def include(self, backend: Backend) -> None:
        """Reports a backend's own counts as well."""
        self.registry.register(_Collector(backend, self._labels))

    def refused(self, status: int) -> None:
        self._refused.labels(*self._labels, str(status)).inc()

    def finished(self, output: RequestOutput) -> None:
        """A request has ended; called from the event loop."""
        metrics = output.metrics
        self._prompts.observe(metrics.prompt_tokens)
        self._prompt_tokens.inc(metrics.prompt_tokens)
        self._generated.observe(metrics.generated_tokens)
        if metrics.latency is not None:
            self._latency.observe(metrics.latency)
        for completion in output.outputs:
            self._success.labels(*self._labels, completion.finish_reason or "abort").inc()
            if completion.kl is not None and completion.kl >= 0:
                self._kl.observe(completion.kl)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    # -- Observer, on the backend's thread --------------------------------------------------------------------

    def tokens(self, output: RequestOutput, new: int, seconds: float, first: bool) -> None:
        (self._first if first else self._between).observe(seconds)

    def step(self, seconds: float) -> None:
        self._steps.observe(seconds)

    def failed_step(self) -> None:
        self._failed.inc()


class _Collector:
    """Reads a backend's own counts when somebody asks."""

    def __init__(self, backend: Backend, labels: tuple[str, ...]) -> None:
        self._backend, self._labels = backend, labels

    def collect(self) -> Iterator[Metric]:
        gauges, counters = self._backend.totals()
        for family, totals in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in totals.items():
                metric = family(name, text, labels=_LABELS)
                metric.add_metric(self._labels, value)
                yield metric
