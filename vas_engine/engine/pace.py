"""Keeping steps within a latency bound: what a step will take, and what of it to leave out.

A step's time is modelled as a sum of four parts: a fixed one, one for each row of the base model, one for each token
of prefix that is read, one for each candidate scored. The cost model says what each ought to be on a nominal machine;
what the steps are measured to take corrects each part by a factor of its own (a Kalman filter whose state drifts).
Where that is not enough, on a machine that does other things too, a margin grows until few steps are late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

import numpy as np

from vas_engine.engine import cost
from vas_engine.engine.sequence import Sequence
from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.model.lm import CausalLM
from vas_engine.sampling import Selection

# A machine of no particular kind: only the ratios of the parts come from it, the scale is measured.
NOMINAL = cost.Device("nominal", 2e10, {"float32": 1e11, "bfloat16": 1e11, "float16": 1e11}, step=1e-4)
_FALLBACK = (1e-3, 1e-5, 1e-8, 2e-6)  # for models that the cost model cannot count
_DRIFT, _DOUBT, _WARM_UP = 1e-4, 100.0, 20
_MARGIN = 2.0  # standard deviations of what the model cannot tell
_LATE = 0.01  # share of steps that may take longer than the bound
_WIDEN = 0.05  # of the bound, by which a late step widens the margin
_FOLLOW = 0.05  # share of a step's news in a running mean


class Pace:
    """Predicts the time of steps and shares out what a bound leaves.

    Args:
        bound: seconds that a step may take.
        parts: seconds, as first guesses: fixed, per row, per token of prefix read, per candidate scored.
    """

    def __init__(self, bound: float, parts: Seq[float] = _FALLBACK) -> None:
        if not 0 < bound < math.inf:
            raise InvalidArgumentError("itl_slo", bound, "give a time above 0")
        self.bound = bound
        self._parts = np.asarray(parts, np.float64)
        self._factors = np.ones(4)
        self._doubt = np.eye(4) * _DOUBT
        self._noise = 0.0  # variance of the residuals, seconds squared
        self._margin = 0.0  # seconds kept free beside what the noise asks for
        self._rest = 0.0  # seconds of a step that follow the choice of its candidates, less those of the candidates
        self._elapsed: float | None = None  # at the choice of the present step's candidates
        self._seen = 0

    @property
    def budget(self) -> float:
        """Seconds to plan with: the bound less what steps of equal size differ by, and less what keeps few late."""
        return max(self.bound - _MARGIN * math.sqrt(self._noise) - self._margin, self.bound / 2)

    def predict(self, rows: float, context: float, scored: float) -> float:
        """Seconds of a step with so many rows, tokens of prefix read and candidates scored."""
        return float(self._each @ (1.0, rows, context, scored))

    def observe(self, rows: int, context: int, scored: int, seconds: float) -> None:
        """Learns from a step."""
        late = seconds > self.bound
        # A step that was short for want of work says nothing about the margin.
        if self._seen > _WARM_UP and (late or self.predict(rows, context, scored) > 0.9 * self.budget):
            self._margin = min(max(self._margin + _WIDEN * self.bound * (late - _LATE), 0.0), self.bound / 2)
        if not self._seen:  # of the guess only the ratios are meant
            self._parts = self._parts * (seconds / self.predict(rows, context, scored))
        inputs = self._parts * (1.0, rows, context, scored)
        error = seconds - float(inputs @ self._factors)
        if self._seen > _WARM_UP:
            # The machine does other things too: a step that was held up says little about the next one.
            error = min(error, 4 * math.sqrt(self._noise) + 1e-4)
        self._seen += 1
        self._doubt += np.eye(4) * _DRIFT
        spread = self._doubt @ inputs
        gain = spread / (inputs @ spread + max(self._noise, (0.05 * seconds) ** 2))
        self._factors += gain * error
        self._doubt -= np.outer(gain, spread)
        share = 1 / min(self._seen, 50)
        self._noise += share * (min(error * error, self.bound**2) - self._noise)
        if self._elapsed is not None:
            rest = min(seconds, 2 * self.bound) - self._elapsed - self._each[3] * scored
            self._rest += _FOLLOW * (rest - self._rest)
            self._elapsed = None

    def prompt_rows(self, rows: int, context: int, floor: int) -> int:
        """Rows of prompts that fit beside the decoding ones.

        Args:
            rows, context: of the decoding rows.
            floor: candidates that they score at least.
        """
        left = self.budget - self.predict(rows, context, floor)
        return max(int(left / self._each[1]), 0)

    def candidates(self, elapsed: float) -> int:
        """Candidates that can be scored in what is left of a step, of which so many seconds have gone."""
        self._elapsed = elapsed
        return max(int((self.budget - elapsed - self._rest) / self._each[3]), 0)

    @property
    def _each(self) -> np.ndarray:
        """Seconds of each part; a part is never free, whatever the measurements suggest."""
        return self._parts * np.maximum(self._factors, 0.01)


def spend(selection: Selection, needed: np.ndarray, floors: np.ndarray, rows: int) -> np.ndarray:
    """The columns to score when there is time for `rows` of them: each sequence's floor, then near-ties.

    How much a candidate matters is told by how far it stands, with its noise, behind the best of its sequence: that is
    what its tilt has to make up for.

    Args:
        selection: of S sequences, W columns.
        needed: bool [S, W], columns worth scoring.
        floors: int [S], columns that a sequence gets in any case (or all it needs, if fewer); at least 1.
        rows: columns of all sequences together, where the floors do not need more.

    Returns:
        bool [S, W], a subset of `needed`.
    """
    score = np.where(needed, selection.log_probs + selection.noise, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(score.shape[1])[None, :], axis=1)
    kept = needed & (rank < floors[:, None])
    owner, column = np.nonzero(needed & ~kept)
    gap = score.max(1)[owner] - score[owner, column]
    nearest = np.argsort(gap, kind="stable")[: max(rows - int(kept.sum()), 0)]
    kept[owner[nearest], column[nearest]] = True
    return kept


def floors(sequences: Seq[Sequence], width: int) -> np.ndarray:
    """Columns each sequence is to have in any case: all, where it asked for exact statistics; int64 [S]."""
    return np.array([width if s.all_needed else s.params.min_candidates for s in sequences], np.int64)


def first_guess(lm: CausalLM, scorers: Seq) -> tuple[float, float, float, float]:
    """Parts of a step by the cost model, on the nominal machine: fixed, per row, per token read, per candidate."""
    try:
        shape = cost.Shape.of(lm)
        networks = [cost.Network(scorer.config) for scorer in scorers if scorer.config.kind != "model"]

        def seconds(batch: int, context: float, candidates: int = 1) -> float:
            works = cost.step_work(shape, batch, context, networks, candidates)
            return NOMINAL.step + sum(work.seconds(NOMINAL) for work in works)

        one = seconds(1, 0)
        row = (seconds(65, 0) - one) / 64
        read = (seconds(1, 1024) - one) / 1024
        scored = (seconds(64, 0, 21) - seconds(64, 0, 1)) / (64 * 20) if networks else _FALLBACK[3]
        return max(one - row, 1e-6), max(row, 1e-8), max(read, 1e-11), max(scored, 1e-8)
    except VASError:
        return _FALLBACK
