"""The tests marked gpu, a process for each file and several at once: one that hangs or crashes takes no other along.

python -m benchmarks.gpu_parity tests/kernels/test_triton_select.py tests/engine/test_gpu.py --seconds 120
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

MOST_AT_ONCE = 8
OK, NO_TESTS = 0, 5
"""Exit codes of pytest that are no failure."""
PYTEST = ("-m", "pytest", "-m", "gpu", "-o", "addopts=", "-q", "-rfE", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Outcome:
    """Of a file: pytest's exit code, None if it was stopped; what it printed; seconds."""

    file: str
    code: int | None
    output: str
    seconds: float

    @property
    def good(self) -> bool:
        return self.code in (OK, NO_TESTS)

    @property
    def counts(self) -> Counter[str]:
        """How many tests passed, failed, were skipped."""
        last = self.output.strip().rpartition("\n")[2]
        found = Counter(
            {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
        )
        # A process that says nothing of its tests is itself what failed.
        return found if self.good or found["failed"] + found["error"] else found + Counter(failed=1)


def run_file(file: str, end: float) -> Outcome:
    """The file's tests, until `end` of the monotonic clock."""
    start = time.monotonic()
    command = [sys.executable, *PYTEST, file]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=max(end - start, 1.0))
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, code = process.communicate()[0] + f"\nstopped after {time.monotonic() - start:.0f} s", None
    return Outcome(file, code, output, time.monotonic() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the files, prints what they say as they end, and how many tests passed; 1 if any failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--seconds", type=float, default=240, help="after which what still runs is stopped (240)")
    parser.add_argument("--jobs", type=int, default=max(1, min(MOST_AT_ONCE, (os.cpu_count() or 2) // 2)))
    options = parser.parse_args(arguments)
    start, total, bad, printing = time.monotonic(), Counter[str](), [], threading.Lock()

    def run(file: str) -> None:
        found = run_file(file, start + options.seconds)
        with printing:
            total.update(found.counts)
            print(f"-- {file}, {found.seconds:.0f} s\n{found.output.strip()}", flush=True)
            if not found.good:
                bad.append(file)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(run, options.files))
    said = ", ".join(f"{number} {word}" for word, number in total.items()) or "no test ran"
    print(f"{said} in {time.monotonic() - start:.0f} s" + (f"; see {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
