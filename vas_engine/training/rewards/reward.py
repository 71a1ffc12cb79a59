"""What a reward is, and the plainest one: a function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vas_engine.errors import TrainingDataError
from vas_engine.prompts import ChatPrompt

__all__ = ["WHOLE_TEXT", "Bounds", "ChatPrompt", "FunctionReward", "Reward", "RewardError", "WholeTextReward"]

Bounds = tuple[float, float] | None
"""``(low, high)`` that a reward cannot leave, or None when none is known."""

WHOLE_TEXT = " (prompt and response)"
"""Ends the description of a reward that was loaded with ``whole_text``."""


@runtime_checkable
class Reward(Protocol):
    """Worth of finished responses.

    Attributes:
        name: of the reward's column in the rollouts and of the value head trained on it.
        spec: the description it was made from, kept with the data.
        bounds: ``(low, high)`` that no reward can leave, or None when none is known.
    """

    name: str
    spec: str

    @property
    def bounds(self) -> Bounds: ...

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one finite number per response; a response does not repeat its prompt.

        A reward judges each response by itself: what stands beside it in the batch must not matter.
        """
        ...


class RewardError(TrainingDataError):
    """A reward that failed.

    Attributes:
        reward: its name.
        what: what it did and what to change; ``{where}`` stands for the response.
        place: index of the response in what was scored, or None when all of it is meant.
    """

    def __init__(self, reward: str, what: str, place: int | None = None) -> None:
        self.reward, self.what, self.place = reward, what, place
        where = "a batch of responses" if place is None else f"response {place}"
        super().__init__(f"reward {reward!r} {what.replace('{where}', where)}")

    @classmethod
    def raised(cls, reward: str, error: Exception, place: int | None = None) -> RewardError:
        """For a reward that raised an error of its own."""
        said = f"raised {type(error).__name__} ({error}) for {{where}}"
        return cls(reward, f"{said}: make it return a number for every text", place)


@dataclass
class FunctionReward:
    """A reward from a plain callable: of one ``(prompt, response)``, or of both lists when ``batched``."""

    name: str
    function: Callable[..., Any]
    batched: bool = False
    bounds: Bounds = None
    spec: str = ""

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        if self.batched:
            return self.function(prompts, responses)
        rewards = []
        for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                rewards.append(self.function(prompt, response))
            except Exception as error:
                raise RewardError.raised(self.name, error, place) from error
        return rewards


@dataclass
class WholeTextReward:
    """Another reward, applied to prompt and response together instead of to the response alone."""

    inner: Reward

    def __post_init__(self) -> None:
        self.name, self.bounds = self.inner.name, self.inner.bounds
        self.spec = self.inner.spec + WHOLE_TEXT

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return self.inner(prompts, [p + r for p, r in zip(prompts, responses, strict=True)])
