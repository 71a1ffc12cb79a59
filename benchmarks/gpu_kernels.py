"""Every kernel by itself on a GPU: bytes per second beside those of a copy, what sharing a prefix saves, attention
beside others', and a reader as one kernel beside its parts.

python -m benchmarks.gpu_kernels
python -m benchmarks.gpu_kernels --small          one little case of each, for compute-sanitizer
python -m benchmarks.gpu_kernels --device cpu --small --backend reference
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vas_engine.kernels import reference

from benchmarks import gpu_cases, record
from benchmarks.attention_peers import peers
from benchmarks.gpu_cases import CommitCase, HeadCase, InputCase, PrefillCase
from benchmarks.gpu_clock import Budget, Call, Ceilings, captured, measure_ceilings, seconds_per_call
from benchmarks.record import spread
from vas_engine.sampling import SamplingArrays

CACHE_BYTES = 256 * 2**20
"""Inputs of a case are copied until they are larger than any cache."""


@dataclass(frozen=True)
class AttentionCase:
    """Decoding's attention: `requests` prefixes of `context` tokens, `rows` candidates each; by default of 8B."""

    requests: int
    context: int
    rows: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16

    @property
    def bytes(self) -> int:
        """That must move in bfloat16: the prefixes, queries and results, once."""
        prefixes = 2 * self.requests * self.context * self.kv_heads * self.head_dim
        return 2 * (prefixes + 2 * self.requests * self.rows * self.heads * self.head_dim)


@dataclass(frozen=True)
class SamplerCase:
    """Selection of candidates of `requests` rows of logits."""

    requests: int
    vocabulary: int
    candidates: int

    @property
    def bytes(self) -> int:
        """That must move in bfloat16: the logits, once."""
        return 2 * self.requests * self.vocabulary


@dataclass(frozen=True)
class ReaderCase:
    """A reader over `rows` candidates each of `requests` prefixes of `context` tokens, of a base of a shape."""

    requests: int
    context: int
    rows: int = 21
    shape: str = "llama-8b"


ATTENTION = [
    AttentionCase(32, 8192, 20),
    AttentionCase(32, 8192, 1),
    AttentionCase(1, 8192, 20),
    AttentionCase(8, 8192, 20),
    AttentionCase(64, 1024, 20),
    AttentionCase(32, 8192, 20, heads=16),
]
SAMPLER = [SamplerCase(batch, 128256, candidates) for batch in (1, 8, 64) for candidates in (0, 20)]
READER = [ReaderCase(requests, context) for requests in (1, 8, 32) for context in (1024, 8192)]
HEADS = [HeadCase(requests, 21, hidden=hidden) for requests in (1, 32) for hidden in (0, 512)]
INPUTS = [InputCase(requests, 21) for requests in (1, 32)]
COMMITS = [CommitCase(requests, 21) for requests in (1, 32)]
PREFILLS = [PrefillCase(1, 8192, 8192), PrefillCase(4, 8192, 1024), PrefillCase(32, 256, 256)]
CASES: dict[str, Sequence[Any]] = {
    "candidate_attention": ATTENTION,
    "candidate_select": SAMPLER,
    "value_head_tilt": HEADS,
    "candidate_input": INPUTS,
    "kv_commit": COMMITS,
    "paged_prefill": PREFILLS,
    "reader_step": READER,
}
SMALL: dict[str, Sequence[Any]] = {
    "candidate_attention": [AttentionCase(3, 70, 5, heads=4, kv_heads=2, head_dim=64)],
    "candidate_select": [SamplerCase(3, 1000, 5)],
    "value_head_tilt": [HeadCase(3, 5, width=16, hidden=16)],
    "candidate_input": [InputCase(3, 5, width=24)],
    "kv_commit": [CommitCase(3, 5, layers=2, kv_heads=2, head_dim=16)],
    "paged_prefill": [PrefillCase(2, 40, 20, heads=4, kv_heads=2, head_dim=64)],
    "reader_step": [ReaderCase(2, 20, 3, "tiny")],
}
_ELSEWHERE = {"value_head_tilt": "value_tilt"}
"""Kernels whose module has another name."""
_TWINS = {"paged_prefill": "candidate_attention"}
"""Kernels whose reference has another name."""


def load(name: str, backend: str) -> Any:
    """A function of the module of its name, or of the reference.

    Raises:
        ModuleNotFoundError: there is no such kernel, or no Triton.
    """
    if backend == "reference":
        twin = _TWINS.get(name, name)
        if not hasattr(reference, twin):
            raise ModuleNotFoundError(f"{name} is judged against its parts, which are its reference")
        return getattr(reference, twin)
    return getattr(importlib.import_module(f"vas_engine.kernels.{_ELSEWHERE.get(name, name)}"), name)


def attention_inputs(case: AttentionCase, device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Rows that all see the whole prefix."""
    lens = torch.full((case.requests * case.rows,), case.context, dtype=torch.int32, device=device)
    return gpu_cases.paged_inputs(case, case.block_size, device, seed) | {"prefix_lens": lens}


def measure_attention(
    case: AttentionCase, run: Any, device: torch.device, ceilings: Ceilings, capture: bool = True
) -> dict[str, Any]:
    """Seconds of one call, of peers' and, for several rows, of as many calls of one row each, as CUDA graphs or not.

    Raises:
        ValueError: the result is not the reference's.
    """
    inputs = [attention_inputs(case, device, seed) for seed in range(_copies(case, device))]
    scale = case.head_dim**-0.5
    check(run(**inputs[0], scale=scale), inputs[0], case, scale)
    calls, captures = _captured([partial(run, **given, scale=scale) for given in inputs], device, capture)
    seconds = seconds_per_call(calls, device)
    median = statistics.median(seconds)
    found = _figures(case, seconds, captures, ceilings)
    if case.rows > 1:
        single = [[_one_row(given, case, row) for row in range(case.rows)] for given in inputs]

        def one_by_one(parts: list[dict[str, Any]]) -> None:
            for part in parts:
                run(**part, scale=scale)

        apart, _ = _captured([partial(one_by_one, parts) for parts in single], device, capture)
        found["seconds_one_by_one"] = spread(seconds_per_call(apart, device))
        found["times_faster"] = found["seconds_one_by_one"]["median"] / median
    found["peers"] = {}
    for name, peer in peers(device).items():
        try:
            calls = [peer(given) for given in inputs]
            check(calls[0](), inputs[0], case, scale)
            calls, captures = _captured(calls, device, capture)
            seconds = seconds_per_call(calls, device)
        except Exception as error:  # of whatever sort: a peer that cannot run here is no fault of ours
            found["peers"][name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        times = statistics.median(seconds) / median
        found["peers"][name] = {"seconds": spread(seconds), "captured": captures, "times_faster": times}
    return found


def _copies(case: Any, device: torch.device) -> int:
    return max(1, min(8, -(-CACHE_BYTES // case.bytes))) if device.type == "cuda" else 1


def _figures(case: Any, seconds: Sequence[float], captures: bool, ceilings: Ceilings) -> dict[str, Any]:
    rate = case.bytes / statistics.median(seconds)
    return {
        **asdict(case),
        "bytes": case.bytes,
        "seconds": spread(seconds),
        "captured": captures,
        "bytes_per_second": rate,
        "of_copy_bandwidth": rate / ceilings.bandwidth,
    }


def _one_row(given: dict[str, Any], case: AttentionCase, row: int) -> dict[str, Any]:
    """The row-th candidate of every request, as a batch of its own."""
    offsets = torch.arange(case.requests + 1, dtype=torch.int32, device=given["q"].device)
    lens = given["prefix_lens"][row :: case.rows].contiguous()
    return {**given, "q": given["q"][row :: case.rows].contiguous(), "group_offsets": offsets, "prefix_lens": lens}


def _captured(calls: list[Call], device: torch.device, capture: bool) -> tuple[list[Call], bool]:
    """The calls as graphs, where that works."""
    if not capture or device.type != "cuda":
        return calls, False
    try:
        return [captured(call, device) for call in calls], True
    except RuntimeError as error:
        print(f"not captured: {error}", file=sys.stderr)
        return calls, False


def check(out: torch.Tensor, given: dict[str, Any], case: AttentionCase, scale: float) -> None:
    """Compares the first and the last request with the reference in float32; ValueError above one hundredth."""
    for request in (0, case.requests - 1):
        own = slice(request * case.rows, (request + 1) * case.rows)
        blocks = given["block_tables"][request].long()
        wanted = reference.candidate_attention(
            given["q"][own].float(),
            given["k_pages"][blocks].float(),
            given["v_pages"][blocks].float(),
            torch.arange(len(blocks), dtype=torch.int32, device=out.device)[None],
            given["group_offsets"][:2],
            given["prefix_lens"][own],
            scale=scale,
        )
        error = float((out[own].float() - wanted).norm() / wanted.norm())
        if not error < 1e-2:
            raise ValueError(f"{case}: differs from the reference by {error:.3g} of its norm")


def measure_sampler(
    case: SamplerCase, run: Any, device: torch.device, ceilings: Ceilings, capture: bool = True
) -> dict[str, Any]:
    """Seconds of one selection, as a CUDA graph or not."""
    generator = torch.Generator(device).manual_seed(0)
    logits = [
        (torch.randn(case.requests, case.vocabulary, generator=generator, device=device) * 2.5).bfloat16()
        for _ in range(_copies(case, device))
    ]
    arrays = SamplingArrays.build(case.requests, seed=np.arange(case.requests), num_candidates=case.candidates)
    calls, captures = _captured(_selections(run, logits, arrays), device, capture)
    return _figures(case, seconds_per_call(calls, device), captures, ceilings)


def _selections(run: Any, logits: Sequence[torch.Tensor], arrays: SamplingArrays) -> list[Call]:
    """Of the kernel what a step's graph has: settings are on the device already."""
    rows = np.arange(len(logits[0]), dtype=np.int64)
    if run is reference.candidate_select:
        return [partial(run, given, rows, arrays) for given in logits]
    from vas_engine.kernels.candidate_select import pack_settings, select_packed, select_width

    vocabulary = logits[0].shape[1]
    settings = torch.from_numpy(pack_settings(rows, arrays, vocabulary)).to(logits[0].device)
    return [partial(select_packed, given, settings, select_width(arrays, vocabulary)) for given in logits]


def measure_reader(
    case: ReaderCase, _: Any, device: torch.device, ceilings: Ceilings, capture: bool = True
) -> dict[str, Any]:
    """Seconds of a whole reader as one kernel, what prepares its input included, and of its parts, eager and compiled;
    as CUDA graphs, or without the compiled ones as they are.

    Raises:
        ValueError: their values differ.
    """
    from benchmarks.reader_step import ReaderStep, base_and_reader, compiled_reader

    lm, network = base_and_reader(case.shape, device)
    step = ReaderStep(lm, network, [case.context] * case.requests, [case.rows] * case.requests)
    error = step.difference()
    if not error < 2e-2:
        raise ValueError(f"{case}: differs from its parts by {error:.3g} of their norm")
    config, kv_heads = network.config, lm.layers[0].kv_heads
    seen = 2 * len(config.layers) * case.requests * case.context * kv_heads * config.head_dim
    assert network.embed_weight is not None  # read once, for the table
    moved = (network.num_parameters - network.embed_weight.numel() + seen) * lm.dtype.itemsize
    ways: dict[str, Call] = {"whole": step.whole, "its parts": step.parts}
    if capture:
        ways["its parts compiled"] = partial(step.parts, compiled_reader(case.shape, device))
    graphs, captures = _captured(list(ways.values()), device, capture)
    seconds, *apart = (seconds_per_call(way, device) for way in graphs)
    median = statistics.median(seconds)
    return {
        **asdict(case),
        "bytes": moved,
        "seconds": spread(seconds),
        "captured": captures,
        "bytes_per_second": moved / median,
        "of_copy_bandwidth": moved / median / ceilings.bandwidth,
        "difference": error,
        "peers": {
            name: {"seconds": spread(own), "times_faster": statistics.median(own) / median}
            for name, own in zip(list(ways)[1:], apart, strict=True)
        },
    }


def measure_case(
    case: gpu_cases.Case, run: Any, device: torch.device, ceilings: Ceilings, capture: bool = True
) -> dict[str, Any]:
    """Seconds of one call, as a CUDA graph or not.

    Raises:
        ValueError: the result is not the reference's.
    """
    inputs = [case.inputs(device, seed) for seed in range(_copies(case, device))]
    gpu_cases.check(case, run, inputs[0])
    calls, captures = _captured([partial(run, **case.prepare(run, given)) for given in inputs], device, capture)
    found = _figures(case, seconds_per_call(calls, device), captures, ceilings)
    return found | {"of_matrix_rate": case.flops / found["seconds"]["median"] / ceilings.flops}


MEASURES: dict[str, Any] = {
    "candidate_attention": measure_attention,
    "candidate_select": measure_sampler,
    "reader_step": measure_reader,
}
"""Of kernels with a way of their own to be measured."""


def measure(
    device: torch.device,
    backend: str,
    several: Mapping[str, Sequence[Any]],
    ceilings: Ceilings,
    budget: Budget,
    small: bool = False,
) -> Iterator[dict[str, Any]]:
    """A row for every case; what there was no time for, or failed, says why."""
    for name, cases in several.items():
        way = MEASURES.get(name, measure_case)
        for case in cases:
            row: dict[str, Any] = {"kernel": name}
            if budget.left <= 0:
                row |= {**asdict(case), "skipped": "out of time"}
            else:
                try:
                    row |= way(case, load(name, backend), device, ceilings, not small)
                except ModuleNotFoundError as error:
                    row |= {**asdict(case), "skipped": str(error)}
                except Exception as error:  # of whatever sort: the other cases are to be measured
                    row |= {**asdict(case), "failed": f"{type(error).__name__}: {error}"}
            yield row


def _described(row: dict[str, Any]) -> str:
    """Its case in some 30 letters."""
    words = {
        "candidate_attention": "{requests} x {context}, {rows} rows, {heads} heads",
        "candidate_select": "{requests} x {vocabulary}, {candidates} candidates",
        "value_head_tilt": "{requests} x {rows}, {width} wide, {hidden} hidden",
        "candidate_input": "{requests} x {rows}, {width} wide",
        "kv_commit": "{requests} of {rows}, {layers} layers",
        "paged_prefill": "{requests} x {context}, {rows} rows",
        "reader_step": "{requests} x {context}, {rows} rows, {shape}",
    }
    return words[row["kernel"]].format(**row)


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        str(Ceilings(**report["ceilings"])),
        f"{'kernel':<21}{'case':<34}{'us':>9}{'GB/s':>8}{'of copy':>9}  times faster than",
    ]
    for row in report["results"]:
        case = _described(row)
        if "seconds" not in row:
            state = "skipped" if "skipped" in row else "FAILED"
            lines.append(f"{row['kernel']:<21}{case:<34}  {state}: {row[state.lower()].splitlines()[0]}")
            continue
        ratios = {"one by one": row} if "times_faster" in row else {}
        ratios |= {name: peer for name, peer in row.get("peers", {}).items() if "times_faster" in peer}
        ratio = ", ".join(f"{name} {of['times_faster']:.1f}" for name, of in ratios.items())
        numbers = f"{row['seconds']['median'] * 1e6:>9.1f}{row['bytes_per_second'] / 1e9:>8.0f}"
        lines.append(f"{row['kernel']:<21}{case:<34}{numbers}{row['of_copy_bandwidth']:>9.2f}  {ratio}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON (after every row, so that being stopped loses little); 1 if any failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", choices=("triton", "reference"), default="triton")
    parser.add_argument("--small", action="store_true", help="one little case of each")
    parser.add_argument("--seconds", type=float, default=60, help="no case is begun after that (60)")
    parser.add_argument("--json", type=Path, metavar="OUT", default=record.RESULTS / "gpu_kernels.json")
    options = parser.parse_args(arguments)
    cases = SMALL if options.small else CASES
    device, budget, circumstances = torch.device(options.device), Budget(options.seconds), record.circumstances()
    ceilings = measure_ceilings(device, large=not options.small)
    report: dict[str, Any] = {"ceilings": asdict(ceilings), "backend": options.backend, "results": []}
    for row in measure(device, options.backend, cases, ceilings, budget, options.small):
        report["results"].append(row)
        record.write(options.json, {**circumstances, **report})
    print(table(report))
    return int(any("failed" in row for row in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
