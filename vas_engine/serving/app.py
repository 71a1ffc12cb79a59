"""The application: routes, and what a request goes through."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

import vas_engine
from vas_engine.engine.detokenizer import decoder
from vas_engine.errors import VASError
from vas_engine.integrations.remote import RemoteLLM
from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving import errors, protocol, requests
from vas_engine.serving.admin import add_admin
from vas_engine.serving.backend import Backend, Observer
from vas_engine.serving.errors import ServingError, as_serving_error, json_response, overloaded, to_json
from vas_engine.serving.logs import Journal
from vas_engine.serving.metrics import Metrics
from vas_engine.serving.profiles import Profiles
from vas_engine.serving.relay import Relay
from vas_engine.serving.replies import ChatReply, CompletionReply, Reply, usage
from vas_engine.serving.requests import Job
from vas_engine.serving.security import Gate, salt_of
from vas_engine.serving.settings import Settings
from vas_engine.serving.stream import Delta
from vas_engine.serving.worker import EngineThread
from vas_engine.tokenizer import render_chat

if TYPE_CHECKING:
    from vas_engine.llm import LLM
    from vas_engine.values.config import HeadConfig

PLAYGROUND = Path(__file__).parent / "playground"
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
RETRY_SECONDS = 1

log = logging.getLogger("vas_engine.serving")


class State:
    """What the routes of one server share.

    Attributes:
        worker: runs the requests.
        draining: nothing new is taken in; what was accepted goes on.
        stuck: the present step takes longer than it may.
    """

    def __init__(self, llm: LLM | RemoteLLM, settings: Settings) -> None:
        self.llm, self.settings = llm, settings
        self.profiles = Profiles(settings.profiles)
        self.metrics = Metrics(settings.model_name)
        self.worker = _backend(llm, settings, self.metrics)
        self.metrics.include(self.worker)
        self.created = int(time.time())
        self.draining = self.stuck = False
        # One thread with a tokenizer of its own: the engine's thread decodes with the other one.
        self._tokenizer = copy.deepcopy(llm.tokenizer)
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        vocabulary = self._tokenizer.get_vocab() if self._tokenizer is not None else ()
        self._longest_token = max(map(len, vocabulary), default=None)

    @property
    def max_chars(self) -> int:
        """The longest text that may still fit the model's context."""
        context = self.llm.max_model_len
        if context is None or self._longest_token is None:
            return self.settings.limits.body_bytes
        return context * self._longest_token

    @property
    def status(self) -> str:
        if self.worker.broken is not None:
            return "failed"
        return "stuck" if self.stuck else "draining" if self.draining else "ok"

    async def encode(self, prompt: Prompt) -> Prompt:
        """The prompt with its token ids, if there is a tokenizer."""
        if self._tokenizer is None:
            return prompt
        return Prompt(prompt.text, await self._off_loop(prompt.encode, self._tokenizer))

    async def tokens(self, prompt: Prompt) -> list[int]:
        """The prompt's token ids."""
        ids = (await self.encode(prompt)).token_ids
        if ids is None:
            raise errors.bad_request("prompt", "no tokenizer is loaded")
        return ids

    async def render(self, messages: Sequence[protocol.Message]) -> Prompt:
        """A conversation by the model's own template, or the operator's."""
        read = requests.read_messages(list(messages))
        chars = sum(len(message["content"]) for message in read)
        requests.within("messages", chars, self.max_chars, "characters, the model's context")
        options = {"chat_template": self.settings.chat_template} if self.settings.chat_template else {}
        return await self._off_loop(lambda: render_chat(self._tokenizer, read, add_generation_prompt=True, **options))

    async def decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            raise errors.bad_request("tokens", "no tokenizer is loaded")
        return await self._off_loop(decoder(self._tokenizer), tokens)

    async def pieces(self, tokens: list[int]) -> list[str]:
        assert self._tokenizer is not None
        return await self._off_loop(self._tokenizer.convert_ids_to_tokens, tokens)

    async def _off_loop(self, function, *arguments) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, function, *arguments)

    def admit(self, completions: int) -> None:
        """Refuses a request that can never be taken in, and any while the server shuts down or too many wait."""
        most = self.worker.places + self.settings.max_waiting
        if completions > most:
            fix = f"{completions} completions (prompts times n, or best_of): this server never takes more than {most}"
            raise ServingError(400, f"n: {fix}; split the request", param="n", code="limit")
        if self.draining:
            raise overloaded(503, "the server is shutting down", 10)
        if self.worker.broken is not None:
            raise overloaded(503, "the engine has stopped", 60)
        waiting = self.worker.open_completions + completions - self.worker.places
        if waiting > self.settings.max_waiting:
            raise overloaded(429, "too many requests are waiting; come again later", RETRY_SECONDS)

    async def watch(self) -> None:
        """Reports a step that takes too long, once, and the end of it."""
        limit = self.settings.step_timeout
        while True:
            await asyncio.sleep(min(limit / 4, 1.0))
            stuck = self.worker.step_seconds > limit
            if stuck and not self.stuck:
                log.critical("step stuck", extra={"seconds": limit, "stack": self.worker.where()})
            self.stuck = stuck
            self.metrics.stuck.set(stuck)


def _backend(llm: LLM | RemoteLLM, settings: Settings, observer: Observer) -> Backend:
    if isinstance(llm, RemoteLLM):
        return Relay(llm, observer)
    llm.engine.bound_latency(settings.itl_slo)
    return EngineThread(llm.engine, llm.tokenizer, observer)


def create_app(llm: LLM | RemoteLLM, settings: Settings, tracer: Any | None = None) -> FastAPI:
    """An ASGI application that serves an LLM, which it owns from its startup to its shutdown.

    Args:
        llm: with an engine of its own, or over an endpoint behind this server.
        tracer: an OpenTelemetry tracer that gets a span for each request; None traces nothing.
    """
    state = State(llm, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await state.worker.start()
        watchdog = asyncio.create_task(state.watch())
        yield
        watchdog.cancel()
        await state.worker.stop()

    app = FastAPI(
        title="vas_engine",
        version=vas_engine.__version__,
        description="OpenAI-compatible serving of a language model guided by values.",
        lifespan=lifespan,
        docs_url=None,  # these pages would run scripts of a CDN where the keys are
        redoc_url=None,
        responses={status: {"model": protocol.ErrorBody, "description": text} for status, text in _ERRORS.items()},
    )
    app.state.vas = state
    app.openapi = lambda: _describe(app)  # type: ignore[method-assign]
    errors.install(app)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(Journal, metrics=state.metrics, tracer=tracer)  # outside the gate: it sees what that refuses
    _add_generation(app, state)
    _add_information(app, state)
    if settings.admin_key is not None:
        add_admin(app, state)
    _add_playground(app)
    return app


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds: a field that cannot work is a 400 here."""
    document = FastAPI.openapi(app)
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    return document


_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer, or with `stream` its parts as events", "content": {"text/event-stream": {}}}
}
_ERRORS: dict[int | str, str] = {
    400: "A field that cannot work; `param` names it",
    401: "No key, or a wrong one",
    403: "The server is reached by a name that is not its own",
    404: "No such model",
    408: "The body did not arrive in time",
    413: "The body is too large",
    415: "The body is no JSON",
    429: "Too many requests wait; see Retry-After",
    500: "The engine failed this request",
    502: "The endpoint behind this server failed, or answered nonsense",
    503: "Shutting down, or the engine or the endpoint behind does not run; see Retry-After",
    504: "The request took too long",
}


# -- routes ------------------------------------------------------------------------------------------------


def _add_generation(app: FastAPI, state: State) -> None:
    settings, limits = state.settings, state.settings.limits

    @app.post("/v1/completions", response_model=protocol.CompletionResponse, responses=_STREAMED, tags=["generation"])
    async def completions(request: Request, body: protocol.CompletionRequest) -> Response:
        """Completes prompts."""
        started = time.monotonic()
        _check_model(state, body.model)
        job = requests.completion_job(body, limits, state.profiles.weights(body.vas_profile))
        prompts = requests.read_prompts(body, limits, state.max_chars)
        state.admit(len(prompts) * job.params.n)
        prompts = [await state.encode(prompt) for prompt in prompts]
        echoed = []
        if job.echo:
            echoed = [p.text if p.text is not None else await state.decode(p.token_ids or []) for p in prompts]
        reply = CompletionReply(job, settings.model_name, echoed)
        return await _answer(request, state, body, job, prompts, reply, started)

    @app.post(
        "/v1/chat/completions", response_model=protocol.ChatCompletionResponse, responses=_STREAMED, tags=["generation"]
    )
    async def chat_completions(request: Request, body: protocol.ChatCompletionRequest) -> Response:
        """Continues a conversation."""
        started = time.monotonic()
        _check_model(state, body.model)
        job = requests.chat_job(body, limits, state.profiles.weights(body.vas_profile))
        state.admit(job.params.n)
        prompt = await state.render(body.messages)
        reply = ChatReply(job, settings.model_name)
        return await _answer(request, state, body, job, [prompt], reply, started)

    @app.post("/tokenize", response_model=protocol.TokenizeResponse, tags=["tokens"])
    async def tokenize(body: protocol.TokenizeRequest) -> Any:
        """Token ids of a text, or of a conversation by the chat template."""
        if body.model is not None:
            _check_model(state, body.model)
        if (body.prompt is None) == (body.messages is None):
            raise errors.bad_request("prompt", "give either prompt or messages")
        if body.messages is not None:
            tokens = await state.tokens(await state.render(body.messages))
        else:
            requests.within("prompt", len(body.prompt or ""), state.max_chars, "characters, the model's context")
            tokens = await state.tokens(Prompt(text=body.prompt))
        pieces = await state.pieces(tokens) if body.return_token_strs else None
        return json_response(
            {"count": len(tokens), "max_model_len": state.llm.max_model_len, "tokens": tokens, "token_strs": pieces}
        )

    @app.post("/detokenize", response_model=protocol.DetokenizeResponse, tags=["tokens"])
    async def detokenize(body: protocol.DetokenizeRequest) -> Any:
        """Text of token ids."""
        if body.model is not None:
            _check_model(state, body.model)
        size = state.worker.vocab_size
        worst = max(body.tokens, default=0)
        if size is not None and worst >= size:
            raise errors.bad_request("tokens", f"tokens={worst}: token ids of this model end at {size - 1}")
        requests.within("tokens", len(body.tokens), state.max_chars, "tokens, the model's context")
        return json_response({"prompt": await state.decode(body.tokens)})


def _add_information(app: FastAPI, state: State) -> None:
    limits = state.settings.limits

    def card() -> dict[str, Any]:
        return {
            "id": state.settings.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "vas_engine",
            "max_model_len": state.llm.max_model_len,
            "vas_token_ids": not isinstance(state.llm, RemoteLLM) or state.llm.tells_ids,
            "vas_values": state.llm.value_names,
            "vas_scales": {name: _scale(head) for name, head in state.worker.heads().items()},
            "vas_limits": {"logprobs": limits.logprobs, "candidates": limits.candidates},
        }

    @app.get("/v1/models", response_model=protocol.ModelList, tags=["information"])
    async def models() -> Any:
        """The model that is served."""
        return json_response({"object": "list", "data": [card()]})

    @app.get("/v1/models/{model:path}", response_model=protocol.ModelCard, tags=["information"])
    async def model(model: str) -> Any:
        """One model by its name."""
        _check_model(state, model)
        return json_response(card())

    @app.get("/v1/profiles", response_model=protocol.ProfileList, tags=["information"])
    async def profiles() -> Any:
        """Sets of weights that `vas_profile` may name."""
        return json_response(state.profiles.to_dict())

    unwell: dict[int | str, dict[str, Any]] = {503: {"model": protocol.HealthResponse}}

    @app.get("/health", response_model=protocol.HealthResponse, responses=unwell, tags=["information"])
    async def health() -> Any:
        """200 while requests are taken in, else 503."""
        return json_response({"status": state.status}, 200 if state.status == "ok" else 503)

    @app.get("/version", response_model=protocol.VersionResponse, tags=["information"])
    async def version() -> Any:
        """The engine's version."""
        return json_response({"version": vas_engine.__version__})

    @app.get("/metrics", tags=["information"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics."""
        text = await asyncio.to_thread(state.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


def _scale(head: HeadConfig) -> dict[str, Any]:
    """What `protocol.ValueScale` says."""
    bounded = math.isfinite(head.interval[1] - head.interval[0])
    return {
        "reward": head.reward,
        "std": None if bounded else abs(head.std),
        "interval": head.interval if bounded else None,
    }


def _add_playground(app: FastAPI) -> None:
    """The page at / and what it consists of: these files and no other."""

    def serve(file: Path) -> Callable[[], Awaitable[Response]]:
        async def page() -> Response:
            return FileResponse(file, headers=_PAGE_HEADERS)

        return page

    for file in sorted(PLAYGROUND.rglob("*")):
        if file.is_file():
            name = file.relative_to(PLAYGROUND).as_posix()
            path = "/" if name == "index.html" else f"/{name}"
            app.add_api_route(path, serve(file), methods=["GET"], include_in_schema=False)


# -- a request's way ---------------------------------------------------------------------------------------


async def _answer(
    request: Request,
    state: State,
    body: protocol.Sampling,
    job: Job,
    prompts: Sequence[Prompt],
    reply: Reply,
    started: float,
) -> Response:
    """Runs a job, whose request came at `started`, and answers with its outputs, whole or as a stream."""
    salt = salt_of(request.scope["state"]["key"], body.cache_salt, state.settings.salt_per_key)
    state.admit(len(prompts) * job.params.n)
    deadline = None if body.vas_deadline_ms is None else started + body.vas_deadline_ms / 1000
    options = {"priority": body.priority or 0, "salt": salt, "deadline": deadline}
    request.scope["state"]["told"] |= {"stream": bool(body.stream), "model": body.model}
    work = Work(state, prompts, job.params, options, request.scope["state"]["told"])
    streaming = False  # a stream closes its work itself
    try:
        await _unless_gone(request, work.accepted())
        if body.stream:
            wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
            stream = EventStream(_chunks(work, reply, wanted), work, state.settings.write_timeout)
            streaming = True
            return stream
        return json_response(reply.response(await _unless_gone(request, work.results())))
    except Exception as error:
        raise _reported(error) from error
    finally:
        if not streaming:
            work.close()


class Work:
    """The engine's part of one HTTP request: a stream for each prompt, their time, their end.

    Args:
        options: of `OutputFront.add`.
        told: is given what there is to tell of the request when it has ended.
    """

    def __init__(
        self,
        state: State,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        options: dict[str, Any],
        told: dict[str, Any],
    ) -> None:
        self.state, self._told = state, told
        self._closed = False
        self._changed = asyncio.Event()
        self.streams = [state.worker.submit(prompt, params, self._changed, **options) for prompt in prompts]
        self._timer = asyncio.get_running_loop().call_later(state.settings.request_timeout, self._expire)

    @property
    def outputs(self) -> list[RequestOutput]:
        return [stream.output for stream in self.streams if stream.output is not None]

    async def accepted(self) -> None:
        """Waits until the engine has taken in all of it; raises the error of what it does not take."""
        while not all(stream.accepted for stream in self.streams):
            await self._news()
        self._raise()

    async def results(self) -> list[RequestOutput]:
        """The whole outputs, when they are there."""
        while not all(stream.finished for stream in self.streams):
            self._raise()
            await self._news()
        self._raise()
        return self.outputs

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What the streams gained, with their places, whenever they did; raises the first error."""
        while True:
            finished = all(stream.finished for stream in self.streams)
            news = [(place, delta) for place, stream in enumerate(self.streams) for delta in stream.take()]
            if news:
                yield news
            self._raise()
            if finished:
                return
            await self._news()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _raise(self) -> None:
        for stream in self.streams:
            if stream.error is not None:
                raise stream.error

    def _expire(self) -> None:
        limit = self.state.settings.request_timeout
        for stream in self.streams:
            stream.fail(TimeoutError(f"the request took longer than {limit:g} s and was cancelled"))

    def close(self) -> None:
        """Cancels what has not ended, and tells what there was; again is harmless."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        for stream in self.streams:
            self.state.worker.cancel(stream)
        outputs = self.outputs
        for output in outputs:
            self.state.metrics.finished(output)
        if outputs:
            metrics = [output.metrics for output in outputs]
            completions = [completion for output in outputs for completion in output.outputs]
            kl = [completion.kl for completion in completions if completion.kl is not None]
            firsts = [m.time_to_first_token for m in metrics if m.time_to_first_token is not None]
            self._told |= usage(outputs) | {
                "value_evaluations": sum(m.value_evaluations for m in metrics),
                "limited_tokens": sum(m.limited_tokens for m in metrics),
                "finish_reasons": [completion.finish_reason for completion in completions],
                "time_to_first_token": min(firsts, default=None),
                "kl": sum(kl) if kl else None,
            }


async def _chunks(work: Work, reply: Reply, with_usage: bool) -> AsyncGenerator[bytes]:
    left = sum(stream.completions for stream in work.streams)
    try:
        async for news in work.deltas():
            chunks = [reply.chunk(place, delta) for place, delta in news]
            left -= sum(delta.finished for _, delta in news)
            if not left:
                chunks[-1] |= reply.last(work.outputs)
            yield b"".join(_event(chunk) for chunk in chunks)
        if with_usage:
            yield _event(reply.usage_chunk(work.outputs))
    except Exception as error:
        # The status line is long gone: the error is an event of its own.
        yield _event(_reported(error).body())
    yield b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events. Ends the work when the client goes, or leaves what was sent unread for too long."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], work: Work, write_timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._work, self._write_timeout = events, work, write_timeout
        self._writing, self._sent = False, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            done: set[asyncio.Task] = set()
            stuck = -1  # the event that was on its way at the last look
            while not done and not (self._writing and stuck == self._sent):
                stuck = self._sent
                done, _ = await asyncio.wait(
                    {sending, leaving}, timeout=self._write_timeout, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            leaving.cancel()
            sending.cancel()
            self._work.close()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                self._writing = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._writing, self._sent = False, self._sent + 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _reported(error: Exception) -> ServingError:
    """The error to answer with; one that nobody raised on purpose is logged."""
    if not isinstance(error, VASError | TimeoutError):
        log.error("request failed", exc_info=error)
    return as_serving_error(error)


class ClientGone(ServingError):
    """Nobody reads the answer; the status is what logs call it."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


async def _unless_gone(request: Request, awaitable: Awaitable) -> Any:
    """Awaits something unless the client goes first; raises ClientGone then."""
    task = asyncio.ensure_future(awaitable)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _check_model(state: State, name: str) -> None:
    if name != state.settings.model_name:
        served = state.settings.model_name
        raise ServingError(
            404, f"model {name[:100]!r} is not served; {served!r} is", param="model", code="model_not_found"
        )


def _event(body: Any) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
