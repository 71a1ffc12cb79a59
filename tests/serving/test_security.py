"""The known holes of LLM servers, each tried."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import logging
import random
import resource
import socket
from pathlib import Path

import httpx
import pytest

from tests.serving.conftest import Served, make_llm, serving
from vas_engine.serving import security
from vas_engine.serving.errors import ServingError
from vas_engine.serving.security import Keys, check_shape, salt_of
from vas_engine.serving.settings import Limits

KEYS = ("first-key", "second-key")
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def locked():
    """A server with two keys, an admin key and prefixes salted by key."""
    with serving(api_keys=KEYS, admin_key="root-key", salt_per_key=True) as running:
        yield running


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# -- keys ----------------------------------------------------------------------------------------------------


def test_every_route_but_health_needs_a_key(locked: Served) -> None:
    app = locked.server.config.app
    paths = {route.path for route in app.routes} | {
        "/openapi.json",
        "/docs",
        "/redoc",
        "/",
        "/nowhere",
        "/v1/../metrics",
    }
    assert {"/v1/completions", "/metrics", "/tokenize", "/v1/models"} <= paths
    with locked.client() as client:
        assert client.get("/health").status_code == 200
        for path in paths - {"/health"}:
            for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
                answer = client.request(method, path.replace("{", "").replace("}", ""))
                assert answer.status_code == 401, (method, path)
                assert "WWW-Authenticate" in answer.headers
        assert client.get("//health").status_code == 401
        assert client.get("/health/").status_code == 401
        assert client.get("/HEALTH").status_code == 401


def test_a_key_opens(locked: Served) -> None:
    with locked.client() as client:
        basic = base64.b64encode(b"anyone:first-key").decode()
        for given in ("Bearer first-key", "bearer second-key", "Bearer root-key", f"Basic {basic}"):
            assert client.get("/v1/models", headers={"Authorization": given}).status_code == 200
        wrong = ["first-key", "Bearer first-ke", "Bearer first-key2", "", "Bearer", "Basic !!!", "Basic Zmlyc3Qta2V5"]
        for given in wrong:
            assert client.get("/v1/models", headers={"Authorization": given}).status_code == 401
        raw = "Bearer clé".encode("latin-1")
        assert client.get("/v1/models", headers={b"authorization": raw}).status_code == 401


def test_admin_routes_need_the_admin_key(locked: Served, served: Served) -> None:
    with locked.client() as client:
        for path in ("/admin", "/admin/values", "/admin/nowhere"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers=bearer("first-key")).status_code == 401
    with served.client() as client:
        assert code(client.get("/admin/values")) == (404, "not_found")


def test_keys_are_compared_whole_and_all(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = [], hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return compare(a, b)

    monkeypatch.setattr(security.hmac, "compare_digest", noted)
    assert Keys(KEYS).match("first-key") is not None
    assert len(compared) == 2  # the match does not end the search
    assert all(len(a) == len(b) == 32 for a, b in compared)


def test_keys_do_not_show(locked: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        locked.post("/v1/completions", {"model": "tiny", "prompt": "sesame"}, headers=bearer("first-key"))
        locked.post("/v1/completions", {"model": "tiny", "prompt": "sesame", "n": 0}, headers=bearer("first-key"))
    for secret in (*KEYS, "root-key", "sesame"):
        assert secret not in caplog.text
        assert secret not in repr(locked.state.settings)


def test_a_web_page_cannot_reach_a_server_without_keys() -> None:
    with serving(hosts=("127.0.0.1", "localhost", "::1")) as local, local.client() as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "[::1]:80"}).status_code == 200
        for name in ("evil.example:8000", "", "[::1", "127.0.0.1.evil.example"):
            assert client.get("/v1/models", headers={"Host": name}).status_code in (400, 403)
        # What a page may send without asking first is no JSON.
        body = json.dumps({"model": "tiny", "prompt": "a"})
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = client.post("/v1/completions", content=body, headers={"Content-Type": kind})
            assert code(answer) == (415, "unsupported_media_type")
        assert "access-control-allow-origin" not in client.get("/v1/models", headers={"Origin": "http://e"}).headers


# -- prefixes ------------------------------------------------------------------------------------------------


def hits(served: Served, prompt: str, key: str, **body) -> int:
    """Tokens of a prompt that the prefix cache knew."""
    before = served.llm.engine.blocks.prefix_hit_tokens
    served.post("/v1/completions", {"model": "tiny", "prompt": prompt, "max_tokens": 1, **body}, headers=bearer(key))
    return served.llm.engine.blocks.prefix_hit_tokens - before


def test_no_prefix_is_shared_between_keys(locked: Served) -> None:
    prompt = "what the first one asked, and nobody else"
    assert hits(locked, prompt, "first-key") == 0
    assert hits(locked, prompt, "first-key") == 32
    assert hits(locked, prompt, "second-key") == 0
    assert hits(locked, prompt, "first-key", cache_salt="alice") == 0
    assert hits(locked, prompt, "first-key", cache_salt="alice") == 32
    assert hits(locked, prompt, "second-key", cache_salt="alice") == 0
    assert hits(locked, prompt, "first-key", vas_weights={"long": 1.0}) == 0  # its pages hold more


def test_salts_are_apart() -> None:
    a, b = b"a" * 32, b"b" * 32
    salts = [salt_of(key, own, per_key) for key in (None, a, b) for own in (None, "", "x") for per_key in (True, False)]
    assert len(set(salts)) == 2 + 2 + 2  # none, x, a, a + x, b, b + x
    assert salt_of(a, "x", True) != salt_of(a, None, True)


# -- bodies --------------------------------------------------------------------------------------------------


def test_sizes_are_bounded(served: Served) -> None:
    too_much = {
        "n": 17,
        "best_of": 17,
        "logprobs": 21,
        "stop": ["x"] * 17,
        "stop_token_ids": list(range(17)),
        "logit_bias": {str(i): 0.1 for i in range(301)},
        "vas_candidates": 101,
        "vas_return_candidates": 21,
        "prompt": ["x"] * 65,
    }
    for param, value in too_much.items():
        answer = served.post("/v1/completions", {"model": "tiny", "prompt": "a", param: value})
        assert code(answer) == (400, "limit"), param
        assert answer.json()["error"]["param"] == param
    assert code(served.post("/v1/completions", {"model": "tiny", "prompt": "a", "stop": "x" * 257})) == (400, "limit")
    assert code(served.post("/v1/completions", {"model": "tiny", "prompt": "x" * 10**6})) == (400, "limit")
    assert code(served.post("/v1/completions", {"model": "tiny", "prompt": [1] * 10**5})) == (400, "limit")
    assert code(served.post("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21})) == (400, "limit")
    many = {"model": "tiny", "messages": CHAT["messages"] * 1025}
    assert code(served.post("/v1/chat/completions", many)) == (400, "limit")
    long = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 10**5}]}
    assert code(served.post("/v1/chat/completions", long)) == (400, "limit")
    parts = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 10**5}]}]}
    assert code(served.post("/v1/chat/completions", parts)) == (400, "limit")
    for huge in (2**31, 10**30, -1, 1.5, "1", True):
        answer = served.post("/v1/completions", {"model": "tiny", "prompt": "a", "n": huge})
        assert answer.status_code == 400, huge


def test_bodies_are_bounded(served: Served) -> None:
    headers = {"Content-Type": "application/json"}
    with served.client() as client:
        announced = {**headers, "Content-Length": str(2**40)}
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "x", **announced}.items())
            raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{lines}\r\n".encode())
            assert b" 413 " in raw.recv(1000)
        sent = 0

        def endless():
            nonlocal sent
            for _ in range(10_000):
                sent += 2**16
                yield b" " * 2**16

        # The server answers, and stops reading, long before the end.
        with contextlib.suppress(httpx.WriteError):
            assert client.post("/v1/completions", content=endless(), headers=headers).status_code == 413
        assert sent < 2**16 * 10_000


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 33 + b"]" * 33,
        b'{"model": "tiny", "prompt": ' + b"[" * 32 + b"]" * 32 + b"}",
        b'{"model": "tiny", "prompt": [' + b"[]," * 300_000 + b"[]]}",
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "vas_weights": {"kind": 1e999}}',
        b'{"model": "tiny", "prompt": "a", "vas_weights": {"kind": -Infinity}}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"-1": 1}}',
        b'{"model": "tiny", "prompt": "a", "metadata": {' + b",".join(b'"%d": 1' % i for i in range(9000)) + b"}}",
        b'{"model": "\xff\xfe", "prompt": "a"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'"' + b"\\" * 100_001,
        b'"' + b'\\"' * 2_000_000,  # in a time that grows with the square of it this would never be done
        '{"model": "tiny", "prompt": "a"}'.encode("utf-16-le"),
        b"null",
        b"[]",
        b"",
        b"\x80\x04\x95.",
    ],
    ids=lambda body: repr(body[:30]),
)
def test_malformed_bodies(served: Served, body: bytes) -> None:
    with served.client() as client:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code in (400, 404, 413), answer.text
            assert len(answer.text) < 2000
            assert answer.json()["error"]["message"]


def test_depth_is_counted_outside_texts() -> None:
    limits = Limits(json_depth=3, json_items=4)
    for fine in (b'{"a": [[1, 2], "[[[[[[", "\\"[[[[", "\\\\"]}', b"]]]]", b"", b'{"a": ",,,,,,,"}'):
        check_shape(fine, limits)
    for endless in (b'"\\"[[[[', b'"[[[[\\'):
        check_shape(endless, limits)
    hidden = '["∀", [[[1]]]]'.encode("utf-16-le")  # whose bytes are those of texts where its brackets are not
    for bad in (b'{"a": [[{}]]}', b"[[[[", b'["\\\\", [[[1]]]]', b"[1,2,3,4,5,6]", hidden):
        with pytest.raises(ServingError):
            check_shape(bad, limits)


def test_a_body_that_never_arrives(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_TIMEOUT", 0.2)
    with served.client() as client, socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
        lines = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n"
        raw.sendall(f"POST /v1/completions HTTP/1.1\r\n{lines}{{".encode())
        assert b" 408 " in raw.recv(1000)


# -- nothing from clients is run -----------------------------------------------------------------------------


def test_no_template_code_or_address_from_clients(served: Served) -> None:
    template = "{{ cycler.__init__.__globals__.os.popen('id').read() }}"
    fields = {
        "chat_template": template,
        "chat_template_kwargs": {"chat_template": template, "tokenize": True},
        "documents": [{"text": "x"}],
        "tools": [{"type": "function", "function": {"name": "x"}}],
        "guided_regex": "(a+)+$",
        "guided_json": {"$ref": "http://169.254.169.254/"},
        "structured_outputs": {"regex": "(a+)+$"},
        "logits_processors": ["os.system"],
        "prompt_embeds": "gASVAAAAAAAAAA==",
        "mm_processor_kwargs": {"trust_remote_code": True},
        "lora_path": "/etc/passwd",
    }
    for name, value in fields.items():
        answer = served.post("/v1/chat/completions", {**CHAT, name: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}}
    answer = served.post("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": [image]}]})
    assert answer.status_code == 400
    # Text that looks like a template is text.
    messages = [{"role": "user", "content": template}]
    tokens = served.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert bytes(tokens) == f"[user]{template}[bot]".encode()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "tiny/../tiny", "tiny\x00", "file:///x"]
)
def test_model_names_are_only_compared(served: Served, name: str) -> None:
    answer = served.post("/v1/completions", {"model": name, "prompt": "a"})
    assert code(answer) == (404, "model_not_found")
    with served.client() as client:
        assert client.get(f"/v1/models/{name.encode().hex()}").status_code == 404


def test_a_message_of_an_error_is_short_and_json(served: Served) -> None:
    answer = served.post("/v1/completions", {"model": "m\ud800" * 80, "prompt": "a"})
    assert answer.status_code in (400, 404)
    assert len(answer.content) < 1500


def test_an_internal_error_tells_nothing() -> None:
    llm = make_llm()

    def broken(*_, **__):
        raise RuntimeError("secret path /srv/weights")

    llm.engine.lm.forward = broken
    with serving(llm) as running:
        answer = running.post("/v1/completions", {"model": "tiny", "prompt": "a"})
        assert code(answer) == (500, "internal")
        assert "secret" not in answer.text


# -- in bulk -------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Keeps pytest from keeping a line for every request."""
    for name in ("vas_engine.serving", "httpx"):
        caplog.set_level(logging.WARNING, name)


def test_malformed_requests(quiet) -> None:
    malformed(300)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_malformed_requests(quiet) -> None:
    malformed(10_000)


def malformed(count: int) -> None:
    """Whole bodies with bytes, fields and types wrong: never a 5xx, nothing held, and memory does not grow."""
    rng = random.Random(0)
    whole = {"model": "tiny", "prompt": "Once", "max_tokens": 3, "stop": ["x"], "vas_weights": {"kind": 1.0}, "n": 1}
    wrong = [None, True, -1, 1e300, "", "x", [], [[]], {}, {"a": {}}, [None], "\ud800", 2**70, [1.5], "\0"]

    def spoiled() -> bytes:
        body: dict = dict(whole)
        for _ in range(rng.randrange(1, 3)):
            body[rng.choice([*body, "logprobs", "logit_bias", "vas_tail", "stream", "nobody"])] = rng.choice(wrong)
        content = bytearray(json.dumps(body).encode())
        for _ in range(rng.choice([0, 0, 1, 5])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(content[: rng.choice([None, None, rng.randrange(len(content))])])

    async def run(url: str, number: int) -> None:
        statuses = set()
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=16)) as client:

            async def one(content: bytes) -> None:
                path = rng.choice(["/v1/completions", "/v1/chat/completions", "/tokenize"])
                answer = await client.post(path, content=content, headers={"Content-Type": "application/json"})
                statuses.add(answer.status_code)

            for start in range(0, number, 200):  # tasks of the client are memory of this process too
                await asyncio.gather(*(one(spoiled()) for _ in range(start, min(start + 200, number))))
        assert 400 in statuses
        assert all(status < 500 for status in statuses), statuses

    with serving(max_waiting=100_000) as served:
        expected = served.complete("Once", seed=1)["choices"]
        asyncio.run(run(served.url, count // 3))
        served.check_idle()
        before = resident()
        asyncio.run(run(served.url, count - count // 3))
        served.check_idle()
        assert served.complete("Once", seed=1)["choices"] == expected
        assert resident() - before < 64 * 2**20


def resident() -> int:
    """Bytes of memory this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
