"""Running the application: the socket, signals and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI

from vas_engine.errors import InvalidArgumentError
from vas_engine.serving.app import create_app
from vas_engine.serving.settings import Settings
from vas_engine.serving.state import State

if TYPE_CHECKING:
    from vas_engine.integrations.remote import RemoteLLM
    from vas_engine.llm import LLM

CLOSE_TIMEOUT = 5  # seconds that clients have to take the last of their answers
# The engine's thread lets go of the interpreter in every tensor operation and has to get it back from the event loop,
# which by default may keep it for 5 ms: as long as several steps of a small model.
SWITCH_INTERVAL = 1e-4

log = logging.getLogger("vas_engine.serving")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
        InvalidArgumentError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets that say they are TCP's: else events wait for acknowledgements.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(2048)
    except (OSError, OverflowError) as error:
        found.close()
        fix = f"cannot be listened on ({error}); choose another --port (0 takes a free one) or --host"
        raise InvalidArgumentError("--port", f"{host}:{port}", fix) from error
    return found


class Server(uvicorn.Server):
    """uvicorn, with an end in two parts: what was accepted is finished while new requests get 503; then it closes.

    A second signal does not wait.
    """

    def __init__(self, app: FastAPI, settings: Settings, ready: Callable[[], None] | None = None) -> None:
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
            ws="none",
        )
        super().__init__(config)
        self.settings = settings
        self._state: State = app.state.vas
        self._ready = ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._ready is not None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None or self._state.draining:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self.drain)

    def drain(self) -> None:
        """Begins the graceful end; called on the event loop."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        state = self._state
        state.draining = True
        log.info("draining", extra={"completions": state.worker.open_completions})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_timeout):
                await state.worker.idle()
        self.should_exit = True


def serve(
    llm: LLM | RemoteLLM,
    settings: Settings,
    listener: socket.socket,
    ready: Callable[[], None] | None = None,
    tracer: Any | None = None,
) -> None:
    """Serves until SIGTERM or Ctrl-C; returns when everything accepted has been answered."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    server = Server(create_app(llm, settings, tracer), settings, ready)
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
