"""Tokens per second of plain and value-guided decoding: this engine beside the other ways to do it.

    python -m benchmarks.decode                                everything, some eight minutes on two cores
    python -m benchmarks.decode --vllm-python ENV/bin/python   vLLM too, plain and with the plugin
    python -m benchmarks.decode --contenders vas-plain vas-reader --rounds 3 --batch 1
    python -m benchmarks.decode --setting tiny --rounds 1 --new-tokens 8   does it run at all?

All contenders load the same random weights and get the same prompts. They are measured in turn, round after
round, in one run and each round in another order, so that what slows the machine slows all of them. A figure
is whole prompts to whole completions, prefill included; ratios are taken within a round, then their median
over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import record
from benchmarks.contenders import SETTINGS, Assets, Contender, Decoding, builders, names

Rates = dict[tuple[str, int], list[float]]
"""(contender, batch) -> tokens per second, one a round."""


@dataclass(frozen=True)
class Goal:
    """A ratio of tokens per second that is to be reached."""

    contender: str
    reference: str
    batch: int
    ratio: float

    def judge(self, rates: Rates) -> dict[str, Any] | None:
        """What was measured, or None if it was not."""
        try:
            ratios = compare(rates, self.contender, self.reference, self.batch)
        except KeyError:
            return None
        measured = statistics.median(ratios)
        return {**asdict(self), "measured": measured, "met": measured >= self.ratio}


GOALS = [
    *(Goal(f"vas-{kind}", "vas-plain", batch, 0.85) for kind in ("reader", "side") for batch in (1, 16)),
    Goal("vas-lookahead", "vas-plain", 1, 0.6),
    Goal("vas-model", "hf-all-at-once", 16, 2.0),
    Goal("vas-model", "hf-one-at-a-time", 1, 4.0),
    Goal("vas-compiled-model", "hf-one-at-a-time", 1, 4.0),
    *(Goal("vas-plain", "hf-plain", batch, 1.0) for batch in (1, 16)),
    *(Goal("vas-compiled", "vllm-plain", batch, 1.0) for batch in (1, 16)),
]


def compare(rates: Rates, name: str, reference: str, batch: int) -> list[float]:
    """Ratio of two contenders in each round."""
    return [a / b for a, b in zip(rates[name, batch], rates[reference, batch], strict=True)]


def measure(
    contenders: Sequence[Contender],
    batches: Sequence[int],
    rounds: int,
    prompt_tokens: int,
    vocab_size: int,
    decoding: Decoding,
    seed: int = 0,
) -> Rates:
    """Runs everybody in turn, ``rounds`` times, after a short run to warm up.

    Raises:
        RuntimeError: a contender generated another number of tokens than it was asked for.
    """
    rng = np.random.default_rng(seed)
    rates: Rates = {}
    warm = Decoding(4, decoding.num_candidates, decoding.temperature, decoding.weight)
    total = len(batches) * len(contenders) * (rounds + 1)
    with tqdm(total=total, unit="run", file=sys.stderr) as bar:
        for turn in range(rounds + 1):
            for batch in batches:
                prompts = rng.integers(3, vocab_size, (batch, prompt_tokens)).tolist()
                for place in range(len(contenders)):
                    contender = contenders[(place + turn) % len(contenders)]
                    rate = _run(contender, prompts, decoding if turn else warm, seed + turn)
                    if turn:
                        rates.setdefault((contender.name, batch), []).append(rate)
                        bar.set_postfix_str(f"{contender.name}, batch {batch}: {rate:.0f} tokens/s")
                    bar.update()
    return rates


def _run(contender: Contender, prompts: list[list[int]], decoding: Decoding, seed: int) -> float:
    seconds, tokens = contender.run(prompts, decoding, seed)
    wanted = len(prompts) * decoding.new_tokens
    if tokens != wanted:
        raise RuntimeError(f"{contender.name} generated {tokens} tokens where {wanted} were asked for")
    return tokens / seconds


def report(rates: Rates, reference: str = "vas-plain") -> list[dict[str, Any]]:
    """A row for each contender and batch: tokens per second and the ratio to plain decoding."""
    rows = []
    for (name, batch), series in rates.items():
        row: dict[str, Any] = {"contender": name, "batch": batch, "tokens_per_second": _spread(series)}
        if (reference, batch) in rates:
            row["ratio_to_plain"] = _spread(compare(rates, name, reference, batch))
        rows.append(row)
    return rows


def _spread(series: list[float]) -> dict[str, Any]:
    return {**record.spread(series), "rounds": series}


def table(rows: list[dict[str, Any]], order: Sequence[str]) -> str:
    """The rows as text, a line for each contender and batch."""
    lines = [f"{'contender':<18}{'batch':>6}{'tokens/s':>10}{'(min - max)':>18}{'of plain':>10}"]
    for row in sorted(rows, key=lambda r: (r["batch"], order.index(r["contender"]))):
        rate = row["tokens_per_second"]
        spread = f"({rate['min']:.1f} - {rate['max']:.1f})"
        ratio = f"{row['ratio_to_plain']['median']:.2f}" if "ratio_to_plain" in row else ""
        lines.append(f"{row['contender']:<18}{row['batch']:>6}{rate['median']:>10.1f}{spread:>18}{ratio:>10}")
    return "\n".join(lines)


def goals_table(judged: list[dict[str, Any]]) -> str:
    """The goals as text."""
    lines = []
    for goal in judged:
        pair = f"{goal['contender']} / {goal['reference']}, batch {goal['batch']}"
        verdict = "met" if goal["met"] else "MISSED"
        lines.append(f"{verdict:<7}{pair}: {goal['measured']:.2f} (goal {goal['ratio']:.2f})")
    return "\n".join(lines)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: use a positive integer")
    return number


def parser() -> argparse.ArgumentParser:
    """The command line."""
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--setting", choices=sorted(SETTINGS), default="135m", help="sizes of the models")
    made.add_argument("--contenders", nargs="+", metavar="NAME", help=f"of {', '.join(names(vllm=True))}")
    made.add_argument("--batch", nargs="+", type=_positive, default=[1, 16], help="prompts at once (1 16)")
    made.add_argument("--rounds", type=_positive, default=5, help="measurements of each (5)")
    made.add_argument("--prompt-tokens", type=_positive, default=32, help="random tokens of a prompt (32)")
    made.add_argument("--new-tokens", type=_positive, default=64, help="tokens to generate (64)")
    made.add_argument("--candidates", type=_positive, default=20, help="tokens that a guided step scores (20)")
    made.add_argument("--temperature", type=float, default=1.0, help="0 takes the best token (1)")
    made.add_argument("--threads", type=_positive, help="threads of torch (all cores)")
    made.add_argument("--vllm-python", metavar="PATH", help="interpreter with vLLM (CPU build) installed")
    made.add_argument("--json", type=Path, metavar="OUT", default=record.RESULTS / "decode.json", help="result")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints a table, writes JSON."""
    made = parser()
    options = made.parse_args(arguments)
    known = names(vllm=bool(options.vllm_python))
    chosen = options.contenders or known
    for name in chosen:
        if name not in known:
            made.error(f"--contenders {name}: known are {', '.join(known)} (vLLM needs --vllm-python)")
    if options.threads:
        torch.set_num_threads(options.threads)
    decoding = Decoding(options.new_tokens, options.candidates, options.temperature)
    setting = SETTINGS[options.setting]
    longest = -(-(options.prompt_tokens + options.new_tokens + 1) // 16) * 16
    with tempfile.TemporaryDirectory(prefix="vas-decode-") as folder:
        assets = Assets(Path(folder), setting, seed=options.seed)
        log = Path(folder) / "vllm.log"
        makers = builders(assets, max(options.batch), longest, options.vllm_python, log)
        contenders: list[Contender] = []
        try:
            for name in tqdm(chosen, desc="load", unit="model", file=sys.stderr):
                contenders.append(makers[name]())
            rates = measure(
                contenders,
                options.batch,
                options.rounds,
                options.prompt_tokens,
                setting.base.vocab,
                decoding,
                options.seed,
            )
        finally:
            for contender in contenders:
                contender.close()
    rows = report(rates)
    judged = [found for goal in GOALS if (found := goal.judge(rates))] if options.setting == "135m" else []
    circumstances = record.circumstances()
    for contender in contenders:
        circumstances["versions"].update(
            {f"{contender.name}: {k}": v for k, v in getattr(contender, "versions", {}).items()}
        )
    settings = {
        "setting": options.setting,
        "models": asdict(setting),
        "dtype": "bfloat16",
        "decoding": asdict(decoding),
        "batches": options.batch,
        "rounds": options.rounds,
        "prompt_tokens": options.prompt_tokens,
        "seed": options.seed,
    }
    record.write(options.json, {**circumstances, "settings": settings, "results": rows, "goals": judged})
    print(table(rows, known))
    if judged:
        print("\n" + goals_table(judged))
    print(f"\nwritten to {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
