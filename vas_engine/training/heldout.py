"""How values do on rollouts that were held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from vas_engine.training.batches import Batch
from vas_engine.training.report import AdvantageReport, CalibrationBin, HeadReport, PositionBin
from vas_engine.training.returns import r_squared

__all__ = ["Heldout", "position_bins"]

BINS = 10


@dataclass
class Heldout:
    """Predictions and returns of held-out states, batch by batch.

    Attributes:
        missed, spread: with a teacher, its variance between candidates, [M]: what the pupil misses of it, and all.
    """

    values: list[torch.Tensor] = field(default_factory=list)
    returns: list[torch.Tensor] = field(default_factory=list)
    late: list[torch.Tensor] = field(default_factory=list)
    positions: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)
    missed: torch.Tensor | None = None
    spread: torch.Tensor | None = None

    def add(self, batch: Batch, values: torch.Tensor, returns: torch.Tensor) -> None:
        """values and returns [B, T, M] of a batch."""
        mask = batch.mask
        self.values.append(values[mask].cpu().double())
        self.returns.append(returns[mask].cpu().double())
        self.late.append(batch.last_quarter[mask].cpu())
        self.positions.append(batch.response_positions[mask].cpu())
        self.weights.append(batch.weights[mask].cpu().double())

    def add_differences(self, missed: torch.Tensor, spread: torch.Tensor) -> None:
        """Variance between candidates that the pupil misses, and all of it, summed over a batch: [M] each."""
        missed, spread = missed.cpu().double(), spread.cpu().double()
        self.missed = missed if self.missed is None else self.missed + missed
        self.spread = spread if self.spread is None else self.spread + spread

    def reports(
        self, heads: Sequence[Any], advantages: Sequence[AdvantageReport | None] | None = None
    ) -> dict[str, HeadReport]:
        """A report by the name of each head, with what was found of its advantages."""
        values, returns, weights = torch.cat(self.values), torch.cat(self.returns), torch.cat(self.weights)
        late, positions = torch.cat(self.late), torch.cat(self.positions)
        everywhere = r_squared(values, returns, weights)
        at_end = r_squared(values[late], returns[late], weights[late])
        shares = weights / weights.sum()
        error, constant = shares @ (values - returns).square(), shares @ (returns - shares @ returns).square()
        agreement = None if self.missed is None or self.spread is None else 1 - self.missed / self.spread
        return {
            head.name: HeadReport(
                reward=head.reward or head.name,
                r_squared=float(everywhere[index]),
                r_squared_last_quarter=float(at_end[index]),
                error=float(error[index]),
                constant_error=float(constant[index]),
                by_position=_by_position(values[:, index], returns[:, index], weights, positions),
                calibration=_calibration(values[:, index], returns[:, index], weights),
                agreement=None if agreement is None else float(agreement[index]),
                advantages=advantages[index] if advantages else None,
            )
            for index, head in enumerate(heads)
        }


def position_bins(positions: torch.Tensor, bins: int = BINS) -> list[tuple[int, int, torch.Tensor]]:
    """Equal ranges of positions (int64 [N]) with at least one state: start, stop, and which states are in it."""
    stop = int(positions.max()) + 1
    edges = sorted({round(stop * index / bins) for index in range(bins + 1)})
    chosen = [(low, high, (positions >= low) & (positions < high)) for low, high in pairwise(edges)]
    return [(low, high, inside) for low, high, inside in chosen if bool(inside.any())]


def _by_position(
    values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor, positions: torch.Tensor
) -> list[PositionBin]:
    found = []
    for low, high, inside in position_bins(positions):
        score = float(r_squared(values[inside, None], returns[inside, None], weights[inside])[0])
        found.append(PositionBin(low, high, int(inside.sum()), None if math.isnan(score) else score))
    return found


def _calibration(values: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor) -> list[CalibrationBin]:
    found = []
    for chosen in values.argsort().tensor_split(BINS):
        if len(chosen):
            shares = weights[chosen] / weights[chosen].sum()
            received = shares @ returns[chosen]
            error = (shares.square() @ (returns[chosen] - received).square()).sqrt()
            found.append(CalibrationBin(float(shares @ values[chosen]), float(received), float(error), len(chosen)))
    return found
