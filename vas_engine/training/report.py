"""What a fit says about itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vas_engine.files import write_json

__all__ = [
    "REPORT_FILE",
    "AdvantageReport",
    "BranchReport",
    "CalibrationBin",
    "EpochReport",
    "FitReport",
    "HeadReport",
    "PositionBin",
    "save_report",
]

REPORT_FILE = "training.json"


@dataclass(frozen=True)
class CalibrationBin:
    """Held-out states with similar predictions, one of ten groups of equal size.

    Attributes:
        predicted, received: means, in the reward's units; equal for calibrated values.
        error: standard error of ``received``, as if states were independent.
    """

    predicted: float
    received: float
    error: float
    count: int


@dataclass(frozen=True)
class PositionBin:
    """Held-out states with ``start`` to ``stop`` - 1 tokens of the response behind them, and R² among them.

    ``r_squared`` is None where their rewards do not vary.
    """

    start: int
    stop: int
    count: int
    r_squared: float | None


@dataclass(frozen=True)
class BranchReport:
    """How values compare with the mean reward of several completions from the same state (see
    `vas_engine.training.branching`).

    Attributes:
        points, samples: states, and completions of each.
        explainable: share of the rewards' variance that lies between states, so that values could explain it.
        r_squared: share of that part which they explain; 1 for the best values there can be. None where nothing is
            explainable.
        by_position: the same by position of the states.
    """

    points: int
    samples: int
    explainable: float
    r_squared: float | None
    by_position: list[PositionBin]


@dataclass(frozen=True)
class AdvantageReport:
    """What values would gain by guiding (see `vas_engine.training.advantages`).

    Attributes:
        efficiency: KL efficiency at small weights, 1 at best; negative where the tilt would lower the reward.
        error: its standard error.
        gain, spread, drift: Σ Cov(A, R), Σ Var(A) and the drift of a response, in variances of the reward.
        responses: held-out ones that it was found from.
    """

    efficiency: float
    error: float
    gain: float
    spread: float
    drift: float
    responses: int


@dataclass(frozen=True)
class HeadReport:
    """How one head does on held-out rollouts; R² is 1 for perfect values, 0 for their best constant.

    Attributes:
        r_squared: over all positions, against the reward that was received.
        r_squared_last_quarter: over the last quarter of each response.
        error: mean squared error of the values, in the reward's units squared.
        constant_error: mean squared error of that constant, likewise.
        by_position: R² by position, ten bins.
        calibration: ten bins.
        agreement: share of the teacher's differences between candidates that the head has learnt; None without.
        branching: None where no completions were sampled.
        advantages: None where they cannot be judged: responses that values guided, one to a prompt, or γ < 1.
    """

    reward: str
    r_squared: float
    r_squared_last_quarter: float
    error: float
    constant_error: float
    by_position: list[PositionBin] = field(default_factory=list)
    calibration: list[CalibrationBin] = field(default_factory=list)
    agreement: float | None = None
    branching: BranchReport | None = None
    advantages: AdvantageReport | None = None


@dataclass(frozen=True)
class EpochReport:
    """One pass over the rollouts: the mean training loss, and each head's held-out R².

    Attributes:
        agreement: with the teacher, by head (see `HeadReport`); empty without one.
        efficiency: of the advantages, by head, where enough responses are held out to choose by it; else empty.
    """

    epoch: int
    train_loss: float
    r_squared: dict[str, float]
    seconds: float
    agreement: dict[str, float] = field(default_factory=dict)
    efficiency: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FitReport:
    """Outcome of a fit; the network holds the weights of ``best_epoch``, which the efficiency of held-out advantages
    chose (R² where too few are held out to tell; with a teacher, the agreement with it).

    Attributes:
        heads: by name.
        epochs: the course of training.
        holdout_by: "prompt" or "sample".
        base: where what is read of the frozen model came from (see `FrozenBase.source`).
        settings: of the fit.
        teacher: kind of the value that taught; None without one.
        interrupted: stopped by hand before its end.
    """

    kind: str
    parameters: int
    heads: dict[str, HeadReport]
    epochs: list[EpochReport]
    best_epoch: int
    train_rollouts: int
    heldout_rollouts: int
    holdout_by: str
    seconds: float
    base: str = "model"
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: str | None = None
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def save_report(folder: str | Path, report: FitReport) -> Path:
    """Write a report into the folder of its value, whole or not at all."""
    path = Path(folder) / REPORT_FILE
    write_json(path, report.to_dict())
    return path
