"""Reading what a value folder or a checkpoint holds, with typed errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vas_engine.errors import ValueArtifactError


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object from a file; anything else is a ValueArtifactError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueArtifactError(f"{path}: not readable as JSON ({error}); save the value again") from error
    if not isinstance(values, dict):
        raise ValueArtifactError(f"{path}: expected a JSON object; save the value again")
    return values


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file; a missing or corrupt one is a ValueArtifactError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueArtifactError(f"{path}: not readable as safetensors ({error}); save or download it again") from error


def fill(module: torch.nn.Module, tensors: Mapping[str, Tensor], prefix: str, where: Path) -> None:
    """Loads tensors into a module: all of them, of the right shapes, finite.

    Raises:
        ValueArtifactError: naming the tensors that are missing, extra, of another shape or not finite.
    """
    wanted = module.state_dict(prefix=prefix)
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        raise ValueArtifactError(f"{where}: tensors missing: {missing}, not known: {extra}; config and weights differ")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueArtifactError(
                f"{where}: {name} has shape {list(tensor.shape)}, its config says {list(wanted[name].shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueArtifactError(f"{where}: {name} has entries that are not finite; train or download it again")
    module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
