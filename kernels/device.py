"""Which GPU kernels run on. Triton launches on the current one, wherever the tensors lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor  # by this name torch finds it in the annotations of operators that are wrapped here

P = ParamSpec("P")
T = TypeVar("T")


def where_tensors_lie(launch: Callable[P, T]) -> Callable[P, T]:
    """The function, with the GPU of its first tensor as the current one: of several, and in whatever thread."""

    @wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
        with torch.cuda.device_of(first):
            return launch(*args, **kwargs)

    return run
