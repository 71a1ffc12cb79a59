"""Value and reward heads as other projects save them.

Layouts, all reading the state after the final norm: TRL (``v_head.summary``, also in LLaMA-Factory's
``value_head.safetensors``), Hugging Face sequence classification (``score.weight``) and token classification
(``score.weight`` and ``score.bias``, or ``classifier``), the two-layer ``score.0``/``score.2`` of Qwen2's
reward models, InternLM2's ``v_head``, OpenRLHF's ``value_head`` (or the name in ``value_head_prefix``) with
``mean`` and ``std``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vas_engine.errors import InvalidArgumentError, ValueArtifactError, nearest
from vas_engine.values.base import base_fingerprint
from vas_engine.values.config import HeadConfig, ValueConfig
from vas_engine.values.files import fill
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel, load_backbone

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

# Wrappers that put their name in front of every tensor.
WRAPPERS = ("pretrained_model.", "base_model.model.", "module.")
# Buffers that old checkpoints carry and that say nothing about the weights.
BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))$")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Trained to value prefixes, not only whole answers.
PREFIX_VALUES = ("v_head.summary", "token classification")


@dataclass
class Checkpoint:
    """Names of a folder's tensors and the file of each."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Raises ValueArtifactError for a folder without safetensors; pickled files are refused by name."""
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
            if pickled:
                raise ValueArtifactError(
                    f"{folder}: {', '.join(pickled)}: pickled weights can run code and are not read; convert them "
                    "where you trust them: load the model with transformers and call save_pretrained (it writes "
                    "safetensors), or safetensors.torch.save_file(state_dict, 'model.safetensors')"
                )
            raise ValueArtifactError(
                f"{folder}: neither a value folder (config.json with format_version) nor safetensors"
            )
        checkpoint = cls(folder)
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    checkpoint.files.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ValueArtifactError(f"{path}: not readable as safetensors ({error}); download it again") from error
        return checkpoint

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def find(self, pattern: str) -> str | None:
        """Full name of the tensor whose name without wrappers is ``pattern``."""
        for wrapper in ("", *WRAPPERS):
            if wrapper + pattern in self.files:
                return wrapper + pattern
        return None


@dataclass
class ForeignHead:
    """A head as found: an optional hidden layer with ReLU, then labels."""

    layout: str
    weight: Tensor
    bias: Tensor
    names: set[str]
    hidden: tuple[Tensor, Tensor] | None = None

    @property
    def inputs(self) -> int:
        """Width of the state it reads."""
        return (self.hidden[0] if self.hidden else self.weight).shape[1]


def read_head(checkpoint: Checkpoint, config: Mapping[str, Any]) -> ForeignHead:
    """Finds the head of a checkpoint.

    Raises:
        ValueArtifactError: no head of a known layout, or several.
    """
    found: list[ForeignHead] = []
    prefix = config.get("value_head_prefix")
    candidates = (
        [prefix] if isinstance(prefix, str) else ["v_head.summary", "v_head", "value_head", "score", "classifier"]
    )
    for base in candidates:
        head = _two_layers(checkpoint, base) or _one_layer(checkpoint, base)
        if head is not None:
            found.append(head)
    if not found:
        raise ValueArtifactError(
            f"{checkpoint.folder}: no value head found (looked for {', '.join(candidates)}); it has "
            f"{', '.join(sorted(checkpoint.files)[-3:])}"
        )
    if len(found) > 1:
        raise ValueArtifactError(
            f"{checkpoint.folder}: several heads ({', '.join(head.layout for head in found)}); keep the tensors of one"
        )
    return found[0]


def _two_layers(checkpoint: Checkpoint, base: str) -> ForeignHead | None:
    names = [checkpoint.find(f"{base}.{part}") for part in ("0.weight", "0.bias", "2.weight", "2.bias")]
    if names[0] is None or names[2] is None:
        return None
    tensors = [checkpoint.read(name).float() if name else None for name in names]
    first, second = tensors[0], tensors[2]
    assert first is not None
    assert second is not None
    return ForeignHead(
        layout=f"{base}.0 and {base}.2",
        weight=second,
        bias=_or_zeros(tensors[3], second),
        names={name for name in names if name},
        hidden=(first, _or_zeros(tensors[1], first)),
    )


def _one_layer(checkpoint: Checkpoint, base: str) -> ForeignHead | None:
    weight_name, bias_name = checkpoint.find(f"{base}.weight"), checkpoint.find(f"{base}.bias")
    if weight_name is None:
        return None
    weight = checkpoint.read(weight_name).float()
    if weight.dim() != 2:
        raise ValueArtifactError(
            f"{checkpoint.folder}: {weight_name} has shape {list(weight.shape)}, expected [labels, H]"
        )
    bias = checkpoint.read(bias_name).float() if bias_name else None
    layout = base
    if base in ("score", "classifier"):
        layout = "sequence classification" if bias is None else "token classification"
    return ForeignHead(layout, weight, _or_zeros(bias, weight), {weight_name} | ({bias_name} if bias_name else set()))


def _or_zeros(bias: Tensor | None, weight: Tensor) -> Tensor:
    return torch.zeros(weight.shape[0]) if bias is None else bias


def load_foreign(
    folder: Path,
    config: Mapping[str, Any],
    lm: CausalLM,
    *,
    as_: str = "auto",
    label: int | str | None = None,
    tokenizer: Any | None = None,
) -> ValueNetwork | ValueModel:
    """Loads a checkpoint's head as a lookahead head of the base model, or with its backbone as a value model.

    Args: as of ``load_value``; ``config`` is the checkpoint's config.json (empty without one).

    Raises:
        ValueArtifactError, InvalidArgumentError: as ``load_value``.
    """
    checkpoint = Checkpoint.open(folder)
    head = read_head(checkpoint, config)
    index = _choose_label(head, label, config)
    backbone = [n for n in checkpoint.files if n not in head.names and not BUFFERS.search(n)]
    adapters = [name for name in backbone if ".lora_" in name or name.startswith("lora_")]
    if adapters:
        raise ValueArtifactError(
            f"{folder}: {adapters[0]} and others are adapter weights; merge the adapter into its model "
            "(peft: merge_and_unload) and save that"
        )
    _check_tokenizer(folder, tokenizer)
    if as_ == "auto":
        as_ = "head" if not backbone or _same_weights(checkpoint, backbone, lm) else "model"
    elif as_ == "head" and backbone and not _same_weights(checkpoint, backbone, lm):
        raise ValueArtifactError(
            f"{folder}: its backbone is not the base model, so its head means nothing on the base's states; "
            "use as_='model' to load it with its backbone"
        )
    elif as_ == "model" and not backbone:
        raise ValueArtifactError(f"{folder}: holds a head only and no backbone; use as_='head'")
    if head.layout not in PREFIX_VALUES:
        warnings.warn(
            f"{folder}: a head of layout '{head.layout}' is usually trained on the last tokens of whole answers; "
            "that is not by itself a valid value of prefixes. Check it, or train a value on its scores.",
            stacklevel=3,
        )
    head_config = _head_config(head, config, index, folder)
    if as_ == "head":
        return _as_head(head, head_config, index, lm, tokenizer, folder)
    return _as_model(head, head_config, index, lm, tokenizer, folder)


def _choose_label(head: ForeignHead, label: int | str | None, config: Mapping[str, Any]) -> int:
    count = head.weight.shape[0]
    names = {str(name): int(index) for index, name in (config.get("id2label") or {}).items() if int(index) < count}
    if label is None:
        if count > 1:
            options = ", ".join(f"{index} ({name})" for name, index in sorted(names.items(), key=lambda item: item[1]))
            options = options or f"0 to {count - 1}"
            fix = f"this head has {count} outputs; choose one by index or name: {options}"
            raise InvalidArgumentError("label", None, fix)
        return 0
    if isinstance(label, str):
        if label not in names:
            raise InvalidArgumentError("label", label, nearest(label, names))
        return names[label]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < count:
        raise InvalidArgumentError("label", label, f"choose an index from 0 to {count - 1}")
    return label


def _check_tokenizer(folder: Path, tokenizer: Any | None) -> None:
    if tokenizer is None or not (folder / "tokenizer.json").is_file():
        return
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if theirs.get_vocab() != tokenizer.get_vocab():
        raise ValueArtifactError(
            f"{folder}: its tokenizer has another vocabulary than the base model's; values are read token by token, "
            "so use a checkpoint of the same tokenizer"
        )


def _same_weights(checkpoint: Checkpoint, names: list[str], lm: CausalLM) -> bool:
    """Whether the checkpoint's backbone is the base model, tensor by tensor in the base model's dtype."""
    ours = lm.model.state_dict()
    prefix = lm.model.base_model_prefix + "."
    output = lm.model.get_output_embeddings()
    head = {name for name, module in lm.model.named_modules() if module is output}
    wanted = {name for name, _ in lm.model.named_parameters() if name.rpartition(".")[0] not in head}
    for name in names:
        plain = name
        for wrapper in WRAPPERS:
            plain = plain.removeprefix(wrapper)
        match = next((n for n in (plain, prefix + plain, plain.removeprefix(prefix)) if n in ours), None)
        if match is None:
            return False
        tensor = checkpoint.read(name)
        if tensor.shape != ours[match].shape:
            return False
        if not torch.equal(tensor.to(device=lm.device, dtype=ours[match].dtype), ours[match]):
            return False
        wanted.discard(match)
    return not wanted


def _head_config(head: ForeignHead, config: Mapping[str, Any], index: int, folder: Path) -> HeadConfig:
    names = {int(i): str(name) for i, name in (config.get("id2label") or {}).items()}
    reward = names.get(index, "") if head.weight.shape[0] > 1 else ""
    if not config.get("normalize_reward"):
        return HeadConfig(reward=reward or folder.name)
    # OpenRLHF's reward is (raw - mean) / std.
    mean, std = float(config.get("mean", 0.0)), float(config.get("std", 1.0))
    try:
        return HeadConfig(reward=reward or folder.name, mean=-mean / std, std=1.0 / std)
    except (InvalidArgumentError, ZeroDivisionError) as error:
        raise ValueArtifactError(f"{folder}: mean={mean}, std={std} cannot normalise a reward") from error


def _tensors(head: ForeignHead, index: int) -> dict[str, Tensor]:
    tensors = {
        "heads.output.weight": head.weight[index : index + 1],
        "heads.output.bias": head.bias[index : index + 1],
    }
    if head.hidden:
        tensors |= {"heads.hidden.weight": head.hidden[0], "heads.hidden.bias": head.hidden[1]}
    return tensors


def _settings(head: ForeignHead, head_config: HeadConfig, lm: CausalLM) -> dict[str, Any]:
    return {
        "heads": (head_config,),
        "hidden_size": head.inputs,
        "vocab_size": lm.vocab_size,
        "head_norm": False,
        "head_hidden": head.hidden[0].shape[0] if head.hidden else 0,
        "activation": "relu",
    }


def _as_head(
    head: ForeignHead, head_config: HeadConfig, index: int, lm: CausalLM, tokenizer: Any | None, folder: Path
) -> ValueNetwork:
    if head.inputs != lm.hidden_size:
        raise ValueArtifactError(
            f"{folder}: its head reads states of {head.inputs}, the base model has {lm.hidden_size}; "
            "load the base model it was trained on"
        )
    config = ValueConfig(
        kind="lookahead",
        states=(lm.num_layers,),
        state_norm=False,
        base=base_fingerprint(lm, tokenizer),
        **_settings(head, head_config, lm),
    )
    network = ValueNetwork(config)
    fill(network, _tensors(head, index), "", folder)
    return network.bind(lm, tokenizer).eval()


def _as_model(
    head: ForeignHead, head_config: HeadConfig, index: int, lm: CausalLM, tokenizer: Any | None, folder: Path
) -> ValueModel:
    backbone = load_backbone(folder, lm)
    settings = _settings(head, head_config, lm)
    if backbone.hidden_size != head.inputs:
        raise ValueArtifactError(
            f"{folder}: its head reads states of {head.inputs}, its backbone has {backbone.hidden_size}"
        )
    settings["vocab_size"] = backbone.vocab_size
    model = ValueModel(ValueConfig(kind="model", **settings), backbone)
    fill(model.heads, _tensors(head, index), "heads.", folder)
    return model.bind(lm, tokenizer).eval()
