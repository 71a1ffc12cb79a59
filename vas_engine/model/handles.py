"""Objects that operators find by a number, as only tensors and numbers reach one.

The number comes in a tensor, so that none is written into compiled code and what is compiled can be shared.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch

__all__ = ["find", "handle_of"]

_numbers = itertools.count()
_objects: WeakValueDictionary[int, Any] = WeakValueDictionary()


def handle_of(thing: Any) -> torch.Tensor:
    """A new handle, int64 []; it is good as long as somebody else holds the object."""
    number = next(_numbers)
    _objects[number] = thing
    return torch.tensor(number)


def find(handle: torch.Tensor) -> Any:
    """The object of a handle."""
    return _objects[int(handle)]
