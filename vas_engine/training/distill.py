"""A strong value teaches a network, over all candidates and not only the tokens that were taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.model.branches import Branches
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import Batch
from vas_engine.training.config import FitConfig

__all__ = ["Lesson", "Teacher"]

# Differences smaller than this share of the spread of values are rounding.
LEAST_SPREAD = 1e-6


@dataclass(frozen=True, eq=False)
class Lesson:
    """What a teacher says of one batch.

    Attributes:
        branches: the candidates, at P states of each response.
        weights: float32 [B, P, K]: how much each candidate counts. They sum to 1 over the candidates of a state,
            and are 0 for states that do not exist.
        states: head output at the states of the responses, float32 [B, T, O].
        candidates: head output behind the candidates, float32 [B, P, K, O].
    """

    branches: Branches
    weights: torch.Tensor
    states: torch.Tensor
    candidates: torch.Tensor


class Teacher:
    """A value that knows the rewards wanted, run on the same batches as its pupils.

    What steers decoding is the difference between the candidates of one state, w V(s∘a), to which the level of
    that state adds nothing; yet differences are a small part of the variance of V over all states, and a plain
    squared error would spend a small network on the rest. With D = V_pupil − V_teacher and weights p over the
    candidates of a state, E_p[D²] = (E_p D)² + Var_p(D): a level and differences. The second is, to second order,
    the KL between the guided policies, ½ w² Var_p(D). Each is counted in units of the teacher's own variance of the
    same kind, so that they weigh the same: as shares of what there is to learn.

    The weights are p ∝ π0(a | s)^(1 / temperature) over the base model's most probable tokens: those whose values
    decoding asks for.

    Args:
        network: bound to the base model; not changed.
        base: of the fit.
    """

    def __init__(self, network: Any, base: FrozenBase, config: FitConfig) -> None:
        self.network, self.base, self.config = network, base, config
        self.network.eval()
        self.levels = self.spreads = torch.empty(0)

    def columns(self, heads: Any) -> list[int]:
        """Of each of a pupil's heads the teacher's head for the same reward.

        Raises:
            InvalidArgumentError: a reward that the teacher does not know.
        """
        known = [head.reward or head.name for head in self.network.heads.configs]
        wanted = [head.reward or head.name for head in heads.configs]
        for reward in wanted:
            if reward not in known:
                raise InvalidArgumentError("teacher", known, f"has no head for the reward {reward!r}")
        return [known.index(reward) for reward in wanted]

    @torch.no_grad()
    def teach(self, batch: Batch, generator: torch.Generator) -> Lesson:
        """Draw states of the batch, take the base model's best candidates there, and value all of it."""
        places, exist = batch.draw(self.config.teacher_positions, generator)
        logits = self.base.logits_at(batch, places)
        best = logits.topk(min(self.config.teacher_candidates, logits.shape[-1]), -1)
        weights = torch.softmax(best.values / self.config.teacher_temperature, -1) * exist[..., None]
        branches = Branches(places, best.indices)
        output = self.network.train_values(self.base, batch.token_ids, batch.lengths, branches)
        return Lesson(branches, weights, *branches.split(output))

    def measure(self, batches: Sequence[Batch], generator: torch.Generator) -> None:
        """Find out how much the teacher's values vary, between states and between candidates.

        Raises:
            TrainingDataError: between candidates they do not.
        """
        heads = self.network.heads
        values: list[torch.Tensor] = []
        spread, states = torch.zeros(len(heads.configs), dtype=torch.float64), 0.0
        for batch in batches:
            self.base.take(batch)
            lesson = self.teach(batch, generator)
            values.append(heads.mean(lesson.states)[batch.mask].double())
            spread += differences(heads.mean(lesson.candidates), lesson.weights).sum((0, 1)).cpu()
            states += float(lesson.weights.sum())
        self.levels = torch.cat(values).var(0, correction=0).float()
        self.spreads = (spread / max(states, 1.0)).float().to(self.levels.device)
        if bool((self.spreads <= LEAST_SPREAD * self.levels).any()):
            raise TrainingDataError("the teacher's values do not differ between candidates: it has nothing to teach")

    def loss(self, heads: Any, output: torch.Tensor, lesson: Lesson, batch: Batch) -> torch.Tensor:
        """What a pupil's output [B, T + P K, O] has yet to learn, one number for each head, [M]; with autograd."""
        columns, theirs = self.columns(heads), self.network.heads
        states, candidates = lesson.branches.split(output)
        levels, spreads = self.levels[columns], self.spreads[columns]
        away = heads.mean(states) - theirs.mean(lesson.states)[..., columns]
        there = heads.mean(candidates) - theirs.mean(lesson.candidates)[..., columns]
        count = lesson.weights.sum().clamp_min(1.0)
        shift = (lesson.weights[..., None] * there).sum(2).square().sum((0, 1)) / count
        apart = differences(there, lesson.weights).sum((0, 1)) / count
        losses = 0.5 * (away[batch.mask].square().mean(0) + shift) / levels + 0.5 * apart / spreads
        for index, column in enumerate(columns):
            if self.knows_distribution(heads, index):
                part, known = heads.slices[index], theirs.slices[column]
                at_states = _cross_entropy(states[..., part], lesson.states[..., known])[batch.mask].mean()
                at_candidates = _cross_entropy(candidates[..., part], lesson.candidates[..., known])
                extra = at_states + (lesson.weights * at_candidates).sum() / count
                losses = losses.index_add(0, torch.tensor([index], device=losses.device), extra[None])
        return losses

    def knows_distribution(self, heads: Any, index: int) -> bool:
        """Whether the teacher's head for a pupil's distributional head has the same atoms, and so teaches it whole."""
        support = heads.configs[index].support
        column = self.columns(heads)[index]
        return support is not None and support == self.network.heads.configs[column].support


def differences(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted variance over the candidates of each state: [B, P, K, M], [B, P, K] -> [B, P, M] (0 without state)."""
    weights = weights[..., None]
    return (weights * (values - (weights * values).sum(2, keepdim=True)).square()).sum(2)


def _cross_entropy(output: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    return -(known.softmax(-1) * output.log_softmax(-1)).sum(-1)
