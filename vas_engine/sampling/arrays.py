"""The sampling settings of a batch as flat arrays, one entry a sequence."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vas_engine.errors import InvalidArgumentError, nearest

_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "temperature": (np.float64, 1.0),
    "top_k": (np.int32, 0),
    "top_p": (np.float64, 1.0),
    "min_p": (np.float64, 0.0),
    "repetition_penalty": (np.float64, 1.0),
    "presence_penalty": (np.float64, 0.0),
    "frequency_penalty": (np.float64, 0.0),
    "seed": (np.uint64, 0),
    "position": (np.int64, 0),
    "num_candidates": (np.int32, 0),
    "keep_tail": (np.bool_, True),
}
_RAGGED: dict[str, Any] = {
    "history_offsets": np.int64,
    "history_ids": np.int32,
    "history_counts": np.int32,
    "bias_offsets": np.int64,
    "bias_ids": np.int32,
    "bias_values": np.float32,
}
# Below this a temperature divides logits into numbers float64 cannot hold, and means "greedy" anyway.
MIN_TEMPERATURE = 1e-8


@dataclass
class SamplingArrays:
    """Settings of S sequences. The ids of one sequence's history, and of its bias, are distinct; order is free.

    Attributes:
        temperature: float64 [S], 0 is greedy.
        top_k: int32 [S], 0 is off.
        top_p: float64 [S], 1 is off.
        min_p: float64 [S], 0 is off.
        repetition_penalty: float64 [S], 1 is off.
        presence_penalty: float64 [S], 0 is off.
        frequency_penalty: float64 [S], 0 is off.
        seed: uint64 [S].
        position: int64 [S], position of the token to be drawn.
        num_candidates: int32 [S], 0 is plain sampling.
        keep_tail: bool [S], whether tokens outside the candidates may be drawn.
        history_offsets: int64 [S + 1] into the two below.
        history_ids: int32, distinct tokens of prompt and output.
        history_counts: int32, how often each was generated; 0 if it is only in the prompt.
        bias_offsets: int64 [S + 1] into the two below.
        bias_ids: int32.
        bias_values: float32, added to the logits; -inf bans a token.
    """

    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    min_p: np.ndarray
    repetition_penalty: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    seed: np.ndarray
    position: np.ndarray
    num_candidates: np.ndarray
    keep_tail: np.ndarray
    history_offsets: np.ndarray
    history_ids: np.ndarray
    history_counts: np.ndarray
    bias_offsets: np.ndarray
    bias_ids: np.ndarray
    bias_values: np.ndarray

    def __len__(self) -> int:
        return len(self.temperature)

    @classmethod
    def build(
        cls,
        count: int,
        history: list[dict[int, int]] | None = None,
        bias: list[dict[int, float]] | None = None,
        **settings: Any,
    ) -> SamplingArrays:
        """Arrays of count sequences; what is not named is off.

        Args:
            count: S.
            history: for each sequence, token -> times generated.
            bias: for each sequence, token -> what to add to its logit.
            settings: any per-sequence attribute, a scalar for all or S values.

        Raises:
            InvalidArgumentError: an unknown setting or a wrong number of values.
        """
        for name in settings:
            if name not in _DEFAULTS:
                raise InvalidArgumentError(name, settings[name], f"unknown setting; {nearest(name, _DEFAULTS)}")
        columns = {
            name: _column(name, settings.get(name, default), count, dtype)
            for name, (dtype, default) in _DEFAULTS.items()
        }
        return cls(
            **columns,
            **_ragged("history", history, count, "counts"),
            **_ragged("bias", bias, count, "values"),
        )

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidArgumentError for the first attribute that is malformed or out of range."""
        self._check_layout()
        self._check_ranges()
        for name in ("history", "bias"):
            ids = getattr(self, f"{name}_ids")
            _require(f"{name}_ids", ids, (ids >= 0) & (ids < vocab_size), f"token ids lie in [0, {vocab_size})")
        _require("history_counts", self.history_counts, self.history_counts >= 0, "counts are 0 or more")
        _require("bias_values", self.bias_values, self.bias_values < np.inf, "use finite values, or -inf to ban")

    def _check_layout(self) -> None:
        dtypes = {name: dtype for name, (dtype, _) in _DEFAULTS.items()} | _RAGGED
        lengths = dict.fromkeys(_DEFAULTS, len(self)) | {
            "history_offsets": len(self) + 1,
            "bias_offsets": len(self) + 1,
            "history_counts": len(self.history_ids),
            "bias_values": len(self.bias_ids),
        }
        for field in fields(self):
            array = getattr(self, field.name)
            if not isinstance(array, np.ndarray) or array.dtype != dtypes[field.name] or array.ndim != 1:
                wanted = np.dtype(dtypes[field.name]).name
                raise InvalidArgumentError(field.name, getattr(array, "dtype", array), f"a {wanted} vector is needed")
            if not array.flags.c_contiguous:
                raise InvalidArgumentError(field.name, array.strides, "a contiguous vector is needed")
            if len(array) != lengths.get(field.name, len(array)):
                raise InvalidArgumentError(field.name, len(array), f"{lengths[field.name]} entries are needed")
        for name in ("history", "bias"):
            offsets, ids = getattr(self, f"{name}_offsets"), getattr(self, f"{name}_ids")
            if offsets[0] != 0 or offsets[-1] != len(ids) or (np.diff(offsets) < 0).any():
                raise InvalidArgumentError(f"{name}_offsets", offsets, f"must rise from 0 to {len(ids)}")

    def _check_ranges(self) -> None:
        t, penalty = self.temperature, self.repetition_penalty
        legal = np.isfinite(t) & ((t == 0) | (t >= MIN_TEMPERATURE))
        _require("temperature", t, legal, f"use 0 (greedy) or a finite number from {MIN_TEMPERATURE}")
        _require("top_k", self.top_k, self.top_k >= 0, "use 0 (off) or more")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _require(name, value, (value >= 0) & (value <= 1), "use a number in [0, 1]")
        _require("repetition_penalty", penalty, (penalty > 0) & (penalty < np.inf), "use a positive finite number")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(name, getattr(self, name), np.isfinite(getattr(self, name)), "use a finite number")
        _require("position", self.position, self.position >= 0, "positions count from 0")
        _require("num_candidates", self.num_candidates, self.num_candidates >= 0, "use 0 (plain) or more")


def _column(name: str, value: Any, count: int, dtype: Any) -> np.ndarray:
    array = np.asarray(value, dtype=dtype)
    if array.shape not in ((), (count,)):
        raise InvalidArgumentError(name, value, f"give one value or {count}")
    return np.array(np.broadcast_to(array, (count,)))


def _ragged(name: str, entries: list[Any] | None, count: int, values: str) -> dict[str, np.ndarray]:
    entries = [{}] * count if entries is None else entries
    if len(entries) != count:
        raise InvalidArgumentError(name, len(entries), f"give one mapping for each of {count} sequences")
    names = f"{name}_offsets", f"{name}_ids", f"{name}_{values}"
    flat = [pair for entry in entries for pair in entry.items()]
    columns = (
        np.cumsum([0, *map(len, entries)]),
        [token for token, _ in flat],
        [value for _, value in flat],
    )
    return {key: np.asarray(column, dtype=_RAGGED[key]) for key, column in zip(names, columns, strict=True)}


def _require(name: str, array: np.ndarray, legal: np.ndarray, fix: str) -> None:
    if not legal.all():
        raise InvalidArgumentError(name, array[~legal][0].item(), fix)
