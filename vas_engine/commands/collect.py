"""`vas collect`: sample responses from a frozen model and score them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

EXAMPLES = """examples:
  vas collect MODEL --prompts prompts.txt --reward vader --out runs/mood
  vas collect MODEL --prompts chats.jsonl --reward length --reward mine=rewards:score --out runs/two

Give the same command again to go on with a run that was interrupted."""


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
    parser.add_argument("--prompts", required=True, help=".txt, .jsonl, .json, .yaml or .parquet file")
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="[NAME=]SPEC",
        help="vader, vader:pos-neg, a text statistic, hf:PATH#LABEL or module:function; may be repeated",
    )
    parser.add_argument("--out", required=True, help="folder of the rollouts")
    parser.add_argument("--samples", type=int, default=64, help="responses per prompt (default 64)")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest response (default 128)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-rows", type=int, default=512, help="responses per file (default 512)")
    parser.add_argument("--hidden-states", action="store_true", help="keep the model's final hidden states too")
    parser.add_argument("--whole-text", action="store_true", help="let rewards see prompt and response together")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="default: the model's own")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda")
    parser.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16")
    parser.add_argument("--max-num-seqs", type=int, metavar="N", help="responses that are sampled at once")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; the exit status is 130 after Ctrl-C."""
    from vas_engine.llm import LLM
    from vas_engine.training.collect import CollectConfig, collect
    from vas_engine.training.prompts import load_prompts
    from vas_engine.training.rewards import load_rewards

    config = CollectConfig(args.samples, args.max_tokens, args.seed, args.shard_rows, args.hidden_states)
    rewards = load_rewards(args.reward, whole_text=args.whole_text)
    prompts = load_prompts(args.prompts)
    llm = LLM(
        args.model,
        tokenizer=args.tokenizer,
        device=args.device,
        dtype=args.dtype,
        max_num_seqs=args.max_num_seqs,
    )
    try:
        rollouts = collect(llm, prompts, rewards, args.out, config)
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
    return {
        "out": out,
        "rollouts": len(rollouts),
        "tokens": sum(len(rollout.response_ids) for rollout in rollouts),
        "ended": ended / len(rollouts),
        "rewards": {
            name: {"mean": float(column.mean()), "std": float(column.std(correction=0))}
            for name, column in zip(names, table.unbind(1), strict=True)
        },
    }


def _readable(summary: dict[str, Any]) -> str:
    lines = [f"{summary['rollouts']} responses, {summary['tokens']} tokens, {summary['ended']:.0%} ended by the model"]
    for name, reward in summary["rewards"].items():
        lines.append(f"  {name}: {reward['mean']:.3f} (standard deviation {reward['std']:.3f})")
    return "\n".join([*lines, f"in {summary['out']}"])
