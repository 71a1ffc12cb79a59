"""A CUDA device in software, to run what is meant for a GPU where there is none.

Its tensors say that they lie on "cuda:0" and keep their numbers on the host, where no operator finds them that was not
meant to. As on a GPU

- tensors of the host and of the device do not mix, and what reads a number back waits for the device;
- work is queued, and done when somebody waits, not before: what the host reads or overwrites too early is wrong;
- a captured graph repeats its operators and launches without any Python, on memory that other graphs of its pool use
  as well, except for what somebody still holds;
- memory that nobody has written to holds nonsense;
- kernels run on the current GPU, which may be another one than that of their tensors.

Kernels run under Triton's interpreter. There is one stream, and speed means nothing.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
MEMORY = 2**32
"""Bytes of the device."""
_READS_BACK = ("nonzero", "masked_select", "_unique", "unique_", "equal", "repeat_interleave", "is_nonzero")
_FACTORIES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Block:
    """Memory of the device that one operator allocated; as long as this object lives somebody may read it.

    Attributes:
        memory: the numbers.
    """

    __slots__ = ("__weakref__", "memory")

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory


class DeviceTensor(torch.Tensor):
    """A tensor on the device.

    Attributes:
        inner: its numbers, on the host. block: whose memory they are in.
    """

    inner: torch.Tensor
    block: Block

    @staticmethod
    def __new__(cls, inner: torch.Tensor, block: Block) -> DeviceTensor:
        with torch.inference_mode(False):  # views of weights could not be made else
            made = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=CUDA,
            )  # fmt: skip
        made.inner, made.block = inner, block
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _mode().handle(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({list(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.cpu().numpy()

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        made = self.detach().clone()
        memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        return memo[id(self)]


class Graph:
    """What `torch.cuda.CUDAGraph` is."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.work: list[Callable[[], None]] = []
        self.made: list[tuple[weakref.ref[Block], torch.Tensor]] = []
        self._pool: Any = None

    def pool(self) -> Any:
        return self._pool

    def replay(self) -> None:
        device = _mode()
        device.replays += 1

        def again() -> None:
            # Whatever a graph of the pool left lying about, this one may use; its own it has to make anew.
            for graph in device.graphs:
                if graph._pool is self._pool:
                    for owner, memory in graph.made:
                        if owner() is None:
                            _spoil(memory)
            for run in self.work:
                run()

        device.enqueue(again)


class Generator(torch.Generator):
    """What `torch.Generator` is; one of the device draws other numbers than a GPU does."""

    def __new__(cls, device: Any = CPU) -> Generator:
        return super().__new__(cls, CPU)


class Event:
    """What `torch.cuda.Event` is."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.place = 0

    def record(self, stream: Any = None) -> None:
        self.place = _mode().place

    def synchronize(self) -> None:
        _mode().wait("event", self.place)

    def query(self) -> bool:
        return _mode().done >= self.place

    def wait(self, stream: Any = None) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class Stream:
    """What `torch.cuda.Stream` is; all are worked off in the order of what was queued, as one."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        _mode().wait("stream")

    def wait_stream(self, other: Any) -> None:
        pass

    wait_event = wait_stream


@dataclass(frozen=True)
class Pointer:
    """What a kernel was given where it takes a tensor: numbers of a type, whether at an address divisible by 16."""

    dtype: torch.dtype
    aligned: bool


class EmulatedDevice(TorchDispatchMode):
    """The device, which sees all operators while it is entered.

    Args:
        late: work is done when somebody waits for it; else at once.

    Attributes:
        computes: whether work is done at all. Where it is not, new memory is zeros that stay so, cost nothing and are
            not counted: models of any size can be gone through for what they launch.
        waits: what the host waited for, and how often.
        allocations: blocks of memory that were taken, those of graphs left out.
        captures, replays: of graphs. live, peak: bytes.
        launches: kernels that were launched, each with its arguments and options.
        current: number of the current GPU; the others are there by their numbers only.
    """

    def __init__(self, late: bool = True) -> None:
        super().__init__()
        self.late, self.computes = late, True
        self.waits: Counter[str] = Counter()
        self.allocations = self.captures = self.replays = self.live = self.peak = 0
        self.current = CUDA.index
        self.launches: list[tuple[Callable[..., None], dict[str, Any]]] = []
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.stream = Stream()
        self.place = self.done = 0
        self.capturing: Graph | None = None
        self._queue: list[Callable[[], None]] = []
        self._one_at_a_time = threading.RLock()  # several threads may wait
        self._pinned: dict[int, torch.Tensor] = {}

    # Work

    def enqueue(self, run: Callable[[], None]) -> None:
        """To be done after everything before, or by the graph that is being captured."""
        if not self.computes:
            return
        if self.capturing is not None:
            self.capturing.work.append(run)
            return
        with self._one_at_a_time:
            self._queue.append(run)
            self.place += 1
        if not self.late:
            self._work_off(self.place)

    def wait(self, reason: str, place: int | None = None) -> None:
        """For what was queued, up to a place."""
        self._refuse(reason)
        self.waits[reason] += 1
        self._work_off(self.place if place is None else place)

    def _refuse(self, what: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def _work_off(self, place: int) -> None:
        with self._one_at_a_time, _native():
            while self.done < place:
                self.done += 1
                self._queue.pop(0)()

    # Memory

    def allocate(self, like: torch.Tensor) -> DeviceTensor:
        """Nonsense of a tensor's shape, strides and type."""
        if not self.computes:
            return self._zeros(like)
        with torch.inference_mode(False):
            memory = torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=CPU)
        block = Block(memory)
        if self.capturing is not None:
            self.capturing.made.append((weakref.ref(block), memory))
        else:
            self.allocations += 1
            self.live += memory.nbytes
            self.peak = max(self.peak, self.live)
        weakref.finalize(block, self._free, memory, self.capturing)
        _spoil(memory)
        return DeviceTensor(memory, block)

    def _zeros(self, like: torch.Tensor) -> DeviceTensor:
        """What no work will be done on; the host's memory is taken only where it is written to."""
        size = 1 + sum(max(n - 1, 0) * step for n, step in zip(like.size(), like.stride(), strict=True))
        with torch.inference_mode(False):
            flat = torch.from_numpy(np.zeros(size * like.dtype.itemsize, np.uint8)).view(like.dtype)
            memory = flat.as_strided(like.size(), like.stride())
        return DeviceTensor(memory, Block(memory))

    def _free(self, memory: torch.Tensor, graph: Graph | None) -> None:
        """From here on others write to it, in the order of the work."""
        if graph is not None and graph is self.capturing:
            graph.work.append(lambda: _spoil(memory))
        if graph is None:
            with self._one_at_a_time:
                self.live -= memory.nbytes
                self._queue.append(lambda: _spoil(memory))
                self.place += 1

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, known as pinned from now on."""
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    # Operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.handle(func, args, kwargs or {})

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator that touches the device, or the host alone."""
        name, space = func.__name__.split(".")[0], func.namespace
        leaves = tree_leaves((args, kwargs))
        on_device = [leaf for leaf in leaves if isinstance(leaf, DeviceTensor)]
        wanted = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        wanted = CUDA if wanted is not None and wanted.type == "cuda" else wanted
        if not on_device and wanted is not CUDA:
            return self._on_host(func, name, args, kwargs)
        if space == "vas_engine":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        if name == "_fused_sdp_choice":
            return 0  # by plain operators
        if name in ("copy_", "_to_copy"):
            return self._copy(name, args, kwargs, wanted)
        if name == "lift_fresh":
            return args[0]
        if (
            torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd)
            and name not in _READS_BACK
        ):
            with self:
                return func.decompose(*args, **kwargs)
        if func.is_view:
            return self._view(func, args, kwargs)
        if on_device:
            self._check(name, args, kwargs)
        if name == "_local_scalar_dense":
            self.wait("item")
            return args[0].inner.item()
        if wanted is not None and wanted is not CUDA:  # made like a tensor of the device, but on the host
            return func(*_to_meta(args), **kwargs)
        if name.startswith(_READS_BACK) or (name in ("index", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )):  # fmt: skip
            return self._read_back(func, name, args, kwargs)
        found = self._run(func, name, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags and self.capturing is None:
            self._work_off(self.place)  # host and device share a generator, which is asked in the order of the program
        return found

    def _on_host(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        made = func(*args, **kwargs)
        if not pinned:
            return made
        if name in _FACTORIES:
            _spoil(made) if self.computes else made.zero_()
        return self.pin(made)

    def _check(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor) and leaf.dim():
                if name in ("index", "index_put_") and leaf is not args[0]:
                    self.wait("index from the host")  # torch copies it, which waits as it is not pinned
                    continue
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name}, {leaf.shape})"
                )

    def _copy(self, name: str, args: Any, kwargs: dict[str, Any], wanted: torch.device | None) -> Any:
        if name == "copy_":
            target, source, late = args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            source, late = args[0], kwargs.get("non_blocking", False)
            wanted = wanted or source.device
            shape = torch.ops.aten._to_copy.default(
                _to_meta(source), dtype=kwargs.get("dtype"), memory_format=kwargs.get("memory_format")
            )
            target = self.allocate(shape) if wanted.type == "cuda" else torch.empty_like(shape, device=CPU)
        into, of = _inner(target), _inner(source)
        if isinstance(target, DeviceTensor):
            if not isinstance(source, DeviceTensor) and source.dim() + (self.capturing is not None):
                if not (late and self.is_pinned(source)):
                    self._refuse("copy from the host that waits")
                    # Of memory that is not pinned torch takes a copy of its own, which may have to wait.
                    self.waits["copy from the host"] += 1
                    of = of.clone()
            elif not isinstance(source, DeviceTensor):
                of = of.clone()
            self.enqueue(lambda: into.copy_(of))
        elif late and self.is_pinned(target):
            self.enqueue(lambda: into.copy_(of))
        else:
            self.wait("copy to the host")
            with _native():
                into.copy_(of)
        return target

    def _view(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        with torch.inference_mode(False):
            found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        block = args[0].block
        return tree_map(lambda leaf: DeviceTensor(leaf, block) if isinstance(leaf, torch.Tensor) else leaf, found)

    def _read_back(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        self.wait(name)
        with _native():
            found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if name == "index_put_":
            return args[0]

        def place(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            made = self.allocate(leaf)
            made.inner.copy_(leaf)
            return made

        return tree_map(place, found)

    def _run(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        """Computed when its time comes; its shape is known at once."""
        given = {**kwargs, "device": CPU} if kwargs.get("device") is not None else dict(kwargs)
        given.pop("pin_memory", None)
        inner_args, inner_kwargs = tree_map(self._taken, args), tree_map(self._taken, given)
        if func._schema.is_mutable:
            self.enqueue(lambda: func(*inner_args, **inner_kwargs))
            if not func._schema.returns:
                return None
            written = [
                kwargs.get(a.name, args[i] if i < len(args) else None)
                for i, a in enumerate(func._schema.arguments)
                if a.alias_info is not None and a.alias_info.is_write
            ]
            return written[0] if len(func._schema.returns) == 1 else tuple(written)
        shapes = {**given, "device": "meta"} if "device" in given else given
        found = func(*_to_meta(args), **_to_meta(shapes))
        outs = [self.allocate(leaf) for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        if name not in _FACTORIES:
            targets = [out.inner for out in outs]

            def run() -> None:
                results = [leaf for leaf in tree_leaves(func(*inner_args, **inner_kwargs)) if torch.is_tensor(leaf)]
                for target, result in zip(targets, results, strict=True):
                    target.copy_(result)

            self.enqueue(run)
        remaining = iter(outs)
        return tree_map(lambda leaf: next(remaining) if isinstance(leaf, torch.Tensor) else leaf, found)

    def _taken(self, leaf: Any) -> Any:
        """A number of the host is read when the operator is launched."""
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor):
            return leaf.clone()
        return _inner(leaf)

    def launch(self, kernel: Any, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A kernel of Triton."""
        if self.current != CUDA.index:
            raise ValueError(f"{kernel} was launched on cuda:{self.current}, its tensors lie on {CUDA}")
        for leaf in (*args, *kwargs.values()):
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, DeviceTensor) and not self.is_pinned(leaf):
                raise ValueError(
                    f"Pointer argument cannot be accessed from Triton (cpu tensor?): {kernel}, {leaf.shape}"
                )
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        self.launches.append((kernel.fn, {name: _described(argument) for name, argument in named.items()}))
        given, others = [_inner(arg) for arg in args], {name: _inner(arg) for name, arg in kwargs.items()}
        self.enqueue(lambda: executor(*given, **others))


def _described(argument: Any) -> Any:
    return Pointer(argument.dtype, argument.data_ptr() % 16 == 0) if isinstance(argument, torch.Tensor) else argument


class _Indexed(TorchFunctionMode):
    """Gives "cuda" its number, for which torch would ask a driver."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def indexed(leaf: Any) -> Any:
            return CUDA if isinstance(leaf, str | torch.device) and str(leaf) == "cuda" else leaf

        named = {name: indexed(value) if name == "device" else value for name, value in (kwargs or {}).items()}
        if func is torch.Tensor.to:
            args = tuple(indexed(arg) for arg in args)
        return func(*args, **named)


_devices: list[EmulatedDevice] = []


def _mode() -> EmulatedDevice:
    return _devices[-1]


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, DeviceTensor) else leaf


def _to_meta(tree: Any) -> Any:
    def meta(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not isinstance(leaf, DeviceTensor) and not leaf.dim():
            return leaf
        return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")

    return tree_map(meta, tree)


@contextmanager
def _native() -> Iterator[None]:
    """What the device does by itself: on numbers of any sort, outside of autograd and unseen."""
    with torch._C._DisableTorchDispatch(), torch.inference_mode():
        yield


def _spoil(memory: torch.Tensor) -> None:
    with _native():
        if memory.dtype.is_floating_point:
            memory.fill_(torch.nan)
        elif memory.dtype == torch.bool:
            memory.fill_(True)
        else:
            memory.fill_(torch.iinfo(memory.dtype).max // 2)


@contextmanager
def _on(stream: Stream) -> Iterator[None]:
    device = _mode()
    before, device.stream = device.stream, stream
    gpu = _exchange(CUDA.index)
    try:
        yield
    finally:
        device.stream = before
        _exchange(gpu)


def _exchange(gpu: int) -> int:
    """Makes a GPU the current one, none if negative; the number of the one before."""
    device = _mode()
    before = device.current
    device.current = gpu if gpu >= 0 else before
    return before if gpu >= 0 else -1


@contextmanager
def _capture(graph: Graph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    device = _mode()
    device.wait("capture")
    before, device.stream = device.stream, stream or Stream()
    gpu = _exchange(CUDA.index)
    # Like torch, which does not go back to the stream before in either case of failure.
    if pool is not None and not any(other._pool is pool for other in device.graphs):
        raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: all graphs of this pool are gone")
    graph._pool = pool or object()
    device.capturing = graph
    device.graphs.add(graph)
    device.captures += 1
    try:
        yield
    finally:
        device.capturing = None
    device.stream = before
    _exchange(gpu)


def _guard() -> None:
    """Lets torch's bindings switch to the device, as they do around many calls: like to the CPU, which does nothing.

    A build without CUDA has nobody registered for that; the table of those who are is `device_guard_impl_registry`.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[1] = guards[1] or guards[0]


@contextmanager
def emulated(late: bool = True, processors: int = 4) -> Iterator[EmulatedDevice]:
    """torch with a device "cuda" of some multiprocessors, for as long as this lasts and in this thread."""
    if torch.backends.cuda.is_built():
        pytest.skip("this torch has CUDA, whose own checks want a driver: the emulated device takes a build without it")
    from triton.runtime.interpreter import InterpretedFunction

    device = EmulatedDevice(late)
    plain_launch = InterpretedFunction.__getitem__

    def getitem(self: Any, grid: Any) -> Any:
        executor = plain_launch(self, grid)
        return lambda *args, **kwargs: device.launch(self, executor, args, kwargs)

    properties = SimpleNamespace(
        name="emulated", major=9, minor=0, multi_processor_count=processors, total_memory=MEMORY, warp_size=32,
        gcnArchName="", shared_memory_per_block_optin=227 * 1024, L2_cache_size=2**20,
    )  # fmt: skip
    swaps: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: _mode().current,
        "set_device": _exchange,
        "_exchange_device": _exchange,
        "_maybe_exchange_device": _exchange,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: "emulated",
        "synchronize": lambda device=None: _mode().wait("synchronize"),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (MEMORY - _mode().live, MEMORY),
        "memory_allocated": lambda device=None: _mode().live,
        "max_memory_allocated": lambda device=None: _mode().peak,
        "reset_peak_memory_stats": lambda device=None: setattr(_mode(), "peak", _mode().live),
        "current_stream": lambda device=None: _mode().stream,
        "set_stream": lambda stream: setattr(_mode(), "stream", stream),
        "stream": _on,
        "is_current_stream_capturing": lambda: _mode().capturing is not None,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "manual_seed_all": lambda seed: None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _capture,
        "_lazy_init": lambda: None,
        "_sleep": lambda cycles: None,
    }
    _guard()
    lifts, converts = torch._C._only_lift_cpu_tensors(), torch.__future__.get_swap_module_params_on_conversion()
    with ExitStack() as stack:
        for name, replacement in swaps.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(InterpretedFunction, "__getitem__", getitem))
        pin = lambda tensor, device=None: tensor if _mode().is_pinned(tensor) else _mode().pin(tensor.clone())  # noqa: E731
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_swap_module_params_on_conversion(True)
        _devices.append(device)
        try:
            with torch.no_grad(), device, _Indexed():  # autograd would ask a driver
                yield device
        finally:
            _devices.pop()
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_swap_module_params_on_conversion(converts)
