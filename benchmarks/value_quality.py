"""How good values get, and what that buys: data, λ, loss, kind and size of network, each with its KL efficiency.

    python -m benchmarks.value_quality MODEL --out runs/quality --json benchmarks/results/value_quality.json
    python -m benchmarks.value_quality MODEL --out runs/quality --rollouts 131072              some hours
    python -m benchmarks.value_quality MODEL --out runs/try --rollouts 2048 --responses 8      does it run at all?
    python -m benchmarks.value_quality MODEL --reward "mood=hf:runs/sentiment#positive" --out runs/mood

Reward: VADER's positive less negative share of 96 generated tokens, or another one; eight openings. Every run is judged
three ways: R² on held-out rollouts; the efficiency of its advantages on rollouts that no run of the study learns from,
which needs no decoding; and decoded rewards against exact KL at a few weights. What is finished in the folder is not
done again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import circumstances, write
from vas_engine import LLM, SamplingParams
from vas_engine.evaluation.best_of_n import best_of_n
from vas_engine.evaluation.measure import measure
from vas_engine.evaluation.optimum import Optimum
from vas_engine.training.advantages import Advantages, Candidates
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import make_batch, split
from vas_engine.training.collect import CollectConfig, collect
from vas_engine.training.fit import SUPPORT_BINS, FitConfig, fit, head_for
from vas_engine.training.network import make_network
from vas_engine.training.report import save_report
from vas_engine.training.rewards import RewardProcess, load_reward
from vas_engine.training.rollouts import Rollouts
from vas_engine.values import load_value
from vas_engine.values.artifact import save_value

OPENINGS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "Tom and Sam",
    "There was a little dog",
    "The sun was",
    "Lily had a",
    "Once there was a boy who",
    "In the forest",
)
MAX_TOKENS = 96
REWARD = "vader:pos-neg"
PARTIAL_REWARDS = 4
CANDIDATES = 20
# Weights in standard deviations of the reward: from a third of best-of-16's gain to beyond best-of-128's.
STRENGTHS = (2.0, 4.0, 6.5)
BASELINES = (4, 16, 64, 128)
SIZES = (2_048, 8_192, 32_768, 65_536)
# Responses that advantages are judged on, six times those of a training report: the error is 0.05 or so.
JUDGED, JUDGED_AT_ONCE = 3_072, 32


# What the study arrived at for a whole model; the others change one thing each.
RECIPE = {"epochs": 1, "weight_decay": 0.05, "ema": 0.998, "batch_tokens": 6_656, "consistency": 50.0}


@dataclass(frozen=True)
class Run:
    """One value to train.

    Attributes:
        samples: rollouts, held-out ones included. settings: of FitConfig, beside the recipe's. sizes: of the network.
        head: "plain", "two-hot" or "hl-gauss". bins: atoms of a distribution.
        partial: whether the rewards of beginnings are used.
        teacher: name of the run that it is distilled from.
        candidates: so many of each step's tokens when it is decoded.
        value: name of the run whose value it is, where nothing is trained.
    """

    name: str
    kind: str
    samples: int
    settings: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    head: str = "plain"
    bins: int = SUPPORT_BINS
    partial: bool = True
    teacher: str | None = None
    candidates: int = CANDIDATES
    value: str | None = None


def plan(most: int) -> list[Run]:
    """What is compared, on at most so many rollouts."""
    usual = min(most, 32_768)
    best = Run(f"model, {most}", "model", most)
    runs = [best] + [Run(f"model, {size}", "model", size) for size in SIZES if size < most]
    networks: list[tuple[str, dict[str, int]]] = [
        ("reader", {}),
        ("reader", {"queries": 4}),
        ("side", {}),
        ("side", {"width": 32}),
        ("side", {"width": 96, "depth": 4}),
    ]
    for kind, sizes in networks:
        label = f"{kind} {' '.join(f'{key} {value}' for key, value in sizes.items())}".strip()
        # A teacher's 20 candidates at each of four states are as many rows again as the response has.
        runs.append(Run(f"{label}, distilled", kind, usual // 2, {"teacher_positions": 4}, sizes, teacher=best.name))
        if not sizes:
            runs.append(Run(f"{label}, direct", kind, usual))
    runs.append(Run(f"side, {most}, distilled", "side", most, {"teacher_positions": 4}, teacher=best.name))
    changes: dict[str, dict[str, Any]] = {
        "no consistency": {"consistency": 0.0},
        "consistency 15": {"consistency": 15.0},
        "λ 0.5": {"lam": 0.5},
        "λ 0.95": {"lam": 0.95},
        "small batches": {"batch_tokens": 2_048},
    }
    runs += [Run(f"model, {usual}, {name}", "model", usual, settings) for name, settings in changes.items()]
    whole = {"no partial rewards, λ 1": {"consistency": 0.0}, "no partial rewards, λ 0.9": {"lam": 0.9}}
    runs += [Run(f"model, {usual}, {name}", "model", usual, s, partial=False) for name, s in whole.items()]
    # Distributions are learnt from whole rewards, with which strong consistency does harm.
    alone = {"consistency": 0.0}
    runs += [Run(f"model, {usual}, {head}", "model", usual, alone, head=head) for head in ("two-hot", "hl-gauss")]
    # How strong should it be where responses are few? Smaller batches, as more steps help there.
    few, small = SIZES[0], {"batch_tokens": 2_048, "ema": 0.99}
    for epochs in (1, 4):
        for strength in (0, 5, 15, 50):
            settings = small | {"consistency": float(strength), "epochs": epochs}
            runs.append(Run(f"model, {few}, consistency {strength}, {epochs} small", "model", few, settings))
    runs.append(Run(f"{best.name}, 64 candidates", "model", most, candidates=64, value=best.name))
    # For a reward of yes or no.
    return [*runs, Run(f"model, {usual}, two atoms", "model", usual, head="two-hot", bins=2)]


def unseen(rollouts: Rollouts, own: Sequence[int]) -> list[int]:
    """Places of the rollouts from which neither a value fitted to its ``own`` has learnt nor one fitted to all; the
    last responses to each prompt come last."""
    config = FitConfig()
    held = set(split(rollouts, config.holdout, config.holdout_by, config.seed)[1])
    if len(own) < len(rollouts):
        held -= set(own)
    # Rollouts lie prompt by prompt.
    return sorted(held, key=lambda index: index % (len(rollouts) // len(OPENINGS)))


def value_folder(study: Path, name: str) -> Path:
    """Where a run's value lies."""
    return study / "values" / name.replace(" ", "_").replace(",", "")


class Study:
    """Rollouts, trained values and measurements in one folder."""

    def __init__(
        self,
        model: str,
        folder: Path,
        samples: int,
        responses: int,
        reward: str,
        strengths: Sequence[float],
        decoding: bool,
    ) -> None:
        self.model, self.folder, self.responses = model, folder, responses
        self.strengths, self.decoding = strengths, decoding
        self.llm = LLM(model, max_num_seqs=512)
        self.lm, self.reward = self.llm.lm, load_reward(reward)
        start, before = time.monotonic(), (folder / "rollouts").exists()
        per_prompt = -(-samples // len(OPENINGS))
        config = CollectConfig(
            samples=per_prompt, max_tokens=MAX_TOKENS, shard_rows=4096, partial_rewards=PARTIAL_REWARDS
        )
        with RewardProcess([reward]) as process:
            self.rollouts = collect(self.llm, OPENINGS, process.rewards, folder / "rollouts", config)
        self.collect_seconds = None if before else time.monotonic() - start
        rewards = self.rollouts.rewards([self.reward.name])[:, 0]
        prompts = torch.tensor([rollout.prompt_index for rollout in self.rollouts])
        self.pools = [rewards[prompts == prompt].tolist() for prompt in range(len(OPENINGS))]
        self.spread = float(rewards.std())
        self.optimum = Optimum(self.pools)

    def part(self, samples: int) -> Rollouts:
        """So many rollouts, evenly from all prompts."""
        return self._chosen(self._places(samples))

    def _places(self, samples: int) -> list[int]:
        step = len(self.rollouts) / samples
        return [int(index * step) for index in range(samples)]

    def _chosen(self, places: Sequence[int]) -> Rollouts:
        return dataclasses.replace(self.rollouts, rollouts=[self.rollouts.rollouts[place] for place in places])

    def base(self) -> dict[str, Any]:
        """The base and best-of-n."""
        means = [sum(pool) / len(pool) for pool in self.pools]
        lines = {"base": {"reward": sum(means) / len(means), "kl": 0.0}}
        for n in BASELINES:
            if n <= min(map(len, self.pools)):
                reward = best_of_n(self.pools, n)
                lines[f"best of {n}"] = {"reward": asdict(reward), "optimum_kl": self.optimum.kl_at(reward.mean)}
        return lines

    def run(self, run: Run) -> dict[str, Any]:
        """Train, judge and decode; what an earlier call finished is read."""
        place = value_folder(self.folder, run.value or run.name)
        done, source = value_folder(self.folder, run.name) / "study.json", place / "study.json"
        if done.exists():
            line = json.loads(done.read_text(encoding="utf-8"))
        elif run.value is not None:
            line = json.loads(source.read_text(encoding="utf-8")) | {"run": asdict(run), "points": []}
        else:
            line = self._train(run, place)
            write(done, line)
        if "advantages" not in line:
            line["advantages"] = self._judge(place, run.samples)
            write(done, line)
        if self.decoding and not line["points"]:
            tilts = ("mean", "optimal") if run.head != "plain" else ("mean",)
            line["points"] = [
                self._decode(place, strength, tilt, run.candidates) for tilt in tilts for strength in self.strengths
            ]
            write(done, line)
        return line

    def _train(self, run: Run, place: Path) -> dict[str, Any]:
        rollouts = self.part(run.samples)
        if not run.partial:
            header = rollouts.header
            header = dataclasses.replace(header, settings=header.settings | {"partial_rewards": 0})
            rollouts = dataclasses.replace(rollouts, header=header)
        settings = RECIPE | run.settings | ({"loss": run.head} if run.head != "plain" else {})
        config = FitConfig(**settings)
        head = head_for(
            rollouts, self.reward.name, distributional=run.head != "plain", bins=run.bins, sigma=config.spread
        )
        backbone = self.model if run.kind == "model" else None
        network = make_network(self.lm, run.kind, [head], tokenizer=self.llm.tokenizer, backbone=backbone, **run.sizes)
        teacher = load_value(value_folder(self.folder, run.teacher), self.lm) if run.teacher else None
        report = fit(self.lm, network, rollouts, config, teacher=teacher)
        save_value(place, network)
        save_report(place, report)
        return {"run": asdict(run), "training": report.to_dict(), "points": []}

    def _judge(self, place: Path, samples: int) -> dict[str, Any]:
        """The advantages of a value, on rollouts that it has not seen."""
        rollouts = self._chosen(unseen(self.rollouts, self._places(samples))[-JUDGED:])
        rewards = rollouts.rewards([self.reward.name])
        network = load_value(place, self.lm)
        base, found = FrozenBase(self.lm, [network]), Advantages(rollouts, rewards)
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(rollouts), JUDGED_AT_ONCE):
            indices = list(range(start, min(start + JUDGED_AT_ONCE, len(rollouts))))
            batch = make_batch(rollouts, indices, rewards, self.lm.device)
            base.take(batch)
            found.add(base, network, batch, Candidates.find(base, batch, generator))
        [report] = found.reports()
        assert report is not None
        return asdict(report)

    def _decode(self, place: Path, strength: float, tilt: str, candidates: int) -> dict[str, Any]:
        llm = LLM(self.model, values={"value": place}, max_num_seqs=256)
        weight = strength / self.spread
        params = SamplingParams(max_tokens=MAX_TOKENS, values={"value": weight}, num_candidates=candidates, tilt=tilt)
        found = measure(llm, OPENINGS, params, [self.reward], samples=self.responses, seed=7)
        reward, kl = found.rewards[self.reward.name], found.kl
        assert kl is not None
        return {
            "weight": weight,
            "tilt": tilt,
            "reward": asdict(reward),
            "kl": asdict(kl),
            "efficiency": self.optimum.kl_at(reward.mean) / kl.mean,
            "perplexity": found.perplexity,
            "flops_per_token": found.flops_per_token,
        }


def draw(path: Path, record: dict[str, Any], optimum: Optimum) -> None:
    """Reward against KL of every run, under the optimum's curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    axes.plot(*optimum.curve(), color="black", label="optimum")
    for line in record["runs"]:
        for tilt in dict.fromkeys(point["tilt"] for point in line["points"]):
            points = [point for point in line["points"] if point["tilt"] == tilt]
            kl, rewards = [p["kl"]["mean"] for p in points], [p["reward"]["mean"] for p in points]
            label = line["run"]["name"] + (", optimal tilt" if tilt == "optimal" else "")
            axes.plot(kl, rewards, marker="o", markersize=3, linewidth=1, label=label)
    for name, found in record["base"].items():
        if name.startswith("best of"):
            axes.axhline(found["reward"]["mean"], color="grey", linewidth=0.5)
            axes.text(0, found["reward"]["mean"], f" {name}", fontsize=7, color="grey")
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set(xlabel="KL to the base, nats per response", ylabel=f"reward ({record['reward']})")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.value_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="the base model")
    parser.add_argument("--out", type=Path, required=True, help="folder of rollouts and values")
    parser.add_argument("--reward", default=REWARD, metavar="SPEC", help=f"as `vas collect` takes it ({REWARD})")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs, in this order")
    parser.add_argument("--no-decoding", action="store_true", help="train and judge alone")
    parser.add_argument("--responses", type=int, default=64, help="decoded for each opening and weight (64)")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=STRENGTHS, metavar="W", help="weights, in deviations"
    )
    parser.add_argument("--rollouts", type=int, default=32_768, metavar="N", help="at most so many (32768)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well, and a plot beside")
    options = parser.parse_args(argv)
    runs = plan(options.rollouts)
    if options.only:
        known = {run.name: run for run in runs}
        unknown = [name for name in options.only if name not in known]
        if unknown:
            parser.error(f"--only: no run {unknown[0]!r}; there are: {'; '.join(known)}")
        runs = [known[name] for name in options.only]
    study = Study(
        options.model,
        options.out,
        options.rollouts,
        options.responses,
        options.reward,
        options.strengths,
        not options.no_decoding,
    )
    base = study.base()
    print(f"{'run':<36}{'R²':>6}{'adv.':>6}{'drift':>7}   reward at KL (efficiency)")
    lines = []
    for run in runs:
        line = study.run(run)
        lines.append(line)
        [head] = line["training"]["heads"].values()
        advantages = line["advantages"]
        points = "  ".join(
            f"{p['reward']['mean']:.3f} at {p['kl']['mean']:.2f} ({p['efficiency']:.2f})" for p in line["points"]
        )
        print(
            f"{run.name:<36}{head['r_squared']:>6.3f}{advantages['efficiency']:>6.2f}{advantages['drift']:>7.2f}   "
            f"{points}",
            flush=True,
        )
    if options.json:
        record = {"circumstances": circumstances(), "model": Path(options.model).name, "reward": options.reward}
        record |= {"collect_seconds": study.collect_seconds, "base": base, "runs": lines}
        write(options.json, record)
        draw(options.json.with_suffix(".svg"), record, study.optimum)
    return 0


if __name__ == "__main__":
    sys.exit(main())
