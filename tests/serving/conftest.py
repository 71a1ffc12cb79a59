"""Servers over a tiny random model with two random values, on a free port, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch

pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")

from tests.engine.conftest import network
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM
from vas_engine.integrations.remote import RemoteLLM
from vas_engine.model import CausalLM
from vas_engine.serving.app import create_app
from vas_engine.serving.server import Server, listen
from vas_engine.serving.settings import Settings
from vas_engine.serving.state import State
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork

TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}[bot]{% endif %}"


def make_llm(**options) -> LLM:
    """A tiny random Llama with the values "kind" (a reader) and "long" (a side network)."""
    settings = {"device": "cpu", "kv_cache_memory": "4MiB", "tokenizer": byte_tokenizer(chat_template=TEMPLATE)}
    positions = options.pop("max_positions", 128)
    bare = LLM(tiny_llama(max_positions=positions), **settings)
    networks = {}
    for name, kind in (("kind", "reader"), ("long", "side")):
        torch.manual_seed(1)
        networks[name] = ValueNetwork(default_config(kind, bare.lm, [name])).bind(bare.lm)
        with torch.no_grad():
            networks[name].heads.output.weight.mul_(12.0)
    return LLM(tiny_llama(max_positions=positions), networks, **(settings | options))


@dataclass
class Served:
    """A running server."""

    url: str
    llm: LLM
    server: Server
    state: State

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300, **options)

    def post(self, path: str, body: dict | None = None, **options) -> httpx.Response:
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        with self.client() as client:
            return client.post(path, content=json.dumps(body), headers=headers, **options)

    def complete(self, prompt="Once", **body) -> dict:
        """An ordinary completion; fails on any error."""
        answer = self.post("/v1/completions", {"model": "tiny", "prompt": prompt, **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def check_idle(self) -> None:
        """Waits until nothing runs; then no block may be held and all bookkeeping must agree."""
        loop = self.server._loop
        assert loop is not None
        asyncio.run_coroutine_threadsafe(self.state.worker.idle(), loop).result(300)

        def look(engine) -> int:
            assert not engine.scheduler.has_work
            engine.scheduler.check()
            return engine.blocks.num_used

        assert asyncio.run_coroutine_threadsafe(self.state.worker.call(look), loop).result(300) == 0


@contextlib.contextmanager
def serving(llm: LLM | None = None, tracer: Any | None = None, **settings) -> Iterator[Served]:
    """A server in a thread; it ends with the block, by the way that SIGTERM takes."""
    llm = llm or make_llm()
    chosen = Settings(**{"model_name": "tiny", "drain_timeout": 20.0, **settings})
    listener = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(create_app(llm, chosen, tracer), chosen, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", llm, server, server._state)
    finally:
        with contextlib.suppress(RuntimeError):  # its event loop is closed: the block has ended it already
            server._loop.call_soon_threadsafe(server.drain)
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def upstream() -> Iterator[Served]:
    """A server of the same model without values, to be behind another."""
    llm = LLM(tiny_llama(), device="cpu", kv_cache_memory="4MiB", tokenizer=byte_tokenizer(chat_template=TEMPLATE))
    with serving(llm, max_waiting=4096) as running:
        yield running
        running.check_idle()


@contextlib.contextmanager
def proxying(behind: Served, **settings) -> Iterator[Served]:
    """A server in front of another, whose model it guides by the value "kind"."""
    value = network("model", CausalLM.load(tiny_llama()), (HeadConfig("kind", std=0.5),))
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    llm = RemoteLLM(behind.url + "/v1", "tiny", {"kind": value}, tokenizer=tokenizer, backoff=0.0)
    with serving(llm, **settings) as running:
        yield running
        assert running.server._loop is not None
        asyncio.run_coroutine_threadsafe(running.state.worker.idle(), running.server._loop).result(60)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


@pytest.fixture(autouse=True)
def clean(request):
    """After every test with the shared server: it is idle, and holds nothing."""
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").check_idle()
