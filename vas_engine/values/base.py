"""Does a value belong to the base model at hand?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vas_engine.errors import ValueArtifactError
from vas_engine.values.config import ValueConfig

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM


def base_fingerprint(lm: CausalLM, tokenizer: Any | None = None) -> dict[str, Any]:
    """What identifies the base model: architecture, hash of the weights, hash of the vocabulary (None if not known)."""
    return dict(lm.fingerprint(tokenizer))


def check_base(config: ValueConfig, lm: CausalLM, tokenizer: Any | None = None) -> None:
    """Refuses a value made for another base model, tokenizer or vocabulary, or for layers it lacks.

    A value model reads tokens only, so weights and architecture of the base do not matter to it, its
    vocabulary does. What a config does not know (an empty fingerprint) is not compared; sizes always are.

    Raises:
        ValueArtifactError: naming what differs and what to load instead.
    """
    if config.vocab_size != lm.vocab_size:
        raise ValueArtifactError(
            f"vocab_size={config.vocab_size}: the base model has {lm.vocab_size} tokens; load the value with the model "
            "and tokenizer it was made for"
        )
    if config.kind != "model" and config.hidden_size != lm.hidden_size:
        raise ValueArtifactError(
            f"hidden_size={config.hidden_size}: the base model has hidden states of {lm.hidden_size}; load the value "
            "with the model it was made for"
        )
    _check_layers(config, lm)
    if not config.base:
        return
    found = base_fingerprint(lm, tokenizer)
    names = ("vocabulary",) if config.kind == "model" else ("architecture", "weights", "vocabulary")
    for name in names:
        wanted, given = config.base.get(name), found.get(name)
        if wanted is not None and given is not None and wanted != given:
            what = "tokenizer" if name == "vocabulary" else "base model"
            fix = f"load the {what} the value was made for, or train a value for this one"
            if name == "weights" and lm.dtype == torch.float16:
                fix += "; if it is the same, load it in bfloat16 or float32: float16 rounds weights in its own way"
            raise ValueArtifactError(f"{name}: made for {wanted!r}, the loaded {what} has {given!r}; {fix}")


def _check_layers(config: ValueConfig, lm: CausalLM) -> None:
    for index in config.states:
        if index > lm.num_layers:
            raise ValueArtifactError(
                f"states={list(config.states)}: this base model has hidden states 0 to {lm.num_layers}"
            )
    for index in config.layers:
        if index >= lm.num_layers:
            raise ValueArtifactError(
                f"layers={list(config.layers)}: this base model has layers 0 to {lm.num_layers - 1}"
            )
        spec = lm.layers[index]
        if spec.head_dim != config.head_dim:
            raise ValueArtifactError(
                f"head_dim={config.head_dim}: base layer {index} has heads of {spec.head_dim}; a reader's must match"
            )
        if config.queries % spec.kv_heads:
            raise ValueArtifactError(
                f"queries={config.queries}: use a multiple of the {spec.kv_heads} K/V heads of base layer {index}"
            )
        # Refuses a layer whose rotation is not known, now and not in the middle of a request.
        lm.rotate(
            torch.zeros(1, config.queries, config.head_dim, dtype=lm.dtype, device=lm.device),
            torch.zeros(1, dtype=torch.int64, device=lm.device),
            index,
        )
