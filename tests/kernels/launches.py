"""Launches of kernels as plain text, and Triton's own just-in-time path over them for a GPU that is not here.

    python tests/kernels/launches.py sm_90 < launches.json                  a line of JSON for each binary
    python tests/kernels/launches.py sm_90 --extremes < launches.json       likewise, with other numbers
    python tests/kernels/launches.py sm_90 --moved < launches.json          a line for each that is compiled once more
                                                                            for where its arguments lie

A launch is {"kernel": "module:function", "arguments": {name: value}}, where a tensor is {"pointer": "bfloat16",
"aligned": true} and a type of Triton {"type": "bf16"}; arguments hold the options of the launch too. TRITON_INTERPRET
must not be set, under which kernels are none that could be compiled.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib import import_module
from typing import Any

Launch = dict[str, Any]


def encode(launches: Iterable[tuple[Callable[..., None], dict[str, Any]]]) -> list[Launch]:
    """What `EmulatedDevice.launches` recorded, each kind once.

    Raises:
        TypeError: a value that is no argument of a kernel, such as a number of NumPy.
    """
    distinct: dict[str, Launch] = {}
    for function, arguments in launches:
        named = {name: _encode_value(value) for name, value in arguments.items()}
        launch = {"kernel": f"{function.__module__}:{function.__qualname__}", "arguments": named}
        distinct.setdefault(json.dumps(launch), launch)
    return list(distinct.values())


def _encode_value(value: Any) -> Any:
    import triton.language as tl

    from tests.emulation import Pointer

    if isinstance(value, Pointer):
        return {"pointer": str(value.dtype).removeprefix("torch."), "aligned": value.aligned}
    if isinstance(value, tl.dtype):
        return {"type": value.name}
    if type(value) not in (int, float, bool, str, type(None)):
        raise TypeError(f"{value!r} of {type(value)} is no argument of a kernel")
    return value


def _decode_value(value: Any) -> Any:
    import torch
    import triton.language as tl
    from triton.runtime.jit import MockTensor

    if not isinstance(value, dict):
        return value
    if "type" in value:
        return tl.dtype(value["type"])
    tensor = MockTensor(getattr(torch, value["pointer"]))
    address = 0 if value["aligned"] else 8
    tensor.data_ptr = lambda: address
    return tensor


def activate(target: str) -> None:
    """Makes Triton believe that the GPU is one of `compile.TARGETS`, for which it can compile and nothing else."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from vas_engine.kernels.compile import TARGETS

    chip = TARGETS[target]

    class Absent(DriverBase):
        """A GPU that is not there."""

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError("nothing is launched")

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError("there is no device")

        def get_benchmarker(self) -> Any:
            raise NotImplementedError("nothing is launched")

        def get_current_target(self) -> GPUTarget:
            return GPUTarget(chip.backend, chip.arch, chip.warp_size)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(Absent())


def specialised(launches: Iterable[Launch]) -> dict[str, Launch]:
    """The launches that Triton compiles apart, by kernel and what it specialises for; the first of each."""
    distinct: dict[str, Launch] = {}
    for launch in launches:
        kernel, given = _decode(launch)
        *_, bind = kernel.device_caches[0]
        _, specialisation, options = bind(**given)
        distinct.setdefault(f"{launch['kernel']} {specialisation} {sorted(options.items())}", launch)
    return distinct


def _decode(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """The kernel and what it is given."""
    module, name = launch["kernel"].split(":")
    given = {name: _decode_value(value) for name, value in launch["arguments"].items()}
    return getattr(import_module(module), name), given


def extremes(launches: Iterable[Launch]) -> list[Launch]:
    """The first launch of each kernel, with all its integers 1, of no use to 16, and too large for 32 bits."""
    first: dict[str, Launch] = {}
    for launch in launches:
        first.setdefault(launch["kernel"], launch)
    found = []
    for launch in first.values():
        kernel, arguments = _decode(launch)[0], launch["arguments"]
        integers = [p.name for p in kernel.params if not p.is_constexpr and type(arguments[p.name]) is int]
        found += [{**launch, "arguments": arguments | dict.fromkeys(integers, n)} for n in (1, 3, 2**31 + 5)]
    return found


def moved(launches: Iterable[Launch]) -> Iterator[str]:
    """Kernels compiled more than once though only the addresses of their arguments differ, 16 dividing them or not."""
    seen: set[str] = set()
    for name, launch in specialised(launches).items():
        anywhere = re.sub(r"\('\*(\w+)', 'D'\)", r"('*\1', '')", name)
        if anywhere in seen:
            yield launch["kernel"]
        seen.add(anywhere)


def compile_launches(launches: Iterable[Launch], target: str) -> Iterator[dict[str, Any]]:
    """For the active target, a report of `vas_engine.kernels.compile` and its problem for each kind of launch."""
    from vas_engine.kernels.compile import Report, read_binary

    for name, launch in specialised(launches).items():
        kernel, given = _decode(launch)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                report = read_binary(name, kernel.warmup(grid=(1,), **given), target)
        except Exception as error:  # of whatever sort: one that does not compile must not hide the others
            report = Report(name, target, error=f"{type(error).__name__}: {str(error).strip()[:2000]}")
        yield {**asdict(report), "problem": report.problem, "launch": launch}


if __name__ == "__main__":
    activate(sys.argv[1])
    given = json.load(sys.stdin)
    lines: Iterable[Any] = compile_launches(extremes(given) if "--extremes" in sys.argv else given, sys.argv[1])
    for line in moved(given) if "--moved" in sys.argv else lines:
        print(json.dumps(line), flush=True)
