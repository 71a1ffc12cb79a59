"""Sampling controls: what a request set once, gathered into arrays for the sequences of a step."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np

from vas_engine.engine.sequence import Sequence
from vas_engine.params import SamplingParams
from vas_engine.sampling import SamplingArrays
from vas_engine.sampling.arrays import MIN_TEMPERATURE


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
    history = _rows([_history(s) if s.penalised else None for s in sequences], np.int32)
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


def _history(sequence: Sequence) -> dict[int, int]:
    """Token -> times generated (0: only in the prompt), brought up to the sequence's length."""
    counts = sequence.token_counts
    for token in sequence.token_ids[sequence.counted :]:
        generated = sequence.counted >= sequence.prompt_len
        counts[token] = counts.get(token, 0) + generated
        sequence.counted += 1
    return counts


def _bias(sequence: Sequence) -> dict[int, float] | None:
    if sequence.num_generated < sequence.params.min_tokens:
        return {**sequence.bias, **dict.fromkeys(sequence.end_ids, -np.inf)}
    return sequence.bias or None


def _rows(entries: list[dict | None], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dictionaries as compressed rows: offsets, keys, values."""
    offsets = np.zeros(len(entries) + 1, np.int64)
    np.cumsum([len(e) if e else 0 for e in entries], out=offsets[1:])
    keys = np.fromiter((k for e in entries if e for k in e), np.int32, offsets[-1])
    values: np.ndarray = np.fromiter((v for e in entries if e for v in e.values()), dtype, offsets[-1])
    return offsets, keys, values
