"""Everything that needs a GPU, in ten minutes, on a machine that need not have this project installed.

    python -m benchmarks.gpu_check                      all parts
    python -m benchmarks.gpu_check --part parity decode

Wants Python with torch, Triton and transformers; no network, no virtual environment. Parts run one after the other,
each in a process of its own with a limit in seconds, so one that hangs or breaks the device's context costs itself
only. JSON goes to benchmarks/results/gpu_*.json, a short table comes last. Exit code: 0 all is well, 1 a part failed,
2 there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 570.0
"""Of all parts together."""
OK, FAILED, NO_GPU = 0, 1, 2


@dataclass(frozen=True)
class Part:
    """A step of the check.

    Attributes:
        seconds: its limit.
        summary: a line.
        command: words behind the interpreter; `{seconds}`, `{out}` and `{tests}` (files with tests for a GPU) are
            filled in.
        wrapper: a program it runs under; the part is passed over where there is none.
        refusal: what that says on machines where it cannot work, which is no failure either.
        needs: a module without which the part is passed over.
        counts: whether its last line is worth showing when all went well.
    """

    seconds: float
    summary: str
    command: tuple[str, ...]
    wrapper: tuple[str, ...] = ()
    refusal: str = ""
    needs: str | None = None
    counts: bool = False


# A part that measures is told to begin nothing in its last seconds.
PARTS = {
    "build": Part(90, "the C++ extensions, in place", ("setup.py", "-q", "build_ext", "--inplace"), needs="pybind11"),
    "parity": Part(
        200,
        "tests marked gpu, several files at once",
        ("-m", "benchmarks.gpu_parity", "{tests}", "--seconds", "{seconds}"),
        needs="pytest",
        counts=True,
    ),
    "sanitizer": Part(
        120,
        "one small case of each kernel under compute-sanitizer",
        ("-m", "benchmarks.gpu_kernels", "--small", "--json", "{out}/gpu_sanitizer.json"),
        wrapper=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"),
        refusal="Device not supported",
    ),
    "kernels": Part(
        110,
        "kernels by themselves",
        ("-m", "benchmarks.gpu_kernels", "--seconds", "{seconds}", "--json", "{out}/gpu_kernels.json"),
    ),
    "decode": Part(
        400,
        "decoding of an 8B Llama with random weights",
        ("-m", "benchmarks.gpu_decode", "--seconds", "{seconds}", "--json", "{out}/gpu_decode.json"),
    ),
}
MARGIN = 20.0
"""Seconds that a part which measures keeps for starting and ending."""
LEAST = 15.0
"""A part with less than this many seconds is not begun."""


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "FAILED" or "skipped", in how many seconds, and why or with what."""

    part: str
    state: str
    seconds: float
    note: str


@contextlib.contextmanager
def kernels_in_place() -> Iterator[None]:
    """Makes `vas_engine.kernels` importable from a bare checkout, here and in every process started from here.

    Installed, the folder kernels/ is that package. Uninstalled a link stands in for it while this runs; a path on
    PYTHONPATH would not do, as pytest puts the checkout's own vas_engine before it.
    """
    link = ROOT / "vas_engine" / "kernels"
    try:
        found = importlib.util.find_spec("vas_engine.kernels") is not None
    except ModuleNotFoundError:
        found = False
    if found or link.exists():
        yield
        return
    link.symlink_to(Path("..") / "kernels", target_is_directory=True)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        link.unlink(missing_ok=True)


def gpu_tests() -> list[str]:
    """Files with tests for a GPU. The others may need packages that a bare machine lacks even to be collected."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = re.compile(r"^(@|pytestmark\b).*\bmark\.gpu\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in found if marked.search(path.read_text(encoding="utf-8"))]


def missing(part: Part) -> str | None:
    """Why a part cannot run here; None if it can."""
    if part.needs and importlib.util.find_spec(part.needs) is None:
        return f"{part.needs} is not installed"
    if part.wrapper and shutil.which(part.wrapper[0]) is None:
        return f"{part.wrapper[0]} is not on the PATH"
    if "{tests}" in part.command and not gpu_tests():
        return "no test is marked gpu"
    return None


def run_part(name: str, part: Part, seconds: float, out: Path) -> Outcome:
    """Runs a part for at most `seconds`; its output goes through, to stderr."""
    reason = missing(part)
    if reason is None and seconds < LEAST:
        reason = f"{max(seconds, 0):.0f} s are left"
    if reason is not None:
        return Outcome(name, "skipped", 0.0, reason)
    begin = f"{max(seconds - MARGIN, 5.0):.0f}"
    words: list[str] = []
    for word in part.command:
        words += gpu_tests() if word == "{tests}" else [word.format(seconds=begin, out=out)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Freed blocks that torch keeps are legal memory to a checker.
    extra = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if part.wrapper else {}
    print(f"\n== {name}: {part.summary}, at most {seconds:.0f} s", file=sys.stderr, flush=True)
    start = time.monotonic()
    process = subprocess.Popen(
        [*part.wrapper, sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **extra},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines, ended = _follow(process, seconds)
    if part.refusal and any(part.refusal in line for line in lines):
        return Outcome(name, "skipped", time.monotonic() - start, f"{part.wrapper[0]}: {part.refusal}")
    good, said = process.returncode == 0, _last_words(lines)
    note = said if ended else f"stopped after {seconds:.0f} s; {said}"
    shown = note if part.counts or not good else ""
    return Outcome(name, "ok" if good else "FAILED", time.monotonic() - start, shown)


def _follow(process: subprocess.Popen[str], seconds: float) -> tuple[list[str], bool]:
    """Passes a process' lines on; after `seconds` it is ended, with all that it started."""
    lines: list[str] = []

    def copy() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip())
            print(line, end="", file=sys.stderr, flush=True)

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    ended = True
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        ended = False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return lines, ended


def _last_words(lines: Sequence[str]) -> str:
    """The last line that says something."""
    spoken = [line.strip("= ") for line in lines if re.search(r"\w", line)]
    return spoken[-1][:160] if spoken else ""


def check(names: Sequence[str], seconds: float, out: Path) -> list[Outcome]:
    """Runs parts in their order; what earlier ones leave of the time goes to the later."""
    end = time.monotonic() + seconds
    outcomes = []
    with kernels_in_place():
        for name in [name for name in PARTS if name in names]:
            left = end - time.monotonic()
            outcomes.append(run_part(name, PARTS[name], min(PARTS[name].seconds, left), out))
    return outcomes


def results(out: Path, since: float) -> str:
    """The tables of what was measured since a time (seconds since the epoch)."""
    tables = []
    for name in ("gpu_kernels", "gpu_decode"):
        path = out / f"{name}.json"
        if path.exists() and path.stat().st_mtime >= since:
            with kernels_in_place():
                module = importlib.import_module(f"benchmarks.{name}")
            tables.append(module.table(json.loads(path.read_text(encoding="utf-8"))))
    return "\n\n".join(tables)


def summary(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as text, a line each."""
    lines = [f"{'part':<11}{'':<9}{'seconds':>8}"]
    lines += [f"{done.part:<11}{done.state:<9}{done.seconds:>8.0f}  {done.note}".rstrip() for done in outcomes]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    assert __doc__ is not None
    parts = "\n".join(f"  {name:<11}{part.summary}" for name, part in PARTS.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        epilog=f"parts:\n{parts}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    made.add_argument("--seconds", type=float, default=SECONDS, help=f"of all parts together ({SECONDS:.0f})")
    made.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    return made


def has_gpu() -> bool:
    """Whether torch sees a CUDA (or ROCm) device."""
    import torch

    return torch.cuda.is_available()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the parts and prints the tables."""
    options = parser().parse_args(arguments)
    if not has_gpu():
        print("gpu-check: torch sees no GPU here; nothing was run", file=sys.stderr)
        return NO_GPU
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    # Tests compare with the C++ extension, so a machine that has not built it yet does that first.
    wanted = [name for name in PARTS if name in options.part or (name == "build" and "parity" in options.part)]
    outcomes = check(wanted, options.seconds, options.out.resolve())
    record = _record(outcomes)
    from benchmarks.record import write

    write(options.out / "gpu_check.json", record)
    for text in (results(options.out, started), summary(outcomes)):
        if text:
            print(f"\n{text}")
    return FAILED if any(done.state == "FAILED" for done in outcomes) else OK


def _record(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    from benchmarks.record import circumstances

    return {**circumstances(), "parts": [asdict(done) for done in outcomes]}


if __name__ == "__main__":
    sys.exit(main())
