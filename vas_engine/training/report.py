"""What a fit says about itself."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["REPORT_FILE", "EpochReport", "FitReport", "HeadReport", "save_report"]

REPORT_FILE = "training.json"


@dataclass(frozen=True)
class HeadReport:
    """How one head does on held-out rollouts; R² is 1 for perfect values, 0 for their best constant.

    Attributes:
        r_squared: over all positions, against the reward that was received.
        r_squared_last_quarter: over the last quarter of each response.
        constant_error: mean squared error of that constant, in the reward's units squared.
        error: mean squared error of the values, likewise.
    """

    reward: str
    r_squared: float
    r_squared_last_quarter: float
    error: float
    constant_error: float


@dataclass(frozen=True)
class EpochReport:
    """One pass over the rollouts: the mean training loss, and each head's held-out R²."""

    epoch: int
    train_loss: float
    r_squared: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class FitReport:
    """Outcome of a fit; the network holds the weights of ``best_epoch``, which the held-out R² chose.

    Attributes:
        heads: by name.
        epochs: the course of training.
        holdout_by: "prompt" or "sample".
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
    settings: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def save_report(folder: str | Path, report: FitReport) -> Path:
    """Write a report into the folder of its value, whole or not at all."""
    path = Path(folder) / REPORT_FILE
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
