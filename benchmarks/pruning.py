"""Pruning in one shot against pruning in rounds: candidates evaluated, passes of the value network, time a step.

    python -m benchmarks.pruning                      the reader on the 135M shape, batch 1 and 16
    python -m benchmarks.pruning --kind side --json benchmarks/results/pruning.json

In one shot a step scores every candidate that could win given only that tilts lie in [low, high]. In rounds of m it
scores the m most promising ones of each sequence, prunes the rest with what came out, and goes on until nothing is
left. Rounds evaluate less but pass through the network more often, and a sequence waits for the slowest of its
batch. Counts come from selections of the sampler over logits of a model-like spread, with tilts drawn evenly from
the interval; times of a pass over so many rows from the real network; a step's time is the sum over its passes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contenders import SETTINGS, Assets
from benchmarks.record import circumstances, write
from vas_engine.model import AttentionBatch
from vas_engine.model.lm import CausalLM
from vas_engine.sampling import SamplingArrays, Selection, select
from vas_engine.values import load_value

BLOCK_SIZE = 16
LOGIT_SPREAD = 5.0  # standard deviation; the 20 best tokens then hold most of the probability


def select_steps(vocabulary: int, steps: int, candidates: int, seed: int) -> Selection:
    """Selections of `steps` independent steps."""
    rng = torch.Generator().manual_seed(seed)
    logits = LOGIT_SPREAD * torch.randn(steps, vocabulary, generator=rng)
    arrays = SamplingArrays.build(steps, seed=seed, position=np.arange(steps), num_candidates=candidates)
    return select(logits, np.arange(steps), arrays)


def count_rows(selection: Selection, interval: float, per_round: int | None, seed: int) -> list[list[int]]:
    """Candidates evaluated in each round of each step.

    Args:
        interval: high - low, in nats.
        per_round: candidates a round; None is one shot.
    """
    rng = np.random.default_rng(seed)
    return [
        _rounds(
            selection.log_probs[step, :count] + selection.noise[step, :count],
            rng.uniform(0.0, interval, count),
            interval,
            int(selection.tail[step]),
            per_round,
        )
        for step, count in enumerate(selection.count)
    ]


def _rounds(base: np.ndarray, tilt: np.ndarray, interval: float, tail: int, per_round: int | None) -> list[int]:
    """Rows of every round of one step; the tail's champion has a tilt of 0 in the middle of the interval, known."""
    low, high = base.copy(), base + interval
    if tail >= 0:
        low[tail] = high[tail] = base[tail] + interval / 2
    known = np.arange(len(base)) == tail
    rows: list[int] = []
    while True:
        open_ = np.flatnonzero(~known & (high >= low.max()))
        # The winner's value is the next state's, so it is evaluated even when it can no longer lose.
        if not len(open_):
            return rows
        chosen = open_[np.argsort(-high[open_])][:per_round]
        low[chosen] = high[chosen] = base[chosen] + tilt[chosen]
        known[chosen] = True
        rows.append(len(chosen))


def step_time(rounds: Sequence[list[int]], batch: int, seconds: Callable[[float], float]) -> tuple[float, float, float]:
    """Mean seconds, passes and rows a sequence of a batch's step, its sequences' rounds being taken together."""
    times, passes, rows = [], [], []
    for start in range(0, len(rounds) - batch + 1, batch):
        group = rounds[start : start + batch]
        depth = max(map(len, group))
        totals = [sum(each[turn] for each in group if turn < len(each)) for turn in range(depth)]
        times.append(sum(map(seconds, totals)))
        passes.append(depth)
        rows.append(sum(totals) / batch)
    return statistics.mean(times), statistics.mean(passes), statistics.mean(rows)


class Pass:
    """The value network over `rows` candidates of `batch` sequences, each `context` tokens long."""

    def __init__(self, folder: Path, kind: str, setting: str, context: int, batch: int) -> None:
        assets = Assets(folder, SETTINGS[setting])
        self.lm = CausalLM.load(assets.base, device="cpu")
        self.network: Any = load_value(assets.value(kind), self.lm)
        blocks = -(-(context + 1) // BLOCK_SIZE)
        self.lm.allocate(batch * blocks, BLOCK_SIZE)
        self.network.allocate(batch * blocks, BLOCK_SIZE)
        self.tables = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
        self.context, self.batch = context, batch

    def time(self, rows: int, repeats: int) -> float:
        """Median seconds."""
        users = min(rows, self.batch)
        counts = np.full(users, rows // users) + (np.arange(users) < rows % users)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        places = np.full(rows, self.context)
        hidden, owner = None, None
        if self.network.states:
            hidden = torch.randn(users, len(self.network.states) * self.lm.hidden_size, dtype=self.lm.dtype)
            owner = torch.from_numpy(np.repeat(np.arange(users), counts))
        tokens = torch.randint(3, self.lm.vocab_size, (rows,))
        taken = []
        for _ in range(repeats):
            batch = AttentionBatch.build(self.tables[:users], offsets, places, np.full(rows, -1))
            start = time.perf_counter()
            self.network.score(tokens, hidden, owner, batch)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)


def measure(kind: str, setting: str, batches: Sequence[int], context: int, repeats: int, steps: int) -> list[dict]:
    """One line a batch, interval and way of pruning."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        selection = select_steps(SETTINGS[setting].base.vocab, steps, 20, seed=0)
        network = Pass(Path(folder), kind, setting, context, max(batches))
        sizes = np.unique(np.geomspace(1, 21 * max(batches), 14).round().astype(int))
        network.time(int(sizes[-1]), 3)  # warming up
        known = [network.time(int(size), repeats) for size in sizes]
    for batch in batches:
        for interval in (1.0, 2.0, 3.0):
            for per_round in (None, 1, 2, 4):
                rounds = count_rows(selection, interval, per_round, seed=1)
                seconds, passes, rows = step_time(rounds, batch, lambda total: float(np.interp(total, sizes, known)))
                way = "one shot" if per_round is None else f"rounds of {per_round}"
                line = {"kind": kind, "batch": batch, "interval_nats": interval, "way": way}
                lines.append(line | {"milliseconds": 1e3 * seconds, "passes": passes, "evaluations": rows})
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", nargs="+", default=["reader", "side", "model"], help="of value network")
    parser.add_argument("--setting", choices=SETTINGS, default="135m", help="sizes of the models (135m)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--context", type=int, default=64, help="tokens of every sequence (64)")
    parser.add_argument("--repeats", type=int, default=30, help="passes timed of each size (30)")
    parser.add_argument("--steps", type=int, default=1600, help="steps counted (1600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_args(argv)
    lines = []
    for kind in options.kind:
        lines += measure(kind, options.setting, options.batch, options.context, options.repeats, options.steps)
    print(f"{'kind':<10}{'batch':>6}{'interval':>9}  {'way':<14}{'evaluations':>12}{'passes':>8}{'ms a step':>11}")
    for line in lines:
        print(
            f"{line['kind']:<10}{line['batch']:>6}{line['interval_nats']:>9}  {line['way']:<14}"
            f"{line['evaluations']:>12.1f}{line['passes']:>8.1f}{line['milliseconds']:>11.2f}"
        )
    if options.json:
        write(options.json, {"circumstances": circumstances(), "context": options.context, "lines": lines})
    return 0


if __name__ == "__main__":
    sys.exit(main())
