"""Rotary positions as the model's own modules apply them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vas_engine.errors import UnsupportedModelError
from vas_engine.model.attention import Probed


class Rotary:
    """Rotates queries as each layer of a model rotates its own.

    Checked against the model itself: the probe ran one token at position 0 and at a later one, and the
    later queries must be what this gives for the earlier. A layer where that fails can be run but not read:
    :meth:`rotate` refuses.
    """

    def __init__(self, model: PreTrainedModel, probed: list[Probed], position: int) -> None:
        self.name = type(model).__name__
        found = {
            id(module): module
            for module in model.base_model.modules()
            if type(module).__name__.endswith("RotaryEmbedding")
        }
        self.module: nn.Module | None = next(iter(found.values())) if len(found) == 1 else None
        self.apply = self._applier(probed)
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        typed = self.module is not None and "layer_type" in inspect.signature(self.module.forward).parameters
        self.layer_types: list[str | None] = list(kinds) if typed and kinds else [None] * len(probed)
        self.kinds = [self._kind(layer, entry, position, bool(found)) for layer, entry in enumerate(probed)]

    def _applier(self, probed: list[Probed]) -> Callable[..., Any] | None:
        source = sys.modules.get(type(probed[0].module).__module__)
        return getattr(source, "apply_rotary_pos_emb", None)

    def _kind(self, layer: int, entry: Probed, position: int, has_rotary: bool) -> str:
        if not has_rotary:
            return "identity"
        _, first, later = entry.query.float()
        if _near(first, later):
            return "identity"
        if self.module is None or self.apply is None:
            return "unknown"
        try:
            # A scaling of the rotation (yarn) is already in the query at position 0, where cos is that scaling.
            places = torch.tensor([0, position], device=entry.query.device)
            cos, _ = self._tables(entry.query[1:2], places, layer, {})
            turned = self._turn(entry.query[1:2] / cos[0, 0, 0], places[1:], layer, {})[0].float()
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError):
            return "unknown"
        return "rotary" if _near(turned, later) else "unknown"

    def _tables(
        self, like: torch.Tensor, positions: torch.Tensor, layer: int, known: dict[Any, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, in the dtype of `like`; `known` keeps those of the positions for other layers."""
        assert self.module is not None
        kind = self.layer_types[layer]
        key = ("rotary", kind, like.dtype)
        if key not in known:
            options = {"layer_type": kind} if kind is not None else {}
            known[key] = self.module(like, positions[None], **options)
        return known[key]

    def _turn(self, queries: torch.Tensor, positions: torch.Tensor, layer: int, known: dict[Any, Any]) -> torch.Tensor:
        assert self.apply is not None
        cos, sin = self._tables(queries, positions, layer, known)
        laid = queries.transpose(0, 1)[None]
        turned, _ = self.apply(laid, laid[:, :1], cos, sin)
        return turned[0].transpose(0, 1)

    def rotate(self, queries: torch.Tensor, positions: torch.Tensor, layer: int, known: dict[Any, Any]) -> torch.Tensor:
        """queries [R, Hq, D], positions int64 [R] -> [R, Hq, D]; `known` as in `CausalLM.rotate`."""
        kind = self.kinds[layer]
        if kind == "identity":
            return queries
        if kind == "unknown":
            raise UnsupportedModelError(
                f"{self.name}: how layer {layer} rotates its queries is not known, so no reader can read it; "
                "choose another layer or a side network"
            )
        return self._turn(queries, positions, layer, known)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 2e-2 * b.norm())
