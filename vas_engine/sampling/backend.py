"""Which implementation of the sampling path runs: the C++ extension, the Triton kernels or the reference in torch."""

from __future__ import annotations

from types import ModuleType

import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels import has_triton, interprets

try:
    from vas_engine import _sampling as _extension
except ImportError:  # a host without a compiler
    _extension = None

_NAMES = ("auto", "cpp", "reference")


def available() -> bool:
    """Whether the C++ extension is built."""
    return _extension is not None and hasattr(_extension, "select")


def extension() -> ModuleType:
    """The C++ module.

    Raises:
        InvalidArgumentError: it is not built.
    """
    if not available():
        raise InvalidArgumentError("backend", "cpp", "the extension is not built; reinstall it or use 'reference'")
    return _extension


def runs_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device: a GPU, or under TRITON_INTERPRET the CPU."""
    return has_triton() and (device.type == "cuda" or interprets())


def resolve_backend(backend: str) -> str:
    """ "cpp" or "reference" for "auto", "cpp" or "reference": what runs on the host.

    Raises:
        InvalidArgumentError: another name, or "cpp" where the extension is not built.
    """
    if backend not in _NAMES:
        raise InvalidArgumentError("backend", backend, f"one of {', '.join(_NAMES)}")
    if backend == "cpp":
        extension()
    if backend == "auto":
        return "cpp" if available() else "reference"
    return backend


def backend_name() -> str:
    """What backend="auto" means here, e.g. "cpp (avx512, 8 threads)" or "reference"."""
    if not available():
        return "reference"
    return f"cpp ({extension().instruction_set()}, {torch.get_num_threads()} threads)"
