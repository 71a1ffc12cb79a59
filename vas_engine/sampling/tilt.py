"""What the values add to a candidate's score, and which candidates need no value."""

from __future__ import annotations

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels import reference
from vas_engine.sampling.backend import extension, resolve_backend
from vas_engine.sampling.selection import Selection


def value_tilt(
    utilities: np.ndarray,
    baselines: np.ndarray,
    limits: np.ndarray,
    row_sequence: np.ndarray,
    backend: str = "auto",
) -> np.ndarray:
    """Sum over values of the clipped advantage U(s then a) - U(s).

    Args:
        utilities: float32 [R, M], weighted utility of each value after the row's token.
        baselines: float32 [S, M], the same before it.
        limits: float64 [S, M], the largest size of each term, |weight| times clip; inf is no limit.
        row_sequence: int64 [R], the sequence a row belongs to.
        backend: "auto", "cpp" or "reference".

    Returns:
        float64 [R]; NaN where an input is.

    Raises:
        InvalidArgumentError: shapes do not fit, a limit is negative or NaN, or a sequence is out of range.
    """
    utilities = np.ascontiguousarray(utilities, np.float32)
    baselines = np.ascontiguousarray(baselines, np.float32)
    limits = np.ascontiguousarray(limits, np.float64)
    row_sequence = np.ascontiguousarray(row_sequence, np.int64)
    if utilities.ndim != 2 or row_sequence.shape != utilities.shape[:1]:
        given = utilities.shape, row_sequence.shape
        raise InvalidArgumentError("utilities", given, "give [R, M] and one row_sequence a row")
    if baselines.ndim != 2 or baselines.shape != limits.shape or baselines.shape[1] != utilities.shape[1]:
        given = baselines.shape, limits.shape
        raise InvalidArgumentError("baselines", given, "baselines and limits are [S, M], M that of utilities")
    if not (limits >= 0).all():
        raise InvalidArgumentError("limits", limits[~(limits >= 0)][0].item(), "use 0 or more; inf is no limit")
    if len(row_sequence) and not 0 <= row_sequence.min() <= row_sequence.max() < len(baselines):
        given = row_sequence.min(), row_sequence.max()
        raise InvalidArgumentError("row_sequence", given, f"there are {len(baselines)} sequences")
    if resolve_backend(backend) == "cpp":
        return extension().value_tilt(utilities, baselines, limits, row_sequence)
    tensors = map(torch.from_numpy, (utilities, baselines, limits, row_sequence))
    return reference.value_tilt(*tensors).numpy()


def tilt_limits(weights: np.ndarray, clip: float | None) -> np.ndarray:
    """The largest size of each value's share of the tilt: |weight| times clip, or inf without a clip; 0 without weight.

    Args:
        weights: float [..., M].
        clip: largest size of an advantage, in the rewards' units; None is no limit.

    Returns:
        float64 [..., M].
    """
    size = np.abs(weights.astype(np.float64))
    # 0 * inf is undefined.
    return np.multiply(size, np.inf if clip is None else clip, out=np.zeros_like(size), where=size != 0)


def prune(
    selection: Selection, low: np.ndarray, high: np.ndarray, all_needed: np.ndarray, backend: str = "auto"
) -> np.ndarray:
    """Columns whose value has to be known. What is left out cannot win, so the drawn token is the same.

    A candidate whose score + high is below the best score + low (the champion's score counts with tilt 0) is out.
    Exact also in rounding: the comparison makes the additions `choose` makes, and rounding keeps order.

    Args:
        selection: of S sequences, W columns.
        low: float64 [S], below every candidate's tilt; -inf if unknown.
        high: float64 [S], above it; inf if unknown.
        all_needed: bool [S], keep all columns in use (statistics were asked for).
        backend: "auto", "cpp" or "reference".

    Returns:
        bool [S, W].

    Raises:
        InvalidArgumentError: shapes do not fit, or not low <= high, or low = inf, or high = -inf.
    """
    shape = selection.count.shape
    low, high = np.ascontiguousarray(low, np.float64), np.ascontiguousarray(high, np.float64)
    all_needed = np.ascontiguousarray(all_needed, np.bool_)
    for name, array in (("low", low), ("high", high), ("all_needed", all_needed)):
        if array.shape != shape:
            raise InvalidArgumentError(name, array.shape, f"one entry a sequence: {shape}")
    legal = (low <= high) & (low < np.inf) & (high > -np.inf)
    if not legal.all():
        given = low[~legal][0].item(), high[~legal][0].item()
        raise InvalidArgumentError("low, high", given, "low must not exceed high")
    s = selection
    if resolve_backend(backend) == "cpp":
        return extension().prune(s.log_probs, s.noise, s.count, s.tail, low, high, all_needed)
    arrays = (s.log_probs, s.noise, s.count, s.tail, low, high, all_needed)
    return reference.prune_candidates(*map(torch.from_numpy, arrays)).numpy()
