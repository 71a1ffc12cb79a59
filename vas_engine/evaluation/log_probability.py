"""A value read as a probability, and its logarithm in place of the value."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vas_engine.errors import InvalidArgumentError
from vas_engine.values.artifact import load_value
from vas_engine.values.scorer import Scorer

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

__all__ = ["LogProbability"]

LEAST = 1e-6


class LogProbability:
    """A value folder's network whose values V in [low, high] become log((V - low) / (high - low)).

    What FUDGE multiplies the base distribution with is a probability; the engine adds tilts, so its logarithm is
    what a weight applies to. A `Scorer` once it is bound.

    Args:
        folder: of a value all of whose heads are bounded or distributional.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder

    def bind(self, lm: CausalLM, tokenizer: Any | None = None) -> LogProbability:
        """Load the network.

        Raises:
            ValueArtifactError: it cannot be loaded for this model.
            InvalidArgumentError: a head without bounds, whose values are no probabilities.
        """
        self._inner: Scorer = load_value(self.folder, lm, tokenizer=tokenizer)
        self.heads = _LogHeads(self._inner.heads)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._inner, name)


class _LogHeads:
    """The part of `Heads` that the engine reads."""

    def __init__(self, heads: Any) -> None:
        self._heads = heads
        low, high = torch.tensor(heads.bounds, dtype=torch.float64).unbind(-1)
        if not bool((low.isfinite() & high.isfinite()).all()):
            fix = "its head has no bounds to make a probability of; train it --bounded or --distributional"
            raise InvalidArgumentError("value", heads.names, fix)
        self._low, self._width = low.float(), (high - low).float()
        self.bounds = [(math.log(LEAST), 0.0)] * len(heads.names)

    def mean(self, output: Tensor) -> Tensor:
        """Log-probabilities [..., M]."""
        values = self._heads.mean(output)
        share = (values - self._low.to(values.device)) / self._width.to(values.device)
        return share.clamp(LEAST, 1.0).log()

    def utility(self, output: Tensor, weights: Tensor, optimal: Tensor | None, checked: bool = False) -> Tensor:
        """Weight times log-probability, [R, M]."""
        return self.mean(output) * weights.to(output.dtype)
