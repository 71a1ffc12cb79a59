"""Errors in the shape that OpenAI's clients know: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from vas_engine.errors import InvalidArgumentError, KVCacheError, NonFiniteError, ValueArtifactError, VASError

LONGEST_MESSAGE = 1000

# What a request calls the engine's arguments where it is not the same name.
NAMES = {
    "prompts": "prompt",
    "values": "vas_weights",
    "num_candidates": "vas_candidates",
    "min_candidates": "vas_min_candidates",
    "tail": "vas_tail",
    "baseline": "vas_baseline",
    "tilt": "vas_tilt",
    "advantage_clip": "vas_clip",
    "report_kl": "vas_return_kl",
}


class ServingError(VASError):
    """A request that is answered with an HTTP error.

    Attributes:
        status: HTTP status.
        kind: "invalid_request_error", "authentication_error", "rate_limit_error", "server_error" ...
        param: the field of the request that is at fault.
        code: a word for programs.
        headers: of the answer, Retry-After for one.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.kind, self.param, self.code = status, kind, param, code
        self.headers = dict(headers or {})
        super().__init__(message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 1] + "…")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(param: str | None, message: str) -> ServingError:
    return ServingError(400, message, param=param, code="invalid_value")


def overloaded(status: int, message: str, seconds: int) -> ServingError:
    """429 (too many wait) or 503 (shutting down), and when to come again."""
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ServingError(status, message, kind, code="overloaded", headers={"Retry-After": str(seconds)})


def as_serving_error(error: BaseException) -> ServingError:
    """Any error as the one to answer with."""
    if isinstance(error, ServingError):
        return error
    if isinstance(error, InvalidArgumentError):
        argument = error.argument
        base = argument.split("[")[0].split(" ")[0]
        param = NAMES.get(base, base)
        return bad_request(param, f"{param}{argument[len(base) :]}={error.value!r}: {error.fix}")
    if isinstance(error, ValueArtifactError):
        return bad_request("path", str(error))
    if isinstance(error, KVCacheError):
        return bad_request("max_tokens", str(error))
    if isinstance(error, NonFiniteError):
        return ServingError(500, str(error), "server_error", code="not_finite")
    if isinstance(error, TimeoutError):
        return ServingError(504, str(error) or "the request took too long", "server_error", code="timeout")
    # What went wrong inside is for the log, not for a stranger.
    return ServingError(500, "the server failed to process this request", "server_error", code="internal")


def to_json(body: Any) -> bytes:
    """JSON that can always be sent: what is no UTF-8 (a lone surrogate that a client sent) stays escaped."""
    return json.dumps(body, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def json_response(body: Any, status: int = 200) -> Response:
    return Response(to_json(body), status, media_type="application/json")


def error_response(error: ServingError) -> Response:
    return Response(to_json(error.body()), error.status, error.headers, "application/json")


def install(app: FastAPI) -> None:
    """Has every error of the application leave in this shape."""

    @app.exception_handler(VASError)
    async def _own(request: Request, error: VASError) -> Response:
        return error_response(as_serving_error(error))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(_first_problem(error))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return error_response(
            ServingError(error.status_code, str(error.detail), kind, code=code, headers=error.headers)
        )


def _first_problem(error: RequestValidationError) -> ServingError:
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"] if part != "body"]
    if problem["type"] == "json_invalid":
        return ServingError(400, f"the body is no JSON: {problem.get('ctx', {}).get('error', '')}", code="invalid_json")
    if problem["type"] == "unknown_field":
        place.append(problem["ctx"]["field"])
    param = next((part for part in place if not part.isdecimal()), None)
    where = ".".join(place) or "body"
    return bad_request(param, f"{where}: {problem['msg']}")
