"""Noise keyed by (seed, position, token), and the seeds of forks."""

from __future__ import annotations

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels import reference
from vas_engine.sampling.backend import extension, resolve_backend

_MASK64 = 2**64 - 1


def gumbel_noise(seed: int, position: int, token_ids: np.ndarray, backend: str = "auto") -> np.ndarray:
    """Gumbel(0, 1) noise of tokens, a pure function of its three arguments (see `kernels.reference.gumbel_noise`).

    Args:
        seed: 0 <= seed < 2^64.
        position: non-negative.
        token_ids: integer array of any shape, non-negative.
        backend: "auto", "cpp" or "reference".

    Returns:
        float64 array of token_ids' shape.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """
    check_seed(seed)
    ids = np.ascontiguousarray(token_ids, dtype=np.int64)
    if position < 0:
        raise InvalidArgumentError("position", position, "positions count from 0")
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
        raise InvalidArgumentError("token_ids", (ids.min(), ids.max()), "token ids lie in [0, 2^31)")
    if resolve_backend(backend) == "cpp":
        return extension().gumbel_noise(seed, position, ids.reshape(-1)).reshape(ids.shape)
    return reference.gumbel_noise(seed, position, torch.from_numpy(ids)).numpy()


def check_seed(seed: int) -> None:
    """Raises InvalidArgumentError unless 0 <= seed < 2^64."""
    if not 0 <= seed <= _MASK64:
        raise InvalidArgumentError("seed", seed, "give an integer in [0, 2^64)")


def fork_seed(seed: int, index: int) -> int:
    """Seed of the index-th sample of a request; index 0 keeps the request's own.

    Otherwise the SplitMix64 output function (Steele, Lea & Flood, OOPSLA 2014) is applied twice: to the seed,
    and to that plus index times its odd increment. For a fixed seed it is one-to-one in the index.

    Args:
        seed: 0 <= seed < 2^64.
        index: 0 <= index.

    Returns:
        An integer in [0, 2^64).

    Raises:
        InvalidArgumentError: an argument is out of range.
    """
    check_seed(seed)
    if index < 0:
        raise InvalidArgumentError("index", index, "samples of a request count from 0")
    if index == 0:
        return seed
    return _mix(_mix(seed) + index * 0x9E3779B97F4A7C15)


def _mix(value: int) -> int:
    value &= _MASK64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK64
    return value ^ (value >> 31)
