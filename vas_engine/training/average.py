"""A moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

__all__ = ["Average"]

# Without it the average would stay near the initial weights for many steps.
WARMUP = 10


class Average:
    """An exponential moving average of parameters (Polyak averaging), which can stand in for them.

    Args:
        parameters: whose average it is.
        decay: of each step, reached after a while: step t uses min(decay, t / (t + WARMUP)).
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = list(parameters), decay
        self.tensors = [parameter.detach().clone() for parameter in self.parameters]
        self.steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.steps += 1
        share = 1.0 - min(self.decay, self.steps / (self.steps + WARMUP))
        for tensor, parameter in zip(self.tensors, self.parameters, strict=True):
            tensor.lerp_(parameter, share)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """The parameters hold their average; afterwards what they held before."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.data, self.tensors[index] = self.tensors[index], parameter.data
