"""Requests run by an endpoint behind the server, each token guided by values here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time

from vas_engine.errors import VASError
from vas_engine.integrations.remote import (
    EndpointAnswerError,
    EndpointError,
    EndpointTimeoutError,
    EndpointUnavailableError,
    RemoteLLM,
    SpendLimitError,
)
from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving.backend import Observer, Totals, report_tokens
from vas_engine.serving.errors import ServingError, bad_request
from vas_engine.serving.stream import News, Stream
from vas_engine.values.config import HeadConfig

RETRY_SECONDS = 5  # where the endpoint does not say when to come again
THEIR_FAULT = (400, 413, 422)  # answers of the endpoint that a client can do something about

log = logging.getLogger("vas_engine.serving")


class Relay:
    """A Backend over a model behind an API; every request is a task of the event loop.

    Args:
        llm: the model and its values.
        observer: is told of every token.
    """

    broken: BaseException | None = None
    step_seconds = 0.0

    def __init__(self, llm: RemoteLLM, observer: Observer) -> None:
        self._llm, self._observer = llm, observer
        self._ids = itertools.count(1)
        self._runs: dict[Stream, asyncio.Task] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._exit = contextlib.AsyncExitStack()
        self._tokens = self._evaluations = 0

    @property
    def places(self) -> int:
        return self._llm.limits.concurrency

    @property
    def open_completions(self) -> int:
        return sum(stream.completions for stream in tuple(self._runs))  # at once: `totals` is another thread's

    @property
    def vocab_size(self) -> int | None:
        return None if self._llm.tokenizer is None else len(self._llm.tokenizer)

    async def start(self) -> None:
        """Makes the pool of connections; the endpoint need not be there yet."""
        self._session = await self._exit.enter_async_context(self._llm.session())
        self._session.meet()

    async def stop(self) -> None:
        runs = list(self._runs.values())
        for run in runs:
            run.cancel()
        await asyncio.gather(*runs, return_exceptions=True)
        await self._exit.aclose()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        changed: asyncio.Event,
        *,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float | None = None,
    ) -> Stream:
        stream = Stream(str(next(self._ids)), params.n, changed)
        stream.told = time.monotonic()
        for name, asked in (("priority", priority), ("cache_salt", salt)):
            if asked:
                stream.fail(bad_request(name, f"{name}: the endpoint behind this server cannot be told; leave it out"))
                return stream
        self._idle.clear()
        self._runs[stream] = asyncio.create_task(self._run(stream, prompt, params, deadline))
        return stream

    def cancel(self, stream: Stream) -> None:
        if stream in self._runs:
            self._runs[stream].cancel()

    async def idle(self) -> None:
        await self._idle.wait()

    def where(self) -> str:
        return ""

    def heads(self) -> dict[str, HeadConfig]:
        return self._llm.values.heads

    def totals(self) -> Totals:
        running = min(self.open_completions, self.places)
        per_token = self._evaluations / max(self._tokens, 1)
        spent = self._llm.spent
        gauges = {
            "vllm:num_requests_running": ("Completions that run", running),
            "vllm:num_requests_waiting": ("Completions that wait", self.open_completions - running),
            "vas:value_evaluations_per_token": ("Value evaluations per token", per_token),
        }
        counters = {
            "vllm:generation_tokens": ("Tokens generated", self._tokens),
            "vas:value_evaluations": ("Rows that value networks scored to choose tokens", self._evaluations),
            "vas:upstream_requests": ("Requests sent to the endpoint behind, further tries included", spent.requests),
            "vas:upstream_retries": ("Further tries of them", spent.retries),
            "vas:upstream_tokens": ("Tokens that the endpoint says it used", spent.tokens),
        }
        return Totals(gauges, counters)

    async def _run(self, stream: Stream, prompt: Prompt, params: SamplingParams, deadline: float | None) -> None:
        tokens = evaluations = 0
        try:
            async with contextlib.aclosing(self._session.stream(prompt, params, deadline=deadline)) as outputs:
                # Nobody is told of a request before its first token: what fails until then still has a status.
                async for output in outputs:
                    self._evaluations += output.metrics.value_evaluations - evaluations
                    self._tell(stream, output, output.metrics.generated_tokens - tokens)
                    tokens, evaluations = output.metrics.generated_tokens, output.metrics.value_evaluations
        except Exception as error:
            stream.fail(_reported(error))
        finally:
            del self._runs[stream]
            if not self._runs:
                self._idle.set()

    def _tell(self, stream: Stream, output: RequestOutput, new: int) -> None:
        self._tokens += new
        report_tokens(self._observer, stream, output, new, time.monotonic())
        latest = News.of(output)
        if latest.error is not None:
            latest = latest._replace(error=_reported(latest.error), finished=True)
        stream.update(latest)


def _reported(error: Exception) -> Exception:
    """An error of the endpoint as the one to answer with, logged; it never shows a client where the endpoint is."""
    if not isinstance(error, EndpointError | SpendLimitError):
        return error
    answer = _answer(error)
    log.warning(
        "upstream failed",
        extra={
            "kind": type(error).__name__,
            "upstream_status": getattr(error, "status", None),
            "answered": answer.status,
        },
    )
    return answer


def _answer(error: VASError) -> ServingError:
    if isinstance(error, SpendLimitError):
        return ServingError(429, f"this server's ceiling: {error}", "insufficient_quota", code="spend_limit")
    assert isinstance(error, EndpointError)
    seconds = RETRY_SECONDS if error.retry_after is None else max(math.ceil(error.retry_after), 1)
    again = {"Retry-After": str(seconds)}
    if isinstance(error, EndpointTimeoutError) or error.status in (408, 504):
        text = "the endpoint behind this server does not answer in time"
        return ServingError(504, text, "server_error", code="upstream_timeout", headers=again)
    if isinstance(error, EndpointUnavailableError) and error.status in (None, 429, 503, 529):
        why = "cannot be reached" if error.status is None else f"takes no more requests now ({error.status})"
        text = f"the endpoint behind this server {why}; come again later"
        return ServingError(503, text, "server_error", code="upstream_unavailable", headers=again)
    if error.status in THEIR_FAULT and not isinstance(error, EndpointAnswerError):
        text = f"the endpoint behind this server refuses the request: {error.told}"
        return ServingError(400, text, code="upstream_refused")
    if isinstance(error, EndpointAnswerError):
        text = "the endpoint behind this server gave an answer that cannot be used"
    else:
        text = f"the endpoint behind this server failed the request ({error.status})"
    return ServingError(502, text, "server_error", code="upstream_error", headers=again)
