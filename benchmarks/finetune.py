"""Fine-tuning by TRL, the rival of guided decoding: DPO on pairs of rollouts, RLOO or GRPO on samples of their own.

    python -m benchmarks.finetune dpo MODEL --rollouts runs/mood --reward mood --beta 0.1 --out runs/dpo
    python -m benchmarks.finetune rloo MODEL --rollouts runs/mood --reward mood --beta 0.05 --steps 300 --out runs/rloo
    vas evaluate MODEL ... --policy dpo:10=runs/dpo --policy rloo:20=runs/rloo

TRL runs in an environment of its own (--env), which the first call makes. `--out` becomes a Hugging Face folder with a
`training.json` of what it cost. All of a policy's data are the prompts, samples and rewards that a value is trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    out = Path(args.out)
    if out.exists():
        raise SystemExit(f"{out} exists already; choose a new folder")
    if find_spec("trl") is None:
        words = list(sys.argv[1:] if argv is None else argv)
        return subprocess.run([_python(Path(args.env)), __file__, *words]).returncode
    start = time.perf_counter()
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        spent = (_dpo if args.method == "dpo" else _online)(args, partial)
        spent["seconds"] = time.perf_counter() - start
        report = {**spent, "method": args.method, "trl": version("trl"), "settings": vars(args)}
        (partial / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.method}: {spent['train_rollouts']} rollouts, {spent['seconds']:.0f} s, in {out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("method", choices=("dpo", "rloo", "grpo"))
    add("model", help="folder of the frozen model")
    add("--rollouts", required=True, help="folder that `vas collect` wrote; of the online methods only its prompts")
    add("--reward", required=True, help="name of a reward of the rollouts")
    add("--out", required=True, help="folder of the policy")
    add("--beta", type=float, default=0.1, help="weight of the divergence (default 0.1)")
    add("--steps", type=int, default=200, help="updates (default 200)")
    add("--batch", type=int, default=64, help="pairs or samples of an update (default 64)")
    add("--group", type=int, default=8, help="samples of a prompt that an online method compares (default 8)")
    add("--lr", type=float, default=1e-4, help="peak learning rate (default 1e-4)")
    add("--seed", type=int, default=0)
    add("--env", default=str(ROOT / ".venv-trl"), help="environment of TRL, made if there is none (default .venv-trl)")
    return parser


def _python(env: Path) -> str:
    """The environment's Python; the environment is made with this one's torch."""
    python = env / "bin" / "python"
    if not python.exists():
        import torch

        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        packages = [f"torch=={torch.__version__.partition('+')[0]}", "trl", "--editable", f"{ROOT}[train]"]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    return str(python.absolute())


def _load(args: argparse.Namespace) -> tuple[Any, Any, Any]:
    """Rollouts, model (float32) and tokenizer; padding must be another token than the end, which is trained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vas_engine.training.rollouts import load_rollouts

    rollouts = load_rollouts(args.rollouts)
    rollouts.rewards([args.reward])
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return rollouts, model, tokenizer


def _common(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "trainer"),
        "per_device_train_batch_size": args.batch,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(args.steps // 20, 1),
        "beta": args.beta,
        "seed": args.seed,
        "bf16": False,
        "use_cpu": not _cuda(),
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": max(args.steps // 20, 1),
    }


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _finish(trainer: Any, tokenizer: Any, folder: Path) -> None:
    trainer.train()
    trainer.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(folder / "trainer", ignore_errors=True)


def _dpo(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Direct preference optimisation (Rafailov et al. 2023): of two rollouts of a prompt the better is chosen."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenTrainer(DPOTrainer):
        """On the rollouts' own tokens: TRL would spell the texts anew, and end also those that a limit cut."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    rollouts, model, tokenizer = _load(args)
    pairs = _pairs(rollouts, args.reward, args.steps * args.batch, random.Random(args.seed))
    config = DPOConfig(**_common(args, folder), max_length=None)
    trainer = TokenTrainer(model=model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    _finish(trainer, tokenizer, folder)
    return {"train_rollouts": len(rollouts)}


def _pairs(rollouts: Any, reward: str, count: int, chooser: random.Random) -> list[dict[str, list[int]]]:
    """Pairs of different reward, every prompt's in turn; at most `count`, and each rollout's about equally often."""
    by_prompt: dict[int, list[Any]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(rollout.prompt_index, []).append(rollout)
    pairs: list[dict[str, list[int]]] = []
    for _ in range(count):
        own = by_prompt[list(by_prompt)[len(pairs) % len(by_prompt)]]
        worse, better = sorted(chooser.sample(own, 2), key=lambda rollout: rollout.rewards[reward])
        if worse.rewards[reward] == better.rewards[reward]:
            continue
        pairs.append(
            {"prompt_ids": better.prompt_ids, "chosen_ids": better.response_ids, "rejected_ids": worse.response_ids}
        )
    return pairs


def _online(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """REINFORCE with the other samples as baseline (RLOO, Ahmadian et al. 2024), or GRPO (Shao et al. 2024)."""
    import trl
    from datasets import Dataset

    from vas_engine.training.rewards import load_reward, score

    rollouts, model, tokenizer = _load(args)
    known = rollouts.header
    reward = load_reward(f"{args.reward}={known.rewards[args.reward]['spec']}")

    def worth(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return score(reward, prompts, completions)

    prompts = list(dict.fromkeys(rollout.prompt for rollout in rollouts))
    name = args.method.upper()
    config = getattr(trl, f"{name}Config")(
        **_common(args, folder),
        num_generations=args.group,
        max_completion_length=known.settings["max_tokens"],
        temperature=1.0,
        remove_unused_columns=False,
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        reward_funcs=[worth],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
    )
    _finish(trainer, tokenizer, folder)
    return {"train_rollouts": args.steps * args.batch}


if __name__ == "__main__":
    sys.exit(main())
