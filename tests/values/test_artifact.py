"""Value folders: what is saved is what is loaded, and everything else is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from value_models import HEADS, KINDS, Driver, base_model, make_network, network_config

from vas_engine.errors import InvalidArgumentError, ValueArtifactError
from vas_engine.values import (
    HeadConfig,
    Support,
    ValueConfig,
    ValueModel,
    ValueNetwork,
    artifact,
    default_config,
    load_value,
    read_config,
    save_value,
)
from vas_engine.values.config import config_parameters


class Tokenizer:
    """The one thing that is asked of a tokenizer here."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


@pytest.fixture(scope="module")
def lm():
    return base_model("llama")


@pytest.fixture
def saved(lm, tmp_path: Path) -> Path:
    return save_value(tmp_path / "value", make_network("reader", lm))


def edit(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    values.update(changes)
    (folder / "config.json").write_text(json.dumps(values))


def rewrite(folder: Path, change) -> None:
    """Changes the tensors and, as one who means it, the hash as well."""
    tensors = load_file(folder / "value.safetensors")
    change(tensors)
    save_file(tensors, folder / "value.safetensors")
    edit(folder, sha256=artifact._digest(folder / "value.safetensors"))


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_round_trip_is_exact(lm, tmp_path: Path, kind: str) -> None:
    network = make_network(kind, lm)
    save_value(tmp_path, network)
    loaded = load_value(tmp_path, lm)
    assert loaded.config.replace(backbone={}) == network.config
    ours, theirs = network.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    outputs = []
    for one in (network, loaded):
        driver = Driver(lm, one, [[5, 6, 7]])
        driver.feed({0: 3})
        outputs.append(driver.score({0: [8, 9]})[0])
    assert torch.equal(*outputs)
    assert read_config(tmp_path) == loaded.config


def test_saving_again_replaces_and_leaves_nothing_behind(lm, tmp_path: Path) -> None:
    for seed_kind in ("model", "model"):
        network = make_network(seed_kind, lm)
        with torch.no_grad():
            network.heads.output.weight.add_(1)
        save_value(tmp_path, network)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backbone", "config.json", "value.safetensors"]
    assert torch.equal(load_value(tmp_path, lm).heads.output.weight, network.heads.output.weight)


def test_a_failed_save_keeps_what_was_there(lm, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors, path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    before = (saved / "value.safetensors").read_bytes()
    monkeypatch.setattr(artifact, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_value(saved, make_network("reader", lm))
    assert (saved / "value.safetensors").read_bytes() == before
    assert len(list(saved.iterdir())) == 2


def test_files_of_two_saves_do_not_mix(lm, saved: Path, tmp_path: Path) -> None:
    other = make_network("reader", lm)
    with torch.no_grad():
        other.state_weight.add_(1)
    save_value(tmp_path / "other", other)
    shutil.copy(tmp_path / "other" / "value.safetensors", saved)
    with pytest.raises(ValueArtifactError, match="sha256"):
        load_value(saved, lm)


def test_backbone_of_another_save_is_refused(lm, tmp_path: Path) -> None:
    save_value(tmp_path / "a", make_network("model", lm))
    other = make_network("model", lm)
    with torch.no_grad():
        next(iter(other.backbone.parameters())).add_(1)
    save_value(tmp_path / "b", other)
    shutil.rmtree(tmp_path / "a" / "backbone")
    shutil.copytree(tmp_path / "b" / "backbone", tmp_path / "a" / "backbone")
    with pytest.raises(ValueArtifactError, match="backbone"):
        load_value(tmp_path / "a", lm)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format_version": 99}, "format_version=99"),
        ({"widht": 3}, "did you mean 'width'"),
        ({"kind": "raeder"}, "did you mean 'reader'"),
        ({"layers": [7]}, "layers 0 to 2"),
        ({"states": [9]}, "hidden states 0 to 3"),
        ({"states": []}, "states"),
        ({"states": ["x"]}, "states"),
        ({"queries": 5}, "K/V heads"),
        ({"hidden_size": 16}, "hidden_size=16"),
        ({"vocab_size": 100}, "vocab_size=100"),
        ({"width": 13}, "shape"),
        ({"head_hidden": 0}, "not known"),
        ({"mlp": 0}, "not known"),
        ({"activation": "tanh"}, "activation"),
        ({"heads": []}, "heads"),
        ({"heads": 3}, "heads"),
        ({"heads": [{"name": "a", "suport": None}]}, "did you mean 'support'"),
        ({"heads": [{"name": "a", "support": {"min": 0, "max": 1, "bins": 1}}]}, "bins"),
        ({"heads": [{"name": "a"}, {"name": "a"}]}, "another name"),
        ({"base": {"architecture": "GPT2LMHeadModel"}}, "GPT2LMHeadModel"),
        ({"base": {"weights": "0" * 64}}, "weights"),
    ],
)
def test_configs_that_do_not_fit(lm, saved: Path, changes: dict, said: str) -> None:
    edit(saved, **changes)
    with pytest.raises(ValueArtifactError, match=said):
        load_value(saved, lm)


def test_another_base_model(saved: Path) -> None:
    with pytest.raises(ValueArtifactError, match="weights: made for"):
        load_value(saved, base_model("llama", seed=4))
    with pytest.raises(ValueArtifactError, match="architecture"):
        load_value(saved, base_model("mistral"))


@pytest.mark.parametrize("kind", ["reader", "model"])
def test_another_tokenizer(lm, tmp_path: Path, kind: str) -> None:
    save_value(tmp_path, make_network(kind, lm), tokenizer=Tokenizer("a", "b"))
    load_value(tmp_path, lm, tokenizer=Tokenizer("a", "b"))
    load_value(tmp_path, lm)
    with pytest.raises(ValueArtifactError, match="vocabulary"):
        load_value(tmp_path, lm, tokenizer=Tokenizer("b", "a"))


def test_a_value_model_serves_another_base_of_its_vocabulary(lm, tmp_path: Path) -> None:
    save_value(tmp_path, make_network("model", lm))
    assert isinstance(load_value(tmp_path, base_model("gpt2")), ValueModel)


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing"])
def test_corrupt_weights(lm, saved: Path, damage: str) -> None:
    path = saved / "value.safetensors"
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "garbage":
        path.write_bytes(b"not safetensors")
    else:
        path.unlink()
    with pytest.raises(ValueArtifactError, match=r"value\.safetensors"):
        load_value(saved, lm)


def test_tensors_missing_extra_misshapen_or_not_finite(lm, saved: Path) -> None:
    def missing(tensors) -> None:
        tensors["nonsense"] = tensors.pop("state_weight")

    def misshapen(tensors) -> None:
        tensors["state_weight"] = tensors["state_weight"][:, :-1].contiguous()

    def not_finite(tensors) -> None:
        tensors["state_weight"][0, 0] = math.nan

    original = (saved / "value.safetensors").read_bytes()
    for change, said in (
        (missing, r"missing: \['state_weight'\], not known: \['nonsense'\]"),
        (misshapen, "shape"),
        (not_finite, "not finite"),
    ):
        (saved / "value.safetensors").write_bytes(original)
        rewrite(saved, change)
        with pytest.raises(ValueArtifactError, match=said):
            load_value(saved, lm)


def test_config_is_not_json(lm, saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueArtifactError, match="JSON"):
        load_value(saved, lm)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueArtifactError, match="JSON object"):
        load_value(saved, lm)


def test_folder_missing_or_empty(lm, tmp_path: Path) -> None:
    with pytest.raises(ValueArtifactError, match="no such folder"):
        load_value(tmp_path / "nowhere", lm)
    with pytest.raises(ValueArtifactError, match="neither a value folder"):
        load_value(tmp_path, lm)


def test_arguments_for_checkpoints_only(lm, saved: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="label"):
        load_value(saved, lm, label=1)
    with pytest.raises(InvalidArgumentError, match="did you mean 'model'"):
        load_value(saved, lm, as_="modle")


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("reader", {"kind": "nothing"}, "kind"),
        ("reader", {"layers": ()}, "layers"),
        ("reader", {"queries": 0}, "queries"),
        ("reader", {"depth": 1}, "depth"),
        ("action", {"layers": (0,)}, "layers"),
        ("action", {"width": 0}, "width"),
        ("action", {"states": (1, 1)}, "states"),
        ("side", {"depth": 0}, "depth"),
        ("side", {"kv_heads": 3}, "num_heads"),
        ("side", {"head_dim": 5}, "head_dim"),
        ("side", {"width": -1}, "width"),
        ("side", {"width": 2.5}, "width"),
        ("side", {"state_norm": 1}, "state_norm"),
        ("side", {"heads": ()}, "heads"),
    ],
)
def test_settings_that_cannot_work(lm, kind: str, changes: dict, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        network_config(kind, lm).replace(**changes)


def test_a_value_model_has_no_network_settings(lm) -> None:
    with pytest.raises(InvalidArgumentError, match="width"):
        ValueConfig("model", HEADS, hidden_size=8, vocab_size=9, width=4)
    with pytest.raises(InvalidArgumentError, match="ValueModel"):
        ValueNetwork(ValueConfig("model", HEADS, hidden_size=8, vocab_size=9))


def test_config_survives_json() -> None:
    config = ValueConfig("lookahead", HEADS, hidden_size=8, vocab_size=9, states=(1, 0), width=4, base={"weights": "x"})
    assert ValueConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ------------------------------------------------------------------------
# default sizes


@pytest.mark.parametrize("kind", KINDS)
def test_default_config_binds_and_counts_right(lm, kind: str) -> None:
    config = default_config(kind, lm, ["a", HeadConfig("b", support=Support(0, 1, 5))])
    network = ValueNetwork(config).bind(lm)
    assert network.num_parameters == config_parameters(config)
    assert config.width >= 64
    assert [head.name for head in config.heads] == ["a", "b"]
    driver = Driver(lm, network, [[4, 5]])
    driver.feed({0: 2})
    assert bool(torch.isfinite(driver.score({0: [3]})[0]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_default_config_is_a_hundredth_of_a_large_base(kind: str) -> None:
    class Large:
        """Shape of a 135 M Llama; only sizes are asked for."""

        num_layers, hidden_size, vocab_size, num_parameters = 30, 576, 49152, 134_515_008
        layers = (type("Layer", (), {"kv_heads": 3, "head_dim": 64, "num_heads": 9, "window": 0}),) * 30

        def fingerprint(self) -> dict:
            return {}

    config = default_config(kind, Large(), ["reward"], distributional=True)
    assert 0.9e6 < config_parameters(config) <= 1.35e6
    assert config.heads[0].support == Support(-1.0, 1.0, 51)
    if kind == "reader":
        assert config.layers == (14, 29)
        assert config.queries == 15
    if config.kv_heads:
        assert config.kv_heads == config.num_heads // 3  # of 6


def test_default_config_of_no_kind(lm) -> None:
    with pytest.raises(InvalidArgumentError, match="reader"):
        default_config("redaer", lm, ["a"])
    with pytest.raises(InvalidArgumentError, match="kind"):
        default_config("model", lm, ["a"])
