"""Sampling controls: what a request set once, gathered into arrays for the sequences of a step."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np

from vas_engine.engine.sequence import Sequence
from vas_engine.params import SamplingParams
from vas_engine.sampling import SamplingArrays
from vas_engine.sampling.arrays import MIN_TEMPERATURE

Row = tuple[np.ndarray, np.ndarray]
"""Token ids int32 [n], and a number for each."""


class Knobs(NamedTuple):
    """What a request sets to a number each; of a step's S sequences float64 [S] each, see `columns`."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    keep_tail: Any

    @classmethod
    def of(cls, params: SamplingParams) -> Knobs:
        """Those of a request."""
        return cls(
            # Below the sampler's least it is greedy in all but name.
            temperature=params.temperature if params.temperature >= MIN_TEMPERATURE else 0.0,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            keep_tail=params.tail == "keep",
        )

    @classmethod
    def columns(cls, sequences: Seq[Sequence]) -> Knobs:
        """Those of S sequences, float64 [S] each, contiguous."""
        lines = np.array([s.knobs for s in sequences], np.float64).reshape(len(sequences), len(cls._fields))
        return cls(*lines.T.copy())


def has_limits(params: SamplingParams) -> bool:
    """Whether a request cuts the support of its distribution."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def has_penalties(params: SamplingParams) -> bool:
    """Whether scores of a request depend on the tokens that it has."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def gather(sequences: Seq[Sequence], num_candidates: np.ndarray) -> SamplingArrays:
    """Arrays for the next token of each sequence; its position is the sequence's length."""
    knobs = Knobs.columns(sequences)
    history = _rows([None if s.history is None else s.history.follow(s.token_ids) for s in sequences], np.int32)
    bias = _rows([_bias(s) for s in sequences], np.float32)
    return SamplingArrays(
        temperature=knobs.temperature,
        top_k=knobs.top_k.astype(np.int32),
        top_p=knobs.top_p,
        min_p=knobs.min_p,
        repetition_penalty=knobs.repetition_penalty,
        presence_penalty=knobs.presence_penalty,
        frequency_penalty=knobs.frequency_penalty,
        seed=np.array([s.seed for s in sequences], np.uint64),
        position=np.array([len(s.token_ids) for s in sequences], np.int64),
        num_candidates=num_candidates.astype(np.int32),
        keep_tail=knobs.keep_tail != 0,
        history_offsets=history[0],
        history_ids=history[1],
        history_counts=history[2],
        bias_offsets=bias[0],
        bias_ids=bias[1],
        bias_values=bias[2],
    )


def bias_row(bias: Mapping[int, float]) -> Row | None:
    """Token ids and what to add to their logits; None where there is nothing."""
    if not bias:
        return None
    return np.fromiter(bias.keys(), np.int32, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))


def _bias(sequence: Sequence) -> Row | None:
    early = sequence.num_generated < sequence.params.min_tokens
    return sequence.early_bias if early else sequence.bias


def _rows(rows: list[Row | None], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compressed rows: offsets, token ids, values."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([0 if row is None else len(row[0]) for row in rows], out=offsets[1:])
    nothing: Row = np.zeros(0, np.int32), np.zeros(0, dtype)
    ids, values = zip(nothing, *(row for row in rows if row is not None), strict=True)
    return offsets, np.concatenate(ids), np.concatenate(values)
