"""`vas demo`: watch a frozen language model follow two rewards."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from vas_engine.errors import VASError

NEEDS = ("pyarrow", "vaderSentiment", "matplotlib", "plotext")

EXAMPLES = """examples:
  vas demo                                      the shipped model, no network, under three minutes on two cores
  vas demo --model path/to/model --prompts openings.txt
  vas demo --reward calm=vader --reward size=length --kind reader --out runs/calm
  vas demo --json > demo.json"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `vas` parser."""
    parser = subparsers.add_parser(
        "demo",
        help="watch a frozen language model follow two rewards",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or hub name (default: the model that ships with the package)")
    parser.add_argument("--prompts", help="file of openings, a line each (default: openings of little stories)")
    parser.add_argument("--reward", action="append", metavar="NAME=SPEC", help="twice; default mood=vader and length")
    parser.add_argument("--kind", default="side", help="value network: side, reader, action, lookahead, side-lookahead")
    parser.add_argument("--samples", type=int, help="texts per opening to train on")
    parser.add_argument("--max-tokens", type=int, help="longest text")
    parser.add_argument("--epochs", type=int, help="passes over the texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/demo", help="folder for samples, value and plot (default runs/demo)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON; the story goes to stderr")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise VASError(f'the demo needs {", ".join(missing)}: pip install "vas-engine[demo]"')
    from vas_engine.demo import model_path
    from vas_engine.demo.showcase import ShowcaseConfig, run_showcase, save_plot, table, terminal_plot
    from vas_engine.training.prompts import load_prompts

    def say(line: str) -> None:
        print(line, file=sys.stderr if args.json else sys.stdout, flush=True)

    options = {
        name: getattr(args, name)
        for name in ("model", "kind", "samples", "max_tokens", "epochs", "seed")
        if getattr(args, name) is not None
    }
    if args.prompts:
        options["prompts"] = tuple(load_prompts(args.prompts))
    if args.reward:
        options["rewards"] = tuple(args.reward)
    config = ShowcaseConfig(**options)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        result = run_showcase(config, out, say)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    save_plot(result, out / "frontier.png")
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    say(f"\n{table(result)}\n")
    say(terminal_plot(result))
    seconds = sum(result.seconds.values())
    say(f"\n{seconds:.0f} s in all. Plot: {out / 'frontier.png'}; the trained value: {out / 'value'}")
    name = result.reward_names[0]
    weight = config.shown / result.deviations[name]
    say(
        f'Try it: vas generate {args.model or model_path()} "{config.prompts[0]}" '
        f"--value {out / 'value'} --weight {name}={weight:.3g}"
    )
    return 0
