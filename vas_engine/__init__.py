"""vas_engine: value-augmented decoding.

    from vas_engine import LLM, SamplingParams

The names below are imported when first used: importing the package itself loads no model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LLM": "vas_engine.llm",
    "SamplingParams": "vas_engine.params",
    "CompletionOutput": "vas_engine.outputs",
    "Logprob": "vas_engine.outputs",
    "RequestMetrics": "vas_engine.outputs",
    "RequestOutput": "vas_engine.outputs",
    "InvalidArgumentError": "vas_engine.errors",
    "KVCacheError": "vas_engine.errors",
    "NonFiniteError": "vas_engine.errors",
    "TrainingDataError": "vas_engine.errors",
    "UnsupportedModelError": "vas_engine.errors",
    "VASError": "vas_engine.errors",
    "ValueArtifactError": "vas_engine.errors",
}

if TYPE_CHECKING:
    from vas_engine.errors import (
        InvalidArgumentError,
        KVCacheError,
        NonFiniteError,
        TrainingDataError,
        UnsupportedModelError,
        ValueArtifactError,
        VASError,
    )
    from vas_engine.llm import LLM
    from vas_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from vas_engine.params import SamplingParams

__all__ = [
    "LLM",
    "CompletionOutput",
    "InvalidArgumentError",
    "KVCacheError",
    "Logprob",
    "NonFiniteError",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TrainingDataError",
    "UnsupportedModelError",
    "VASError",
    "ValueArtifactError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vas_engine' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
