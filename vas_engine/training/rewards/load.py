"""Rewards from their descriptions."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.training.rewards.ensemble import READINGS, EnsembleReward
from vas_engine.training.rewards.expression import Expression, ExpressionReward
from vas_engine.training.rewards.reward import WHOLE_TEXT, FunctionReward, Reward, WholeTextReward
from vas_engine.training.text_statistics import STATISTICS

__all__ = ["load_reward", "load_rewards"]

NAME_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
FUNCTION_PATTERN = re.compile(r"[\w.]+:[\w.]+")
ENSEMBLE_PATTERN = re.compile(r"ensemble:(\w+)\((.*)\)", re.DOTALL)
# What a formula has and a plain word has not.
FORMULA_PATTERN = re.compile(r"[^\w:.]")
VADER_READINGS = ("compound", "pos-neg")
FORMS = ("vader", "vader:pos-neg", "hf:PATH", "module:function", *(f"ensemble:{reading}(...)" for reading in READINGS))


def load_reward(spec: str, *, whole_text: bool = False, device: str = "auto") -> Reward:
    """Make a reward from its description; see `load_rewards`."""
    return load_rewards([spec], whole_text=whole_text, device=device)[0]


def load_rewards(specs: Sequence[str], *, whole_text: bool = False, device: str = "auto") -> list[Reward]:
    """Make rewards of different names from their descriptions.

    Descriptions, each of which may be given a name of its own as ``NAME=DESCRIPTION``:

    - ``vader``: VADER's compound sentiment, in [-1, 1]; ``vader:pos-neg``: the share of the text's words that
      are positive less the share that are negative, in [-1, 1].
    - a text statistic: one of `vas_engine.training.text_statistics.STATISTICS`.
    - ``hf:PATH`` or ``hf:PATH#LABEL``: a Hugging Face sequence classifier or reward model (see
      `vas_engine.training.classifier.ClassifierReward.load`).
    - ``module:function``: a callable of ``(prompt, response)``, or of two lists if its attribute ``batched``
      is true. It is imported with the working directory on the path.
    - ``ensemble:mean(A, B, ...)``, ``ensemble:min(A, B, ...)``, ``ensemble:uncertainty(A, B, ..., c=1)`` of
      descriptions or names of rewards (see `vas_engine.training.rewards.ensemble.EnsembleReward`).
    - a formula such as ``mood + 0.01*length - max(0, toxicity)`` of rewards named in the same list, or of
      ``vader`` and the text statistics, with numbers, ``+ - * / **``, min, max, abs, clip, log and exp. A ``-``
      in a name is written ``_`` there.

    Args:
        specs: the descriptions, in any order.
        whole_text: apply the rewards to prompt + response; the default is the response alone. A reward model
            with a chat template sees both in any case.
        device: of reward models: "auto" (CUDA where there is one), "cpu", "cuda:1".

    Raises:
        InvalidArgumentError: no such reward, it cannot be loaded, or two of one name.
    """
    return _Loader(specs, whole_text, device).load()


class _Loader:
    """Rewards of one list, which may refer to each other."""

    def __init__(self, specs: Sequence[str], whole_text: bool, device: str) -> None:
        self.whole_text, self.device = whole_text, device
        self.given: list[tuple[str | None, str]] = [_split_name(spec) for spec in specs]
        self.loaded: dict[str, Reward] = {}
        self.loading: list[str] = []

    def load(self) -> list[Reward]:
        names = []
        for name, body in self.given:
            reward = self._named(name) if name else self._build(body, None)
            if reward.name in names:
                fix = f"a second reward named {reward.name!r}: write NAME=SPEC"
                raise InvalidArgumentError("reward", f"{name}={body}" if name else body, fix)
            self.loaded[reward.name] = reward
            names.append(reward.name)
        # By name: one that another refers to has meanwhile been given a memory.
        return [self.loaded[name] for name in names]

    def _named(self, name: str) -> Reward:
        """A reward of the list by its name."""
        if name not in self.loaded:
            body = next(body for known, body in self.given if known == name)
            if name in self.loading:
                fix = f"is defined by itself ({' -> '.join([*self.loading, name])})"
                raise InvalidArgumentError("reward", f"{name}={body}", fix)
            self.loading.append(name)
            self.loaded[name] = self._build(body, name)
            self.loading.remove(name)
        return self.loaded[name]

    def _part(self, name: str) -> Reward:
        """A reward that a formula or an ensemble refers to; it is computed once a batch, for all who ask."""
        if not isinstance(self._named(name), _Remembering):
            self.loaded[name] = _Remembering(self._named(name))
        return self.loaded[name]

    def _build(self, body: str, name: str | None) -> Reward:
        reward = self._composed(body)
        if reward is None:
            reward = self._leaf(body)
        elif self.whole_text:
            reward.spec += WHOLE_TEXT
        reward.name = name or _clean(reward.name)
        return reward

    def _composed(self, body: str) -> Reward | None:
        if body in STATISTICS or FUNCTION_PATTERN.fullmatch(body) or body.startswith(("hf:", "vader:")):
            return None
        if body.startswith("ensemble:"):
            return self._ensemble(body)
        if FORMULA_PATTERN.search(body):
            return self._formula(body)
        return None

    def _leaf(self, body: str) -> Reward:
        reward = _leaf(body, self.device)
        reward.spec = body
        sees_prompt = getattr(reward, "chat", False)
        return WholeTextReward(reward) if self.whole_text and not sees_prompt else reward

    def _ensemble(self, body: str) -> Reward:
        match = ENSEMBLE_PATTERN.fullmatch(body)
        if match is None or match[1] not in READINGS:
            forms = ", ".join(f"ensemble:{reading}(SPEC, SPEC)" for reading in READINGS)
            raise InvalidArgumentError("reward", body, f"write one of {forms}")
        members = _split_list(match[2])
        c = None
        if members and members[-1].startswith("c="):
            try:
                c = float(members.pop().removeprefix("c="))
            except ValueError as error:
                raise InvalidArgumentError("reward", body, "c is a number, as in c=0.5") from error
        names = {name for name, _ in self.given}
        rewards = [self._part(member) if member in names else self._build(member, None) for member in members]
        return EnsembleReward(match[1], rewards, c, body)

    def _formula(self, body: str) -> Reward:
        expression = Expression(body)
        ours = {name.replace("-", "_"): name for name, _ in self.given if name}
        built_in = {re.sub(r"\W", "_", spec): spec for spec in (*STATISTICS, "vader", "vader:pos-neg")}
        parts: dict[str, Reward] = {}
        for name in sorted(expression.names):
            if name in ours:
                parts[name] = self._part(ours[name])
            elif name in built_in:
                parts[name] = self._build(built_in[name], None)
            else:
                known = nearest(name, {**ours, **built_in})
                raise InvalidArgumentError("reward", body, f"no reward is named {name!r}; {known}")
        return ExpressionReward(body, expression, parts)


class _Remembering:
    """A reward that keeps its answer to the last batch, for those that are computed from it."""

    def __init__(self, inner: Reward) -> None:
        self.inner = inner
        self.name, self.spec = inner.name, inner.spec
        self._asked: tuple[list[str], list[str]] | None = None
        self._answer: list[float] = []

    @property
    def bounds(self) -> tuple[float, float] | None:
        return self.inner.bounds

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        if self._asked != (prompts, responses):
            self._answer = self.inner(prompts, responses)
            self._asked = (prompts, responses)
        return self._answer


def _leaf(body: str, device: str) -> Reward:
    if body in STATISTICS:
        statistic = STATISTICS[body]
        return FunctionReward(body, lambda _, response: statistic.function(response), bounds=statistic.bounds)
    if body == "vader" or body.startswith("vader:"):
        return _vader(body)
    if body.startswith("hf:"):
        from vas_engine.training.classifier import ClassifierReward

        return ClassifierReward.load(body, device)
    if FUNCTION_PATTERN.fullmatch(body):
        return _imported(body)
    raise InvalidArgumentError("reward", body, f"unknown reward; {nearest(body, (*STATISTICS, *FORMS))}")


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
        return name, body.strip()
    return None, spec.strip()


def _split_list(text: str) -> list[str]:
    """Parts between the commas that stand in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _clean(name: str) -> str:
    """Letters, digits, ``_`` and ``-``: a name goes into file columns, requests and ``key.head`` names."""
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")
    return cleaned or "reward"
