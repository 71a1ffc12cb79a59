"""Interval arithmetic: what bounds of the parts say about the whole (Moore, Interval Analysis, 1966)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

from vas_engine.training.rewards.reward import Bounds

__all__ = ["FUNCTIONS", "Interval"]


@dataclass(frozen=True)
class Interval:
    """All numbers from ``low`` to ``high``, either of which may be infinite.

    The result of an operation holds every number that the operation gives on members; it may be wider, since
    each use of a name counts as a number of its own (x - x of [0, 1] is [-1, 1]).
    """

    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, bounds: Bounds) -> Interval:
        return cls() if bounds is None else cls(float(bounds[0]), float(bounds[1]))

    @property
    def bounds(self) -> Bounds:
        """``(low, high)``, or None when one of them is infinite."""
        return (self.low, self.high) if math.isfinite(self.low) and math.isfinite(self.high) else None

    def __neg__(self) -> Interval:
        return Interval(-self.high, -self.low)

    def __pos__(self) -> Interval:
        return self

    def __add__(self, other: Interval) -> Interval:
        return _hull((self.low + other.low, self.high + other.high))

    def __sub__(self, other: Interval) -> Interval:
        return self + -other

    def __mul__(self, other: Interval) -> Interval:
        # An end that is infinite is never reached, so 0 times it is 0.
        return _hull(0.0 if 0.0 in pair else pair[0] * pair[1] for pair in _corners(self, other))

    def __truediv__(self, other: Interval) -> Interval:
        if other.low <= 0.0 <= other.high:
            return Interval()
        return _hull(one / two for one, two in _corners(self, other))

    def __pow__(self, other: Interval) -> Interval:
        if self.low > 0.0:
            return _hull(_power(*pair) for pair in _corners(self, other))
        if other.low == other.high and other.low >= 0.0 and other.low.is_integer():
            ends = [_power(self.low, other.low), _power(self.high, other.low)]
            crosses = self.low < 0.0 < self.high and other.low % 2 == 0 and other.low > 0.0
            return _hull([*ends, 0.0] if crosses else ends)
        return Interval()


def _corners(one: Interval, other: Interval) -> Iterable[tuple[float, float]]:
    return product((one.low, one.high), (other.low, other.high))


def _hull(numbers: Iterable[float]) -> Interval:
    found = list(numbers)
    return Interval() if any(math.isnan(number) for number in found) else Interval(min(found), max(found))


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.copysign(math.inf, base if exponent % 2 == 1 else 1.0)


def _absolute(x: Interval) -> Interval:
    ends = (abs(x.low), abs(x.high))
    return Interval(0.0 if x.low <= 0.0 <= x.high else min(ends), max(ends))


def _increasing(function: Callable[[float], float]) -> Callable[[Interval], Interval]:
    return lambda x: Interval(function(x.low), function(x.high))


def _exp(x: float) -> float:
    return math.exp(x) if x < 709.0 else math.inf


def _log(x: float) -> float:
    return math.log(x) if x > 0.0 else -math.inf


def _minimum(*xs: Interval) -> Interval:
    return Interval(min(x.low for x in xs), min(x.high for x in xs))


def _maximum(*xs: Interval) -> Interval:
    return Interval(max(x.low for x in xs), max(x.high for x in xs))


FUNCTIONS: dict[str, Callable[..., Interval]] = {
    "abs": _absolute,
    "clip": lambda x, low, high: _minimum(_maximum(x, low), high),
    "exp": _increasing(_exp),
    "log": _increasing(_log),
    "max": _maximum,
    "min": _minimum,
}
