"""`vas train`: fit value networks to rollouts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from vas_engine.commands.options import given

EXAMPLES = """examples:
  vas train MODEL --rollouts runs/mood --kind reader --out values/mood
  vas train MODEL --rollouts runs/two --kind side --reward length --width 64 --out values/length
  vas train MODEL --rollouts runs/strong --kind model --backbone MODEL --epochs 1 --ema 0.998 --out values/strong
  vas train MODEL --rollouts runs/mood --kind reader --kind side --teacher values/strong --out values/taught
  vas train MODEL --rollouts runs/mood --distributional --loss hl-gauss --lam 0.95 --out values/spread

Give the same command with --resume to go on with a run that was interrupted. With several kinds each network has a
folder of its own under --out, and the frozen model runs once for all of them."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `vas` parser."""
    parser = subparsers.add_parser(
        "train",
        help="fit value networks to rollouts",
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
        "--kind",
        action="append",
        help="reader (default), side, action, lookahead, side-lookahead or model; may be repeated",
    )
    network.add_argument("--backbone", metavar="MODEL", help="what a value model (kind model) starts from")
    network.add_argument("--lora-rank", type=int, metavar="R", help="train a value model by adapters (default: whole)")
    network.add_argument("--layers", type=int, nargs="+", metavar="N", help="base layers that a reader looks at")
    network.add_argument("--states", type=int, nargs="+", metavar="N", help="hidden states that the network reads")
    network.add_argument("--width", type=int, metavar="N", help="width of the network")
    network.add_argument("--depth", type=int, metavar="N", help="layers of a side network")
    network.add_argument("--queries", type=int, metavar="N", help="query heads of a reader's layer")
    network.add_argument("--bounded", action="store_true", help="keep values within the reward's bounds")
    network.add_argument("--distributional", action="store_true", help="learn the reward's distribution")
    network.add_argument("--bins", type=int, metavar="N", help="atoms of a distributional head (default 51)")
    training = parser.add_argument_group("training")
    _add_settings(
        training,
        ("epochs", "N", "most passes over the rollouts"),
        ("batch-tokens", "N", "tokens of a batch, padding included"),
        ("lr", "X", "peak learning rate (default 0.002, for kind model less)"),
        ("weight-decay", "X", "of matrices"),
        ("lam", "X", "λ of TD(λ); 1 is Monte Carlo (default: 0.8 with partial rewards, else 1)"),
        ("gamma", "X", "discount per token"),
        ("consistency", "X", "weight of the one-step consistency of V (default: 50 with partial rewards, else 0)"),
        ("loss", "two-hot|hl-gauss", "of distributional heads"),
        ("sigma", "X", "of hl-gauss, in steps between atoms"),
        ("ema", "X", "decay of the averaged weights, which are kept; 0: none (default: 0.99 where λ < 1, else 0)"),
        ("holdout", "SHARE", "of the rollouts, held out"),
        ("holdout-by", "prompt|sample|auto", "what is held out: all responses to some prompts, or some responses"),
        ("patience", "N", "epochs without progress before stopping early (default: never)"),
        ("seed", "N", "of initial weights, split and order"),
        ("ratio-clip", "X", "largest importance weight of guided rollouts"),
        ("cache-memory", "SIZE", "for the frozen model's states, kept over the epochs; 0: none"),
    )
    training.add_argument("--keep-on-interrupt", action="store_true", help="on Ctrl-C save the best so far")
    training.add_argument("--resume", action="store_true", help="go on with what an interruption left in --out")
    teacher = parser.add_argument_group("teacher")
    teacher.add_argument("--teacher", metavar="FOLDER", help="value whose judgement of all candidates is learnt")
    _add_settings(
        teacher,
        ("teacher-share", "SHARE", "of the loss; the rest is TD(λ)"),
        ("teacher-positions", "N", "states of each response at which it judges"),
        ("teacher-candidates", "N", "tokens that it judges there"),
        ("teacher-temperature", "X", "of the model's probabilities that weigh them"),
    )
    report = parser.add_argument_group("report")
    report.add_argument("--branch-points", type=int, metavar="N", help="held-out states to sample completions from")
    report.add_argument("--branch-samples", type=int, metavar="M", default=16, help="completions of each (default 16)")
    report.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, help="draw training.png (default: with matplotlib)"
    )
    parser.add_argument("--device", metavar="auto|cpu|cuda", default="auto", help="default: CUDA where there is one")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)
    return parser


def _add_settings(group: Any, *options: tuple[str, str, str]) -> None:
    """Options (name, metavar, help) of `FitConfig`, whose defaults are told where they are plain values."""
    from vas_engine.training.config import FitConfig

    defaults = {field.name: field.default for field in dataclasses.fields(FitConfig)}
    for name, metavar, text in options:
        default = defaults[name.replace("-", "_")]
        kind = {"N": int, "X": float, "SHARE": float}.get(metavar, str)
        told = text if default is None else f"{text} (default {default})"
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=told)


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    from vas_engine.commands.options import hide_loading
    from vas_engine.model.lm import CausalLM
    from vas_engine.tokenizer import load_tokenizer
    from vas_engine.training.base import FrozenBase, read_states
    from vas_engine.training.checkpoint import drop_checkpoint
    from vas_engine.training.config import FitConfig
    from vas_engine.training.fit import fit_all
    from vas_engine.training.plots import can_plot, save_plots
    from vas_engine.training.report import save_report
    from vas_engine.training.rollouts import load_rollouts
    from vas_engine.values.artifact import load_value, save_value

    _check_out(args)
    config = FitConfig(**given(args, [field.name for field in dataclasses.fields(FitConfig)]))
    rollouts = load_rollouts(args.rollouts)
    branching = _Branching(args, rollouts, config) if args.branch_points is not None else None
    hide_loading(args)
    tokenizer = load_tokenizer(args.model, None, None, required=branching is not None)
    lm = branching.llm.lm if branching else CausalLM.load(args.model, device=args.device)
    networks = _make_networks(args, config, rollouts, lm, tokenizer)
    several = len(networks) > 1
    folders = [Path(args.out) / network.config.kind if several else Path(args.out) for network in networks]
    teacher = load_value(args.teacher, lm, tokenizer=tokenizer) if args.teacher else None
    base = FrozenBase(lm, networks if teacher is None else [*networks, teacher], logits=teacher is not None)
    try:
        reports = fit_all(
            lm,
            networks,
            rollouts,
            config,
            teacher=teacher,
            states=read_states(args.rollouts, rollouts) if base.reads_final_only else None,
            checkpoint=args.out,
            resume=args.resume,
        )
        # Before branches are judged: what is trained must not hang on that.
        for folder, network, report in zip(folders, networks, reports, strict=True):
            save_value(folder, network)
            save_report(folder, report)
        if branching:
            reports = branching.judge(networks, reports)
            for folder, report in zip(folders, reports, strict=True):
                save_report(folder, report)
    except KeyboardInterrupt:
        fix = f"what is finished lies in {args.out}; the same command with --resume goes on"
        print(f"interrupted: {fix} (--keep-on-interrupt keeps the best so far)", file=sys.stderr)
        return 130
    if can_plot() if args.plot is None else args.plot:
        for folder, report in zip(folders, reports, strict=True):
            save_plots(folder, report)
    drop_checkpoint(args.out)
    if args.json:
        found = [report.to_dict() for report in reports]
        print(json.dumps(found if several else found[0], indent=2))
    else:
        print("\n".join([*map(_readable, reports), f"in {args.out}"]))
    return 0


def _check_out(args: argparse.Namespace) -> None:
    from vas_engine.errors import InvalidArgumentError
    from vas_engine.training.checkpoint import CHECKPOINT_FILE

    out = Path(args.out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / CHECKPOINT_FILE).exists():
        raise InvalidArgumentError("out", args.out, "exists already; choose a new folder")
    if not args.resume:
        fix = "holds a fit that was interrupted; give --resume to go on with it, or choose a new folder"
        raise InvalidArgumentError("out", args.out, fix)


def _make_networks(args: argparse.Namespace, config: Any, rollouts: Any, lm: Any, tokenizer: Any) -> list[Any]:
    from vas_engine.errors import InvalidArgumentError
    from vas_engine.training.fit import head_for
    from vas_engine.training.network import SIZES, make_network

    kinds = args.kind or ["reader"]
    if len(set(kinds)) < len(kinds):
        raise InvalidArgumentError("kind", kinds, "name each kind once")
    options: dict[str, Any] = {"distributional": args.distributional, "bounded": args.bounded, "gamma": config.gamma}
    if args.distributional:
        options |= given(args, ["bins"]) | {"sigma": config.spread}
    else:
        for name in ("loss", "sigma", "bins"):
            if (value := getattr(args, name)) is not None:
                raise InvalidArgumentError(name, value, "is for distributional heads; add --distributional")
    heads = [head_for(rollouts, reward, **options) for reward in args.reward or rollouts.reward_names]
    sizes = given(args, list(SIZES))
    return [
        make_network(
            lm,
            kind,
            heads,
            tokenizer=tokenizer,
            seed=config.seed,
            backbone=args.backbone if kind == "model" or "model" not in kinds else None,
            **(sizes if kind != "model" or len(kinds) == 1 else {}),
        )
        for kind in kinds
    ]


class _Branching:
    """Completions from held-out states, sampled and rewarded by the means that made the rollouts."""

    def __init__(self, args: argparse.Namespace, rollouts: Any, config: Any) -> None:
        from vas_engine.llm import LLM
        from vas_engine.training.branching import check_branches, load_rollout_rewards

        self.points, self.samples, self.rollouts, self.config = (
            args.branch_points,
            args.branch_samples,
            rollouts,
            config,
        )
        check_branches(rollouts, self.points, self.samples, config)
        self.rewards = load_rollout_rewards(rollouts, args.reward)
        self.llm = LLM(args.model, device=args.device)

    def judge(self, networks: list[Any], reports: list[Any]) -> list[Any]:
        from vas_engine.training.branching import judge_branches, sample_branches

        branches = sample_branches(self.llm, self.rollouts, self.rewards, self.points, self.samples, self.config)
        return [
            judge_branches(self.llm.lm, network, report, branches, self.config.gamma)
            for network, report in zip(networks, reports, strict=True)
        ]


def _readable(report: Any) -> str:
    lines = [
        f"{report.kind}, {report.parameters:,} parameters, {report.train_rollouts} rollouts, "
        f"best epoch {report.best_epoch} of {len(report.epochs)}, {report.seconds:.0f} s"
    ]
    for name, head in report.heads.items():
        lines.append(
            f"  {name}: R² {head.r_squared:.3f} on {report.heldout_rollouts} held-out rollouts, "
            f"{head.r_squared_last_quarter:.3f} in their last quarter"
        )
        if head.advantages is not None:
            found = head.advantages
            lines.append(f"  {name}: KL efficiency {found.efficiency:.2f} ± {found.error:.2f} by its advantages there")
        if head.agreement is not None:
            lines.append(f"  {name}: {head.agreement:.0%} of the teacher's differences between candidates are learnt")
        if head.branching is not None and head.branching.r_squared is not None:
            branches = head.branching
            lines.append(
                f"  {name}: {branches.r_squared:.0%} of what can be explained, by {branches.points} states "
                f"with {branches.samples} completions each"
            )
    return "\n".join(lines)
