"""Serving and sampling on a real Ray cluster of this machine, by replicas and workers of which some are killed."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
import pytest
import torch

from tests.integrations.test_documentation import examples
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, InvalidArgumentError, SamplingParams
from vas_engine.errors import VASError
from vas_engine.model import CausalLM
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.rewards import RewardError, load_rewards
from vas_engine.values.artifact import save_value
from vas_engine.values.config import default_config
from vas_engine.values.network import ValueNetwork

POSITIONS = 1024
pytestmark = pytest.mark.timeout(1800)  # a cluster takes its time on a busy machine


def test_without_ray_the_extra_is_named(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vas_engine.integrations.ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(VASError, match=r"pip install 'vas-engine\[ray\]'"):
        importlib.import_module("vas_engine.integrations.ray")


def test_what_cannot_work_is_refused_before_a_cluster_is_asked() -> None:
    pytest.importorskip("ray", reason="needs pip install 'vas-engine[ray]'")
    from vas_engine.integrations.ray import build_openai_app, collect_on_ray

    llm = {"model": "m"}
    for args, told in (
        ({"llms": llm}, "did you mean 'llm'"),
        ({"llm": {}}, "folder or hub name"),
        ({"llm": llm, "settings": {"api_key": "k"}}, "did you mean 'api_keys'"),
        ({"llm": llm, "settings": {"admin_key": "k"}}, "one of them"),
        ({"llm": llm, "settings": {"limits": {"prompt": 1}}}, "did you mean 'prompts'"),
    ):
        with pytest.raises(InvalidArgumentError, match=told):
            build_openai_app(args)
    with pytest.raises(InvalidArgumentError, match="folder or hub name"):
        collect_on_ray({}, ["a"], ["length"], "out")


def test_what_goes_to_one_replica() -> None:
    """Requests of one profile, or the same weighed values, whose prompts begin alike; strengths do not part them."""
    pytest.importorskip("ray", reason="needs pip install 'vas-engine[ray]'")
    from vas_engine.integrations.ray.serve import PREFIX_CHARS, affinity

    def key(**request) -> str:
        return affinity(json.dumps(request).encode())

    start = "x" * PREFIX_CHARS
    one = key(prompt=start + "a", vas_weights={"kind": 1.0})
    assert one == key(prompt=start + "b", vas_weights={"kind": 2.0}, seed=3)
    question = {"role": "user", "content": "Who?"}
    asked = key(messages=[{"role": "system", "content": "S"}, question])
    assert asked == key(messages=[{"role": "system", "content": "S"}, question, {"role": "assistant", "content": "I"}])
    others = [
        key(prompt=start + "a"),
        key(prompt=start + "a", vas_weights={"mood": 1.0}),
        key(prompt=start + "a", vas_profile="kind"),
        key(prompt="y" + start, vas_weights={"kind": 1.0}),
        key(messages=[{"role": "system", "content": "T"}, question]),
    ]
    assert len({one, asked, *others}) == 7
    assert affinity(b"no JSON") == affinity(b"[]") == affinity(b"{}") == ""


# -- a cluster ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray on this machine, with more CPUs than it has: nothing here is about speed."""
    ray = pytest.importorskip("ray", reason="needs pip install 'vas-engine[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # On a busy machine Ray would take its own proxy for dead.
    os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = os.environ["RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S"] = "300"
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=200 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """Folders of a tiny random model and of a value for it, by the names that the examples of the page use."""
    folder = tmp_path_factory.mktemp("ray")
    tokenizer = byte_tokenizer()
    tiny_llama(max_positions=POSITIONS).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lm = CausalLM.load(folder / "model")
    torch.manual_seed(1)
    value = ValueNetwork(default_config("reader", lm, ["kind"])).bind(lm)
    with torch.no_grad():
        value.heads.output.weight.mul_(12.0)
    save_value(folder / "value", value, tokenizer)
    (folder / "prompts.txt").write_text("Once\nupon a time\n")
    return {"MODEL": str(folder / "model"), "VALUE": str(folder / "value")}


@pytest.fixture(scope="module")
def llm(made) -> dict:
    """Arguments of LLM. So few seats that requests wait in each replica."""
    return {
        "model": made["MODEL"],
        "values": {"kind": made["VALUE"]},
        "kv_cache_memory": "16MiB",
        "max_num_seqs": 4,
        "device": "cpu",
    }


@pytest.fixture(scope="module")
def local(llm) -> LLM:
    return LLM(**llm)


# -- serving -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(cluster) -> Iterator[str]:
    """Address of Ray Serve's HTTP proxy."""
    from ray import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray.serve._private.api.HTTP_PROXY_TIMEOUT", 900)  # a minute is too little on a busy machine
        serve.start(http_options={"port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def url(proxy, llm) -> Iterator[str]:
    """Two replicas of the engine."""
    from ray import serve

    from vas_engine.integrations.ray import build_openai_app

    settings = {"model_name": "tiny", "api_keys": ["secret"], "drain_timeout": 1.0}
    engine = {"num_replicas": 2, "max_ongoing_requests": 64}
    serve.run(build_openai_app({"llm": llm, "settings": settings, "engine": engine}))
    yield proxy
    serve.delete("default")


class StreamLost(Exception):
    """An event said so."""


class Client(httpx.Client):
    def __init__(self, url: str) -> None:
        super().__init__(base_url=url, timeout=120, headers={"Authorization": "Bearer secret"})

    def complete(self, request: dict) -> str:
        answer = self.post("/v1/completions", json={"model": "tiny", **request})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    def stream(self, request: dict) -> Iterator[str]:  # type: ignore[override]
        body = {"model": "tiny", "stream": True, **request}
        with super().stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise StreamLost(event["error"]["message"])
                    yield event["choices"][0]["text"]
                elif line:
                    assert line == "data: [DONE]"

    def counts(self, metric: str) -> set[float]:
        """A count of each replica; those that are the same are one. Any replica answers, so many are asked."""
        pages = [self.get("/metrics").text for _ in range(40)]
        return {float(line.split()[-1]) for page in pages for line in page.splitlines() if line.startswith(metric)}


def requests(count: int, max_tokens: int) -> list[dict]:
    """Plain and guided ones by turns."""
    weights = [{}, {"vas_weights": {"kind": 3.0}}]
    return [
        {"prompt": f"{place} times", "seed": place, "max_tokens": max_tokens, "ignore_eos": True, **weights[place % 2]}
        for place in range(count)
    ]


def expected(local: LLM, asked: list[dict]) -> list[str]:
    """What one engine answers."""
    params = [
        SamplingParams(
            seed=each["seed"],
            max_tokens=each["max_tokens"],
            ignore_eos=True,
            values=each.get("vas_weights"),
        )
        for each in asked
    ]
    outputs = local.generate([each["prompt"] for each in asked], params, use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


@pytest.mark.slow
def test_two_replicas_answer_as_one(url, local) -> None:
    with Client(url) as client, ThreadPoolExecutor(12) as pool:
        alike = [{"prompt": "One beginning", "seed": 1, "max_tokens": 5}] * 6
        assert len(set(pool.map(client.complete, alike))) == 1
        assert client.counts("vllm:generation_tokens_total") == {0.0, 30.0}  # one replica has answered all of them

        asked = requests(12, 60)
        wanted = expected(local, asked)
        assert list(pool.map(client.complete, asked)) == wanted
        first, second = sorted(client.counts("vllm:generation_tokens_total"))
        assert 0 < first < second
        assert first + second == 30 + 12 * 60

        streamed = list(pool.map(lambda request: list(client.stream(request)), asked))
        assert ["".join(parts) for parts in streamed] == wanted
        assert min(map(len, streamed)) > 2

        bad = client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "vas_weights": {"knd": 1}})
        assert bad.status_code == 400
        assert "did you mean 'kind'" in bad.json()["error"]["message"]
        assert client.post("/v1/completions", content=b"{}", headers={"Content-Type": "a/b"}).status_code == 415
        assert client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get("/").headers["content-type"].startswith("text/html")


@pytest.mark.slow
def test_a_replica_killed_under_load_loses_nothing(url, local) -> None:
    """Every request that is not streamed is answered, and every stream that had not begun; the others say so."""
    import ray

    asked = requests(24, 300)
    wanted = expected(local, asked)
    begun = threading.Semaphore(0)

    def stream(request: dict) -> tuple[list[str], bool]:
        parts = []
        try:
            for part in client.stream(request):
                parts.append(part)
                begun.release()
        except StreamLost:
            return parts, False
        return parts, True

    with Client(url) as client, ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(client.complete if place < 12 else stream, each) for place, each in enumerate(asked)]
        for _ in range(12):
            assert begun.acquire(timeout=60)
        names = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "#Engine#" in actor["name"]]
        assert len(names) == 2
        ray.kill(ray.get_actor(names[0]["name"], namespace=names[0]["namespace"]))
        assert not all(answer.done() for answer in answers)
        assert [answer.result() for answer in answers[:12]] == wanted[:12]
        streams = [answer.result() for answer in answers[12:]]
    for (parts, whole), answer in zip(streams, wanted[12:], strict=True):
        text = "".join(parts)
        assert text == answer if whole else parts and answer.startswith(text)
    assert any(whole for _, whole in streams)


@pytest.mark.slow
def test_a_client_that_goes_ends_its_request(url) -> None:
    asked = {"prompt": "Once", "n": 16, "max_tokens": 1000, "ignore_eos": True, "vas_weights": {"kind": 1.0}}
    with Client(url) as client:
        parts = client.stream(asked)
        next(parts)
        parts.close()
        while client.counts("vllm:num_requests_running") != {0.0}:
            pass
        assert 0 < max(client.counts("vllm:generation_tokens_total")) < 16 * 1000


@pytest.mark.slow
def test_replicas_come_and_go_with_the_load(proxy, llm, local) -> None:
    """One replica at rest, two under load, one again; nothing that was asked meanwhile is lost or another."""
    from ray import serve

    from vas_engine.integrations.ray import build_openai_app

    scaling = {
        "min_replicas": 1,
        "max_replicas": 2,
        "target_ongoing_requests": 2,
        "upscale_delay_s": 0,
        "downscale_delay_s": 1,
        "metrics_interval_s": 0.2,
        "look_back_period_s": 1,
    }
    settings = {"model_name": "tiny", "api_keys": ["secret"], "drain_timeout": 30.0}
    serve.run(build_openai_app({"llm": llm, "settings": settings, "engine": {"autoscaling_config": scaling}}))

    def replicas() -> int:
        return serve.status().applications["default"].deployments["Engine"].replica_states.get("RUNNING", 0)

    def keep_asking(request: dict) -> list[str]:
        texts = []
        while not enough.is_set():
            texts.append(client.complete(request))
        return texts

    enough = threading.Event()
    try:
        assert replicas() == 1
        asked = requests(12, 60)
        wanted = expected(local, asked)
        with Client(proxy) as client, ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(keep_asking, request) for request in asked]
            try:
                while replicas() < 2:
                    assert not any(answer.done() for answer in answers)
                    time.sleep(0.2)
            finally:
                enough.set()
            for answer, text in zip(answers, wanted, strict=True):
                assert set(answer.result()) == {text}
            while replicas() > 1:
                time.sleep(0.2)
            assert client.complete(asked[0]) == wanted[0]
    finally:
        enough.set()
        serve.delete("default")


@pytest.mark.slow
def test_a_request_that_kills_its_replica_is_given_up(proxy, tmp_path) -> None:
    """One that loses its replica before any of its body has another answer it; afterwards it is told so; none waits
    where too many do."""
    from ray import serve
    from starlette.applications import Starlette
    from starlette.routing import Route

    from vas_engine.integrations.ray.serve import ATTEMPTS, Dispatcher

    class Mortal:
        async def answer(self, scope, body):
            when, name = json.loads(body)
            died = Path(name).exists()
            Path(name).write_text(Path(name).read_text() + "x" if died else "x")
            yield [{"type": "http.response.start", "status": 200, "headers": []}]
            if when == "always" or (when == "first" and not died):
                await asyncio.sleep(0.5)  # so that the start has arrived
                os._exit(1)
            while when == "busy" and not Path(name + "-go").exists():
                await asyncio.sleep(0.02)
            yield [{"type": "http.response.body", "body": b"some", "more_body": True}]
            if when == "late":
                while not Path(name + "-seen").exists():
                    await asyncio.sleep(0.02)
                os._exit(1)
            yield [{"type": "http.response.body", "body": b" more", "more_body": False}]

    def build():
        handle = serve.get_deployment_handle("Mortal", app_name="mortal")
        return Starlette(routes=[Route("/{path:path}", Dispatcher(handle))])

    mortal = serve.deployment(Mortal, name="Mortal").options(max_ongoing_requests=1, max_queued_requests=1)
    ingress = serve.deployment(serve.ingress(build)(), name="Front")
    serve.run(ingress.bind(mortal.bind()), name="mortal", route_prefix="/mortal")
    calls = {when: tmp_path / when for when in ("never", "first", "late", "always", "busy")}

    def post(when: str) -> httpx.Response:
        return httpx.post(proxy + "/mortal/x", json=[when, str(calls[when])], timeout=120)

    try:
        for when, tries in (("never", 1), ("first", 2)):
            assert post(when).text == "some more"
            assert len(calls[when].read_text()) == tries
        body = json.dumps(["late", str(calls["late"])])
        with httpx.stream("POST", proxy + "/mortal/x", content=body, timeout=120) as answer:
            parts = answer.iter_text()
            assert next(parts) == "some"
            (tmp_path / "late-seen").touch()
            assert "".join(parts).startswith('data: {"error"')
        assert len(calls["late"].read_text()) == 1
        with ThreadPoolExecutor(3) as pool:
            runs = pool.submit(post, "busy")
            while not calls["busy"].exists():
                time.sleep(0.02)
            coming = as_completed([runs, *(pool.submit(post, "busy") for _ in range(2))])
            assert next(coming).result().status_code == 429  # another waits
            (tmp_path / "busy-go").touch()
            assert [other.result().text for other in coming] == ["some more"] * 2
        answer = post("always")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert len(calls["always"].read_text()) == ATTEMPTS
    finally:
        serve.delete("mortal")


# -- sampling ----------------------------------------------------------------------------------------------

GATE = """
import os, pathlib, time

FOLDER = pathlib.Path(__file__).parent

def gate(prompt, response):
    "The response's length; for the last prompt not before the file `go` is there. Leaves the worker's process id."
    if prompt == "last":
        (FOLDER / "part").write_text(str(os.getppid()))
        os.replace(FOLDER / "part", FOLDER / "worker")
        while not (FOLDER / "go").exists():
            time.sleep(0.02)
    return float(len(response))

def broken(prompt, response):
    raise ValueError("no")
"""
PROMPTS = ["Once", "upon", "a time", "there was", "last"]
CONFIG = CollectConfig(samples=20, max_tokens=12, seed=3, shard_rows=16, values={"kind": 2.0})


@pytest.fixture
def gate(tmp_path, monkeypatch) -> Path:
    """A folder with a module of rewards."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "gate.py").write_text(GATE)
    monkeypatch.syspath_prepend(folder)
    return folder


def when_there(path: Path, act) -> threading.Thread:
    """Does something in a thread once a file is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.02)
        act(path)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_workers_collect_what_one_process_does(cluster, gate, llm, local, tmp_path) -> None:
    """Interrupted, gone on with by other workers, of which one is killed: the same folder."""
    from vas_engine.integrations.ray import collect_on_ray

    path = os.pathsep.join([str(gate), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = {"use_tqdm": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
    out = tmp_path / "ray"

    def run(workers: int, rewards=("length", "gate:gate"), config=CONFIG):
        return collect_on_ray(llm, PROMPTS, rewards, out, config, workers=workers, **options)

    when_there(gate / "worker", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(2)
    shards = json.loads((out / "index.json").read_text())["shards"]
    assert 0 < len(shards) < 7
    before = {name: (out / name).stat().st_mtime_ns for name in shards}

    def kill(path: Path) -> None:
        os.kill(int(path.read_text()), signal.SIGKILL)
        (gate / "go").touch()

    (gate / "worker").unlink()
    thread = when_there(gate / "worker", kill)
    rollouts = run(1)
    thread.join()
    assert {name: (out / name).stat().st_mtime_ns for name in shards} == before
    plain = collect(local, PROMPTS, load_rewards(["length", "gate:gate"]), tmp_path / "plain", CONFIG, use_tqdm=False)
    assert rollouts.header == plain.header
    for row, same in zip(rollouts, plain, strict=True):
        assert row.log_ratios == pytest.approx(same.log_ratios, abs=1e-4)  # rounding depends on the batch
        assert dataclasses.replace(row, log_ratio=0, log_ratios=[]) == dataclasses.replace(
            same, log_ratio=0, log_ratios=[]
        )
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "plain").iterdir()}

    with pytest.raises(InvalidArgumentError, match="seed=3, not 4"):
        run(1, config=CollectConfig(samples=20, max_tokens=12, seed=4, shard_rows=16, values={"kind": 2.0}))
    out = tmp_path / "other"
    with pytest.raises(InvalidArgumentError, match="did you mean 'length'"):
        run(1, ["lenght"])
    with pytest.raises(RewardError, match="ValueError") as raised:
        run(1, ["gate:broken"])
    assert "sample" in raised.value.__notes__[0]


@pytest.mark.slow
def test_generating_goes_on_from_ray_s_checkpoints(cluster, llm, local, tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import ray.data

    from vas_engine.integrations.ray import ray_generate

    rows = [{"id": i, "prompt": f"{i} times" if i != 5 else "x" * 2000, "seed": 100 + i} for i in range(12)]
    for part, name in ((rows[:7], "a"), (rows[7:], "b")):
        (tmp_path / name).mkdir()
        parquet.write_table(pa.Table.from_pylist(part), tmp_path / name / f"{name}.parquet")
    params = SamplingParams(max_tokens=8, n=2, values={"kind": 2.0})
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = ray.data.checkpoint.CheckpointConfig(
        "id", str(tmp_path / "checkpoint"), delete_checkpoint_on_success=False
    )
    try:
        for folders in (["a"], ["a", "b"]):
            dataset = ray.data.read_parquet([str(tmp_path / name) for name in folders])
            ray_generate(dataset, llm, params, workers=2, batch_size=3).write_parquet(str(tmp_path / "out"))
    finally:
        context.checkpoint_config = None
    made = sorted(parquet.read_table(tmp_path / "out").to_pylist(), key=lambda row: row["id"])
    assert [row["id"] for row in made] == list(range(12))  # each once
    good = [row for row in made if row["id"] != 5]
    outputs = local.generate(
        [row["prompt"] for row in good], [params.replace(seed=row["seed"]) for row in good], use_tqdm=False
    )
    assert [row["responses"] for row in good] == [[c.text for c in output.outputs] for output in outputs]
    assert [row["seeds"] for row in good] == [[c.seed for c in output.outputs] for output in outputs]
    assert all(row["error"] is None for row in good)
    assert "2000" in made[5]["error"]


# -- the page ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_documentation(proxy, made, tmp_path, monkeypatch) -> None:
    from ray import serve

    monkeypatch.chdir(tmp_path)
    Path("prompts.parquet").parent.mkdir(exist_ok=True)
    space = {**made, "PROMPTS": ["Once", "upon a time"]}
    try:
        exec(examples("ray.md"), space)
        answer = httpx.post(
            proxy + "/v1/completions",
            json={"model": made["MODEL"], "prompt": "Once", "vas_weights": {"kind": 2}},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
    finally:
        serve.delete("default")
    assert len(space["rollouts"]) == 2 * 4
    assert {len(row["responses"]) for row in space["rows"]} == {1}
