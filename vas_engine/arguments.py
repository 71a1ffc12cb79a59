"""Checks of arguments: one function per sort of value; each error names the argument and the fix."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

from vas_engine.errors import InvalidArgumentError, nearest

T = TypeVar("T", bound=Callable[..., Any])
C = TypeVar("C")

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_power, f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}


def unknown_argument(name: str, value: object, known: Collection[str], aliases: Mapping[str, str]) -> None:
    """Raises InvalidArgumentError for an argument nobody knows, with the one that was probably meant."""
    alias = aliases.get(name)
    hint = f"did you mean {alias!r}?" if alias else nearest(name, known)
    raise InvalidArgumentError(name, value, f"unknown argument; {hint}")


def names_nearest(aliases: Mapping[str, str] | None = None) -> Callable[[T], T]:
    """Decorator of a function, or of a class for its constructor: an unknown keyword names the nearest right one.

    Python's own TypeError names the wrong keyword only. `aliases` maps names of other libraries to ours.
    """

    def decorate(what: T) -> T:
        if not isinstance(what, type):
            return cast(T, _checked(what, aliases or {}))
        what.__init__ = _checked(what.__init__, aliases or {})  # type: ignore[misc]
        return what

    return decorate


def _checked(original: Callable[..., Any], aliases: Mapping[str, str]) -> Callable[..., Any]:
    known = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name not in known:
                unknown_argument(name, kwargs[name], known, aliases)
        return original(*args, **kwargs)

    return checked


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """An int in [low, high]; True and 3.0 are not ints, NumPy's integers are."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidArgumentError(name, value, "must be an integer")
    number = int(value)
    if number < low or (high is not None and number > high):
        raise InvalidArgumentError(name, value, f"must be {_range(low, high)}")
    return number


def real(
    name: str, value: object, low: float | None = None, high: float | None = None, *, above_low: bool = False
) -> float:
    """A finite float in [low, high], or in (low, high] with `above_low`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidArgumentError(name, value, "must be a number")
    number = float(value)
    if not math.isfinite(number):
        raise InvalidArgumentError(name, value, "must be finite, neither NaN nor infinite")
    too_low = low is not None and (number <= low if above_low else number < low)
    if too_low or (high is not None and number > high):
        raise InvalidArgumentError(name, value, f"must be {_range(low, high, above_low)}")
    return number


def boolean(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgumentError(name, value, "must be True or False")
    return value


def choice(name: str, value: object, options: Collection[str]) -> str:
    """One of `options`; a near miss is named."""
    if not isinstance(value, str) or value not in options:
        listed = ", ".join(repr(option) for option in options)
        hint = f" ({nearest(value, options)})" if isinstance(value, str) else ""
        raise InvalidArgumentError(name, value, f"must be one of {listed}{hint}")
    return value


def for_each(name: str, given: object, count: int, check: Callable[[str, object], C]) -> list[C]:
    """One value for all of `count` prompts, or a list or tuple with one for each; `check` takes names and values."""
    if not isinstance(given, list | tuple):
        return [check(name, given)] * count
    if len(given) != count:
        raise InvalidArgumentError(name, f"[{len(given)} entries]", f"give one for all prompts, or {count}")
    return [check(f"{name}[{index}]", item) for index, item in enumerate(given)]


def size_in_bytes(name: str, value: object, least: int = 1) -> int:
    """Bytes from an int or a text such as "2GiB" or "1.5 GB" (GB counts in 1000s, GiB in 1024s)."""
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            fix = "write bytes as a number or with a unit, such as '2GiB' or '512MB'"
            raise InvalidArgumentError(name, value, fix)
        return integer(name, int(float(match[1]) * unit), least)
    return integer(name, value, least)


def _range(low: float | None, high: float | None, above_low: bool = False) -> str:
    parts = []
    if low is not None:
        parts.append(f"above {low}" if above_low else f"at least {low}")
    if high is not None:
        parts.append(f"at most {high}")
    return " and ".join(parts)
