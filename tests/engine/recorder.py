"""A stand-in for the capture of a CUDA graph: operators and launches are noted once and repeated on the same tensors.

As on a GPU nothing of Python runs in a replay, tensors made during the capture keep their memory, and whatever would
wait for the device, or send it something from the host, is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vas_engine.model import backend
from vas_engine.model.graphs import Graphs

_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Callable[[], None]] = []
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name in _WAITS or (name == "index" and any(t.dtype == torch.bool for t in given[1:])):
            raise RuntimeError(f"{name} waits for the device")
        self.paused = True
        try:
            made = func(*args, **kwargs)
        finally:
            self.paused = False
        known = {t.untyped_storage().data_ptr() for t in given}
        fresh = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(made))
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in known
        ]

        def again() -> None:
            results = tree_leaves(func(*args, **kwargs))
            for place, leaf in fresh:
                if "empty" not in name:
                    leaf.copy_(results[place])

        self.notes.append(again)
        return made

    def launch(self, run: Callable[[], Any]) -> None:
        if self.paused:
            run()
            return
        self.paused = True
        try:
            run()
        finally:
            self.paused = False
        self.notes.append(run)


def _forbidden(recorder: _Recorder, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args, **kwargs):
        if not recorder.paused:
            raise RuntimeError(f"{name} moves numbers between host and device")
        return function(*args, **kwargs)

    return call


@contextmanager
def _recording(recorder: _Recorder):
    from triton.runtime.interpreter import InterpretedFunction

    launch = InterpretedFunction.__getitem__
    swaps = [(torch, "tensor"), (torch, "from_numpy"), (torch, "as_tensor")]
    swaps += [(torch.Tensor, name) for name in ("tolist", "numpy", "item", "cpu", "pin_memory")]
    kept = [(place, name, getattr(place, name)) for place, name in swaps]
    for place, name, function in kept:
        setattr(place, name, _forbidden(recorder, name, function))
    captures = backend.captures
    backend.captures = lambda device: True

    def getitem(self, grid):
        executor = launch(self, grid)
        return lambda *args, **kwargs: recorder.launch(lambda: executor(*args, **kwargs))

    InterpretedFunction.__getitem__ = getitem
    try:
        with recorder:
            yield
    finally:
        InterpretedFunction.__getitem__ = launch
        backend.captures = captures
        for place, name, function in kept:
            setattr(place, name, function)


class RecordedGraphs(Graphs):
    """Graphs of a CPU that replay what they recorded."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        recorder = _Recorder()
        with _recording(recorder):
            work()

        def replay() -> None:
            self.replays += 1
            for again in recorder.notes:
                again()

        replay()
        return replay
