"""What every request passes before anything looks at it: its key, the size and the shape of its body."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vas_engine.serving.errors import ServingError, error_response
from vas_engine.serving.settings import Limits, Settings

OPEN_PATHS = frozenset({"/health"})
ADMIN_PREFIX = "/admin"
BODY_TIMEOUT = 60.0  # seconds in which a body has to arrive
# One that never ends goes to the end of the body: if it matched nowhere, each of its quotes would be tried in turn.
_TEXTS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class Keys:
    """API keys. Only their digests are kept, and every one is compared, in constant time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [digest(key) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def match(self, key: str | None) -> bytes | None:
        """The digest of the known key that this is; None if it is none."""
        given = digest(key or "")
        found = None
        for known in self._digests:
            if hmac.compare_digest(known, given):
                found = known
        return found if key else None


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """ASGI middleware that lets only authorised requests of bounded size through.

    Every path but those of `OPEN_PATHS` needs a key, also one that does not exist; paths under `ADMIN_PREFIX` need the
    admin key and are not there without one. Puts the digest of the key in the scope's state as "key".
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.limits, self._hosts = app, settings.limits, settings.hosts
        self._keys = Keys(settings.api_keys)
        self._admin = Keys([settings.admin_key] if settings.admin_key else [])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            scope.setdefault("state", {})["key"] = self._authorise(scope["path"], headers)
            if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
                body = await self._read(headers, receive)
                check_shape(body, self.limits)
                receive = _Replay(body, receive)
        except ServingError as error:
            error.headers["Connection"] = "close"  # the rest of the body is not waited for
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _authorise(self, path: str, headers: Headers) -> bytes | None:
        key = presented_key(headers.get("authorization"))
        admin = self._admin.match(key)
        if path == ADMIN_PREFIX or path.startswith(ADMIN_PREFIX + "/"):
            if not self._admin:
                raise ServingError(404, "the admin API is off; start the server with an admin key", code="not_found")
            if admin is None:
                raise _unauthorised("the admin API needs the admin key")
            return admin
        if path in OPEN_PATHS:
            return None
        if not self._keys:
            self._check_host(headers.get("host", ""))
            return admin
        known = self._keys.match(key) or admin
        if known is None:
            raise _unauthorised("missing API key" if key is None else "wrong API key")
        return known

    def _check_host(self, host: str) -> None:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self._hosts and name not in self._hosts:
            fix = f"this server is not called {host[:100]!r}; use {self._hosts[0]}, or start it with an API key"
            raise ServingError(403, fix, "permission_error", code="wrong_host")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        most = self.limits.body_bytes
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > most:
            raise _too_large(most)
        parts, size = [], 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ServingError(400, "the connection was closed before the body was complete")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise _too_large(most)
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ServingError(408, f"the body did not arrive in {BODY_TIMEOUT:.0f} s", code="timeout") from None
        body = b"".join(parts)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Whatever a page of another site can send without asking is not JSON: it stays outside.
        if body and kind != "application/json":
            raise ServingError(
                415, f"Content-Type is {kind[:60]!r}; send application/json", code="unsupported_media_type"
            )
        return body


class _Replay:
    """`receive` for whoever comes after the gate: the body it has read, then what the connection brings."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def check_shape(body: bytes, limits: Limits) -> None:
    """Refuses JSON that is nested too deeply or has too many entries, before it is parsed."""
    if b"\0" in body:  # which no UTF-8 JSON holds, and every UTF-16 or UTF-32 one: a parser would take those, too
        raise ServingError(400, "the body holds zero bytes; send JSON in UTF-8", code="invalid_json")
    bare = _TEXTS.sub(b"", body)
    if bare.count(b",") > limits.json_items:
        fix = f"the body has {bare.count(b','):,} entries; at most {limits.json_items:,} are taken"
        raise ServingError(413, fix, code="limit")
    brackets = np.frombuffer(bare.translate(None, _NOT_BRACKETS), np.uint8)
    # Of "[", "{" and "]", "}" the former have this bit.
    depth = np.cumsum(np.where(brackets & 2, 1, -1)).max(initial=0)
    if depth > limits.json_depth:
        raise ServingError(400, f"the body is nested deeper than {limits.json_depth} levels", code="limit")


def presented_key(authorization: str | None) -> str | None:
    """The key of an Authorization header: a bearer token, or a browser's Basic password."""
    scheme, _, rest = (authorization or "").partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip() or None
    if scheme.lower() == "basic":
        try:
            decoded = base64.b64decode(rest.strip(), validate=True).decode("utf-8", "surrogateescape")
        except (binascii.Error, ValueError):
            return None
        return decoded.partition(":")[2] or None
    return None


def _unauthorised(message: str) -> ServingError:
    fix = f"{message}; send 'Authorization: Bearer KEY'"
    # A browser asks its user for the key and sends it along from then on: the page at / needs no way around.
    headers = {"WWW-Authenticate": 'Basic realm="vas", charset="UTF-8"'}
    return ServingError(401, fix, "authentication_error", code="invalid_api_key", headers=headers)


def _too_large(most: int) -> ServingError:
    return ServingError(413, f"the body is larger than {most:,} bytes", code="limit")


def salt_of(key: bytes | None, own: str | None, per_key: bool) -> bytes:
    """What keeps a request's cached prefixes apart from those of others."""
    parts: list[Any] = [key if per_key and key else b"", (own or "").encode("utf-8", "surrogatepass")]
    return hashlib.sha256(b"\0".join(parts)).digest() if any(parts) else b""
