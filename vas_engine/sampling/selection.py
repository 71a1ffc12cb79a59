"""Candidates of a step and the champion of the tail."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels import reference
from vas_engine.kernels.transfer import to_host
from vas_engine.sampling.arrays import SamplingArrays
from vas_engine.sampling.backend import extension, resolve_backend

# How the extension is told what the 16-bit words of a row mean.
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# What stands in columns that are not in use, by field.
_UNUSED = {"token_ids": -1, "log_probs": -np.inf, "noise": 0.0}


@dataclass
class Selection:
    """What may be drawn next, for S sequences in W = min(max(num_candidates), V) + 1 columns.

    Candidates come first, by descending log-probability, equal ones by smaller id; the champion of the tail
    (the best token outside the candidates after noise) stands right after the last of them.

    Attributes:
        token_ids: int64 [S, W], -1 in columns not in use.
        log_probs: float64 [S, W], log pi0, normalised over what top_k, top_p and min_p left; at temperature 0
            that of temperature 1. -inf in columns not in use.
        noise: float64 [S, W], the tokens' Gumbel noise; 0 at temperature 0 and in columns not in use.
        count: int64 [S], columns in use.
        tail: int64 [S], the champion's column; -1 if the tail is dropped or empty.
        tail_log_mass: float64 [S], log of the probability pi0 of everything but the candidates, also of a
            dropped tail; -inf if there is nothing else.
        finite: bool [S], False where a score is NaN or +inf or no token is left; such a sequence has no
            columns.
    """

    token_ids: np.ndarray
    log_probs: np.ndarray
    noise: np.ndarray
    count: np.ndarray
    tail: np.ndarray
    tail_log_mass: np.ndarray
    finite: np.ndarray

    @property
    def filled(self) -> np.ndarray:
        """bool [S, W]: columns in use."""
        return np.arange(self.token_ids.shape[1]) < self.count[:, None]

    def pick(self, index: np.ndarray | slice, width: int | None = None) -> Selection:
        """The lines of some sequences (int64 or bool [n], or a slice), of the first `width` columns; None: of all."""
        return Selection(*(each[index, :width] if each.ndim == 2 else each[index] for each in vars(self).values()))

    @classmethod
    def stack(cls, parts: Sequence[Selection], width: int = 0) -> Selection:
        """Selections of different sequences as one, as wide as the widest of them and at least `width`.

        Columns that a part lacks are not in use.
        """
        width = max(width, *(part.token_ids.shape[1] for part in parts))

        def joined(name: str) -> np.ndarray:
            fields = [getattr(part, name) for part in parts]
            if name not in _UNUSED:
                return np.concatenate(fields)
            lines = np.full((sum(map(len, fields)), width), _UNUSED[name], fields[0].dtype)
            start = 0
            for field in fields:
                lines[start : start + len(field), : field.shape[1]] = field
                start += len(field)
            return lines

        return cls(*(joined(field.name) for field in dataclasses.fields(cls)))


def select(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays, backend: str = "auto") -> Selection:
    """Candidates and tail champion of every sequence, in the order of operations of `kernels.reference`.

    Args:
        logits: [B, V] float32, bfloat16 or float16; not modified.
        rows: int64 [S], the row of logits each sequence reads; several may read one.
        arrays: settings of the S sequences.
        backend: "auto", "cpp", "triton" or "reference". On a GPU "auto" takes the Triton kernels where Triton is
            installed. Where these have no room for the vocabulary or the candidates, the reference serves.

    Returns:
        A `Selection`. Logits that cannot be sampled from show in its `finite`, for that sequence only.

    Raises:
        InvalidArgumentError: a shape, dtype or setting is wrong; nothing was computed.
    """
    name = resolve_backend(backend, logits.device)
    if logits.dim() != 2 or logits.dtype not in _CODES:
        given = f"{logits.dtype} {tuple(logits.shape)}"
        raise InvalidArgumentError("logits", given, "give float32, bfloat16 or float16 [rows, vocabulary]")
    if name == "cpp":
        return _select_cpp(logits.detach(), rows, arrays)
    _check(logits, rows, arrays)
    if name == "triton":
        selection = _select_triton(logits.detach(), rows, arrays)
        if selection is not None:
            return selection
    result = reference.candidate_select(logits.detach(), rows, arrays)
    return Selection(*(field.numpy() for field in vars(result).values()))


def select_on_device(
    logits: torch.Tensor,
    settings: torch.Tensor,
    width: int,
    lines: torch.Tensor | None = None,
    backend: str = "auto",
) -> reference.SelectionTensors:
    """`select` without bias and penalties, from settings that lie where the logits do.

    Args:
        logits: [B, V], as `select`'s.
        settings: int64 [SETTINGS, S], lines as `kernels.reference.Setting` has them.
        width: W, at least one more than the most candidates.
        lines: int64 [P], all sequences that have a top_k, top_p or min_p; others, or one of them twice, do no harm.
            None: no sequence has any.
        backend: as `select`'s; the Triton kernels only launch and wait for nothing.

    Returns:
        The fields of a `Selection` of W columns, on the logits' device.
    """
    if resolve_backend(backend, logits.device) == "triton":
        from vas_engine.kernels import candidate_select as kernels

        scores = None if lines is None else kernels.limited_scores(logits, settings, lines)
        return kernels.views(kernels.select_packed(logits, settings, width, scores, lines), settings.shape[1], width)
    rows, temperature, seed, position, candidates, keep_tail, top_k, top_p, min_p = settings.cpu().numpy()
    arrays = SamplingArrays.build(
        len(rows),
        temperature=temperature.view(np.float64),
        seed=seed.view(np.uint64),
        position=position,
        num_candidates=candidates,
        keep_tail=keep_tail,
        top_k=top_k,
        top_p=top_p.view(np.float64),
        min_p=min_p.view(np.float64),
    )
    found = Selection.stack([select(logits, np.ascontiguousarray(rows), arrays, backend)], width)
    return reference.SelectionTensors(*(torch.from_numpy(field).to(logits.device) for field in vars(found).values()))


def _select_triton(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays) -> Selection | None:
    """The kernels' selection, fetched in one transfer; None where they have no room."""
    from vas_engine.kernels import candidate_select as kernels

    width = kernels.select_width(arrays, logits.shape[1])
    if width - 1 > reference.MAX_CANDIDATES or logits.shape[1] > kernels.MAX_VOCABULARY:
        return None
    found = kernels.views(kernels.select_buffer(logits, rows, arrays), len(rows), width)
    return Selection(*to_host(list(vars(found).values())))


def _select_cpp(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays) -> Selection:
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        logits = logits.contiguous()
    words = logits if logits.dtype == torch.float32 else logits.view(torch.int16)
    count = len(rows)
    width = max(min(int(arrays.num_candidates.max(initial=0)), logits.shape[1]), 0) + 1
    out = Selection(
        np.empty((count, width), np.int64),
        np.empty((count, width)),
        np.empty((count, width)),
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        np.empty(count),
        np.empty(count, np.bool_),
    )
    try:
        places = (words.data_ptr(), _CODES[logits.dtype], *logits.shape, logits.stride(0))
        extension().select(*places, rows, arrays, out, torch.get_num_threads())
    except ValueError:
        # The extension only says that something is wrong: the checks in Python name it.
        _check(logits, rows, arrays)
        raise
    return out


def _check(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays) -> None:
    if not isinstance(rows, np.ndarray) or rows.dtype != np.int64 or rows.ndim != 1 or not rows.flags.c_contiguous:
        raise InvalidArgumentError("rows", getattr(rows, "dtype", rows), "a contiguous int64 vector is needed")
    if len(rows) != len(arrays):
        raise InvalidArgumentError("rows", len(rows), f"give one row for each of {len(arrays)} sequences")
    wrong = (rows < 0) | (rows >= logits.shape[0])
    if wrong.any():
        raise InvalidArgumentError("rows", int(rows[wrong][0]), f"logits have {logits.shape[0]} rows")
    if not 0 < logits.shape[1] < 2**31:
        raise InvalidArgumentError("logits", tuple(logits.shape), "the vocabulary must have 1 to 2^31 - 1 tokens")
    arrays.validate(logits.shape[1])
