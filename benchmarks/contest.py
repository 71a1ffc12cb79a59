"""The whole contest from nothing: samples, values, rivals by fine-tuning, and all of them decoded side by side.

    python -m benchmarks.contest MODEL --out runs/contest --json benchmarks/results/contest.json
    python -m benchmarks.contest MODEL --out runs/try --rollouts 2048 --samples 8 --steps 20      does it run at all?

What it runs are commands of their own, each printed before it starts: `benchmarks.value_quality` (samples, a strong
value model, a reader and a side network that learn from it), `benchmarks.finetune` (DPO, RLOO, GRPO), `vas evaluate`.
What is done is not done again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import circumstances, write
from benchmarks.value_quality import MAX_TOKENS, OPENINGS, REWARD, value_folder

# Method and the weight β of the divergence.
POLICIES = ("dpo:1", "dpo:0.1", "rloo:0.1", "grpo:0.3")
NAME = "vader-pos-neg"
# In standard deviations of the reward, for the values; the rivals' own scales are theirs.
WEIGHTS = (1, 2, 3.5, 5, 7, 10, 12)


def steps(args: argparse.Namespace) -> list[tuple[Path | None, list[str]]]:
    """What is to be run: the folder that a step makes (None where the command itself knows what is done), and how."""
    out, model, study = args.out, str(args.model), args.out / "study"
    pupils = ["reader, distilled", f"side, {args.rollouts}, distilled"] if args.pupils is None else args.pupils
    names = [f"model, {args.rollouts}", *pupils]
    train = [sys.executable, "-m", "benchmarks.value_quality", model, "--out", str(study), "--only", *names]
    train += ["--no-decoding", "--rollouts", str(args.rollouts)]
    plan: list[tuple[Path | None, list[str]]] = [(None, train)]
    tune = [sys.executable, "-m", "benchmarks.finetune"]
    sizes = ["--steps", str(args.steps), "--batch", "128", "--lr", args.lr, *(["--env", args.env] if args.env else [])]
    policies = []
    for policy in args.policies:
        method, _, beta = policy.partition(":")
        folder = out / f"{method}_{beta}"
        policies += ["--policy", f"{method}:{1 / float(beta):g}={folder}"]
        group = [] if method == "dpo" else ["--group", "16"]
        shared = [method, model, "--rollouts", str(study / "rollouts"), "--reward", NAME, "--beta", beta]
        plan.append((folder, [*tune, *shared, *sizes, *group, "--out", str(folder)]))
    values = [word for name in names for word in ("--value", f"{name.split(',')[0]}={value_folder(study, name)}")]
    evaluate = [sys.executable, "-m", "vas_engine.cli", "evaluate", model, "--prompts", str(out / "openings.txt")]
    evaluate += ["--reward", REWARD, *values, *policies, "--method", "vas", *args.method]
    evaluate += ["--weights", *map(str, WEIGHTS), "--samples", str(args.samples), "--max-tokens", str(MAX_TOKENS)]
    # Beside rollouts fresh samples only tell what plain decoding costs.
    pool = ["--pool", str(args.pool)] if args.pool else ["--rollouts", str(study / "rollouts"), "--pool", "128"]
    evaluate += [*pool, "--max-num-seqs", "256", "--out", str(out / "results")]
    plan.append((out / "results", evaluate))
    return plan


def run(folder: Path | None, command: Sequence[str]) -> float:
    """Run a step, its own bars and errors shown, and return its seconds; 0 where its folder is there already."""
    if folder is not None and folder.exists():
        return 0.0
    print(f"$ {shlex.join(command)}", file=sys.stderr, flush=True)
    start = time.monotonic()
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(status)
    return time.monotonic() - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run the contest."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, help="the base model")
    add("--out", type=Path, required=True, help="folder of all that is made")
    add("--rollouts", type=int, default=131_072, metavar="N", help="samples of the base (131072)")
    add("--samples", type=int, default=64, help="decoded for each opening and point (64)")
    add("--pool", type=int, metavar="N", help="best-of-n by so many fresh samples of an opening, not by all rollouts")
    add(
        "--pupils",
        nargs="*",
        metavar="RUN",
        help="runs of the study, taught by its value model (a reader, a side network)",
    )
    add("--policies", nargs="*", default=POLICIES, metavar="METHOD:BETA", help=f"fine-tuned ({' '.join(POLICIES)})")
    add("--steps", type=int, default=200, help="updates of each fine-tuning (200)")
    add("--lr", default="5e-4", help="peak learning rate of each (5e-4)")
    add("--method", nargs="*", default=["args", "blockwise"], help="rivals at decoding (args blockwise)")
    add("--env", help="environment of TRL, as benchmarks.finetune takes it")
    add("--json", type=Path, metavar="FILE", help="write the results there as well, and the plot beside")
    args = parser.parse_args(argv)
    plan = steps(args)
    seconds = carry_out(args.out, plan)
    if args.json:
        results = args.out / "results"
        places = places_of(args.out, args.model) | ({str(args.env): "ENV"} if args.env else {})
        write(args.json, summary(plan, seconds, places) | read_evaluation(results, places))
        for plot in sorted(results.glob("*.png")):
            shutil.copyfile(plot, args.json.with_name(f"{args.json.stem}_{plot.name}"))
    return 0


def carry_out(out: Path, plan: Sequence[tuple[Path | None, list[str]]]) -> dict[str, float]:
    """Run the steps of a plan, in a folder that has the openings; seconds of each, over all the times it was begun."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "openings.txt").write_text("\n".join(OPENINGS) + "\n", encoding="utf-8")
    kept = out / "seconds.json"
    seconds: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for folder, command in plan:
        name = folder.name if folder else command[2]
        seconds[name] = seconds.get(name, 0.0) + run(folder, command)
        kept.write_text(json.dumps(seconds, indent=2) + "\n", encoding="utf-8")
    return seconds


def places_of(out: Path, model: Path) -> dict[str, str]:
    """Places of this machine, and what results call them."""
    return {f"{out}/": "", str(model): model.name, sys.executable: "python"}


def summary(
    plan: Sequence[tuple[Path | None, list[str]]], seconds: Mapping[str, float], places: Mapping[str, str]
) -> dict[str, Any]:
    """What results begin with: circumstances, commands, and what each took."""
    commands = [portable(shlex.join(command), places) for _, command in plan]
    return {"circumstances": circumstances(), "commands": commands, "seconds": dict(seconds)}


def read_evaluation(folder: Path, places: Mapping[str, str]) -> dict[str, Any]:
    """What `vas evaluate` left in a folder."""
    return json.loads(portable((folder / "evaluation.json").read_text(encoding="utf-8"), places))


def portable(text: str, places: Mapping[str, str]) -> str:
    """Without the places of this machine, which get the names given."""
    for place, name in places.items():
        text = text.replace(place, name)
    return text


if __name__ == "__main__":
    sys.exit(main())
