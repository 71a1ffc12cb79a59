"""Many small arrays to a device, or back, in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

_ALIGNMENT = 16
"""Bytes; kernels load this much at a time."""


class Layout:
    """Places of arrays of given shapes and dtypes in one buffer of bytes.

    Attributes:
        num_bytes: of the buffer.
    """

    def __init__(self, fields: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._places: list[tuple[int, int, tuple[int, ...], torch.dtype]] = []
        end = 0
        for shape, dtype in fields:
            size = int(np.prod(shape)) * dtype.itemsize
            self._places.append((end, size, shape, dtype))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.num_bytes = end

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The arrays, contiguous, in a buffer uint8 [num_bytes]."""
        return [buffer[at : at + size].view(dtype).view(shape) for at, size, shape, dtype in self._places]

    def host_buffer(self, device: torch.device) -> torch.Tensor:
        """A buffer on the host, pinned where that lets a device copy it by itself."""
        return torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on a device, contiguous and not waited for."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type == "cpu" or not tensors:
        return tensors
    layout = Layout([(tuple(tensor.shape), tensor.dtype) for tensor in tensors])
    buffer = layout.host_buffer(device)
    for place, tensor in zip(layout.views(buffer), tensors, strict=True):
        place.copy_(tensor)
    return layout.views(buffer.to(device, non_blocking=True))


class Packed:
    """Tensors of one device side by side, to be fetched together. Packing them is one launch."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._fields = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        # The widest numbers first: so everything is aligned.
        self._order = sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
        self._buffer = torch.cat([tensors[i].reshape(-1).view(torch.uint8) for i in self._order])

    def send(self) -> Callable[[], list[np.ndarray]]:
        """Sets a copy to the host off; what is returned waits for it and gives the arrays."""
        on_device = self._buffer.device.type == "cuda"
        # Pinned memory comes from torch's cache of it, which gives nothing out again that is still being written to.
        host = torch.empty(self._buffer.shape, dtype=torch.uint8, pin_memory=on_device)
        host.copy_(self._buffer, non_blocking=True)
        sent = torch.cuda.current_stream(self._buffer.device).record_event() if on_device else None

        def arrays() -> list[np.ndarray]:
            if sent is not None:
                sent.synchronize()
            found: dict[int, np.ndarray] = {}
            end = 0
            for i in self._order:
                shape, dtype = self._fields[i]
                start, end = end, end + int(np.prod(shape)) * dtype.itemsize
                found[i] = host[start:end].view(dtype).view(shape).numpy()
            return [found[i] for i in range(len(found))]

        return arrays

    def fetch(self) -> list[np.ndarray]:
        """Copies on the host, once the device has computed them: a single wait."""
        return self.send()()


def to_host(tensors: Sequence[torch.Tensor]) -> list[np.ndarray]:
    """The tensors of one device as arrays: a single wait, or on the CPU none and the same memory."""
    if not tensors or tensors[0].device.type == "cpu":
        return [tensor.numpy() for tensor in tensors]
    return Packed(tensors).fetch()
