"""`vas collect`: sample responses from a frozen model and score them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vas_engine.commands.options import add_guidance_options, add_model_options, load_llm, read_guidance

EXAMPLES = """\
rewards, each of which may be named as NAME=REWARD:
  vader, vader:pos-neg    sentiment by the VADER lexicon
  length, readability ... a property of the text
  hf:PATH#LABEL           a Hugging Face sequence classifier; hf:PATH a reward model, which reads prompt and
                          response as messages where it has a chat template (#LABEL:text: the response alone;
                          #LABEL:logit: the raw logit)
  module:function         your own, called with prompt and response
  ensemble:min(A, B)      the worst of several; ensemble:mean(A, B); ensemble:uncertainty(A, B, c=1), their mean
                          less c standard deviations
  "mood - 0.01*length"    arithmetic of the others: + - * / ** min max abs clip log exp

A response that reaches --max-tokens without an end is scored as it stands (finish_reason "length").

examples:
  vas collect MODEL --prompts prompts.txt --reward vader --out runs/mood
  vas collect MODEL --prompts chats.jsonl --reward length --reward mine=rewards:score --out runs/two
  vas collect MODEL --prompts trl-lib/tldr --split train --reward good=hf:REWARD_MODEL --out runs/tldr
  vas collect MODEL --prompts p.txt --reward vader --partial-rewards 4 --samples 4096 --out runs/strong
  vas collect MODEL --prompts p.txt --reward mood=vader --reward "both=mood + 0.01*length" --out runs/both
  vas collect MODEL --prompts p.txt --reward vader --value mood=VALUE --weight mood=4 --out runs/second-round

Give the same command again to go on with a run that was interrupted, in whatever way."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command to the `vas` parser."""
    parser = subparsers.add_parser(
        "collect",
        help="sample responses from a frozen model and score them",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="folder or hub name of the model")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE|DATASET",
        help=".txt, .jsonl, .json, .yaml or .parquet; or a Hugging Face dataset, saved in a folder or by its name",
    )
    parser.add_argument("--prompt-column", metavar="NAME", help="default: prompt, messages or text")
    parser.add_argument("--split", metavar="NAME", help="of a dataset (default train, or the only one)")
    parser.add_argument(
        "--reward", action="append", required=True, metavar="[NAME=]REWARD", help="see below; may be repeated"
    )
    parser.add_argument("--out", required=True, help="folder of the rollouts")
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt (default 64)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest response (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-rows", type=int, default=512, help="responses per file (default 512)")
    parser.add_argument(
        "--hidden-states",
        action="store_true",
        help="keep the model's final hidden states too: `vas train` reads them in place of running the model where "
        "networks look at nothing else (--kind action or lookahead with --states LAYERS, the model's number of them)",
    )
    parser.add_argument(
        "--partial-rewards",
        type=int,
        default=0,
        metavar="N",
        help="score every response's first N, 2 N, ... tokens too: values get much better where a beginning's reward "
        "says something about the whole's (try 4; a reward costs that many more calls)",
    )
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    group = parser.add_argument_group("rewards")
    add = group.add_argument
    add("--whole-text", action="store_true", help="let rewards see prompt and response together")
    add("--reward-device", default="auto", metavar="auto|cpu|cuda", help="of reward models")
    add("--reward-batch-size", type=int, default=32, metavar="N", help="responses of one call (default 32)")
    add(
        "--reward-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="what takes longer for one batch is taken to hang (default 600)",
    )
    add_guidance_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    from vas_engine.errors import InvalidArgumentError
    from vas_engine.training.collect import CollectConfig, collect
    from vas_engine.training.prompts import load_prompts
    from vas_engine.training.rewards import RewardProcess

    guidance = read_guidance(args)
    if guidance and not args.weight:
        name, setting = next(iter(guidance.items()))
        raise InvalidArgumentError(f"--{name.replace('_', '-')}", setting, "is for guided sampling: add --weight")
    if args.weight and not args.value:
        raise InvalidArgumentError("--weight", args.weight[0], "no value is loaded; add --value NAME=FOLDER")
    settings = ("samples", "max_tokens", "seed", "shard_rows", "hidden_states", "partial_rewards")
    config = CollectConfig(**{name: getattr(args, name) for name in settings}, **guidance)
    prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.split)
    with RewardProcess(
        args.reward, whole_text=args.whole_text, device=args.reward_device, timeout=args.reward_timeout
    ) as process:
        llm = load_llm(args)
        try:
            rollouts = collect(
                llm, prompts, process.rewards, args.out, config, reward_batch_size=args.reward_batch_size
            )
        except KeyboardInterrupt:
            print(f"interrupted: what is finished lies in {args.out}; the same command goes on", file=sys.stderr)
            return 130
    summary = _summary(args.out, rollouts)
    print(json.dumps(summary, indent=2) if args.json else _readable(summary))
    return 0


def _summary(out: str, rollouts: Any) -> dict[str, Any]:
    names = rollouts.reward_names
    table = rollouts.rewards(names)
    ended = sum(rollout.finish_reason == "stop" for rollout in rollouts)
    summary = {
        "out": out,
        "rollouts": len(rollouts),
        "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "ended": ended / len(rollouts),
        "rewards": {
            name: {
                "mean": float(column.mean()),
                "std": float(column.std(correction=0)),
                "min": float(column.min()),
                "max": float(column.max()),
            }
            for name, column in zip(names, table.unbind(1), strict=True)
        },
    }
    if rollouts.header.policy:
        # Responses are the guided policy's own, so this mean estimates KL(π || π0).
        summary["kl"] = sum(rollout.log_ratio for rollout in rollouts) / len(rollouts)
    return summary


def _readable(summary: dict[str, Any]) -> str:
    lines = [f"{summary['rollouts']} responses, {summary['tokens']} tokens, {summary['ended']:.0%} ended by the model"]
    for name, reward in summary["rewards"].items():
        lines.append(f"  {name}: {reward['mean']:.3f} (standard deviation {reward['std']:.3f})")
        if reward["min"] == reward["max"] and summary["rollouts"] > 1:
            lines.append(f"  {name} is the same for every response: there is nothing in it that a value could learn")
    if "kl" in summary:
        lines.append(f"  about {summary['kl']:.2f} nats from the frozen model")
    return "\n".join([*lines, f"in {summary['out']}"])
