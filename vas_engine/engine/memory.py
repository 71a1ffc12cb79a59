"""How much memory the KV cache may take, and how many blocks that is."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vas_engine.errors import KVCacheError

CPU_FRACTION = 0.4
"""Share of the memory that is free on the host: pages are touched as they fill, activations need the rest."""
CUDA_FRACTION = 0.92
"""Share of the memory that is free on the device once the weights are there and what steps need is put aside. The rest
is for what the steps' own measurement does not see: graphs' pool, libraries, fragments."""


def count_blocks(
    bytes_per_block: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int,
    device: torch.device,
    kv_cache_memory: int | None = None,
    activations: int = 0,
) -> int:
    """Blocks to allocate: what the memory holds, but no more than all sequences at full length can use.

    Args:
        bytes_per_block: of all caches together.
        kv_cache_memory: bytes; None takes a share of the free memory (`CPU_FRACTION`, `CUDA_FRACTION`).
        activations: bytes of the free memory that steps need.

    Raises:
        KVCacheError: not one block fits.
    """
    share = CUDA_FRACTION if device.type == "cuda" else CPU_FRACTION
    budget = kv_cache_memory
    if budget is None:
        budget = max(0, int((free_memory(device) - activations) * share))
    # One block more than the length asks for: a sequence may reserve its next slot ahead of time.
    useful = max_num_seqs * (-(-max_model_len // block_size) + 1)
    blocks = min(useful, budget // bytes_per_block)
    if blocks < 1:
        raise KVCacheError(
            f"kv_cache_memory: {budget:,} bytes hold no block of {block_size} tokens "
            f"({bytes_per_block:,} bytes); give at least that, or lower block_size"
        )
    return blocks


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps without using it
        return torch.cuda.mem_get_info(device)[0]
    found = [size for size in (_host_free(), _cgroup_free()) if size is not None]
    return min(found, default=2**30)


def _host_free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        # Where the free part is not told, half of the whole is a cautious guess.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _cgroup_free() -> int | None:
    """What a container's own limit leaves (control groups, version 2)."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        return None if limit == "max" else max(int(limit) - used, 0)
    except (OSError, ValueError):
        return None
