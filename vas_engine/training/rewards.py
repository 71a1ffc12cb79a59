"""Rewards: what a finished response is worth.

A reward is any object with a ``name`` that maps prompts and responses to one number each. `load_reward` makes
one from a short description, and `score` is the only way the rest of the package calls one: it checks what
comes back.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from vas_engine.errors import InvalidArgumentError, TrainingDataError, nearest
from vas_engine.training.text_statistics import STATISTICS

__all__ = ["FunctionReward", "Reward", "load_reward", "load_rewards", "score"]

NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
VADER_READINGS = ("compound", "pos-neg")
PREFIXES = ("vader", "vader:pos-neg", "hf:PATH", "module:function")


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
    def bounds(self) -> tuple[float, float] | None: ...

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """Return one finite number per response; a response does not repeat its prompt."""
        ...


@dataclass
class FunctionReward:
    """A reward from a plain callable: of one ``(prompt, response)``, or of both lists when ``batched``."""

    name: str
    function: Callable[..., Any]
    batched: bool = False
    bounds: tuple[float, float] | None = None
    spec: str = ""

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        if self.batched:
            return self.function(prompts, responses)
        rewards = []
        for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                rewards.append(self.function(prompt, response))
            except Exception as error:
                raise _raised(self.name, f"response {index}", error) from error
        return rewards


@dataclass
class WholeTextReward:
    """Another reward, applied to prompt and response together instead of to the response alone."""

    inner: Reward

    def __post_init__(self) -> None:
        self.name, self.bounds = self.inner.name, self.inner.bounds
        self.spec = f"{self.inner.spec} (prompt and response)"

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return self.inner(prompts, [p + r for p, r in zip(prompts, responses, strict=True)])


def score(reward: Reward, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Apply a reward and check its answer.

    Returns:
        One finite float per response.

    Raises:
        TrainingDataError: the reward raised, or gave a wrong number of rewards, or one that is no finite
            number. The message names the reward, the response's index and what to change.
    """
    if len(prompts) != len(responses):
        raise InvalidArgumentError("responses", len(responses), f"give one per prompt ({len(prompts)})")
    try:
        rewards = reward(list(prompts), list(responses))
    except TrainingDataError:
        raise
    except Exception as error:
        raise _raised(reward.name, f"responses 0 to {len(responses) - 1}", error) from error
    if isinstance(rewards, str | bytes) or not hasattr(rewards, "__iter__"):
        fix = "return a list of numbers, or leave its attribute `batched` unset to be called per response"
        raise TrainingDataError(f"reward {reward.name!r} returned {type(rewards).__name__} for a batch: {fix}")
    checked = [_finite(reward.name, index, value) for index, value in enumerate(rewards)]
    if len(checked) != len(responses):
        raise TrainingDataError(
            f"reward {reward.name!r} returned {len(checked)} rewards for {len(responses)} responses: return "
            "one per response, in order"
        )
    return checked


def load_reward(spec: str, *, whole_text: bool = False) -> Reward:
    """Make a reward from its description.

    Descriptions, each of which may be given a name of its own as ``NAME=DESCRIPTION``:

    - ``vader``: VADER's compound sentiment, in [-1, 1]; ``vader:pos-neg``: the share of the text's words that
      are positive less the share that are negative, in [-1, 1].
    - a text statistic: one of `vas_engine.training.text_statistics.STATISTICS`.
    - ``hf:PATH`` or ``hf:PATH#LABEL``: a Hugging Face sequence classifier. With one label the reward is its
      raw logit, as reward models are trained; with several, the probability of the label named (softmax, or
      sigmoid when the model's ``problem_type`` is multi-label). ``hf:PATH#LABEL:logit`` asks for the raw
      logit instead. A text longer than the classifier takes loses its beginning.
    - ``module:function``: a callable of ``(prompt, response)``, or of two lists if its attribute ``batched``
      is true. It is imported with the working directory on the path.

    Args:
        spec: the description.
        whole_text: apply the reward to prompt + response; the default is the response alone.

    Raises:
        InvalidArgumentError: no such reward, or it cannot be loaded.
    """
    name, body = _split_name(spec)
    reward = _build(body)
    reward.name = name or _clean(reward.name)
    reward.spec = body
    return WholeTextReward(reward) if whole_text else reward


def load_rewards(specs: Sequence[str], *, whole_text: bool = False) -> list[Reward]:
    """Make several rewards, of different names."""
    rewards = [load_reward(spec, whole_text=whole_text) for spec in specs]
    names = [reward.name for reward in rewards]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidArgumentError("reward", specs[index], f"a second reward named {name!r}: write NAME=SPEC")
    return rewards


def _build(body: str) -> Reward:
    if body in STATISTICS:
        statistic = STATISTICS[body]
        return FunctionReward(body, lambda _, response: statistic.function(response), bounds=statistic.bounds)
    if body == "vader" or body.startswith("vader:"):
        return _vader(body)
    if body.startswith("hf:"):
        from vas_engine.training.classifier import ClassifierReward

        return ClassifierReward.load(body)
    if re.fullmatch(r"[\w.]+:[\w.]+", body):
        return _imported(body)
    raise InvalidArgumentError("reward", body, f"unknown reward; {nearest(body, (*STATISTICS, *PREFIXES))}")


def _vader(body: str) -> FunctionReward:
    reading = body.partition(":")[2] or "compound"
    if reading not in VADER_READINGS:
        raise InvalidArgumentError("reward", body, f"unknown reading of VADER; {nearest(reading, VADER_READINGS)}")
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        fix = 'VADER needs the package vaderSentiment: pip install "vas-engine[train]"'
        raise InvalidArgumentError("reward", body, fix) from error
    analyser = SentimentIntensityAnalyzer()

    def sentiment(_: str, response: str) -> float:
        polarity = analyser.polarity_scores(response)
        return polarity["compound"] if reading == "compound" else polarity["pos"] - polarity["neg"]

    return FunctionReward(body, sentiment, bounds=(-1.0, 1.0))


def _imported(body: str) -> FunctionReward:
    module_name, _, attribute = body.partition(":")
    try:
        with _working_directory_importable():
            found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        fix = f"cannot import {module_name!r} ({error}); install it or run from its directory"
        raise InvalidArgumentError("reward", body, fix) from error
    except AttributeError as error:
        fix = f"{module_name} has no {attribute!r}; {nearest(attribute, _public_callables(module_name))}"
        raise InvalidArgumentError("reward", body, fix) from error
    if not callable(found):
        raise InvalidArgumentError("reward", body, f"{attribute} is a {type(found).__name__}, not callable")
    return FunctionReward(attribute, found, getattr(found, "batched", False), getattr(found, "bounds", None))


def _public_callables(module_name: str) -> list[str]:
    members = vars(sys.modules[module_name]).items()
    return [name for name, member in members if callable(member) and not name.startswith("_")]


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    directory = os.getcwd()
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)


def _split_name(spec: str) -> tuple[str | None, str]:
    name, equals, body = spec.partition("=")
    if equals and NAME_PATTERN.fullmatch(name):
        return name, body
    return None, spec


def _clean(name: str) -> str:
    """Letters, digits, ``_`` and ``-``: a name goes into file columns, requests and ``key.head`` names."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    return cleaned or "reward"


def _finite(name: str, index: int, value: Any) -> float:
    # Zero-dimensional arrays and tensors count as numbers; truth values do too, as 0 and 1.
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if not isinstance(value, Real):
        raise TrainingDataError(
            f"reward {name!r} gave {value!r} ({type(value).__name__}) for response {index}: return a number"
        )
    if not math.isfinite(value):
        raise TrainingDataError(
            f"reward {name!r} gave {float(value)} for response {index}: return a finite number (give an "
            "empty or odd text a value of its own)"
        )
    return float(value)


def _raised(name: str, where: str, error: Exception) -> TrainingDataError:
    return TrainingDataError(
        f"reward {name!r} raised {type(error).__name__} ({error}) for {where}: make it return a number for every text"
    )
