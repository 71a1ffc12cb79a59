"""The epochs of a fit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from vas_engine.training.advantages import CANDIDATES, STATES, Advantages, Candidates
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import Batch, make_batch, plan_batches
from vas_engine.training.checkpoint import Checkpoint
from vas_engine.training.config import FitConfig
from vas_engine.training.distill import Lesson, Teacher, differences
from vas_engine.training.heldout import Heldout
from vas_engine.training.report import EpochReport, FitReport, HeadReport
from vas_engine.training.returns import discounted_rewards
from vas_engine.training.rollouts import Rollouts
from vas_engine.training.trainee import Trainee

__all__ = ["Course"]

# Enough held-out batches to know how much a teacher's values vary.
MEASURED_BATCHES = 16
# Held-out responses whose advantages are judged, at most; with fewer than the second an epoch is not chosen by them.
JUDGED_RESPONSES, LEAST_RESPONSES = 512, 256


class Course:
    """Networks going over the same batches together.

    All that is drawn by chance in an epoch (its batches, a teacher's states, dropout) follows from the seed and the
    epoch's number, so that a course taken up again goes on as it would have.
    """

    def __init__(
        self,
        base: FrozenBase,
        rollouts: Rollouts,
        config: FitConfig,
        train: Sequence[int],
        heldout: Sequence[int],
        trainees: Sequence[Trainee],
        teacher: Teacher | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.base, self.rollouts, self.config = base, rollouts, config
        self.train, self.heldout = train, heldout
        self.trainees, self.teacher, self.checkpoint = trainees, teacher, checkpoint
        self.lengths = [rollout.length for rollout in rollouts]
        generator = torch.Generator().manual_seed(config.seed)
        self.plans = [plan_batches(self.lengths, train, config.batch_tokens, generator) for _ in range(config.epochs)]
        self.heldout_plan = plan_batches(self.lengths, heldout, config.batch_tokens)
        self._judged: list[tuple[Batch, Candidates]] = []
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start, interruptions left out."""
        return self.before + time.monotonic() - self.started

    def run(self, resume: bool, use_tqdm: bool) -> None:
        """All epochs, or those that are left."""
        steps = [len(plan) for plan in self.plans]
        done = 0
        torch.manual_seed(self._seed(0))
        for trainee in self.trainees:
            trainee.begin(sum(steps))
        if resume and self.checkpoint:
            done, self.before = self.checkpoint.load(self.trainees)
        if self.teacher is not None:
            batches = [
                self._batch(indices) for indices in self.heldout_plan[:: -(-len(self.heldout_plan) // MEASURED_BATCHES)]
            ]
            self.teacher.measure(batches, self._generator(0))
        with tqdm(total=sum(steps), initial=sum(steps[:done]), desc="train", unit="batch", disable=not use_tqdm) as bar:
            for number in range(done + 1, len(steps) + 1):
                if self._patience_spent(number - 1):
                    break
                self._epoch(number, bar)
                if self.checkpoint:
                    self.checkpoint.save(number, self.seconds, self.trainees)

    def _epoch(self, number: int, bar: tqdm) -> None:
        torch.manual_seed(self._seed(number))
        generator = self._generator(number)
        totals, tokens = [0.0] * len(self.trainees), 0
        for trainee in self.trainees:
            trainee.network.train()
        for indices in self.plans[number - 1]:
            batch = self._batch(indices)
            self.base.take(batch)
            lesson = self.teacher.teach(batch, generator) if self.teacher else None
            weight = int(batch.mask.sum())
            tokens += weight
            for place, trainee in enumerate(self.trainees):
                totals[place] += weight * trainee.step(batch.rewarded(trainee.rewards), lesson)
            bar.update()
        shown = []
        reports = self.evaluate()
        for trainee, total, heads in zip(self.trainees, totals, reports, strict=True):
            scores = {name: head.r_squared for name, head in heads.items()}
            agreement = {name: head.agreement for name, head in heads.items() if head.agreement is not None}
            judged = {name: head.advantages for name, head in heads.items()}
            efficiency = {n: a.efficiency for n, a in judged.items() if a and a.responses >= LEAST_RESPONSES}
            chooses = efficiency if len(efficiency) == len(heads) else {}
            trainee.finish_epoch(EpochReport(number, total / tokens, scores, self.seconds, agreement, chooses))
            shown += [f"{name} {score:.3f}" for name, score in scores.items()]
        bar.set_postfix_str("R² " + ", ".join(shown))

    def _patience_spent(self, epoch: int) -> bool:
        patience = self.config.patience
        return patience is not None and all(epoch - trainee.best_epoch >= patience for trainee in self.trainees)

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(number))

    def _seed(self, number: int) -> int:
        return (self.config.seed * 1_000_003 + number) % 2**63

    def _batch(self, indices: list[int]) -> Batch:
        rewards = self.trainees[0].rewards
        return make_batch(self.rollouts, indices, rewards, self.base.device, self.config.ratio_clip)

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, HeadReport]]:
        """Each network on the held-out rollouts, the heads by name."""
        found = [Heldout() for _ in self.trainees]
        judges = self._judges()
        generator = self._generator(0)
        for trainee in self.trainees:
            trainee.network.eval()
        for indices in self.heldout_plan:
            batch = self._batch(indices)
            self.base.take(batch)
            lesson = self.teacher.teach(batch, generator) if self.teacher else None
            for trainee, heldout in zip(self.trainees, found, strict=True):
                with trainee.judged():
                    values, candidates = trainee.predict(batch, lesson)
                rewards = batch.rewarded(trainee.rewards).rewards
                returns = discounted_rewards(rewards, batch.last, values.shape[1], self.config.gamma)
                heldout.add(batch, values, returns)
                if lesson is not None and candidates is not None:
                    heldout.add_differences(*self._compared(trainee, lesson, candidates))
        if judges:
            self._judge(judges)
        judged = [judge.reports() for judge in judges] if judges else [None] * len(found)
        return [
            heldout.reports(trainee.network.config.heads, advantages)
            for trainee, heldout, advantages in zip(self.trainees, found, judged, strict=True)
        ]

    def _judges(self) -> list[Advantages]:
        """One for each network; none where there is nothing that they could judge."""
        if self.rollouts.header.policy or self.config.gamma != 1.0:
            return []
        return [Advantages(self.rollouts, trainee.rewards) for trainee in self.trainees]

    def _judge(self, judges: Sequence[Advantages]) -> None:
        for batch, candidates in self._cases():
            self.base.take(batch)
            for trainee, judge in zip(self.trainees, judges, strict=True):
                with trainee.judged():
                    judge.add(self.base, trainee.network, batch.rewarded(trainee.rewards), candidates)

    def _cases(self) -> list[tuple[Batch, Candidates]]:
        """Held-out responses and candidates in them, the same ones for all networks and epochs."""
        if not self._judged:
            step = max(len(self.heldout) // JUDGED_RESPONSES, 1)
            chosen = self.heldout[::step][:JUDGED_RESPONSES]
            # A candidate costs as much as a token.
            sizes = [length + STATES * CANDIDATES for length in self.lengths]
            generator = self._generator(0)
            for indices in plan_batches(sizes, chosen, self.config.batch_tokens):
                batch = self._batch(indices)
                self.base.take(batch)
                self._judged.append((batch, Candidates.find(self.base, batch, generator)))
        return self._judged

    def _compared(self, trainee: Trainee, lesson: Lesson, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.teacher is not None
        columns = self.teacher.columns(trainee.heads)
        known = self.teacher.network.heads.mean(lesson.candidates)[..., columns]
        spreads = (differences(part, lesson.weights).sum((0, 1)) for part in (values - known, known))
        missed, spread = spreads
        return missed, spread

    def reports(self, holdout_by: str, interrupted: bool) -> list[FitReport]:
        """What came of it; the networks hold their best weights from then on."""
        for trainee in self.trainees:
            trainee.restore_best()
        return [
            FitReport(
                kind=trainee.network.config.kind,
                parameters=trainee.parameters,
                heads=heads,
                epochs=trainee.epochs,
                best_epoch=trainee.best_epoch,
                train_rollouts=len(self.train),
                heldout_rollouts=len(self.heldout),
                holdout_by=holdout_by,
                seconds=self.seconds,
                base=self.base.source,
                settings=self._settings(trainee),
                teacher=None if self.teacher is None else self.teacher.network.config.kind,
                interrupted=interrupted,
            )
            for trainee, heads in zip(self.trainees, self.evaluate(), strict=True)
        ]

    def _settings(self, trainee: Trainee) -> dict[str, Any]:
        return dataclasses.asdict(trainee.config) | {"lr": trainee.lr, "critic": trainee.critic is not None}
