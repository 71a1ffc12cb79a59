"""`vas evaluate`: reward against KL and cost, for guided decoding and its rivals on the same prompts."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vas_engine import arguments
from vas_engine.commands.options import add_model_options, given, load_llm, read_values
from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.params import GUIDANCE, MAX_SEED, SamplingParams

if TYPE_CHECKING:
    from vas_engine.evaluation.frontier import Contest, Point, Setting
    from vas_engine.evaluation.report import Evaluation, Section
    from vas_engine.llm import LLM

EXAMPLES = """examples:
  vas evaluate MODEL --prompts openings.txt --reward mood=vader:pos-neg --value mood=values/mood --out runs/contest
  vas evaluate MODEL --prompts openings.txt --reward mood=vader --value mood=values/reader --value side=values/side \\
      --weights 1 2 4 8 --method vas args blockwise --pool 2048 --out runs/kinds
  vas evaluate MODEL --prompts openings.txt --reward mood=vader --reward length --value mood=values/mood \\
      --value length=values/length --grid mood=-4,0,4 length=-2,0,2 --out runs/composed

Weights are in nats per standard deviation of the reward under plain sampling, so that they suit any reward. Plain
sampling, best-of-n and the exact optimum at each KL come from one pool of plain samples (--pool); the optimum is
shown as far as 16 effective samples of it reach. A value steers the reward of its own name, or the one that its head
was trained on. Policies of one NAME and several strengths X are one curve."""

METHOD_HELP = "vas (default), qsharp, args, args-greedy, fudge, blockwise, mcts"
GROWN = ("blockwise", "mcts")
"""Methods that are no setting of the engine: they put responses together from many requests."""
CANDIDATES = 20
POOL = 1024
"""Plain responses per prompt, unless rollouts are given."""
SETTINGS = (*GUIDANCE, "temperature")
"""Of vas, that options may change."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `vas` parser."""
    parser = subparsers.add_parser(
        "evaluate",
        help="reward against KL, beside best-of-n",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="folder or hub name of the frozen model")
    add("--prompts", required=True, help=".txt, .jsonl, .json, .yaml or .parquet file")
    add("--limit", type=int, metavar="N", help="only the first N prompts")
    add("--reward", action="append", required=True, metavar="[NAME=]SPEC", help="as `vas collect` takes it; repeatable")
    add("--whole-text", action="store_true", help="let rewards see prompt and response together")
    add("--out", required=True, help="folder of the results; appears when all is done")
    add("--samples", type=int, default=16, help="responses per prompt and method (default 16)")
    add("--pool", type=int, help="plain responses per prompt (default 1024; with --rollouts --samples, for their cost)")
    add("--rollouts", metavar="FOLDER", help="the pool: what `vas collect` sampled from the model on these prompts")
    add("--max-tokens", type=int, default=96, help="longest response (default 96)")
    add("--seed", type=int, default=0)
    add("--best-of", type=int, nargs="*", default=[4, 16, 64, 128], metavar="N", help="default 4 16 64 128")
    add("--json", action="store_true", help="print everything as JSON; the table goes to stderr")
    methods = parser.add_argument_group("methods")
    add = methods.add_argument
    add("--method", nargs="+", default=["vas"], metavar="NAME", help=METHOD_HELP)
    add("--weights", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0], metavar="W", help="default 1 2 4 8 16")
    add("--grid", nargs="+", metavar="REWARD=W,W,..", help="compose values: every combination, in one mixed batch")
    add("--blocks", type=int, nargs="+", default=[2, 4, 8, 16], metavar="K", help="of blockwise; default 2 4 8 16")
    add("--block-tokens", type=int, default=16, metavar="M", help="of blockwise (default 16)")
    add("--simulations", type=int, default=10, metavar="N", help="of mcts, for each token (default 10)")
    add("--policy", action="append", default=[], metavar="NAME[:X]=FOLDER", help="a fine-tuned model; repeatable")
    add("--num-candidates", type=int, metavar="K", help="of vas: tokens that the values look at")
    add("--tail", metavar="keep|drop", help="of vas")
    add("--baseline", metavar="state|candidate-mean", help="of vas")
    add("--tilt", metavar="mean|optimal", help="of vas")
    add("--advantage-clip", type=float, metavar="X", help="of vas, in units of the reward")
    add("--temperature", type=float, metavar="T", help="of vas; the divergence stays that from temperature 1")
    add_model_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    from vas_engine.evaluation.report import check_out, save, table
    from vas_engine.training.prompts import load_prompts
    from vas_engine.training.rewards import load_rewards

    if args.pool is None:
        args.pool = args.samples if args.rollouts else POOL
    check_out(args.out)
    _check_numbers(args)
    _check_packages()
    rewards = load_rewards(args.reward, whole_text=args.whole_text)
    prompts = load_prompts(args.prompts)[: args.limit]
    try:
        evaluation, contest = _evaluate(args, prompts, rewards)
        save(args.out, evaluation, contest)
    except KeyboardInterrupt:
        print("interrupted: nothing is written", file=sys.stderr)
        return 130
    print(table(evaluation), file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False))
    else:
        print(f"\nin {args.out}")
    return 0


def _check_packages() -> None:
    """Packages that are wanted at the very end are asked for at the beginning."""
    import matplotlib  # noqa: F401
    import pyarrow  # noqa: F401


def _check_numbers(args: argparse.Namespace) -> None:
    """Numbers that are wrong whatever is loaded."""
    for name in ("limit", "samples", "pool", "blocks", "block_tokens", "simulations", "best_of"):
        given = getattr(args, name)
        for number in given if isinstance(given, list) else [] if given is None else [given]:
            arguments.integer("--" + name.replace("_", "-"), number, 1)
    for weight in args.weights:
        arguments.real("--weights", weight)
    arguments.integer("--seed", args.seed, 0, MAX_SEED)


def _evaluate(args: argparse.Namespace, prompts: list[Any], rewards: list[Any]) -> tuple[Evaluation, Contest]:
    from vas_engine.evaluation.frontier import Contest
    from vas_engine.evaluation.methods import METHODS, steered_rewards, with_logs
    from vas_engine.evaluation.pool import pick
    from vas_engine.evaluation.report import Evaluation
    from vas_engine.tokenizer import as_prompt
    from vas_engine.training.rollouts import load_rollouts

    for name in args.method:
        if name not in (*METHODS, *GROWN):
            raise InvalidArgumentError("--method", name, nearest(name, (*METHODS, *GROWN)))
    if args.best_of and max(args.best_of) > args.pool and not args.rollouts:
        raise InvalidArgumentError("--best-of", max(args.best_of), f"use at most --pool {args.pool}")
    params = SamplingParams(max_tokens=args.max_tokens)
    params.replace(**given(args, SETTINGS))
    values = read_values(args.value)
    if any(name in METHODS and METHODS[name].of_logs for name in args.method):
        values = with_logs(values)
    llm = load_llm(args, values)
    names = [reward.name for reward in rewards]
    steered = steered_rewards(llm, names)
    combinations = _combinations(args.grid or [], names, steered)
    params = params.replace(num_candidates=min(CANDIDATES, llm.lm.vocab_size))
    policies = _read_policies(args, params, names[0])
    _rehearse(args, llm, params, steered, combinations, [setting for setting, _ in policies])
    prompts = [as_prompt(llm.tokenizer, prompt) for prompt in prompts]
    rollouts = load_rollouts(args.rollouts) if args.rollouts else None
    if rollouts is not None:
        have = len(pick(llm, rollouts, prompts, params)) // len(prompts)
        if args.best_of and max(args.best_of) > have:
            raise InvalidArgumentError(
                "--best-of", max(args.best_of), f"the rollouts have {have} responses of a prompt"
            )
    contest = Contest(
        llm,
        prompts,
        rewards,
        params,
        samples=args.samples,
        pool=args.pool,
        rollouts=rollouts,
        seed=args.seed,
        use_tqdm=True,
    )
    tuned = [_sample_policy(args, contest, setting, folder) for setting, folder in policies]
    sections = [_section(args, contest, steered, reward, tuned) for reward in names]
    fronts = _fronts(args, contest, steered, combinations, sections) if combinations else {}
    settings = {
        name: getattr(args, name)
        for name in (
            "model",
            "prompts",
            "limit",
            "reward",
            "value",
            "samples",
            "pool",
            "rollouts",
            "max_tokens",
            "seed",
        )
    }
    settings["scales"] = contest.scales
    composed = list(combinations[0]) if combinations else []
    return Evaluation(settings, names, sections, composed, fronts), contest


def _section(
    args: argparse.Namespace,
    contest: Contest,
    steered: dict[str, str],
    reward: str,
    policies: list[tuple[Setting, dict[str, float]]],
) -> Section:
    """Every method after one reward."""
    from vas_engine.evaluation.headline import headlines
    from vas_engine.evaluation.report import Section

    objective = {reward: 1.0}
    points = [
        replace(contest.view(replace(setting, objective=objective)), training=trained) for setting, trained in policies
    ]
    for value in (name for name, about in steered.items() if about == reward):
        trained = training_cost(folder_of(args.value, value))
        for method in args.method:
            found = _curve(args, contest, method, value, reward, len(steered) > 1)
            points += [replace(point, training=trained) for point in found]
    base = contest.base(objective)
    best = contest.best_of_n(args.best_of, objective, reward if len(contest.rewards) > 1 else "")
    optimum = contest.optimum(objective)
    lines = headlines(base, best, points, optimum)
    return Section(reward, objective, [base, *best, *points], optimum.curve(), lines)


def _curve(
    args: argparse.Namespace, contest: Contest, method: str, value: str, reward: str, several: bool
) -> list[Point]:
    """One method that follows one value, along its strengths."""
    from vas_engine.evaluation.blockwise import blockwise
    from vas_engine.evaluation.frontier import Setting
    from vas_engine.evaluation.methods import sweep
    from vas_engine.evaluation.search import tree_search

    scale = contest.scales[reward]
    if method not in GROWN:
        own = given(args, SETTINGS) if method == "vas" else None
        return contest.measure(sweep(contest.llm, method, value, reward, args.weights, scale, contest.params, own))
    label, points = _grown_label(method, value, several), []
    common = {"samples": args.samples, "seed": args.seed, "use_tqdm": True}
    for strength in _strengths(args, method):
        if method == "blockwise":
            settings = {"blocks": strength, "block_tokens": args.block_tokens}
            run = blockwise(
                contest.llm, contest.prompts, {value: 1.0}, strength, args.block_tokens, contest.params, **common
            )
        else:
            settings = {"values": {value: strength / scale}, "simulations": args.simulations}
            run = tree_search(
                contest.llm, contest.prompts, settings["values"], args.simulations, contest.params, **common
            )
        setting = Setting(f"{label} {strength:g}", label, contest.params, {reward: 1.0}, float(strength))
        points.append(replace(contest.add(setting, run), settings=settings))
    return points


def _read_policies(args: argparse.Namespace, params: SamplingParams, reward: str) -> list[tuple[Setting, str]]:
    """Fine-tuned policies and their folders."""
    from vas_engine.evaluation.frontier import Setting

    found = []
    for text in args.policy:
        label, sign, folder = text.partition("=")
        if not sign or not label or not folder:
            raise InvalidArgumentError("--policy", text, "write NAME=FOLDER, or NAME:STRENGTH=FOLDER")
        method, _, strength = label.partition(":")
        try:
            number = float(strength) if strength else None
        except ValueError as error:
            raise InvalidArgumentError("--policy", text, "the STRENGTH of NAME:STRENGTH is a number") from error
        if not (Path(folder) / "config.json").is_file():
            raise InvalidArgumentError("--policy", text, f"{folder} holds no model: it has no config.json")
        found.append((Setting(f"{method} {strength}".strip(), method, params, {reward: 1.0}, number), folder))
    return found


def _sample_policy(
    args: argparse.Namespace, contest: Contest, setting: Setting, folder: str
) -> tuple[Setting, dict[str, float]]:
    """Sample a policy; what its training cost comes back with it."""
    from vas_engine.evaluation.policy import sample_policy

    run = sample_policy(
        contest.llm,
        folder,
        contest.prompts,
        contest.params,
        samples=args.samples,
        seed=args.seed,
        use_tqdm=True,
        device=str(contest.llm.lm.device),
    )
    contest.add(setting, run)
    return setting, training_cost(Path(folder))


def _rehearse(
    args: argparse.Namespace,
    llm: LLM,
    params: SamplingParams,
    steered: dict[str, str],
    combinations: list[dict[str, float]],
    policies: list[Setting],
) -> None:
    """Make every setting, as if rewards had a deviation of 1, so that what cannot work is found before sampling."""
    from vas_engine.evaluation.methods import check_settings, grid, sweep

    settings, labels = [], ["base", *(setting.label for setting in policies)]
    for method, (value, reward) in product(args.method, steered.items()):
        if method in GROWN:
            label = _grown_label(method, value, len(steered) > 1)
            labels += [f"{label} {strength:g}" for strength in _strengths(args, method)]
        else:
            own = given(args, SETTINGS) if method == "vas" else None
            settings += sweep(llm, method, value, reward, args.weights, 1.0, params, own)
    if combinations:
        values = _steering(steered)
        settings += grid(values, combinations, dict.fromkeys(values, 1.0), params, given(args, SETTINGS))
    check_settings(llm, settings)
    labels += [setting.label for setting in settings]
    for label in labels:
        if labels.count(label) > 1:
            fix = "would be measured twice; give every method, weight and policy once, a policy by a name of its own"
            raise InvalidArgumentError("label", label, fix)


def _strengths(args: argparse.Namespace, method: str) -> list[Any]:
    return args.blocks if method == "blockwise" else args.weights


def _grown_label(method: str, value: str, several: bool) -> str:
    return f"{method} {value}" if several else method


def _steering(steered: dict[str, str]) -> dict[str, str]:
    """Reward -> the first value that steers it."""
    return {reward: value for value, reward in reversed(steered.items())}


# -- compositions --------------------------------------------------------------------------------------------------


def _combinations(grid: list[str], rewards: list[str], steered: dict[str, str]) -> list[dict[str, float]]:
    """`["mood=-4,0,4", "length=0,2"]` as every combination of strengths."""
    axes: dict[str, list[float]] = {}
    for text in grid:
        name, _, numbers = text.partition("=")
        try:
            axes[name] = [float(number) for number in numbers.split(",")]
        except ValueError as error:
            raise InvalidArgumentError("--grid", text, "write REWARD=W,W,..") from error
        if name not in steered.values():
            fix = f"no value steers this reward; {nearest(name, steered.values())}"
            raise InvalidArgumentError("--grid", text, fix)
    if grid and len(axes) < 2:
        raise InvalidArgumentError("--grid", grid, "compose at least two rewards; --weights sweeps one")
    return [dict(zip(axes, strengths, strict=True)) for strengths in product(*axes.values())] if axes else []


def _fronts(
    args: argparse.Namespace,
    contest: Contest,
    steered: dict[str, str],
    combinations: list[dict[str, float]],
    sections: list[Section],
) -> dict[str, list[Point]]:
    """Compositions in one mixed batch, best-of-n on the same sums, and whatever follows a reward of its own."""
    from vas_engine.evaluation.methods import grid

    composed = list(combinations[0])
    values = _steering(steered)
    settings = grid(values, combinations, contest.scales, contest.params, given(args, SETTINGS))
    fronts = {"composition": contest.measure(settings, together=True)}
    for n in args.best_of:
        found = [contest.best_of_n([n], setting.objective, setting.label) for setting in settings]
        fronts[f"best of {n} by the sum"] = [point for points in found for point in points]
    for section in sections:
        if section.name not in composed:
            fronts |= section.curves
    return fronts


# -- values and policies -------------------------------------------------------------------------------------------


def folder_of(values: list[str], value: str) -> Path:
    """The folder that a value came from, by its name or its network's."""
    named = {name: folder for name, sign, folder in (text.partition("=") for text in values) if sign}
    return Path(named.get(value) or named.get(value.rpartition(".")[0]) or values[0])


def training_cost(folder: Path) -> dict[str, float]:
    """Seconds and rollouts that a value's or policy's training report names; empty without one."""
    from vas_engine.training.report import REPORT_FILE

    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {"seconds": "seconds", "rollouts": "train_rollouts"}
    return {name: float(report[key]) for name, key in names.items() if isinstance(report.get(key), int | float)}
