"""Layers of a value network. What they attend to is handed in: pages while serving, whole sequences while training.

The stream from layer to layer is float32; products are computed in the dtype of the weights.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vas_engine.model.batch import AttentionBatch
from vas_engine.model.branches import Branches, branch_attention
from vas_engine.model.cache import KVCache
from vas_engine.model.lm import CausalLM, DenseOutput
from vas_engine.values.config import ValueConfig
from vas_engine.values.heads import ACTIVATION_FUNCTIONS, initialise, project, rms_norm

ROTARY_THETA = 10000.0


class Attention(Protocol):
    """What layers attend to; rows are flat, [R, ...]."""

    positions: Tensor
    """int64 [R]"""

    def read(self, layer: int, queries: Tensor) -> Tensor:
        """Base layer ``layer``'s K/V strictly below each row's position: queries [R, Q, D], not rotated
        -> [R, Q, D], of any float dtype.
        """

    def own(self, index: int, qk: Tensor, v: Tensor) -> Tensor:
        """The network's own K/V up to each row and the row itself: qk [R, H + KVH, D], queries and then keys, and v
        [R, KVH, D] -> [R, H, D].
        """


class FeedForward(nn.Module):
    """Pre-norm feed-forward block with its residual."""

    def __init__(self, config: ValueConfig, branches: int) -> None:
        super().__init__()
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.up = initialise(nn.Linear(config.width, config.mlp, bias=False))
        self.down = initialise(nn.Linear(config.mlp, config.width, bias=False), gain=branches**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """[R, width] -> [R, width]."""
        return x + project(self.down, self.activation(project(self.up, rms_norm(x))))


class ReaderLayer(nn.Module):
    """Cross-attention to the base model's own K/V of one layer with learned queries; then feed-forward."""

    def __init__(self, config: ValueConfig, index: int) -> None:
        super().__init__()
        self.layer = config.layers[index]
        self.shape = (config.queries, config.head_dim)
        size, branches = config.queries * config.head_dim, 2 * len(config.layers)
        self.query = initialise(nn.Linear(config.width, size, bias=False))
        self.output = initialise(nn.Linear(size, config.width, bias=False), gain=branches**-0.5)
        self.mlp = FeedForward(config, branches) if config.mlp else None

    def forward(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        """[R, width] -> [R, width]."""
        seen = attention.read(self.layer, project(self.query, rms_norm(x)).unflatten(-1, self.shape))
        x = x + project(self.output, seen.flatten(1))
        return x if self.mlp is None else self.mlp(x)


class SideLayer(nn.Module):
    """An ordinary pre-norm transformer layer with K/V of its own."""

    def __init__(self, config: ValueConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.num_heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        branches, size = 2 * config.depth, config.num_heads * config.head_dim
        inputs = size + 2 * config.kv_heads * config.head_dim
        self.qkv = initialise(nn.Linear(config.width, inputs, bias=False))
        self.output = initialise(nn.Linear(size, config.width, bias=False), gain=branches**-0.5)
        self.mlp = FeedForward(config, branches) if config.mlp else None

    def forward(self, x: Tensor, attention: Attention, rotary: Rotary | None) -> Tensor:
        """[R, width] -> [R, width]."""
        assert rotary is not None
        both = project(self.qkv, rms_norm(x)).unflatten(-1, (-1, self.head_dim))
        qk, v = both.split([self.num_heads + self.kv_heads, self.kv_heads], 1)
        seen = attention.own(self.index, rotary.turn(qk), v)
        x = x + project(self.output, seen.flatten(1))
        return x if self.mlp is None else self.mlp(x)


class Rotary:
    """Rotary positions of a side network (Su et al. 2021), the two halves of a head turned against each other."""

    def __init__(self, positions: Tensor, head_dim: int) -> None:
        steps = torch.arange(head_dim // 2, dtype=torch.float32, device=positions.device)
        angles = positions.unsqueeze(-1) * torch.exp(steps * (-2.0 * math.log(ROTARY_THETA) / head_dim))
        self.cos, self.sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    def turn(self, x: Tensor) -> Tensor:
        """[R, heads, head_dim] -> the same, rotated by each row's position."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)


def split_heads(qk: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """qk [R, H + KVH, D] by v [R, KVH, D] -> [R, H, D], [R, KVH, D]."""
    return qk.split([qk.shape[1] - v.shape[1], v.shape[1]], 1)


class PagedAttention:
    """Rows of the engine over pages: the base model's for a reader, the network's own for a side network."""

    def __init__(self, lm: CausalLM, cache: KVCache | None, batch: AttentionBatch) -> None:
        self.lm, self.cache, self.batch = lm, cache, batch
        self.positions, self.known = batch.positions, batch.cache
        self.scratch: list[tuple[Tensor, Tensor]] = []

    def read(self, layer: int, queries: Tensor) -> Tensor:
        return self.attend(layer, self.lm.rotate(queries.to(self.lm.dtype), self.positions, layer, self.known))

    def own(self, index: int, qk: Tensor, v: Tensor) -> Tensor:
        return self.attend(index, qk.to(self.lm.dtype), v.to(self.lm.dtype))

    def attend(self, index: int, q: Tensor, v: Tensor | None = None) -> Tensor:
        """In the base model's dtype: its layer ``index``, or with v, and keys behind the queries, the network's own."""
        if v is None:
            return self.lm.attend(index, q, self.batch)
        assert self.cache is not None
        q, k = split_heads(q, v)
        self.scratch.append((k, v))
        return self.cache.attend(index, q, k, v, self.batch, scale=q.shape[-1] ** -0.5)


class DenseAttention:
    """Whole sequences and the branches behind them, uncached, with autograd. Padding is never seen by what precedes it.

    Args:
        dense: the base model's, with the keys and values of the layers that are read.
        positions: int64 [B, S], of all rows: S is T without branches.
        length: T.
    """

    def __init__(
        self, lm: CausalLM, dense: DenseOutput, positions: Tensor, length: int, branches: Branches | None = None
    ) -> None:
        self.lm, self.dense = lm, dense
        self.size, self.length = positions.shape, length
        self.after = None if branches is None else branches.after
        self.positions = positions.flatten()
        self.known: dict[Any, Any] = {}

    def read(self, layer: int, queries: Tensor) -> Tensor:
        keys, values = (kept[layer][:, :, : self.length] for kept in (self.dense.keys, self.dense.values))
        window = self.lm.layers[layer].window
        rotated = self._lay(self.lm.rotate(queries.to(keys.dtype), self.positions, layer, self.known))
        seen = strictly_causal(rotated[:, :, : self.length], keys, values, window)
        if self.after is not None:
            there = rotated[:, :, self.length :]
            scale = queries.shape[-1] ** -0.5
            seen = torch.cat([seen, branch_attention(there, keys, values, self.after, None, scale, 0.0, window)], 2)
        return seen.transpose(1, 2).flatten(0, 1).to(queries.dtype)

    def own(self, index: int, qk: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self._lay(x) for x in (*split_heads(qk, v), v))
        sizes = [self.length, self.size[1] - self.length]
        (first, q), (keys, k), (values, v) = (x.split(sizes, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        seen = F.scaled_dot_product_attention(first, keys, values, is_causal=True, enable_gqa=grouped)
        if self.after is not None:
            scale = q.shape[-1] ** -0.5
            seen = torch.cat([seen, branch_attention(q, keys, values, self.after, (k, v), scale)], 2)
        return seen.transpose(1, 2).flatten(0, 1)

    def _lay(self, x: Tensor) -> Tensor:
        """[B * S, H, D] -> [B, H, S, D]."""
        return x.unflatten(0, self.size).transpose(1, 2)


def strictly_causal(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Attention in which position p sees keys below p (and above ``p - window`` if that is positive);
    nothing seen gives 0.

    Args:
        q: [B, H, T, D]. k, v: [B, KVH, T, D], H a multiple of KVH. Scale 1 / sqrt(D).

    Returns:
        [B, H, T, D], with autograd.
    """
    length = q.shape[2]
    if length == 1 or window == 1:
        return q * 0.0
    # Position p and the keys below it are row p - 1 of ordinary causal attention.
    q, k, v = q[:, :, 1:], k[:, :, :-1], v[:, :, :-1]
    mask = None
    if 0 < window <= length - 1:
        place = torch.arange(length - 1, device=q.device)
        mask = (place <= place[:, None]) & (place > place[:, None] + 1 - window)
    seen = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return F.pad(seen, (0, 0, 1, 0))
