"""What a model's attention asks for, found by running a token through it; what is not honoured is refused here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vas_engine.errors import UnsupportedModelError
from vas_engine.model.attention import AttentionState, LayerState, Probed, detach, layer_state

_KNOWN_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# Frequencies that depend on the longest sequence at hand: rows of other requests would change a request's result.
_BATCH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


def probe_tokens(model: PreTrainedModel, max_position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A token, and the same token twice behind another one; row 2 of the packed rows stands at ``max_position``."""
    ids = torch.tensor([[2, 1, 1]], device=model.device)
    positions = torch.tensor([[min(3, max_position), 0, max_position]], device=model.device)
    return ids, positions


def probe(model: PreTrainedModel, state: AttentionState, max_position: int) -> list[Probed]:
    """Runs one token alone and packed among others, each row seeing itself only; returns the layers of the packed run.

    Raises:
        UnsupportedModelError: naming the feature and the model.
    """
    check_config(model)
    ids, positions = probe_tokens(model, max_position)
    alone = _run(model, state, ids[:, 1:2], positions[:, 1:2])
    packed = _run(model, state, ids, positions)
    layers = list(state.probed)
    state.probed = []
    _check_layers(model, layers)
    _check_rows_apart(model, alone[0, 0], packed[0, 1])
    return layers


@torch.inference_mode()
def _run(model: PreTrainedModel, state: AttentionState, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm, [1, R, H]."""
    state.probed = []
    with state.running("probe"):
        output = model.base_model(input_ids=ids, position_ids=positions, use_cache=False)
    return output.last_hidden_state


def check_config(model: PreTrainedModel) -> None:
    """Features that show in the config alone."""
    config: Any = model.config.get_text_config()
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(f"{name}: cross attention is not supported; use a decoder-only model")
    if getattr(config, "reorder_and_upcast_attn", False):
        raise UnsupportedModelError(
            f"{name}: reorder_and_upcast_attn goes round the attention interface; set it to False in the config"
        )
    odd = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYER_TYPES
    if odd:
        raise UnsupportedModelError(f"{name}: layers of type {sorted(odd)} are not supported, only attention is")
    if getattr(config, "attention_chunk_size", None):
        raise UnsupportedModelError(f"{name}: attention_chunk_size (chunked attention) is not supported")
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"{name}: rope_type={rope_type!r} depends on the longest sequence of a batch; "
                "use a model with a fixed type (default, linear, yarn, llama3)"
            )


def _rope_types(parameters: Any) -> set[str]:
    if not isinstance(parameters, dict):
        return set()
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(entry.get("rope_type", "default")) for entry in (nested or [parameters])}


def _check_layers(model: PreTrainedModel, probed: list[Probed]) -> None:
    config: Any = model.config.get_text_config()
    name, wanted = type(model).__name__, config.num_hidden_layers
    modules = [entry.module for entry in probed]
    if len(modules) != wanted:
        raise UnsupportedModelError(
            f"{name}: {len(modules)} of {wanted} layers called the attention function; layers of "
            "another kind (state space, linear or legacy attention) are not supported"
        )
    if len({id(module) for module in modules}) != wanted:
        raise UnsupportedModelError(f"{name}: layers that share one attention module are not supported")
    kinds = getattr(config, "layer_types", None)
    for index, entry in enumerate(probed):
        slides = entry.spec.window > 0
        if kinds is not None and slides != (kinds[index] == "sliding_attention"):
            raise UnsupportedModelError(
                f"{name}: layer {index} is of type {kinds[index]!r} but asks for "
                f"a sliding window of {entry.spec.window}"
            )


def _check_rows_apart(model: PreTrainedModel, alone: torch.Tensor, packed: torch.Tensor) -> None:
    alone, packed = alone.float(), packed.float()
    if not (bool(alone.isfinite().all()) and bool(packed.isfinite().all())):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its hidden states are not finite in {str(model.dtype).removeprefix('torch.')}; "
            "its weights are not, or it needs another dtype (float32, bfloat16)"
        )
    distance = float((alone - packed).norm() / alone.norm().clamp_min(1e-30))
    allowed = 1e-4 if model.dtype == torch.float32 else 3e-2
    if not distance <= allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__}: tokens reach one another outside of the attention function "
            f"(relative distance {distance:.1e}); such layers "
            "(convolution, state space, token shift) are not supported"
        )


def decoder_layers(model: PreTrainedModel, probed: list[Probed]) -> list[nn.Module]:
    """The decoder layer around each probed attention module, in order."""
    owners = {id(entry.module): index for index, entry in enumerate(probed)}
    for group in model.base_model.modules():
        if not isinstance(group, nn.ModuleList) or len(group) < len(probed):
            continue
        inside = [[owners[id(m)] for m in layer.modules() if id(m) in owners] for layer in group]
        if inside[: len(probed)] == [[index] for index in range(len(probed))]:
            return list(group)[: len(probed)]
    raise UnsupportedModelError(f"{type(model).__name__}: its decoder layers are not one list of modules")


def settle(model: PreTrainedModel, probed: list[Probed]) -> list[LayerState]:
    """Writes index and spec on the attention modules and takes the state off all others."""
    kept = []
    for index, entry in enumerate(probed):
        layer = layer_state(entry.module)
        layer.index, layer.spec = index, entry.spec
        kept.append(layer)
    used = {id(entry.module) for entry in probed}
    for module in model.modules():
        if id(module) not in used:
            detach(module)
    return kept
