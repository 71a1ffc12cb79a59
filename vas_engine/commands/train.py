"""`vas train`: fit a value network to rollouts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  vas train MODEL --rollouts runs/mood --kind reader --out values/mood
  vas train MODEL --rollouts runs/two --kind side --reward length --width 64 --out values/length"""

# Fine-tuning a whole language model wants smaller steps than training a small network.
VALUE_MODEL_LR = 2e-4


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `vas` parser."""
    parser = subparsers.add_parser(
        "train",
        help="fit a value network to rollouts",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the model that the rollouts were sampled from")
    parser.add_argument("--rollouts", required=True, help="folder that `vas collect` wrote")
    parser.add_argument("--out", required=True, help="folder of the value")
    parser.add_argument("--reward", action="append", metavar="NAME", help="a head for this reward (default: for each)")
    network = parser.add_argument_group("network")
    network.add_argument(
        "--kind", default="reader", help="reader (default), side, action, lookahead, side-lookahead or model"
    )
    network.add_argument("--backbone", metavar="MODEL", help="what a value model (kind model) starts from")
    network.add_argument("--layers", type=int, nargs="+", help="base layers that a reader looks at")
    network.add_argument("--states", type=int, nargs="+", help="hidden states that the network reads")
    network.add_argument("--width", type=int, help="width of the network")
    network.add_argument("--depth", type=int, help="layers of a side network")
    network.add_argument("--queries", type=int, help="query heads of a reader's layer")
    network.add_argument("--distributional", action="store_true", help="learn the reward's distribution")
    network.add_argument("--bounded", action="store_true", help="keep values within the reward's bounds")
    training = parser.add_argument_group("training")
    for name, kind, text in (
        ("epochs", int, "most passes over the rollouts"),
        ("batch-tokens", int, "tokens of a batch"),
        ("lr", float, "peak learning rate"),
        ("weight-decay", float, "of matrices"),
        ("lam", float, "λ of TD(λ); 1 is Monte Carlo"),
        ("gamma", float, "discount per token"),
        ("holdout", float, "share held out"),
        ("holdout-by", str, "prompt, sample or auto"),
        ("patience", int, "epochs without progress before stopping early"),
        ("seed", int, "of initial weights, split and order"),
    ):
        training.add_argument(f"--{name}", type=kind, help=text)
    training.add_argument("--keep-on-interrupt", action="store_true", help="on Ctrl-C save the best so far")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    from vas_engine.errors import InvalidArgumentError
    from vas_engine.model.lm import CausalLM
    from vas_engine.tokenizer import load_tokenizer
    from vas_engine.training.fit import FitConfig, fit, head_for
    from vas_engine.training.network import SIZES, make_network
    from vas_engine.training.report import save_report
    from vas_engine.training.rollouts import load_rollouts
    from vas_engine.values.artifact import save_value

    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InvalidArgumentError("out", args.out, "exists already; choose a new folder")
    options = {
        field.name: getattr(args, field.name) for field in dataclasses.fields(FitConfig) if hasattr(args, field.name)
    }
    if args.kind == "model" and args.lr is None:
        options["lr"] = VALUE_MODEL_LR
    config = FitConfig(**{name: option for name, option in options.items() if option is not None})
    rollouts = load_rollouts(args.rollouts)
    heads = [
        head_for(rollouts, reward, distributional=args.distributional, bounded=args.bounded)
        for reward in args.reward or rollouts.reward_names
    ]
    lm = CausalLM.load(args.model, device=args.device)
    sizes = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    tokenizer = load_tokenizer(args.model, None, None, required=False)
    network = make_network(lm, args.kind, heads, tokenizer=tokenizer, seed=config.seed, backbone=args.backbone, **sizes)
    try:
        report = fit(lm, network, rollouts, config)
    except KeyboardInterrupt:
        print("interrupted: nothing is saved (--keep-on-interrupt keeps the best so far)", file=sys.stderr)
        return 130
    save_value(out, network)
    save_report(out, report)
    print(json.dumps(report.to_dict(), indent=2) if args.json else _readable(report, args.out))
    return 0


def _readable(report: Any, out: str) -> str:
    lines = [
        f"{report.kind}, {report.parameters:,} parameters, {report.train_rollouts} rollouts, "
        f"best epoch {report.best_epoch} of {len(report.epochs)}, {report.seconds:.0f} s"
    ]
    for name, head in report.heads.items():
        lines.append(
            f"  {name}: R² {head.r_squared:.3f} on {report.heldout_rollouts} held-out rollouts, "
            f"{head.r_squared_last_quarter:.3f} in their last quarter"
        )
    return "\n".join([*lines, f"in {out}"])
