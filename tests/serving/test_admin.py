"""Profiles, and values that come and go while requests run."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml

from tests.serving.conftest import Served, make_llm, serving
from tests.serving.test_faults import StepGate, until
from vas_engine.errors import InvalidArgumentError
from vas_engine.serving.profiles import Profiles
from vas_engine.values.artifact import save_value
from vas_engine.values.config import default_config
from vas_engine.values.network import ValueNetwork

KEY = {"Authorization": "Bearer root"}
GUIDED = {"prompt": "Once", "seed": 5, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of values: "polite/v1", one that is broken, one made for another model, and ways out."""
    root = tmp_path_factory.mktemp("values")
    bare = make_llm()
    torch.manual_seed(7)
    network = ValueNetwork(default_config("side", bare.lm, ["polite"])).bind(bare.lm)
    with torch.no_grad():
        network.heads.output.weight.mul_(12.0)
    save_value(root / "polite" / "v1", network, bare.tokenizer)
    other = root / "other"
    save_value(other, network, bare.tokenizer)
    config = json.loads((other / "config.json").read_text())
    config["base"]["weights"] = "0" * 64
    (other / "config.json").write_text(json.dumps(config))
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    outside = tmp_path_factory.mktemp("outside")
    save_value(outside / "stolen", network, bare.tokenizer)
    (root / "link").symlink_to(outside / "stolen")
    (root / "circle").symlink_to(root / "circle")
    return root


@pytest.fixture
def server(folder: Path):
    with serving(admin_key="root", values_dir=folder) as running:
        yield running
        running.check_idle()


def names(served: Served) -> list[str]:
    with served.client() as client:
        return client.get("/v1/models").json()["data"][0]["vas_values"]


def load(served: Served, name: str, path: str):
    return served.post("/admin/values", {"name": name, "path": path}, headers=KEY)


def unload(served: Served, name: str):
    with served.client() as client:
        return client.delete(f"/admin/values/{name}", headers=KEY)


def test_a_value_comes_and_goes(server: Served) -> None:
    plain = server.complete(**GUIDED)["choices"][0]["text"]
    answer = load(server, "polite", "polite/v1")
    assert answer.status_code == 200, answer.text
    assert [value["name"] for value in answer.json()["values"]] == ["kind", "long", "polite"]
    assert names(server) == ["kind", "long", "polite"]
    steered = server.complete(**GUIDED, vas_weights={"polite": 4.0})["choices"][0]["text"]
    assert steered != plain
    assert load(server, "polite", "polite/v1").status_code == 400  # the name is taken
    assert unload(server, "polite").status_code == 200
    assert names(server) == ["kind", "long"]
    assert unload(server, "polite").status_code == 400
    assert server.post("/v1/completions", {"model": "tiny", **GUIDED, "vas_weights": {"polite": 1}}).status_code == 400
    assert load(server, "polite", "polite/v1").status_code == 200
    assert server.complete(**GUIDED, vas_weights={"polite": 4.0})["choices"][0]["text"] == steered


def step_until(busy: Served, gate: StepGate, future: Future) -> None:
    """Lets the engine take a step for each thing that is to happen between two of them, until all have."""
    while not future.done():
        until(lambda: future.done() or not busy.state.worker._commands.empty())
        arrived = gate.arrived
        gate.permit()
        until(lambda: future.done() or gate.arrived > arrived)  # noqa: B023


def test_requests_that_run_are_not_disturbed(folder: Path) -> None:
    llm = make_llm()
    weights = {"vas_weights": {"kind": 3.0, "long": -1.0}}
    with serving() as calm:
        expected = [calm.complete(**GUIDED, **weights), calm.complete(**GUIDED)]
    gate = StepGate(llm)
    with serving(llm, admin_key="root", values_dir=folder) as busy, ThreadPoolExecutor() as pool:
        running = [pool.submit(busy.complete, **GUIDED, **weights), pool.submit(busy.complete, **GUIDED)]
        until(lambda: busy.state.worker.open_completions == 2)
        gate.permit(10)
        until(lambda: gate.arrived == 11)
        loading = pool.submit(load, busy, "polite", "polite/v1")
        step_until(busy, gate, loading)
        assert loading.result().status_code == 200
        leaving = pool.submit(unload, busy, "kind")
        step_until(busy, gate, leaving)
        listed = {value["name"]: value["unloading"] for value in leaving.result().json()["values"]}
        assert listed == {"kind": True, "long": False, "polite": False}
        assert names(busy) == ["long", "polite"]
        gate.open()
        for future, whole in zip(running, expected, strict=True):
            assert future.result()["choices"][0]["text"] == whole["choices"][0]["text"]
        busy.check_idle()
        until(lambda: [network.name for network in llm.engine.guide.networks] == ["long", "polite"])
        steered = busy.complete(**GUIDED, vas_weights={"long": 2.0, "polite": 2.0})
        assert steered["vas"]["value_evaluations"] > 0


@pytest.mark.parametrize(
    "path",
    [
        "../outside/stolen",
        "/etc",
        "link",
        "circle",
        "",
        ".." * 50,
        "polite/../../x",
        "a\x00b",
        "x" * 900,
        "broken/config.json",
    ],
)
def test_paths_stay_in_the_folder(server: Served, path: str) -> None:
    answer = load(server, "new", path)
    assert answer.status_code == 400
    assert names(server) == ["kind", "long"]


def test_values_that_do_not_fit_are_refused(server: Served, folder: Path) -> None:
    for path in ("broken", "other", "."):
        answer = load(server, "new", path)
        assert answer.status_code == 400, answer.text
    for name in ("a/b", "a b", "", "ü", "x" * 101):
        assert load(server, name, "polite/v1").status_code == 400
    assert names(server) == ["kind", "long"]
    assert server.complete(**GUIDED, vas_weights={"kind": 1.0})["vas"]["value_evaluations"] > 0


def test_no_folder_of_values_no_loading(folder: Path) -> None:
    with serving(admin_key="root") as closed:
        assert load(closed, "new", str(folder / "polite/v1")).status_code == 403


# -- profiles ------------------------------------------------------------------------------------------------


def test_a_file_of_profiles_that_nobody_will_write_has_to_be_there(tmp_path: Path) -> None:
    with serving(admin_key="root", profiles=tmp_path / "none.yaml") as served, served.client() as client:
        assert client.get("/v1/profiles").json()["profiles"] == {}
    with (
        pytest.raises(InvalidArgumentError, match=r"none\.yaml.*No such file"),
        serving(profiles=tmp_path / "none.yaml"),
    ):
        pass


def test_profiles_from_a_file_and_by_the_admin_api(tmp_path: Path) -> None:
    file = tmp_path / "profiles.yaml"
    file.write_text("profiles:\n  gentle:\n    weights: {kind: 3, long: 0.5}\n    description: für alle\n")
    with serving(admin_key="root", profiles=file) as served, served.client() as client:
        told = client.get("/v1/profiles").json()["profiles"]
        assert told == {"gentle": {"weights": {"kind": 3.0, "long": 0.5}, "description": "für alle"}}
        by_name = served.complete(**GUIDED, vas_profile="gentle")
        assert by_name["vas"]["weights"] == {"kind": 3.0, "long": 0.5}
        assert by_name["vas"]["profile"] == "gentle"
        spelled = served.complete(**GUIDED, vas_weights={"kind": 3, "long": 0.5})
        assert by_name["choices"][0]["text"] == spelled["choices"][0]["text"]
        over = served.complete(**GUIDED, vas_profile="gentle", vas_weights={"long": -1.0})
        assert over["vas"]["weights"] == {"kind": 3.0, "long": -1.0}

        refused = served.post("/v1/completions", {"model": "tiny", **GUIDED, "vas_profile": "gentl"}).json()["error"]
        assert refused["param"] == "vas_profile"
        assert "did you mean 'gentle'" in refused["message"]

        assert client.put("/admin/profiles/new", json={"weights": {"kind": 1.0}}).status_code == 401
        assert client.put("/admin/profiles/new", json={"weights": {"kind": 1.0}}, headers=KEY).status_code == 200
        assert client.put("/admin/profiles/bad", json={"weights": {"nobody": 1.0}}, headers=KEY).status_code == 400
        assert client.put("/admin/profiles/..%2Fx", json={"weights": {}}, headers=KEY).status_code == 404
        assert client.delete("/admin/profiles/gentle", headers=KEY).status_code == 200
        assert client.delete("/admin/profiles/gentle", headers=KEY).status_code == 404
    assert list(yaml.safe_load(file.read_text())["profiles"]) == ["new"]
    assert Profiles(file).weights("new") == {"kind": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["profiles.yaml"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "profiles: 3",
        "profiles: {a: {weights: {kind: much}}}",
        "profiles: {a: {weights: {kind: .nan}}}",
        "profiles: {a: {wieghts: {}}}",
        "profiles: !!python/object/apply:os.system ['true']",
        "{",
        "profiles: {a: }",
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profiles.yaml"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match="profiles"):
        Profiles(file)


def test_a_profile_that_cannot_be_written_is_not_there(tmp_path: Path) -> None:
    from vas_engine.serving.errors import ServingError
    from vas_engine.serving.protocol import Profile

    profiles = Profiles(tmp_path / "missing" / "profiles.yaml")
    with pytest.raises(ServingError, match="cannot be written"):
        profiles.set("a", Profile(weights={}))
    assert profiles.to_dict() == {"profiles": {}}
