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

_HOST_NAMES = ("auto", "cpp", "reference")
_NAMES = (*_HOST_NAMES, "triton")


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


def resolve_backend(backend: str, device: torch.device | None = None) -> str:
    """ "cpp", "reference" or "triton": what a name means for tensors on a device, or (None) for arrays on the host.

    Raises:
        InvalidArgumentError: a name that is unknown, or of something that does not run there.
    """
    names = _HOST_NAMES if device is None else _NAMES
    if backend not in names:
        raise InvalidArgumentError("backend", backend, f"one of {', '.join(names)}")
    on_host = device is None or device.type == "cpu"
    if backend == "cpp":
        extension()
        if not on_host:
            raise InvalidArgumentError("backend", backend, f"the tensors lie on {device}; use 'auto'")
    if backend == "triton" and device is not None and not runs_triton(device):
        fix = f"Triton is not installed or does not run on {device}; use 'auto'"
        raise InvalidArgumentError("backend", "triton", fix)
    if backend == "auto" and device is not None and not on_host:
        return "triton" if runs_triton(device) else "reference"
    if backend == "auto":
        return "cpp" if available() else "reference"
    return backend


def backend_name() -> str:
    """What backend="auto" means here, e.g. "cpp (avx512, 8 threads)" or "reference"."""
    if not available():
        return "reference"
    return f"cpp ({extension().instruction_set()}, {torch.get_num_threads()} threads)"
