"""Engines beside loaded models of transformers: the same weights, nothing of the model changed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError
from vas_engine.llm import LLM

_engines: WeakKeyDictionary[PreTrainedModel, tuple[LLM, list[int]]] = WeakKeyDictionary()


def load_values(
    model: PreTrainedModel,
    values: str | Path | Mapping[str, Any] | None = None,
    tokenizer: Any | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Makes a loaded model ready for `generate(custom_generate=vas_generate, values={name: weight})`.

    An engine is built over the model's own weights. Nothing of the model changes: it runs, trains and generates as
    before, and what training writes into its weights the engine sees. The engine lives as long as the model, or until
    this is called again.

    Args:
        model: a causal LM, on one device.
        values: {name: folder}, as LLM takes them.
        tokenizer: to compare its vocabulary with the values', and for `stop` strings.
        options: of LLM, such as `max_num_seqs`, `max_model_len` and `kv_cache_memory`.

    Returns:
        The model.

    Raises:
        InvalidArgumentError: no model of transformers, or one whose weights are elsewhere.
        UnsupportedModelError, ValueArtifactError: as of LLM.
    """
    if not isinstance(model, PreTrainedModel):
        fix = "give a loaded model of transformers (of peft: the result of merge_and_unload())"
        raise InvalidArgumentError("model", type(model).__name__, fix)
    llm = LLM(_twin(model), values, tokenizer=tokenizer, skip_tokenizer_init=tokenizer is None, **options)
    _engines[model] = (llm, _addresses(model))
    return model


def engine_of(model: PreTrainedModel) -> LLM:
    """The engine beside a model.

    Raises:
        InvalidArgumentError: there is none, or the model's weights have moved since.
    """
    name = type(model).__name__
    if model not in _engines:
        raise InvalidArgumentError("custom_generate", name, "no engine yet: call load_values(model, {name: folder})")
    llm, addresses = _engines[model]
    if addresses != _addresses(model):
        raise InvalidArgumentError("model", name, "its weights have moved since load_values; call it again")
    return llm


def _addresses(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def _twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over the same memory, with a config and hooks of their own."""
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        fix = "its layers are spread over devices; load it on one (device_map={'': 0})"
        raise InvalidArgumentError("device_map", model.hf_device_map, fix)
    for name, module in model.named_modules():
        if "forward" in vars(module):
            raise UnsupportedModelError(
                f"{type(model).__name__}: the forward of {name or 'the model'!r} was replaced (by torch.compile, "
                "accelerate or another engine); give the model as from_pretrained returns it"
            )
    shared: dict[int, Any] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        plain = type(tensor) is nn.Parameter
        shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if plain else tensor
    return copy.deepcopy(model, shared)
