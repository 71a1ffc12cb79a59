"""Several rewards for the same thing as one, which is harder to exploit than any of them.

Coste, Anwar, Kirk and Krueger, "Reward Model Ensembles Help Mitigate Overoptimization" (2023, arXiv
2310.02743): what is optimised finds the errors of a single reward model; those of several seldom agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError
from vas_engine.training.rewards.reward import Bounds, Reward
from vas_engine.training.rewards.score import apply

__all__ = ["READINGS", "EnsembleReward"]

READINGS = ("mean", "min", "uncertainty")


class EnsembleReward:
    """One number from several rewards, which ought to be of one scale.

    - ``mean``: their mean.
    - ``min``: the worst of them ("worst-case optimisation" of the paper).
    - ``uncertainty``: their mean less ``c`` times their standard deviation over the ensemble. The paper's
      "uncertainty-weighted optimisation" subtracts a multiple of the variance; the deviation has the reward's
      own unit, so that c means the same whatever the scale.

    Raises:
        InvalidArgumentError: fewer than two rewards, or c where it has no meaning.
    """

    def __init__(self, reading: str, rewards: Sequence[Reward], c: float | None = None, spec: str = "") -> None:
        self.reading = arguments.choice("reading", reading, READINGS)
        if len(rewards) < 2:
            raise InvalidArgumentError("reward", spec, "an ensemble has two members or more, separated by commas")
        if c is not None and reading != "uncertainty":
            raise InvalidArgumentError("reward", spec, "c is for ensemble:uncertainty; leave it out")
        self.c = arguments.real("c", 1.0 if c is None else c, 0.0)
        self.name, self.spec, self.rewards = f"ensemble-{reading}", spec, list(rewards)

    @property
    def bounds(self) -> Bounds:
        known = [reward.bounds for reward in self.rewards if reward.bounds is not None]
        if len(known) < len(self.rewards):
            return None
        lows, highs = zip(*known, strict=True)
        if self.reading == "min":
            return min(lows), min(highs)
        # Numbers within an interval deviate by at most half of its width.
        widest = (max(highs) - min(lows)) / 2 if self.reading == "uncertainty" else 0.0
        return statistics.fmean(lows) - self.c * widest, statistics.fmean(highs)

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        table = np.array([apply(reward, prompts, responses) for reward in self.rewards], np.float64)
        if self.reading == "min":
            return table.min(0).tolist()
        penalty = self.c * table.std(0) if self.reading == "uncertainty" else 0.0
        return (table.mean(0) - penalty).tolist()
