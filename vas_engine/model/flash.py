"""flash-attn, where it is installed: attention of prompt chunks.

Its pages must be of 256 tokens (flash-attn 2) or of 128 (flash-attn-4), ours are of any size; so keys and values of the
chunks' prefixes are gathered first. That moves their bytes twice more, which is little beside a chunk's products.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from vas_engine.kernels.transfer import to_device

PACKAGES = {"flash-attn-4": ("flash_attn.cute", (9, 0)), "flash-attn": ("flash_attn", (8, 0))}
"""Distribution -> its module, and the oldest compute capability it serves; what comes first is preferred."""
DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Chunks:
    """Prompt chunks of a batch, one group each: their last row sees all of the group's prefix, the one before it one
    position less, and so on.

    Attributes:
        rows: int64 [Q], the chunks' rows one after another.
        slots: int64 [K], where the prefixes' keys lie, one prefix after another.
        row_ends, slot_ends: int32 [chunks + 1], cumulative lengths.
        longest_rows, longest_prefix: the largest of them.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    row_ends: torch.Tensor
    slot_ends: torch.Tensor
    longest_rows: int
    longest_prefix: int


def serving(capability: tuple[int, int] | None = None) -> dict[str, str]:
    """The packages installed that serve a compute capability (None: any), the preferred first, with their versions."""
    found = {}
    for name, (_, least) in PACKAGES.items():
        if capability is None or capability >= least:
            with suppress(PackageNotFoundError):
                found[name] = version(name)
    return found


def installed(capability: tuple[int, int] | None = None) -> str | None:
    """The package that serves a compute capability (None: any), with its version; None if there is none."""
    return next((f"{name} {found}" for name, found in serving(capability).items()), None)


def load(device: torch.device) -> Callable[..., Any]:
    """The package's function for sequences of any lengths."""
    chosen = installed(torch.cuda.get_device_capability(device))
    assert chosen is not None
    return importlib.import_module(PACKAGES[chosen.split()[0]][0]).flash_attn_varlen_func


def plan(
    groups: np.ndarray, starts: np.ndarray, counts: np.ndarray, lengths: np.ndarray, tables: torch.Tensor, size: int
) -> Chunks:
    """Chunks of some groups.

    Args:
        groups: int [n]. starts, counts: first row and rows of each. lengths: its prefix, the chunk included.
        tables: int32 [G, blocks], on the device. size: tokens of a block.
    """
    row_ends, slot_ends = (np.concatenate([[0], np.cumsum(each)]) for each in (counts, lengths))
    rows = np.arange(row_ends[-1]) + np.repeat(starts - row_ends[:-1], counts)
    place = np.arange(slot_ends[-1]) - np.repeat(slot_ends[:-1], lengths)
    arrays = [rows, place, np.repeat(groups, lengths), row_ends.astype(np.int32), slot_ends.astype(np.int32)]
    index, at, group, q_ends, k_ends = to_device(arrays, tables.device)
    slots = tables[group, at // size].long() * size + at % size
    return Chunks(index, slots, q_ends, k_ends, int(counts.max()), int(lengths.max()))


def attend(
    function: Callable[..., Any],
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    chunks: Chunks,
    scale: float,
    softcap: float,
    window: int,
    out: torch.Tensor,
) -> None:
    """Rows of chunks, whose keys and values are in the pages, into out [R, H, D].

    Args:
        function: `flash_attn_varlen_func`, of either package.
        q: [R, H, D]. k_pages, v_pages: [num_blocks, block_size, KVH, D]. All of one 16-bit dtype.
        window: a row at position p sees keys at positions above ``p - window``; 0 is off.
    """
    options: dict[str, Any] = {"window_size": (window - 1, 0)} if window else {}
    if softcap:
        options["softcap"] = softcap
    found = function(
        q.index_select(0, chunks.rows),
        k_pages.flatten(0, 1).index_select(0, chunks.slots),
        v_pages.flatten(0, 1).index_select(0, chunks.slots),
        cu_seqlens_q=chunks.row_ends,
        cu_seqlens_k=chunks.slot_ends,
        max_seqlen_q=chunks.longest_rows,
        max_seqlen_k=chunks.longest_prefix,
        softmax_scale=scale,
        causal=True,
        **options,
    )
    out.index_copy_(0, chunks.rows, found[0] if isinstance(found, tuple) else found)
