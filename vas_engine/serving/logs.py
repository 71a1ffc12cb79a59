"""Structured logs: one JSON object a line, never with the text of a prompt or a completion."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vas_engine.serving.metrics import Metrics
from vas_engine.serving.tracing import describe, start_span

LOGGER = "vas_engine.serving"
QUIET_ROUTES = frozenset({"/health", "/metrics"})
log = logging.getLogger(LOGGER)
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as a line of JSON: time, level, event and the record's extra fields."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        fields |= {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = type(record.exc_info[1]).__name__
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class TextFormatter(logging.Formatter):
    """The same for people."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        words = [
            time.strftime("%H:%M:%S", time.localtime(record.created)),
            record.levelname.lower(),
            record.getMessage(),
        ]
        line = " ".join([*words, *(f"{name}={value}" for name, value in extra.items() if value is not None)])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def set_up(as_json: bool) -> None:
    """Sends the server's logs, and uvicorn's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    for name, level in ((LOGGER, logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


class RequestLog:
    """ASGI middleware that gives every request an id and, when it is over, a line in the log, a count and a span.

    Handlers leave what there is to tell in `scope["state"]["told"]`: numbers and names, never text of a client.

    Args:
        metrics: counts what was refused.
        tracer: an OpenTelemetry tracer; None traces nothing.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, tracer: Any | None = None) -> None:
        self.app, self._metrics, self._tracer = app, metrics, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = uuid.uuid4().hex, time.monotonic(), 499
        told: dict[str, Any] = {}
        scope.setdefault("state", {})["told"] = told

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        with self._span(scope) as span:
            try:
                await self.app(scope, receive, sending)
            finally:
                seconds = time.monotonic() - started
                if status >= 400:
                    self._metrics.refused(status)
                # A path that exists is the route's; any other is a client's text.
                route = getattr(scope.get("route"), "path", None)
                level = logging.DEBUG if route in QUIET_ROUTES and status < 400 else logging.INFO
                fields = {"request_id": request_id, "method": scope["method"], "route": route, "status": status}
                log.log(level, "request", extra={**fields, "seconds": round(seconds, 6), **told})
                if span is not None:
                    describe(span, {**fields, "seconds": seconds, **told})

    def _span(self, scope: Scope) -> Any:
        if self._tracer is None:
            return contextlib.nullcontext()
        return start_span(self._tracer, scope)
