"""Typed errors. Each names what was wrong, the value that was given and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class VASError(Exception):
    """Base class of every error this package raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Not by the constructor, whose arguments are others than `args`: errors travel between processes.
        return Exception.__new__, (type(self), *self.args), self.__dict__


class InvalidArgumentError(VASError, ValueError):
    """An argument that cannot work.

    Attributes:
        argument: name of the argument, as the caller wrote it.
        value: what was given.
        fix: what to change.
    """

    def __init__(self, argument: str, value: object, fix: str) -> None:
        self.argument, self.value, self.fix = argument, value, fix
        super().__init__(f"{argument}={value!r}: {fix}")


class UnsupportedModelError(VASError):
    """A model whose attention or layout the engine does not honour; refused at load, never ignored."""


class ValueArtifactError(VASError):
    """A value that cannot be loaded: corrupt, made for another model or tokenizer, or of an unknown layout."""


class KVCacheError(VASError, MemoryError):
    """A request that does not fit the KV cache even when it runs alone."""


class NonFiniteError(VASError, ArithmeticError):
    """Logits or values of one request are not finite; that request ends, the others go on."""


class TrainingDataError(VASError, ValueError):
    """Rollouts or rewards that a value cannot be trained on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``did you mean 'top_p'?``, or the list of known names when nothing is near."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(options)}" if options else "none is known"
