"""The application and its routes."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.responses import FileResponse, PlainTextResponse, Response

import vas_engine
from vas_engine.integrations.remote import RemoteLLM
from vas_engine.prompts import Prompt
from vas_engine.serving import errors, protocol, requests
from vas_engine.serving.admin import add_admin
from vas_engine.serving.answer import answer
from vas_engine.serving.errors import ServingError, json_response
from vas_engine.serving.logs import RequestLog
from vas_engine.serving.replies import ChatReply, CompletionReply
from vas_engine.serving.security import Gate
from vas_engine.serving.settings import Settings
from vas_engine.serving.state import State

if TYPE_CHECKING:
    from vas_engine.llm import LLM
    from vas_engine.values.config import HeadConfig

PLAYGROUND = Path(__file__).parent / "playground"
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


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
    app.add_middleware(RequestLog, metrics=state.metrics, tracer=tracer)  # outside the gate: it sees what that refuses
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
        return await answer(request, state, body, job, prompts, reply, started)

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
        return await answer(request, state, body, job, [prompt], reply, started)

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


def _check_model(state: State, name: str) -> None:
    if name != state.settings.model_name:
        served = state.settings.model_name
        raise ServingError(
            404, f"model {name[:100]!r} is not served; {served!r} is", param="model", code="model_not_found"
        )
