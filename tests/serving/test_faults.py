"""Overload, clients that go away or never read, steps that fail or hang, shutting down."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import Served, make_llm, serving
from tests.serving.test_security import resident
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.cli import main
from vas_engine.errors import VASError
from vas_engine.serving import logs
from vas_engine.serving.answer import Work

ASKED = {"model": "tiny", "prompt": "Once", "seed": 5, "max_tokens": 100, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


class StepGate:
    """Holds an engine's steps: each waits for a permit, or for the gate to open."""

    def __init__(self, llm: LLM) -> None:
        self.arrived = self.steps = 0
        self._permits = threading.Semaphore(0)
        self._open = False
        self._step = llm.engine.step
        llm.engine.step = self._held  # type: ignore[method-assign]

    def _held(self):
        self.arrived += 1
        if not self._open:
            self._permits.acquire()
        self.steps += 1
        return self._step()

    def permit(self, steps: int = 1) -> None:
        self._permits.release(steps)

    def open(self) -> None:
        self._open = True
        self._permits.release()


def until(condition: Callable[[], bool]) -> None:
    """Polls for something that happens in another thread or process."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> str:
    """The text of ASKED when nothing goes wrong."""
    sampling = SamplingParams(seed=5, max_tokens=100, ignore_eos=True)
    return make_llm().generate("Once", sampling, use_tqdm=False)[0].outputs[0].text


def raw_request(served: Served, **body) -> socket.socket:
    """A connection with a request sent and nothing read; its receive buffer is small."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = served.url.removeprefix("http://").split(":")
    connection.connect((host, int(port)))
    content = json.dumps({**ASKED, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


# -- overload ------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_keeps_what_it_took(pool: ThreadPoolExecutor, expected: str) -> None:
    llm = make_llm(max_num_seqs=2)
    gate = StepGate(llm)
    with serving(llm, max_waiting=3) as served:
        taken = [pool.submit(served.complete, **{k: v for k, v in ASKED.items() if k != "model"}) for _ in range(5)]
        until(lambda: served.state.worker.open_completions == 5)
        for body in (ASKED, {**ASKED, "stream": True}):
            answer = served.post("/v1/completions", body)
            assert answer.status_code == 429
            assert answer.json()["error"]["type"] == "rate_limit_error"
            assert int(answer.headers["Retry-After"]) >= 1
        with served.client() as client:
            assert client.get("/health").status_code == 200  # full is not broken
        gate.open()
        assert [future.result()["choices"][0]["text"] for future in taken] == [expected] * 5
        served.check_idle()
        assert served.post("/v1/completions", ASKED).status_code == 200


def test_priorities_say_who_is_next(pool: ThreadPoolExecutor) -> None:
    llm = make_llm(max_num_seqs=1)
    gate, step, ran = StepGate(llm), llm.engine.step, []

    def noted():
        events = step()
        ran.extend(sequence.priority for sequence in llm.engine.scheduler.running)
        return events

    llm.engine.step = noted  # type: ignore[method-assign]
    with serving(llm) as served:
        futures = []
        for priority in (5, 7, 0, 3):
            futures.append(pool.submit(served.post, "/v1/completions", {**ASKED, "priority": priority}))
            until(lambda: served.state.worker.open_completions == len(futures))
            if priority == 5:
                until(lambda: gate.arrived == 1)
                gate.permit(2)
                until(lambda: gate.steps == 2 and gate.arrived == 3)
        gate.open()
        assert {future.result().status_code for future in futures} == {200}
    # The first gives way to its betters and is resumed before the last.
    assert [priority for priority, _ in itertools.groupby(ran)] == [5, 0, 3, 5, 7]


def test_a_request_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm()
    gate = StepGate(llm)
    begun, expire = threading.Event(), Work._expire

    def once_begun(work: Work) -> None:  # or the error may come before the stream, and have a status of its own
        if begun.is_set():
            expire(work)
        else:
            asyncio.get_running_loop().call_later(0.01, once_begun, work)

    with serving(llm, request_timeout=0.3) as slow, slow.client() as client:
        answer = slow.post("/v1/completions", ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        monkeypatch.setattr(Work, "_expire", once_begun)
        gate.permit(10)
        lines = []
        with client.stream("POST", "/v1/completions", json={**ASKED, "stream": True}) as stream:
            for line in stream.iter_lines():
                begun.set()
                lines += [line] if line else []
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert lines[-1] == "data: [DONE]"
        gate.open()
        slow.check_idle()


# -- clients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_is_cancelled_within_a_step(streamed: bool) -> None:
    llm = make_llm()
    gate = StepGate(llm)
    with serving(llm) as served:
        connection = raw_request(served, stream=streamed)
        gate.permit(3)
        if streamed:
            # In as many pieces as it comes in: there may be no second one while the engine is held.
            received = b""
            while b"data: " not in received:
                piece = connection.recv(4096)
                assert piece, received
                received += piece
        until(lambda: gate.arrived == 4)
        connection.close()
        # The engine's thread is held in its fourth step; the cancellation is in its queue before that ends.
        until(lambda: not served.state.worker._commands.empty())
        gate.permit(1)
        until(lambda: served.state.worker.open_completions == 0)
        assert gate.steps == 4
        gate.open()
        served.check_idle()
        assert llm.engine.stats.tokens <= 4


def test_clients_that_never_read_hold_nobody(expected: str) -> None:
    unread(20, expected)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_clients_that_never_read(expected: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip(f"this process may open {hard} files; both ends of 1,000 connections need more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    unread(1000, expected)


def unread(count: int, expected: str) -> None:
    with serving(max_waiting=2000) as served:
        asked = {"stream": True, "vas_return_candidates": 20, "vas_weights": {"kind": 1.0}, "vas_candidates": 20}
        connections = [raw_request(served, seed=i, **asked) for i in range(count)]
        until(lambda: served.llm.engine.stats.steps > 0)
        body = {name: value for name, value in ASKED.items() if name != "model"}
        assert served.complete(**body)["choices"][0]["text"] == expected
        served.check_idle()  # all of them were generated to the end, and nothing is held for them
        assert served.llm.engine.stats.tokens == (count + 1) * 100
        for connection in connections:
            connection.close()


def test_a_stream_left_unread_is_given_up() -> None:
    with serving(write_timeout=0.2) as served:
        asked = {"stream": True, "vas_return_candidates": 20, "n": 16, "max_tokens": 120}
        connection = raw_request(served, **asked)
        tasks = served.server.server_state.tasks
        until(lambda: served.llm.engine.stats.steps > 0)
        until(lambda: not tasks)
        connection.close()


# -- the engine ----------------------------------------------------------------------------------------------


def test_a_failing_step_takes_down_its_own_requests(pool: ThreadPoolExecutor, expected: str) -> None:
    llm = make_llm(max_num_seqs=2)
    gate = StepGate(llm)
    forward, fail = llm.lm.forward, threading.Event()

    def sometimes(*arguments, **named):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("injected")
        return forward(*arguments, **named)

    llm.lm.forward = sometimes
    with serving(llm) as served:
        first = [pool.submit(served.post, "/v1/completions", {**ASKED, "stream": s}) for s in (False, True)]
        until(lambda: served.state.worker.open_completions == 2)
        gate.permit(3)
        until(lambda: gate.steps == 3)
        waiting = [pool.submit(served.post, "/v1/completions", {**ASKED, "n": n}) for n in (1, 2)]
        until(lambda: served.state.worker.open_completions == 5)
        fail.set()
        gate.open()
        whole, stream = (future.result() for future in first)
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal")
        assert json.loads(stream.text.split("\n\n")[-3].removeprefix("data: "))["error"]["code"] == "internal"
        for future in waiting:
            assert future.result().json()["choices"][0]["text"] == expected
        served.check_idle()
        assert served.complete(**{k: v for k, v in ASKED.items() if k != "model"})["choices"][0]["text"] == expected


def test_neither_http_nor_tokenising_holds_the_engine(pool: ThreadPoolExecutor, expected: str) -> None:
    llm = make_llm()
    gate = StepGate(llm)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(60)

    with serving(llm) as served:
        future = pool.submit(served.post, "/v1/completions", ASKED)
        until(lambda: gate.arrived == 1)
        served.state._tokenizing.submit(release.wait, 60)
        served.server._loop.call_soon_threadsafe(hold)
        assert held.wait(60)
        gate.open()
        until(lambda: gate.steps >= 100 and not llm.engine.has_unfinished)
        assert not future.done()
        release.set()
        assert future.result().json()["choices"][0]["text"] == expected


def test_a_request_that_cannot_be_taken_in_is_the_only_one_to_fail() -> None:
    with serving() as served:
        front = served.state.worker._front
        whole = front.add

        def broken(*_, **named):
            front.add = whole
            raise TypeError("a tokenizer's")

        front.add = broken
        assert served.post("/v1/completions", ASKED).json()["error"]["code"] == "internal"
        assert served.post("/v1/completions", ASKED).status_code == 200
        served.check_idle()


def test_a_broken_engine_says_so() -> None:
    llm = make_llm()

    def broken(*_):
        raise RuntimeError("beyond repair")

    llm.engine.scheduler.schedule = broken
    llm.engine.scheduler.check = broken
    with serving(llm) as served:
        assert served.post("/v1/completions", ASKED).status_code == 500
        until(lambda: served.state.worker.broken is not None)
        with served.client() as client:
            assert (client.get("/health").status_code, client.get("/health").json()) == (503, {"status": "failed"})
        assert served.post("/v1/completions", ASKED).status_code == 503


def test_nobody_waits_for_an_engine_that_has_stopped(pool: ThreadPoolExecutor) -> None:
    """One request in the step that ends it all, one request and one call still in the queue; then all come again."""
    llm = make_llm()
    gate = StepGate(llm)

    def broken(*_):
        raise RuntimeError("beyond repair")

    with serving(llm) as served:
        worker, loop = served.state.worker, served.server._loop
        first = pool.submit(served.post, "/v1/completions", ASKED)
        until(lambda: gate.arrived == 1)
        second = pool.submit(served.post, "/v1/completions", {**ASKED, "stream": True})
        until(lambda: worker.open_completions == 2)
        call = asyncio.run_coroutine_threadsafe(worker.call(lambda engine: 0), loop)
        until(lambda: worker._calls)
        gate._step = llm.engine.recover = broken
        gate.open()
        assert [future.result(30).status_code for future in (first, second)] == [500, 500]
        with pytest.raises(VASError, match="has stopped"):
            call.result(30)
        with pytest.raises(VASError, match="has stopped"):
            asyncio.run_coroutine_threadsafe(worker.call(lambda engine: 0), loop).result(30)
        assert served.post("/v1/completions", ASKED).status_code == 503
        assert worker.open_completions == 0
        asyncio.run_coroutine_threadsafe(worker.idle(), loop).result(30)


def test_a_call_that_nobody_waits_for_any_more_hurts_nobody() -> None:
    gate = threading.Event()
    with serving() as served:
        loop = asyncio.new_event_loop()
        call = served.state.worker.call(lambda engine: gate.wait(60))
        with pytest.raises(TimeoutError):
            loop.run_until_complete(asyncio.wait_for(call, 0.1))
        loop.close()
        gate.set()
        served.complete()
        assert served.state.worker.broken is None


def test_a_stuck_step_is_reported(pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    llm = make_llm()
    gate = StepGate(llm)
    with serving(llm, step_timeout=0.1) as served, served.client() as client:
        future = pool.submit(served.post, "/v1/completions", ASKED)
        until(lambda: client.get("/health").json() == {"status": "stuck"})
        assert 'vas:engine_stuck{model_name="tiny"} 1.0' in client.get("/metrics").text
        records = [record for record in caplog.records if record.getMessage() == "step stuck"]
        assert len(records) == 1
        assert "_held" in records[0].stack
        gate.open()
        assert future.result().status_code == 200
        until(lambda: client.get("/health").json() == {"status": "ok"})


# -- the end -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny model as a folder, for servers in processes of their own."""
    made = tmp_path_factory.mktemp("model")
    tiny_llama(max_positions=2048).save_pretrained(made)
    byte_tokenizer().save_pretrained(made)
    return made


@contextlib.contextmanager
def process(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`vas serve` on a free port: the process and its address."""
    command = [sys.executable, "-m", "vas_engine.cli", "serve", str(folder), "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stdout is not None
            ready = json.loads(running.stdout.readline())
            assert ready["event"] == "ready"
            yield running, ready["url"]
        finally:
            running.kill()


def listening(pid: int) -> list[str]:
    """Addresses of the TCP sockets that a process listens on."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1])
    return found


def test_sigterm_under_load_loses_nothing(folder: Path, pool: ThreadPoolExecutor) -> None:
    with process(folder, "--served-model-name", "tiny", "--max-num-seqs", "4") as (running, url):
        # One socket, on the loopback, and no other channel whose messages somebody might have to unpickle.
        port = int(url.rpartition(":")[2])
        assert listening(running.pid) == [f"0100007F:{port:04X}"]

        begun = threading.Semaphore(0)
        body = {**ASKED, "max_tokens": 1000, "stream": True}

        def read(seed: int) -> list[dict]:
            chunks = []
            with httpx.stream("POST", url + "/v1/completions", json={**body, "seed": seed}, timeout=60) as stream:
                for line in stream.iter_lines():
                    if line and line != "data: [DONE]":
                        chunks.append(json.loads(line.removeprefix("data: ")))
                    if len(chunks) == 1:
                        begun.release()
            return chunks

        futures = [pool.submit(read, seed) for seed in range(4)]
        for _ in range(4):
            assert begun.acquire(timeout=60)
        late = HTTPConnection("127.0.0.1", port, timeout=60)
        with httpx.Client(base_url=url, timeout=60) as client, contextlib.closing(late):
            # It stands still from before the last request is sent until after the signal: it cannot end in between.
            running.send_signal(signal.SIGSTOP)
            late.request("POST", "/v1/completions", json.dumps({**body, "stream": False}), JSON)
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGCONT)
            refused = None
            with contextlib.suppress(httpx.NetworkError, httpx.RemoteProtocolError):  # it has ended
                while client.get("/health").status_code == 200:
                    pass
                refused = client.post("/v1/completions", json=body)
            if refused is not None:
                assert refused.status_code == 503
                assert int(refused.headers["Retry-After"]) >= 1
            # It was sent before the signal, but is looked at after it: it is answered in either case.
            assert late.getresponse().status in (200, 503)
        for future in futures:
            chunks = future.result()
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert running.wait(60) == 0


def test_spans_reach_their_collector(folder: Path) -> None:
    """By the time the server has ended; none of them tells what was asked."""
    proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        with process(folder, "--served-model-name", "tiny", "--otlp-traces-endpoint", endpoint) as (running, url):
            assert httpx.post(url + "/v1/completions", json=ASKED, timeout=60).status_code == 200
            running.send_signal(signal.SIGTERM)
            assert running.wait(60) == 0
        collector.shutdown()
    exports = [proto.ExportTraceServiceRequest.FromString(body) for body in bodies]
    spans = [span for e in exports for r in e.resource_spans for scope in r.scope_spans for span in scope.spans]
    assert [span.name for span in spans] == ["POST /v1/completions"]
    told = {attribute.key: attribute.value for attribute in spans[0].attributes}
    assert told["gen_ai.usage.output_tokens"].int_value == 100
    assert ASKED["prompt"].encode() not in b"".join(bodies)


def test_a_second_signal_does_not_wait(pool: ThreadPoolExecutor) -> None:
    llm = make_llm()
    gate = StepGate(llm)
    with serving(llm) as served, served.client() as client:
        future = pool.submit(served.post, "/v1/completions", ASKED)
        until(lambda: gate.arrived == 1)
        served.server.handle_exit(signal.SIGTERM, None)
        until(lambda: client.get("/health").json() == {"status": "draining"})
        refused = client.post("/v1/completions", json=ASKED)
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
        served.server.handle_exit(signal.SIGINT, None)
        lost = future.exception(60)
        assert isinstance(lost, httpx.TransportError) if lost else future.result().status_code == 500
        gate.open()


def test_code_that_comes_with_a_model_is_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "set_up", lambda as_json: None)  # this process logs as pytest wants it
    marker = tmp_path / "marker"
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}, "model_type": "evil"}
    config["trust_remote_code"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    capsys.readouterr()
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert capsys.readouterr().err.startswith("vas: error: model=")
    assert not marker.exists()


# -- all at once ---------------------------------------------------------------------------------------------


def test_soak(expected: str) -> None:
    soak(80)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_long_soak(expected: str) -> None:
    soak(3000)


def soak(count: int) -> None:
    """Random requests of every sort at once, some of which are given up or fail: the others get their tokens.

    The second half of them takes no memory that the first did not.
    """
    llm = make_llm(max_num_seqs=8, kv_cache_memory="300KiB")  # few enough pages that requests push each other out
    rng = random.Random(3)
    bodies = [
        {
            "model": "tiny",
            "prompt": rng.choice(["Once", "upon a time there was a long prompt", "a"]) * rng.choice([1, 2]),
            "seed": rng.randrange(6),
            "max_tokens": rng.choice([1, 10, 40]),
            "n": rng.choice([1, 1, 3]),
            "ignore_eos": True,
            **rng.choice([{}, {"vas_weights": {"kind": 2.0}}, {"vas_weights": {"long": -2.0}, "vas_candidates": 5}]),
        }
        for _ in range(count)
    ]
    fates = [rng.choice(["read", "read", "stream", "leave", "bad"]) for _ in range(count)]
    texts: dict[str, list[str]] = {}
    with serving(llm, max_waiting=10_000) as served:

        async def live(client: httpx.AsyncClient, body: dict, fate: str) -> None:
            if fate == "bad":
                answer = await client.post("/v1/completions", json={**body, "vas_weights": {"nobody": 1}})
                assert answer.status_code == 400
            elif fate == "leave":
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                    async for _ in stream.aiter_lines():
                        return
            elif fate == "stream":
                parts = [""] * body["n"]
                async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
                    async for line in stream.aiter_lines():
                        if line and line != "data: [DONE]":
                            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                                parts[choice["index"]] += choice["text"]
                texts.setdefault(json.dumps(body), parts)
                assert texts[json.dumps(body)] == parts
            else:
                answer = await client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                found = [choice["text"] for choice in answer.json()["choices"]]
                texts.setdefault(json.dumps(body), found)
                assert texts[json.dumps(body)] == found

        async def run(start: int, end: int) -> None:
            # The client's own queue for connections would take time by the square of what waits in it.
            seats = asyncio.Semaphore(24)

            async def one(client: httpx.AsyncClient, body: dict, fate: str) -> None:
                async with seats:
                    await live(client, body, fate)

            async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:
                await asyncio.gather(
                    *(one(client, *pair) for pair in zip(bodies[start:end], fates[start:end], strict=True))
                )

        half = count // 2
        asyncio.run(run(half, count))
        served.check_idle()
        before = resident()
        asyncio.run(run(0, half))
        served.check_idle()
        assert resident() - before < 64 * 2**20
        assert llm.engine.scheduler.num_preemptions > 0
        assert not served.state.worker._streams
    alone = make_llm()
    for text, found in list(texts.items())[:40]:
        body = json.loads(text)
        sampling = SamplingParams(
            **{name: body[name] for name in ("seed", "max_tokens", "n", "ignore_eos")},
            values=body.get("vas_weights", {}),
            num_candidates=body.get("vas_candidates", 20),
        )
        output = alone.generate(body["prompt"], sampling, use_tqdm=False)[0]
        assert [completion.text for completion in output.outputs] == found
