"""Time on a device: calls, what the device can do at best, and how much of a budget is left."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
CYCLES = 2e9
"""Of a device's clock in a second, about."""
HOST_SECONDS = 20e-6
"""That the host takes to launch a call."""


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do.

    Attributes:
        bandwidth: bytes/s read plus written by a large copy.
        flops: FLOP/s of a large matrix product.
    """

    bandwidth: float
    flops: float

    def __str__(self) -> str:
        return f"copy {self.bandwidth / 1e9:.0f} GB/s, product {self.flops / 1e12:.4g} TFLOP/s"


class Budget:
    """Seconds that are left of a number of them."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is overdrawn."""
        return self._end - time.monotonic()


def synchronize(device: torch.device) -> None:
    """Waits for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_call(calls: Call | Sequence[Call], device: torch.device, seconds: float = 0.3) -> list[float]:
    """Seconds of each of some calls, after two to warm up; at least five are timed, for about `seconds` in all.

    Args:
        calls: several do the same on different inputs and take turns, so that none finds its own in the cache.
    """
    turns = [calls] if callable(calls) else list(calls)
    for call in (turns * 2)[: max(2, len(turns))]:
        call()
    synchronize(device)
    start = time.perf_counter()
    turns[0]()
    synchronize(device)
    count = max(5, min(200, round(seconds / max(time.perf_counter() - start, 1e-6))))
    order = [turns[index % len(turns)] for index in range(count)]
    if device.type != "cuda":
        return [_wall(call) for call in order]
    # What is short for the device is long for the host, which must be ahead of it: it has this long to launch all.
    torch.cuda._sleep(round(CYCLES * HOST_SECONDS * count))
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in order]
    for call, (before, after) in zip(order, marks, strict=True):
        before.record()
        call()
        after.record()
    synchronize(device)
    return [before.elapsed_time(after) / 1e3 for before, after in marks]


def _wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def captured(call: Call, device: torch.device) -> Call:
    """The call as a CUDA graph, which leaves the host's part out of the time; on a CPU the call itself.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure_ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, large: bool = True) -> Ceilings:
    """A copy of a gigabyte and a product of two 8192 x 8192 matrices of random numbers.

    Far smaller ones on a CPU and with `large` off, whose figures mean nothing.
    """
    large = large and device.type == "cuda"
    size, side = (2**30, 8192) if large else (2**22, 128)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    copy = statistics.median(seconds_per_call(lambda: target.copy_(source), device, 0.2))
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = statistics.median(seconds_per_call(lambda: a @ b, device, 0.2))
    return Ceilings(2 * size / copy, 2 * side**3 / product)
