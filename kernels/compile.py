"""Compiles every kernel as it ships, for GPUs that need not be here, and reads what the binaries use.

    python -m vas_engine.kernels.compile                                   all kernels, all targets
    python -m vas_engine.kernels.compile --target sm_90 --kernel candidate_attention --json

A kernel that spills registers to memory, asks for more shared memory than the target has, or does not
compile at all makes the exit code 1. Run it without TRITON_INTERPRET: an interpreted kernel has no binary.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vas_engine.kernels import has_triton

MODULES = (
    "candidate_attention", "paged_prefill", "kv_commit", "candidate_select", "value_tilt", "candidate_input",
    "candidate_rows", "reader_step",
)  # fmt: skip
"""Modules of kernels; one that is absent or has no `variants()` is passed over."""

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU architecture: what Triton calls it and the shared memory (bytes) that one block may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * KIB),
    "sm_90": Target("cuda", 90, 32, 227 * KIB),
    "sm_100": Target("cuda", 100, 32, 227 * KIB),
    "gfx942": Target("hip", "gfx942", 64, 64 * KIB),
}


@dataclass(frozen=True)
class Variant:
    """One kernel as it ships: what `triton.compile` needs.

    Attributes:
        name: kernel and configuration, such as "candidate_attention d128 bf16".
        kernel: the `@triton.jit` function.
        signature: argument -> "*bf16", "i32", "fp32", "constexpr" and so on.
        constants: constexpr argument -> value.
        num_warps, num_stages: as at launch.
        aligned: pointer and int arguments that are divisible by 16, which Triton finds out at launch where the kernel
            is specialised for them.
        targets: of `TARGETS`, where this configuration is used.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    aligned: tuple[str, ...] = ()
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass(frozen=True)
class Report:
    """What a binary uses.

    Attributes:
        name: of the variant. target: of `TARGETS`.
        registers: of a thread (vector registers on AMD, accumulators included).
        shared_bytes: of a block.
        spills: bytes of registers that a thread keeps in memory: stored plus loaded on NVIDIA, kept at one time on
            AMD (whose scalars may move to vector registers, which is no spill).
        threads: of a block.
        error: why there is no binary.
    """

    name: str
    target: str
    registers: int = 0
    shared_bytes: int = 0
    spills: int = 0
    threads: int = 0
    error: str | None = None

    @property
    def problem(self) -> str | None:
        """Why this must not ship; None if it may."""
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        limit = TARGETS[self.target].shared_bytes
        if self.shared_bytes > limit:
            return f"{self.shared_bytes} bytes of shared memory, {limit} are there"
        return None


def compile_variant(variant: Variant, target: str) -> Report:
    """Compiles one variant and reads the binary.

    Args:
        variant: every argument of its kernel is in the signature or among the constants.
        target: of `TARGETS`.

    Raises:
        ValueError: an unknown target, an argument without a type, or a kernel that TRITON_INTERPRET made
            uncompilable.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}; known are {', '.join(TARGETS)}")
    if not isinstance(variant.kernel, triton.runtime.JITFunction):
        raise ValueError(f"{variant.name}: not a jitted kernel; unset TRITON_INTERPRET before importing it")
    names = variant.kernel.arg_names
    types = {name: variant.signature.get(name, "constexpr") for name in names}
    untyped = [name for name, kind in types.items() if kind == "constexpr" and name not in variant.constants]
    unknown = sorted((variant.signature.keys() | variant.constants.keys() | set(variant.aligned)) - set(names))
    if untyped or unknown:
        raise ValueError(f"{variant.name}: arguments without a type or value {untyped}, of no use {unknown}")
    places = [names.index(name) for name in variant.aligned]
    specialised = [place for place in places if not variant.kernel.params[place].do_not_specialize]
    attributes = {(place,): [["tt.divisibility", 16]] for place in specialised}
    chip = TARGETS[target]
    # By place: the third argument has been called constants and constexprs.
    source = ASTSource(variant.kernel, types, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    # Triton prints the whole of a program that the assembler refuses.
    with contextlib.redirect_stdout(sys.stderr):
        binary = triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp_size), options=options)
    return read_binary(variant.name, binary, target)


def read_binary(name: str, binary: Any, target: str) -> Report:
    """What a compiled kernel uses.

    Args:
        name: of the report. binary: a `CompiledKernel` of Triton for a target of `TARGETS`.
    """
    chip = TARGETS[target]
    registers, spills = _amd_usage(binary.asm) if chip.backend == "hip" else _nvidia_usage(binary.asm)
    threads = binary.metadata.num_warps * chip.warp_size
    # Triton would ask an allocator for it, which nobody sets.
    error = "asks for global memory of its own" if getattr(binary.metadata, "global_scratch_size", 0) else None
    return Report(name, target, registers, int(binary.metadata.shared), spills, threads, error)


def _amd_usage(asm: Any) -> tuple[int, int]:
    """Vector registers of a thread and bytes spilled, from the metadata of the assembly."""

    def field(name: str) -> int:
        return sum(map(int, re.findall(rf"^\s+\.{name}:\s+(\d+)", asm["amdgcn"], re.MULTILINE)))

    # Spilled scalars go to lanes of vector registers while there are any: memory is used when a thread has a segment.
    spilled = field("vgpr_spill_count") + field("sgpr_spill_count") > 0
    return field("vgpr_count"), field("private_segment_fixed_size") if spilled else 0


def _nvidia_usage(asm: Any) -> tuple[int, int]:
    """Registers of a thread and bytes spilled: nothing without a stack, else what the assembler says of it."""
    architecture = re.search(r"^\.target\s+(\w+)", asm["ptx"], re.MULTILINE)
    assert architecture is not None
    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(asm["cubin"])
        source.write_text(asm["ptx"], encoding="utf-8")
        used = _tool("cuobjdump", "-res-usage", str(binary))
        stacks = re.findall(r"REG:(\d+) STACK:(\d+)", used)
        if not stacks:
            raise RuntimeError(f"cuobjdump's report is not understood:\n{used}")
        registers = max(int(count) for count, _ in stacks)
        if all(size == "0" for _, size in stacks):
            return registers, 0
        # Some versions bring a newer assembler for Blackwell.
        blackwell = int(re.sub(r"\D", "", architecture[1])) >= 100 and _bundled("ptxas-blackwell").exists()
        assembler = "ptxas-blackwell" if blackwell else "ptxas"
        log = _tool(assembler, "-v", f"--gpu-name={architecture[1]}", str(source), "-o", os.devnull)
    moved = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not moved:
        raise RuntimeError(f"the assembler's report is not understood:\n{log}")
    return registers, sum(int(stores) + int(loads) for stores, loads in moved)


def _bundled(name: str) -> Path:
    """A program that Triton brings."""
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__file__).parent / "bin" / name


def _tool(name: str, *arguments: str) -> str:
    """What a program that Triton brings prints."""
    done = subprocess.run([str(_bundled(name)), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def variants(kernel: str | None = None) -> Iterator[tuple[str, int, Variant]]:
    """Module, place in its list and variant, of all that ship; `kernel` picks those with it in their name."""
    for module in MODULES:
        path = f"{__spec__.parent}.{module}"
        if find_spec(path) is None:
            continue
        listed: list[Variant] = getattr(import_module(path), "variants", list)()
        for place, variant in enumerate(listed):
            if kernel is None or kernel == module or kernel in variant.name:
                yield path, place, variant


def _compile_listed(task: tuple[str, int, str]) -> Report:
    """In a worker: a jitted function does not travel between processes, its module's name does."""
    path, place, target = task
    variant = import_module(path).variants()[place]
    try:
        return compile_variant(variant, target)
    except Exception as error:
        # One kernel that does not compile must not hide the others.
        return Report(variant.name, target, error=f"{type(error).__name__}: {str(error).strip()[:2000]}")


def compile_all(targets: Sequence[str], kernel: str | None = None, jobs: int = 1) -> list[Report]:
    """A report for each variant and target, in `jobs` processes."""
    tasks = [
        (path, place, target)
        for target in targets
        for path, place, variant in variants(kernel)
        if target in variant.targets
    ]
    if jobs == 1:
        return [_compile_listed(task) for task in tasks]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_compile_listed, tasks))


def table(reports: Sequence[Report]) -> str:
    """The reports as text, a line each."""
    width = max([len(report.name) for report in reports] + [len("kernel")]) + 2
    lines = [f"{'kernel':<{width}}{'target':<8}{'registers':>10}{'threads':>9}{'shared bytes':>14}{'spills':>8}"]
    for report in reports:
        numbers = f"{report.registers:>10}{report.threads:>9}{report.shared_bytes:>14}{report.spills:>8}"
        lines.append(f"{report.name:<{width}}{report.target:<8}{numbers}  {report.problem or ''}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what is asked for, prints a table; 1 if something must not ship."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m vas_engine.kernels.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--kernel", metavar="NAME", help="a module, or part of a variant's name (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (all cores)")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    options = parser.parse_args(arguments)
    if not has_triton():
        print("compile: Triton is not installed: pip install 'vas-engine[gpu]'", file=sys.stderr)
        return 2
    reports = compile_all(options.target, options.kernel, max(1, options.jobs))
    if not reports:
        print(f"compile: no kernel matches {options.kernel!r}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([{**asdict(report), "problem": report.problem} for report in reports], indent=2))
    else:
        print(table(reports))
    return int(any(report.problem for report in reports))


if __name__ == "__main__":
    sys.exit(main())
