"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")

from vas_engine.serving.server import listen


def test_events_are_sent_at_once() -> None:
    """Nagle's algorithm would keep each event until the client has acknowledged the one before: up to 40 ms."""

    async def accepted() -> int:
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found = writer.get_extra_info("socket")
            option.set_result(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, client = await asyncio.open_connection(*listener.getsockname())
            client.close()
            return await option

    assert asyncio.run(accepted()) == 1
