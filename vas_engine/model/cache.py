"""Paged keys and values of a stack of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels.transfer import to_device
from vas_engine.model.backend import PagedLayer, commit_layers, make_layer
from vas_engine.model.batch import AttentionBatch


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps per token: ``kv_heads`` keys and as many values of ``head_dim`` numbers."""

    kv_heads: int
    head_dim: int


class KVCache:
    """Pages of keys and values, one pair of tensors [num_blocks, block_size, kv_heads, head_dim] a layer.

    Pages start as zeros. Blocks are handed out by the engine's block manager; the cache only stores.

    Attributes:
        keys, values: the pages, one tensor a layer.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        backend: str = "auto",
    ) -> None:
        if num_blocks < 1:
            raise InvalidArgumentError("num_blocks", num_blocks, "at least one block is needed")
        if block_size < 1:
            raise InvalidArgumentError("block_size", block_size, "a block holds at least one token")
        self.layers = list(layers)
        self.num_blocks, self.block_size = num_blocks, block_size
        self.dtype, self.device = dtype, torch.device(device)
        shapes = [(num_blocks, block_size, layer.kv_heads, layer.head_dim) for layer in self.layers]
        self.keys = [torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=self.device) for shape in shapes]
        self.pages: list[PagedLayer] = [make_layer(k, v, backend) for k, v in zip(self.keys, self.values, strict=True)]

    @staticmethod
    def bytes_per_block(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes in all layers together."""
        numbers = sum(2 * layer.kv_heads * layer.head_dim for layer in layers)
        return numbers * block_size * dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block(self.layers, self.block_size, self.dtype)

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        batch: AttentionBatch,
        scale: float,
        softcap: float = 0.0,
        window: int = 0,
    ) -> torch.Tensor:
        """Writes the slotted rows' keys and values, then attends; q [R, H, D], k and v [R, KVH, D] or None
        -> [R, H, D]."""
        return self.pages[layer].attend(q, k, v, batch, scale, softcap, window)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Rows [R, KVH, D] to their slots (int64 [R]); slot -1 is left out."""
        self.pages[layer].write(k, v, slots)

    def commit(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        rows: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Rows (int64 [n]) of every layer's scratch [R, KVH, D] to their slots (int64 [n])."""
        commit_layers(self.pages, keys, values, rows, slots)

    def copy_blocks(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copies whole blocks, all layers; ``source[i]`` to ``target[i]``."""
        if len(source) != len(target):
            raise InvalidArgumentError("target", list(target), f"needs {len(source)} blocks, as many as source")
        if not source:
            return
        origin, place = to_device([np.array(source, np.int64), np.array(target, np.int64)], self.device)
        for pages in (*self.keys, *self.values):
            pages[place] = pages[origin]
