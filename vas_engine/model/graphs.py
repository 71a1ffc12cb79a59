"""Work on fixed tensors, kept as CUDA graphs. On a CPU it is done anew each time, on the same tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from vas_engine.kernels.transfer import Layout


def captures(device: torch.device) -> bool:
    """Whether what runs now is being captured: its tensors then stay where they are, and nothing may wait."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Graphs:
    """Captures work; all graphs share one pool of memory, so no two may run at once.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool: Any = None
        # One for all: libraries keep memory for every stream that they ever ran on.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def forget(self) -> None:
        """All graphs are gone, and with them what made their pool one that others may join."""
        self._pool = None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Does the work and returns what does it again.

        The work may be done several times in a row without harm; it reads and writes tensors that outlive it, by their
        addresses, and everything else it looks at is taken as it was now. Work that cannot be captured (it waits for
        the device, say) is warned of once and done by launching it.
        """
        if self._stream is None:
            work()
            return work
        # Kernels are compiled and libraries take their memory outside of the capture.
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError as error:
            # torch leaves the stream of the capture where ending it fails too; nor is the pool to be relied on.
            torch.cuda.set_stream(current)
            self._pool = None
            warnings.warn(f"decoding without a CUDA graph: capturing failed ({error})", stacklevel=2)
            work()
            return work
        self._pool = self._pool or graph.pool()
        # Whatever the work made now lies in the graph's memory, where nothing has been computed yet.
        graph.replay()
        return graph.replay


class Exchange:
    """Arrays that the host hands to work on a device in one transfer, at fixed places on both sides.

    Attributes:
        host: arrays that the host writes to.
        device: tensors of the same shapes, which `send` brings up to date.
    """

    def __init__(self, fields: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        layout = Layout(list(fields.values()))
        self._source = layout.host_buffer(device).zero_()
        self._target = torch.zeros(layout.num_bytes, dtype=torch.uint8, device=device)
        self._sent: torch.cuda.Event | None = None
        self.host = {name: view.numpy() for name, view in zip(fields, layout.views(self._source), strict=True)}
        self.device = dict(zip(fields, layout.views(self._target), strict=True))

    def send(self, num_bytes: int | None = None) -> None:
        """What the host has written, or its first bytes, to the device; not waited for."""
        self._target[:num_bytes].copy_(self._source[:num_bytes], non_blocking=True)
        if self._target.device.type == "cuda":
            self._sent = torch.cuda.current_stream(self._target.device).record_event()

    def wait(self) -> None:
        """Until what was sent last has left, so that the host may write again."""
        if self._sent is not None:
            self._sent.synchronize()
