"""Arithmetic of rewards, as in ``mood + 0.01*length - max(0, toxicity)``."""

from __future__ import annotations

import ast
import functools
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.training.rewards import interval
from vas_engine.training.rewards.interval import Interval
from vas_engine.training.rewards.reward import Bounds, Reward, RewardError
from vas_engine.training.rewards.score import apply

__all__ = ["Expression", "ExpressionReward"]

OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "clip": lambda x, low, high: np.minimum(np.maximum(x, low), high),
    "exp": np.exp,
    "log": np.log,
    "max": lambda *xs: functools.reduce(np.maximum, xs),
    "min": lambda *xs: functools.reduce(np.minimum, xs),
}
ARITIES = {"abs": (1, 1), "clip": (3, 3), "exp": (1, 1), "log": (1, 1), "max": (2, None), "min": (2, None)}
ALLOWED = f"numbers, names of rewards, + - * / ** and {', '.join(FUNCTIONS)}"


class Expression:
    """A formula, read from text and checked; it is walked, never run as Python.

    Attributes:
        names: of rewards in it.

    Raises:
        InvalidArgumentError: something else than numbers, names, + - * / ** and min, max, abs, clip, log, exp.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._root = ast.parse(text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise self._wrong(f"is no formula ({getattr(error, 'msg', error)})") from error
        self.names: set[str] = set()
        self._check(self._root)
        if not self.names:
            raise self._wrong("names no reward")

    def evaluate(self, values: Mapping[str, Any]) -> np.ndarray:
        """The formula of arrays, float64 [N] each, element by element; what is undefined comes out as NaN."""
        with np.errstate(all="ignore"):
            return self._walk(self._root, values, FUNCTIONS, np.float64)

    def bounds(self, bounds: Mapping[str, Bounds]) -> Bounds:
        """Bounds of the formula from those of its names, by interval arithmetic; None where there are none."""
        intervals = {name: Interval.of(known) for name, known in bounds.items()}
        return self._walk(self._root, intervals, interval.FUNCTIONS, lambda number: Interval(number, number)).bounds

    def _walk(
        self,
        node: Any,
        values: Mapping[str, Any],
        functions: Mapping[str, Callable[..., Any]],
        constant: Callable[[float], Any],
    ) -> Any:
        def walk(part: Any) -> Any:
            return self._walk(part, values, functions, constant)

        match node:
            case ast.Name():
                return values[node.id]
            case ast.Constant(value=int() | float() as number):
                return constant(float(number))
            case ast.BinOp():
                return OPERATORS[type(node.op)](walk(node.left), walk(node.right))
            case ast.UnaryOp():
                return OPERATORS[type(node.op)](walk(node.operand))
            case _:
                return functions[node.func.id](*map(walk, node.args))

    def _check(self, node: Any) -> None:
        match node:
            case ast.Name():
                self.names.add(node.id)
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                if abs(number) > sys.float_info.max:
                    raise self._wrong("a number in it is too large")
            case ast.BinOp() if type(node.op) in OPERATORS:
                self._check(node.left)
                self._check(node.right)
            case ast.UnaryOp() if type(node.op) in OPERATORS:
                self._check(node.operand)
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in FUNCTIONS:
                least, most = ARITIES[name]
                if len(node.args) < least or (most is not None and len(node.args) > most):
                    wanted = f"{least}" if most == least else f"{least} or more"
                    raise self._wrong(f"{name} takes {wanted} arguments, not {len(node.args)}")
                for argument in node.args:
                    self._check(argument)
            case ast.Call(func=ast.Name(id=name)) if name not in FUNCTIONS:
                raise self._wrong(f"there is no function {name}; {nearest(name, FUNCTIONS)}")
            case _:
                part = ast.get_source_segment(self.text, node) or type(node).__name__
                raise self._wrong(f"{part!r} may not stand in a formula; use {ALLOWED}")

    def _wrong(self, why: str) -> InvalidArgumentError:
        return InvalidArgumentError("reward", self.text, why)


class ExpressionReward:
    """A formula of other rewards, computed response by response."""

    def __init__(self, name: str, expression: Expression, rewards: Mapping[str, Reward]) -> None:
        """``rewards`` has one for each of the expression's names."""
        self.name, self.spec = name, expression.text
        self.expression, self.rewards = expression, rewards

    @property
    def bounds(self) -> Bounds:
        return self.expression.bounds({name: reward.bounds for name, reward in self.rewards.items()})

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        parts = {name: apply(reward, prompts, responses) for name, reward in self.rewards.items()}
        results = self.expression.evaluate({name: np.array(part, np.float64) for name, part in parts.items()})
        for place in np.flatnonzero(~np.isfinite(results)).tolist():
            where = ", ".join(f"{name} {part[place]:g}" for name, part in parts.items())
            fix = "keep it finite, by clip(...), say, or max(..., 0.1) under a division or log"
            raise RewardError(self.name, f"is {results[place]:g} for {{where}} ({where}): {fix}", place)
        return results.tolist()
