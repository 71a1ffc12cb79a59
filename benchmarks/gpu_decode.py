"""Whole-engine decoding on a GPU: an 8B Llama with random weights, plain and guided, beside the roofline.

    python -m benchmarks.gpu_decode
    python -m benchmarks.gpu_decode --kinds plain reader --batch 1 8 --context 1024
    python -m benchmarks.gpu_decode --device cpu --shape tiny --context 16 --batch 1 2     does it run at all?

Prompts are taken in before the clock starts. "of roof" is the share of what the bytes and operations of a step would
allow at the copy bandwidth and matrix rate measured in the same run, "at best" the ratio to plain there.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import record
from benchmarks.contenders import LOGIT_SCALE, llama_config
from benchmarks.gpu_clock import Budget, Ceilings, measure_ceilings
from benchmarks.gpu_peers import PEERS, batched, guided, rate
from benchmarks.record import spread
from vas_engine.commands.bench import WARM, decode, room
from vas_engine.engine.cost import SHAPES, Device, Network, Shape, network_config, predict
from vas_engine.llm import LLM
from vas_engine.values import ValueNetwork

PLAIN = ("plain", "serial", "compiled")
KINDS = (*PLAIN, "reader", "side", "lookahead", "reader-4", "compiled-reader", *PEERS, "compiled-side")
"""What is measured, first what matters most: "serial" is plain decoding whose steps wait for the host, "compiled" goes
through torch.compile, "reader-4" is four readers at once, and the peers are transformers alone."""
VALUE_MODEL = {"llama-8b": "llama-1.1b", "tiny": "tiny"}
"""Shape of the value model of the paper's method, by that of the base model."""
MODELS = {**SHAPES, "tiny": Shape(2, 64, 4, 2, 16, 128, 512, dtype="float32")}
FIRST_GUESS = 20_000.0
"""Prompt tokens per second, until some have been seen."""


@dataclass(frozen=True)
class Setting:
    """One figure: candidates is 0 for plain decoding."""

    kind: str
    context: int
    batch: int
    candidates: int


def dummy_model(shape: Shape, device: torch.device, positions: int) -> PreTrainedModel:
    """A Llama of random weights, made where it is to run: on the host 8B would take minutes."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(llama_config(shape, positions), dtype=getattr(torch, shape.dtype))
    model.requires_grad_(False)
    model.model.norm.weight.mul_(LOGIT_SCALE)
    return model


def networks_of(shape: Shape, kind: str) -> dict[str, Network]:
    """The networks of a kind, each about one hundredth of the base; "reader-4" is four of "reader"."""
    if kind in PLAIN or kind in PEERS:
        return {}
    kind = kind.removeprefix("compiled-")
    name, _, count = kind.rpartition("-") if kind[-1].isdigit() else (kind, "", "1")
    return {f"value{index}": Network(network_config(shape, name)) for index in range(int(count))}


def settings(kind: str, contexts: Sequence[int], batches: Sequence[int], candidates: Sequence[int]) -> list[Setting]:
    """In the order of what they take: prompts already seen are found in the prefix cache."""
    counts = [0] if kind in (*PLAIN, "hf-batch") else sorted(candidates, reverse=True)
    if kind == "serial" or kind.startswith("compiled"):
        contexts, counts = [min(contexts)], counts[:1]
    if kind == "hf-guided":
        # The port is slow: one setting, that of the goal.
        contexts, counts = [min(contexts)], counts[:1]
        batches = [16] if 16 in batches else [max(batches)]
    return [Setting(kind, c, b, n) for c in sorted(contexts) for b in sorted(batches) for n in counts]


def measure(
    kind: str, planned: Sequence[Setting], shape: Shape, device: torch.device, steps: int, rounds: int, budget: Budget
) -> Iterator[dict[str, Any]]:
    """A row for each setting, of one LLM; what there is no time or memory for says so."""
    contexts = max(setting.context for setting in planned)
    batches = max(setting.batch for setting in planned)
    longest = room(contexts, steps, batches)
    values = {name: ValueNetwork(network.config) for name, network in networks_of(shape, kind).items()}
    start = time.monotonic()
    try:
        llm = LLM(
            dummy_model(shape, device, longest),
            values=values or None,
            skip_tokenizer_init=True,
            max_num_seqs=batches,
            max_model_len=longest,
            enforce_eager=False if kind.startswith("compiled") else None,
        )
    except Exception as error:  # of whatever sort: the other kinds are to be measured
        yield from ({**asdict(setting), "failed": f"{type(error).__name__}: {error}"} for setting in planned)
        return
    llm.engine.overlap = kind != "serial"
    print(f"{kind}: loaded in {time.monotonic() - start:.0f} s", file=sys.stderr)
    pace, prompts = FIRST_GUESS, (0, 0)
    for setting in planned:
        context, seen = prompts
        fresh = setting.batch - (seen if context == setting.context else 0)
        if fresh * setting.context / pace > budget.left:
            yield {**asdict(setting), "skipped": f"no time: {budget.left:.0f} s are left"}
            continue
        start = time.monotonic()
        try:
            rates = []
            for _ in range(rounds):
                rates.append(decode(llm, setting.batch, setting.context, setting.candidates, steps))
                if budget.left < 0:
                    break
        except Exception as error:  # likewise
            yield {**asdict(setting), "failed": f"{type(error).__name__}: {error}"}
            continue
        taken = time.monotonic() - start - len(rates) * setting.batch * (steps + WARM) / statistics.median(rates)
        if fresh > 0:
            pace = fresh * setting.context / max(taken, 1e-3)
        prompts = (setting.context, setting.batch)
        yield {**asdict(setting), "tokens_per_second": spread(rates), "rounds": len(rates)}


def measure_peer(
    kind: str,
    planned: Sequence[Setting],
    name: str,
    device: torch.device,
    steps: int,
    rounds: int,
    budget: Budget,
) -> Iterator[dict[str, Any]]:
    """As `measure`, of transformers alone."""
    shape, longest = MODELS[name], max(setting.context for setting in planned) + 2 * (steps + WARM)
    try:
        model = dummy_model(shape, device, longest).eval()
        value = MODELS[VALUE_MODEL.get(name, name)]
        value = replace(value, vocab=shape.vocab, dtype=shape.dtype)
        backbone = dummy_model(value, device, longest).eval().base_model if kind == "hf-guided" else None
    except Exception as error:  # of whatever sort, as in measure
        yield from ({**asdict(setting), "failed": f"{type(error).__name__}: {error}"} for setting in planned)
        return
    generator = torch.Generator().manual_seed(0)
    for setting in planned:
        if budget.left < 0:
            yield {**asdict(setting), "skipped": "no time is left"}
            continue
        prompts = torch.randint(3, shape.vocab, (setting.batch, setting.context), generator=generator).tolist()
        call = batched(model) if backbone is None else guided(model, backbone, setting.candidates)
        try:
            rates = [rate(call, prompts, steps, WARM)]
            while len(rates) < rounds and budget.left > 0:
                rates.append(rate(call, prompts, steps, WARM))
        except Exception as error:  # likewise
            yield {**asdict(setting), "failed": f"{type(error).__name__}: {error}"}
            continue
        yield {**asdict(setting), "tokens_per_second": spread(rates), "rounds": len(rates)}


def compare(rows: list[dict[str, Any]], shape: Shape, ceilings: Ceilings, steps: int) -> None:
    """Adds to each measured row its ratio to plain decoding and its share of the roofline."""
    roof = Device("measured", ceilings.bandwidth, {shape.dtype: ceilings.flops}, launch=0.0, step=0.0)
    plain = {
        (row["context"], row["batch"]): row["tokens_per_second"]["median"]
        for row in rows
        if row["kind"] == "plain" and "tokens_per_second" in row
    }
    for row in rows:
        if "tokens_per_second" not in row:
            continue
        median, place = row["tokens_per_second"]["median"], (row["context"], row["batch"])
        if place in plain:
            row["ratio_to_plain"] = median / plain[place]
        if row["kind"] in PEERS:
            continue
        networks = list(networks_of(shape, row["kind"]).values())
        middle = row["context"] + WARM + steps / 2
        found = predict(shape, roof, row["batch"], middle, networks, row["candidates"] or 1)
        row["of_roofline"] = median / found.tokens_per_second
        row["ratio_at_roofline"] = found.ratio


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        str(Ceilings(**report["ceilings"])),
        f"{'kind':<11}{'context':>8}{'batch':>6}{'cand.':>6}{'tokens/s':>10}"
        f"{'of plain':>10}{'at best':>9}{'of roof':>9}",
    ]
    for row in report["results"]:
        place = f"{row['kind']:<11}{row['context']:>8}{row['batch']:>6}{row['candidates'] or '':>6}"
        if "tokens_per_second" not in row:
            state = "skipped" if "skipped" in row else "FAILED"
            lines.append(f"{place}  {state}: {row[state.lower()].splitlines()[0][:80]}")
            continue
        ratio = f"{row['ratio_to_plain']:.3f}" if "ratio_to_plain" in row else ""
        median = row["tokens_per_second"]["median"]
        roof = f"{row['ratio_at_roofline']:>9.3f}{row['of_roofline']:>9.2f}" if "of_roofline" in row else ""
        lines.append(f"{place}{median:>10.1f}{ratio:>10}{roof}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--device", default="cuda")
    made.add_argument("--shape", choices=MODELS, default="llama-8b")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    made.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    made.add_argument("--context", nargs="+", type=int, default=[1024, 8192])
    made.add_argument("--candidates", nargs="+", type=int, default=[1, 5, 20])
    made.add_argument("--steps", type=int, default=16, help="timed, one token a request each (16)")
    made.add_argument("--rounds", type=int, default=3, help="measurements of each (3)")
    made.add_argument("--seconds", type=float, default=300, help="in all; each kind has an equal share (300)")
    made.add_argument("--json", type=Path, metavar="OUT", default=record.RESULTS / "gpu_decode.json")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON (after every row, so that being stopped loses little); 1 if any failed."""
    options = parser().parse_args(arguments)
    logging.disable_progress_bar()
    device, shape, budget = torch.device(options.device), MODELS[options.shape], Budget(options.seconds)
    ceilings = measure_ceilings(device, getattr(torch, shape.dtype))
    circumstances = record.circumstances()
    report: dict[str, Any] = {"ceilings": asdict(ceilings), "shape": asdict(shape), "results": []}
    for place, kind in enumerate(options.kinds):
        planned = settings(kind, options.context, options.batch, options.candidates)
        if kind.endswith("-4"):
            planned = [setting for setting in planned if setting.candidates == max(options.candidates)]
        share = Budget(budget.left / (len(options.kinds) - place))
        if kind in PEERS:
            measured = measure_peer(kind, planned, options.shape, device, options.steps, options.rounds, share)
        else:
            measured = measure(kind, planned, shape, device, options.steps, options.rounds, share)
        for row in measured:
            report["results"].append(row)
            compare(report["results"], shape, ceilings, options.steps)
            record.write(options.json, {**circumstances, **report})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(report))
    return int(any("failed" in row for row in report["results"]))


if __name__ == "__main__":
    sys.exit(main())
