"""The server as a Ray Serve application: replicas of the engine, and before them what chooses one and tries again."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vas_engine.arguments import unknown_argument
from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.llm import LLM, MAX_NUM_SEQS
from vas_engine.serving.app import create_app
from vas_engine.serving.errors import error_response, overloaded, to_json
from vas_engine.serving.security import Gate
from vas_engine.serving.settings import Limits, Settings
from vas_engine.serving.state import RETRY_SECONDS

__all__ = ["build_openai_app"]

ENGINE = "Engine"
"""Name of the deployment of engines."""
ATTEMPTS = 3
"""Replicas that a request may lose before it is given up: one that kills its replica must not kill them all."""
PREFIX_CHARS = 1024
"""What prompts must share at least to go to the same replica."""
_PARTS = ("llm", "settings", "engine", "ingress")
_SCOPE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

log = logging.getLogger("vas_engine.serving")


def build_openai_app(args: Mapping[str, Any]) -> serve.Application:
    """`vas serve` over several replicas, for `serve.run`, or for a config file with the same arguments.

    Requests that begin alike and name the same profile (or weigh the same values) go to the same replica, as far as it
    has room. One whose replica dies is run again on another unless some of its answer has gone out.

    Args:
        args: plain types, of four parts:

            - "llm": arguments of `LLM`, "model" and "values" as folders or names that every machine can read.
            - "settings": of `Settings` (keys, limits, profiles, ...); "model_name" is the model unless given.
            - "engine": options of the deployment that holds the engines, as of `serve.deployment`: num_replicas,
              autoscaling_config, ray_actor_options, ... Default: a replica for each GPU of the cluster, or one
              without.
            - "ingress": the same of the deployment before it, which holds no engine.

    Raises:
        InvalidArgumentError: an unknown argument, no model, or an admin key: what it would change is one replica's.
    """
    for name in args:
        if name not in _PARTS:
            unknown_argument(name, args[name], _PARTS, {"deployment": "engine", "model": "llm"})
    llm = dict(args.get("llm") or {})
    if not isinstance(llm.get("model"), str | Path):
        raise InvalidArgumentError("llm['model']", llm.get("model"), "give the folder or hub name of a model")
    settings = _read_settings(args.get("settings") or {}, str(llm["model"]))
    engine = serve.deployment(Engine, name=ENGINE).options(**_engine_options(args.get("engine") or {}, llm, settings))

    def build() -> ASGIApp:
        engines = serve.get_deployment_handle(ENGINE, app_name=serve.get_replica_context().app_name)
        return Starlette(routes=[Route("/{path:path}", Dispatcher(engines))], middleware=[Middleware(Gate, settings)])

    # Everything that may wait does so before the engines, not before the ingress.
    ingress = {"max_ongoing_requests": 10_000, "graceful_shutdown_timeout_s": settings.drain_timeout}
    front = serve.deployment(serve.ingress(build)(), name="Ingress").options(**ingress | (args.get("ingress") or {}))
    return front.bind(engine.bind(llm, settings))


def _engine_options(given: Mapping[str, Any], llm: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    gpus = int(ray.cluster_resources().get("GPU", 0))
    seats = llm.get("max_num_seqs") or MAX_NUM_SEQS["cuda" if gpus else "cpu"]
    router = RequestRouterConfig(
        request_router_class=_ROUTER,
        # A prefix that everybody shares may spread over all replicas once the first are full.
        request_router_kwargs={"num_fallback_replicas": 2**31},
    )
    options = {
        "ray_actor_options": {"num_gpus": 1} if gpus else {"num_cpus": 1},
        "max_ongoing_requests": seats,
        "max_queued_requests": settings.max_waiting,
        "graceful_shutdown_timeout_s": settings.drain_timeout,
        "request_router_config": router,
    }
    if "autoscaling_config" not in given:
        options["num_replicas"] = gpus or 1
    return options | dict(given)


def _read_settings(given: Mapping[str, Any], model: str) -> Settings:
    options = {"model_name": model, **given}
    _check_names("settings", given, Settings)
    if options.get("admin_key") is not None:
        fix = "there is no admin API over replicas, a change would reach one of them; write profiles to a file"
        raise InvalidArgumentError("settings['admin_key']", "...", fix)
    if isinstance(options.get("limits"), Mapping):
        _check_names("limits", options["limits"], Limits)
        options["limits"] = Limits(**options["limits"])
    if options.get("profiles") is not None:
        options["profiles"] = Path(options["profiles"])
    for name in ("api_keys", "hosts"):
        options[name] = tuple(options.get(name) or ())
    return Settings(**options)


def _check_names(part: str, given: Mapping[str, Any], settings: type) -> None:
    known = [field.name for field in fields(settings)]
    for name, value in given.items():
        if name not in known:
            fix = f"unknown argument; {nearest(name, known)}"
            raise InvalidArgumentError(f"{part}[{name!r}]", value, fix)


class Engine:
    """A replica: the engine, and the application that `vas serve` runs."""

    async def __init__(self, llm: dict[str, Any], settings: Settings) -> None:  # type: ignore[misc]  # Ray awaits it
        self.app = create_app(LLM(**llm), settings)
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message]]:
        """ASGI messages of the answer to a request, those at hand together. Ending the generator ends the request."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        request = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            message = next(request, None)
            return message if message is not None else await asyncio.Future()

        task = asyncio.create_task(self.app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                found = [message]
                while not messages.empty() and (message := messages.get_nowait()) is not None:
                    found.append(message)
                yield found
                if message is None:
                    break
            await task
        finally:
            task.cancel()

    def check_health(self) -> None:
        """Called by Ray, which puts a new replica in the place of one that raises here."""
        status = self.app.state.vas.status
        if status in ("failed", "stuck"):
            raise RuntimeError(f"the engine is {status}")

    async def __del__(self) -> None:
        await self._lifespan.__aexit__(None, None, None)


class Dispatcher:
    """ASGI application that has a replica answer, and another one if that dies before any of the answer has gone out.

    The start of an answer waits for the first of its body, so a stream can be run again until its first token. Nothing
    tells the second answer from the first but the draws of requests without a seed. When the client goes, Ray cancels
    the call and what it has called.
    """

    def __init__(self, engines: DeploymentHandle) -> None:
        self._engines = engines.options(stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body()
        engines = self._engines.options(session_id=affinity(body))
        asked = {key: scope[key] for key in _SCOPE if key in scope}
        for _ in range(ATTEMPTS):
            begun, held = False, []
            try:
                async for messages in engines.answer.remote(asked, body):
                    held += messages
                    begun = begun or any(message["type"] == "http.response.body" for message in held)
                    while begun and held:
                        await send(held.pop(0))
                return
            except RayActorError as error:
                log.warning("replica lost", extra={"error": str(error)})
                if begun:  # only streams take long enough; as in them the engine's own errors, it is an event
                    lost = overloaded(503, "the replica that answered was lost", RETRY_SECONDS)
                    event = b"data: " + to_json(lost.body()) + b"\n\ndata: [DONE]\n\n"
                    await send({"type": "http.response.body", "body": event})
                    return
            except (BackPressureError, DeploymentUnavailableError) as error:
                status = 429 if isinstance(error, BackPressureError) else 503
                await error_response(overloaded(status, str(error), RETRY_SECONDS))(scope, receive, send)
                return
        text = f"{ATTEMPTS} replicas were lost over this request"
        await error_response(overloaded(503, text, RETRY_SECONDS))(scope, receive, send)


def affinity(body: bytes) -> str:
    """What the requests for one replica have in common; empty where any replica will do.

    Profile and names of the weighed values, which decide what networks run, and the beginning of the prompt: its first
    `PREFIX_CHARS` characters, of a conversation all up to the first question.
    """
    try:
        request = json.loads(body)
    except ValueError:
        return ""
    if not isinstance(request, dict):
        return ""
    start = request.get("prompt")
    if start is None:
        messages = request.get("messages")
        if not isinstance(messages, list):
            return ""
        asked = (i for i, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "user")
        text = json.dumps(messages[: next(asked, 0) + 1])
    else:
        text = json.dumps(start)[:PREFIX_CHARS]
    weights = request.get("vas_weights")
    names = sorted(weights) if isinstance(weights, dict) else None
    return hashlib.sha256(json.dumps([request.get("vas_profile"), names, text]).encode()).hexdigest()
