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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks import record
from benchmarks.contenders import LOGIT_SCALE, llama_config
from benchmarks.gpu_clock import Budget, Ceilings, measure_ceilings
from benchmarks.gpu_peers import PEERS, batched, guided
from benchmarks.record import spread
from vas_engine.commands.bench import WARM, decode, room
from vas_engine.engine.cost import SHAPES, Device, Network, Shape, network_config, predict
from vas_engine.llm import LLM
from vas_engine.values import ValueNetwork

PLAIN = ("plain", "serial", "compiled")
KINDS = (
    "plain", "reader", "side", "lookahead", "compiled", "compiled-reader",
    "serial", "reader-4", *PEERS, "compiled-side",
)  # fmt: skip
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
    if kind.endswith("-4"):
        counts = counts[:1]
    return [Setting(kind, c, b, n) for c in sorted(contexts) for b in sorted(batches) for n in counts]


def load(kind: str, planned: Sequence[Setting], name: str, device: torch.device, steps: int) -> Contender:
    """What decodes a kind, with room for its settings; compiling an 8B model takes the better part of a minute."""
    shape, longest = MODELS[name], max(setting.context for setting in planned)
    batches = max(setting.batch for setting in planned)
    if kind in PEERS:
        positions = longest + 2 * (steps + WARM)
        model = dummy_model(shape, device, positions).eval()
        if kind == "hf-batch":
            return Peer(lambda candidates: batched(model), shape.vocab, steps)
        small = replace(MODELS[VALUE_MODEL.get(name, name)], vocab=shape.vocab, dtype=shape.dtype)
        backbone = dummy_model(small, device, positions).eval().base_model
        return Peer(lambda candidates: guided(model, backbone, candidates), shape.vocab, steps)
    positions = room(longest, steps, batches)
    values = {value: ValueNetwork(network.config) for value, network in networks_of(shape, kind).items()}
    llm = LLM(
        dummy_model(shape, device, positions),
        values=values or None,
        skip_tokenizer_init=True,
        max_num_seqs=batches,
        max_model_len=positions,
        enforce_eager=False if kind.startswith("compiled") else None,
    )
    llm.engine.overlap = kind != "serial"
    return Ours(llm, steps)


class Ours:
    """An engine. How long prompts take is learnt on the way: those of one length stay in its prefix cache."""

    def __init__(self, llm: LLM, steps: int) -> None:
        self.llm, self.steps = llm, steps
        self._pace, self._prompts = FIRST_GUESS, (0, 0)

    def _fresh(self, setting: Setting) -> int:
        context, seen = self._prompts
        return max(setting.batch - (seen if context == setting.context else 0), 0)

    def seconds(self, setting: Setting) -> float:
        """That its prompts will take."""
        return self._fresh(setting) * setting.context / self._pace

    def rates(self, setting: Setting) -> Iterator[float]:
        """Tokens per second, again and again."""
        fresh, start = self._fresh(setting), time.monotonic()
        while True:
            found = decode(self.llm, setting.batch, setting.context, setting.candidates, self.steps)
            if fresh:
                taken = time.monotonic() - start - setting.batch * (self.steps + WARM) / found
                self._pace, fresh = fresh * setting.context / max(taken, 1e-3), 0
            self._prompts = setting.context, setting.batch
            yield found


class Peer:
    """Transformers alone.

    Args:
        call: candidates -> what decodes prompts.
    """

    def __init__(self, call: Callable[[int], Any], vocab: int, steps: int) -> None:
        self.call, self.vocab, self.steps = call, vocab, steps

    def seconds(self, setting: Setting) -> float:
        """Not known."""
        return 0.0

    def rates(self, setting: Setting) -> Iterator[float]:
        """Tokens per second, again and again."""
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(3, self.vocab, (setting.batch, setting.context), generator=generator).tolist()
        call = self.call(setting.candidates)
        while True:
            yield call(prompts, WARM, self.steps)


Contender = Ours | Peer


def unmeasured(planned: Sequence[Setting], **why: str) -> Iterator[dict[str, Any]]:
    """A row for each setting that says "skipped" or "failed", and why."""
    return ({**asdict(setting), **why} for setting in planned)


def measure(contender: Contender, planned: Sequence[Setting], rounds: int, budget: Budget) -> Iterator[dict[str, Any]]:
    """A row for each setting; what there is no time or memory for says so."""
    for setting in planned:
        if contender.seconds(setting) > budget.left:
            yield from unmeasured([setting], skipped=f"no time: {budget.left:.0f} s are left")
            continue
        rates: list[float] = []
        try:
            for found in contender.rates(setting):
                rates.append(found)
                if len(rates) == rounds or budget.left < 0:
                    break
        except Exception as error:  # of whatever sort: the others are to be measured
            yield from unmeasured([setting], failed=f"{type(error).__name__}: {error}")
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
    made.add_argument(
        "--seconds",
        type=float,
        default=300,
        help="in all; once loaded, a kind has an equal share of what is left (300)",
    )
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
    slowest = dict.fromkeys((False, True), 0.0)  # to load, what is compiled and what is not
    for place, kind in enumerate(options.kinds):
        planned = settings(kind, options.context, options.batch, options.candidates)
        start, compiles = time.monotonic(), kind.startswith("compiled")
        if budget.left < slowest[compiles]:
            left = f"no time: {budget.left:.0f} s are left, and loading takes up to {slowest[compiles]:.0f}"
            rows = unmeasured(planned, skipped=left)
        else:
            try:
                contender = load(kind, planned, options.shape, device, options.steps)
            except Exception as error:  # of whatever sort: the other kinds are to be measured
                rows = unmeasured(planned, failed=f"{type(error).__name__}: {error}")
            else:
                taken = time.monotonic() - start
                slowest[compiles] = max(slowest[compiles], taken)
                print(f"{kind}: loaded in {taken:.0f} s", file=sys.stderr)
                # What is left is for all, but that a kind takes long to load must not cost it its own time.
                share = Budget(budget.left / (len(options.kinds) - place))
                rows = measure(contender, planned, options.rounds, share)
                del contender
        for row in rows:
            report["results"].append(row)
            compare(report["results"], shape, ceilings, options.steps)
            record.write(options.json, {**circumstances, **report})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(report))
    # A peer that cannot run here is no fault of ours.
    return int(any("failed" in row for row in report["results"] if row["kind"] not in PEERS))


if __name__ == "__main__":
    sys.exit(main())
