"""Linear layers that read the same rows, as one product.

A token's keys and values come from small matrices, which by themselves do not fill a GPU. The parameters stay what and
where they are for everybody else: views of one tensor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers that transformers' models call one after another on the same rows."""


class _Shared:
    """The product of a group's layers with the rows that its first layer was last called with."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.weight = torch.cat([layer.weight.data for layer in layers])
        biases = [layer.bias for layer in layers]
        self.bias = None if biases[0] is None else torch.cat([bias.data for bias in biases])
        self.rows: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] = ()
        for layer, weight in zip(layers, self.weight.split(self.sizes), strict=True):
            layer.weight.data = weight
        if self.bias is not None:
            for layer, bias in zip(layers, self.bias.split(self.sizes), strict=True):
                layer.bias.data = bias

    def part(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        if index == 0:
            self.rows, self.parts = rows, F.linear(rows, self.weight, self.bias).split(self.sizes, -1)
        found = self.parts[index]
        if index == len(self.sizes) - 1:
            self.rows, self.parts = None, ()
        return found


def merge(model: nn.Module) -> int:
    """Merges what can be merged; layers that train, that are shared out or wrapped are left alone.

    Returns:
        How many groups were merged.
    """
    merged = 0
    for module in model.modules():
        for names in GROUPS:
            layers = [layer for name in names if type(layer := getattr(module, name, None)) is nn.Linear]
            if len(layers) == len(names) and _alike(layers):
                shared = _Shared(layers)
                for index, layer in enumerate(layers):
                    layer.forward = _forward(layer, shared, index)  # type: ignore[assignment, method-assign]
                merged += 1
    return merged


def _alike(layers: list[nn.Linear]) -> bool:
    first = layers[0]
    return all(
        layer.in_features == first.in_features
        and (layer.bias is None) == (first.bias is None)
        and layer.weight.dtype == first.weight.dtype
        and layer.weight.device == first.weight.device
        and "forward" not in vars(layer)
        for layer in layers
    )


def _forward(layer: nn.Linear, shared: _Shared, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(rows: torch.Tensor) -> torch.Tensor:
        learns = torch.is_grad_enabled() and layer.weight.requires_grad
        expected = index == 0 or shared.rows is rows
        if learns or not expected:
            return F.linear(rows, layer.weight, layer.bias)
        return shared.part(index, rows)

    return forward
