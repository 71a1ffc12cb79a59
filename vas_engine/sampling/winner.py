"""The drawn token and the exact statistics of the distribution it was drawn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels import reference
from vas_engine.sampling.backend import extension, resolve_backend
from vas_engine.sampling.selection import Selection


@dataclass
class Winners:
    """One drawn token for each of S sequences.

    Attributes:
        column: int64 [S], its column in the selection; -1 where the sequence has none: it is not finite, or a
            tilt is NaN or +inf, or all tilts are -inf.
        token_id: int64 [S], -1 likewise.
        log_prob: float64 [S], log pi0 of it (nats); NaN where column is -1.
        tilted_log_prob: float64 [S], log pi of it (nats); NaN also where columns were pruned.
        kl: float64 [S], KL(pi || pi0) of this step (nats); NaN likewise.
    """

    column: np.ndarray
    token_id: np.ndarray
    log_prob: np.ndarray
    tilted_log_prob: np.ndarray
    kl: np.ndarray


def choose(selection: Selection, tilt: np.ndarray, backend: str = "auto") -> Winners:
    """The column with the largest log-probability + noise + tilt, equal ones by the smaller column.

    log pi and KL follow from the candidates and the tail's mass: Z = sum over candidates of pi0 exp(T), plus
    pi0(tail) if it is kept; log pi = log pi0 + T - log Z; KL = sum of pi (T - log Z). At temperature 0 they
    describe temperature 1.

    Args:
        selection: of S sequences, W columns.
        tilt: float64 [S, W]: T of the candidates, 0 for the champion, -inf on columns that were pruned;
            columns not in use are not read.
        backend: "auto", "cpp" or "reference".

    Returns:
        A `Winners`.

    Raises:
        InvalidArgumentError: tilt has another shape.
    """
    tilt = np.ascontiguousarray(tilt, np.float64)
    if tilt.shape != selection.token_ids.shape:
        raise InvalidArgumentError("tilt", tilt.shape, f"one entry a column: {selection.token_ids.shape}")
    s = selection
    fields = (s.token_ids, s.log_probs, s.noise, s.count, s.tail, s.tail_log_mass, s.finite)
    if resolve_backend(backend) == "cpp":
        return Winners(*extension().choose(*fields, tilt))
    tensors = reference.SelectionTensors(*map(torch.from_numpy, fields))
    result = reference.choose_winner(tensors, torch.from_numpy(tilt))
    return Winners(*(field.numpy() for field in vars(result).values()))
