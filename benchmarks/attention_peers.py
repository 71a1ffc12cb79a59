"""Attention by others of what `candidate_attention` is measured on: rows that see all of their request's prefix.

Without a causal mask, queries [requests, rows] over each request's keys are the same function. A peer's copy of the
keys and values lies as it likes best, in order and in pages of its own size; making it takes no part in the time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from vas_engine.model import flash

Peer = Callable[[dict[str, Any]], Callable[[], torch.Tensor]]
"""Inputs of `candidate_attention`, all prefixes of one length -> a call that gives [R, H, D]."""

FLASH_PAGE = 256
"""Tokens; flash-attn 2 takes multiples of it."""


def _dense(given: dict[str, Any], multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """q [B, rows, H, D], k and v [B, context rounded up to a multiple, KVH, D] (zeros behind it), and the context."""
    tables, context = given["block_tables"].long(), int(given["prefix_lens"][0])
    padding = (0, 0, 0, 0, 0, -context % multiple)
    k, v = (F.pad(given[name][tables].flatten(1, 2)[:, :context], padding) for name in ("k_pages", "v_pages"))
    return given["q"].unflatten(0, (len(tables), -1)), k.contiguous(), v.contiguous(), context


def sdpa(given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """torch's own."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in _dense(given)[:3])
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def flash_attn(given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """`flash_attn_with_kvcache` of flash-attn 2, over pages."""
    q, k, v, context = _dense(given, FLASH_PAGE)
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    k_pages, v_pages = (x.flatten(0, 1).unflatten(0, (-1, FLASH_PAGE)) for x in (k, v))
    tables = torch.arange(len(k_pages), dtype=torch.int32, device=q.device).view(len(q), -1)
    lengths = torch.full((len(q),), context, dtype=torch.int32, device=q.device)
    return lambda: function(q, k_pages, v_pages, cache_seqlens=lengths, block_table=tables, causal=False).flatten(0, 1)


def flash_attn_4(given: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """`flash_attn_func` of flash-attn-4, which splits the prefix as it finds right."""
    q, k, v, _ = _dense(given)
    function = importlib.import_module("flash_attn.cute").flash_attn_func

    def call() -> torch.Tensor:
        found = function(q, k, v, causal=False, num_splits=0)
        return (found[0] if isinstance(found, tuple) else found).flatten(0, 1)

    return call


def peers(device: torch.device) -> dict[str, Peer]:
    """Those that can run on a device, by name."""
    found: dict[str, Peer] = {"sdpa": sdpa}
    if device.type != "cuda":
        return found
    theirs = {"flash-attn": flash_attn, "flash-attn-4": flash_attn_4}
    return found | {name: theirs[name] for name in flash.serving(torch.cuda.get_device_capability(device))}
