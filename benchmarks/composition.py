"""Several rewards at once, weighted as each request likes, and a subject that is unlearnt, from nothing.

    python -m benchmarks.composition MODEL --out runs/composition --json benchmarks/results/composition.json
    python -m benchmarks.composition MODEL --out runs/try --rollouts 2048 --samples 2      does it run at all?

Three rewards: VADER's sentiment, words to a sentence, and whether a mother is spoken of. One value model learns all of
them in one pass, another only their sum. Decoded are all combinations of three weights each in one mixed batch, beside
best-of-n on the same sums and the value of the sum; then mothers are unlearnt with negative weights, and what that
costs the rest is read off. What is done is not done again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.contest import carry_out, places_of, read_evaluation, summary
from benchmarks.record import write
from benchmarks.value_quality import MAX_TOKENS, OPENINGS, PARTIAL_REWARDS, RECIPE

MOTHER = re.compile(r"\b(mom|mommy|mother)\b", re.IGNORECASE)
REWARDS = {"mood": "vader:pos-neg", "pace": "sentence-length", "mother": "benchmarks.composition:mother"}
# Each over its standard deviation under stories260K, so that none drowns the others.
SUM = "mood / 0.115 + pace / 1.9 + mother / 0.45"
# In standard deviations of the rewards.
GRID = (-2, 0, 3)
WEIGHTS = (1, 2, 4, 6)


def mother(prompt: str, response: str) -> float:
    """1 for a response that speaks of a mother, else 0."""
    return float(bool(MOTHER.search(response)))


def steps(args: argparse.Namespace) -> list[tuple[Path, list[str]]]:
    """What is to be run: the folder that a step makes, and how."""
    out, model = args.out, str(args.model)
    vas = [sys.executable, "-m", "vas_engine.cli"]
    prompts = ["--prompts", str(out / "openings.txt")]
    rewards = [word for name, spec in REWARDS.items() for word in ("--reward", f"{name}={spec}")]
    everything = [*rewards, "--reward", f"sum={SUM}"]
    samples = str(-(-args.rollouts // len(OPENINGS)))
    collect = [*vas, "collect", model, *prompts, *everything, "--samples", samples, "--max-tokens", str(MAX_TOKENS)]
    collect += ["--partial-rewards", str(PARTIAL_REWARDS), "--max-num-seqs", "512", "--shard-rows", "4096"]
    train = [*vas, "train", model, "--rollouts", str(out / "rollouts"), "--kind", "model", "--backbone", model]
    train += [word for name, value in RECIPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    single = [word for name in REWARDS for word in ("--reward", name)]
    evaluate = [*vas, "evaluate", model, *prompts, "--samples", str(args.samples), "--max-tokens", str(MAX_TOKENS)]
    evaluate += ["--rollouts", str(out / "rollouts"), "--pool", "256", "--max-num-seqs", "256"]
    evaluate += ["--value", f"all={out / 'all'}"]
    weights = ",".join(map(str, GRID))
    composed = [*evaluate, *everything, "--value", f"sum={out / 'sum'}", "--weights", *map(str, WEIGHTS)]
    composed += ["--grid", *(f"{name}={weights}" for name in REWARDS)]
    unlearnt = [*evaluate, *rewards, "--best-of", "--weights", *(str(-weight) for weight in WEIGHTS)]
    return [
        (out / "rollouts", [*collect, "--out", str(out / "rollouts")]),
        (out / "all", [*train, *single, "--out", str(out / "all")]),
        (out / "sum", [*train, "--reward", "sum", "--out", str(out / "sum")]),
        (out / "composed", [*composed, "--out", str(out / "composed")]),
        (out / "unlearnt", [*unlearnt, "--out", str(out / "unlearnt")]),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.composition",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="the base model")
    add("--out", type=Path, required=True, help="folder of all that is made")
    add("--rollouts", type=int, default=32_768, metavar="N", help="samples of the base (32768)")
    add("--samples", type=int, default=16, help="decoded for each opening and point (16)")
    add("--json", type=Path, metavar="FILE", help="write the results there as well, and the Pareto fronts beside")
    args = parser.parse_args(argv)
    plan = steps(args)
    seconds = carry_out(args.out, plan)
    if args.json:
        places = places_of(args.out, args.model)
        parts = {part: read_evaluation(args.out / part, places) for part in ("composed", "unlearnt")}
        write(args.json, summary(plan, seconds, places) | parts)
        shutil.copyfile(args.out / "composed" / "pareto.png", args.json.with_name(f"{args.json.stem}_pareto.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
