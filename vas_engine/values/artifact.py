"""Value folders: ``config.json`` + ``value.safetensors`` (+ ``backbone/`` of a value model)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from vas_engine.errors import InvalidArgumentError, ValueArtifactError, nearest
from vas_engine.files import replacing, write_json
from vas_engine.model.fingerprint import vocabulary_hash, weights_hash
from vas_engine.model.lm import CausalLM
from vas_engine.values.base import check_base
from vas_engine.values.config import ValueConfig
from vas_engine.values.files import fill, read_json, read_tensors
from vas_engine.values.foreign import load_foreign
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel, load_backbone

if TYPE_CHECKING:
    from vas_engine.values.scorer import Scorer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "value.safetensors"
BACKBONE_FOLDER = "backbone"
AS_OPTIONS = ("auto", "head", "model")


def save_value(folder: str | Path, network: Scorer, tokenizer: Any | None = None) -> Path:
    """Writes a value folder; each file appears whole or not at all, ``config.json`` last.

    ``config.json`` holds the sha256 of ``value.safetensors``, so that files of two different saves never
    pass for one.

    Args:
        folder: made if it does not exist.
        network: a bound value network or value model.
        tokenizer: the base model's; its hash is added to the fingerprint.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = network.config
    if tokenizer is not None:
        config = config.replace(base={**config.base, "vocabulary": vocabulary_hash(tokenizer)})
    if isinstance(network, ValueModel):
        config = config.replace(backbone={"weights": weights_hash(network.backbone)})
        with replacing(folder / BACKBONE_FOLDER) as fresh:
            network.backbone.save_pretrained(fresh)
        tensors = network.heads.state_dict(prefix="heads.")
    elif isinstance(network, ValueNetwork):
        tensors = network.state_dict()
    else:
        raise InvalidArgumentError("network", type(network).__name__, "save a ValueNetwork or a ValueModel")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(folder / WEIGHTS_FILE) as fresh:
        save_file(tensors, fresh)
    write_json(folder / CONFIG_FILE, {**config.to_dict(), "sha256": _digest(folder / WEIGHTS_FILE)})
    return folder


def load_value(
    folder: str | Path,
    lm: CausalLM,
    *,
    as_: str = "auto",
    label: int | str | None = None,
    tokenizer: Any | None = None,
) -> ValueNetwork | ValueModel:
    """Loads a value and binds it to its base model.

    Args:
        folder: a value folder, or a checkpoint with a value or reward head in a layout that ``foreign``
            knows.
        lm: the base model.
        as_: for checkpoints. "head": a lookahead head on the base model's final state, which takes a
            checkpoint trained on that very model; "model": a value model with the checkpoint's own backbone;
            "auto": the former where the backbone equals the base model (or there is none), else the latter.
        label: which output of a head with several, by index or by its name in the checkpoint's ``id2label``.
        tokenizer: the base model's, to be compared.

    Raises:
        ValueArtifactError: no value, a corrupt one, or one for another base model or tokenizer.
        InvalidArgumentError: an argument that cannot work, or a label that has to be chosen.
    """
    if as_ not in AS_OPTIONS:
        raise InvalidArgumentError("as_", as_, nearest(str(as_), AS_OPTIONS))
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueArtifactError(f"{folder}: no such folder; give a value folder or a downloaded checkpoint")
    values = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else None
    if values is None or "format_version" not in values:
        return load_foreign(folder, values or {}, lm, as_=as_, label=label, tokenizer=tokenizer)
    if as_ != "auto" or label is not None:
        name, value = ("label", label) if label is not None else ("as_", as_)
        raise InvalidArgumentError(name, value, "leave it out: it is for checkpoints, and this is a value folder")
    return _load_own(folder, dict(values), lm, tokenizer)


def read_config(folder: str | Path) -> ValueConfig:
    """Settings of a value folder, without its weights.

    Raises:
        ValueArtifactError: not a value folder, or settings that cannot work.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueArtifactError(f"{folder}: no {CONFIG_FILE}; give a value folder")
    values = dict(read_json(path))
    if "format_version" not in values:
        raise ValueArtifactError(
            f"{folder}: no value folder; a checkpoint with a head is known when it is loaded beside its base model "
            f"(vas info MODEL --value {folder})"
        )
    values.pop("sha256", None)
    return ValueConfig.from_dict(values)


def _load_own(folder: Path, values: dict[str, Any], lm: CausalLM, tokenizer: Any | None) -> ValueNetwork | ValueModel:
    digest = values.pop("sha256", None)
    config = ValueConfig.from_dict(values)
    check_base(config, lm, tokenizer)
    tensors = read_tensors(folder / WEIGHTS_FILE)
    if digest is not None and digest != _digest(folder / WEIGHTS_FILE):
        raise ValueArtifactError(
            f"{folder / WEIGHTS_FILE}: not the file that {CONFIG_FILE} was written with (sha256 differs); save it again"
        )
    network: ValueNetwork | ValueModel
    if config.kind == "model":
        backbone = load_backbone(folder / BACKBONE_FOLDER, lm)
        wanted = config.backbone.get("weights")
        if wanted is not None and weights_hash(backbone.backbone) != wanted:
            raise ValueArtifactError(f"{folder / BACKBONE_FOLDER}: not the backbone these heads were saved with")
        network = ValueModel(config, backbone)
        fill(network.heads, tensors, "heads.", folder)
    else:
        network = ValueNetwork(config)
        fill(network, tensors, "", folder)
    return network.bind(lm, tokenizer).eval()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
