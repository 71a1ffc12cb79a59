"""Kernels and their reference in plain torch; installed as ``vas_engine.kernels``."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interprets() -> bool:
    """Whether Triton, which must be installed, runs kernels under its interpreter, on a CPU (TRITON_INTERPRET)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
