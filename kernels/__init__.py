"""Kernels and their reference in plain torch; installed as ``vas_engine.kernels``."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

_TRITON = {
    "candidate_input": "candidate_input",
    "candidate_rows": "candidate_rows",
    "value_head_tilt": "value_tilt",
    "winner_rows": "candidate_rows",
}


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton, which must be installed, runs kernels under its interpreter, on a CPU (TRITON_INTERPRET)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def function(name: str, backend: str) -> Callable[..., Any]:
    """A function of `reference` that has a Triton twin: that one, or the reference where a backend has none."""
    module = "reference" if backend in ("cpp", "reference") else _TRITON[name]
    return getattr(importlib.import_module(f"vas_engine.kernels.{module}"), name)
