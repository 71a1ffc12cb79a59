"""What values would gain by guiding, from held-out responses alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from vas_engine.model.branches import Branches
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import Batch
from vas_engine.training.report import AdvantageReport
from vas_engine.training.rollouts import Rollouts

__all__ = ["CANDIDATES", "STATES", "Advantages", "Candidates"]

STATES, CANDIDATES = 16, 20
# Advantages smaller than this, in variances of the reward, are rounding.
LEAST_SPREAD = 1e-12


@dataclass(frozen=True, eq=False)
class Candidates:
    """What the base model would say next at some states of a batch.

    Attributes:
        branches: its most probable tokens there.
        probabilities: of these, float64 [B, P, K].
        exist: bool [B, P], which of the states there are.
    """

    branches: Branches
    probabilities: torch.Tensor
    exist: torch.Tensor

    @classmethod
    @torch.no_grad()
    def find(cls, base: FrozenBase, batch: Batch, generator: torch.Generator) -> Candidates:
        """Draw states of the batch that the base has taken."""
        places, exist = batch.draw(STATES, generator)
        logits = base.logits_at(batch, places)
        best = logits.double().softmax(-1).topk(min(CANDIDATES, logits.shape[-1]), -1)
        return cls(Branches(places, best.indices), best.values, exist)


class Advantages:
    """The KL efficiency of the mean tilt at small weights, without decoding.

    With A the advantages over the base model's best candidates, centred by its probabilities at each state, and R the
    reward, a weight w gains w Σ_t Cov(A_t, R) and costs ½ w² Σ_t Var(A_t) nats. The best possible advantages gain the
    whole variance of R among responses to one prompt, at ½ w² of it. So the nats of the optimum at the same reward
    are (Σ Cov)² / (Σ Var · Var R) of those spent: the efficiency. What a value recognises some tokens late lifts all
    candidates alike and steers nothing: that is the drift, Σ_t (Σ_a π0 V(s∘a) − V(s))², which R² does not punish.

    A few states of each response stand for all of them.

    Args:
        rollouts: the frozen model's own, several to a prompt.
        rewards: those of the heads, float64 [rollouts, M].
    """

    def __init__(self, rollouts: Rollouts, rewards: torch.Tensor) -> None:
        self.noise = _variance_within(rewards, rollouts.prompt_groups)
        self.parts: list[torch.Tensor] = []

    @torch.no_grad()
    def add(self, base: FrozenBase, network: Any, batch: Batch, candidates: Candidates) -> None:
        """Judge a network on a batch that the base has taken."""
        branches, exist = candidates.branches, candidates.exist
        places = branches.places
        output = network.train_values(base, batch.token_ids, batch.lengths, branches)
        states, values = (network.heads.mean(part).double() for part in branches.split(output))
        states = states.gather(1, places[..., None].expand(-1, -1, states.shape[-1]))
        mass = candidates.probabilities.sum(-1)[..., None]
        share = candidates.probabilities[..., None] / mass[..., None]
        mean = (share * values).sum(2)
        advantages = values - mean[:, :, None]
        following = batch.token_ids.gather(1, (places + 1).clamp(max=batch.token_ids.shape[1] - 1))
        taken = (branches.token_ids == following[..., None])[..., None]
        # A state's own value is a control variate: a centred advantage has mean 0 whatever it is multiplied by.
        left = batch.rewards[:, None].double() - states
        # Each state drawn stands for as many.
        counts = (batch.last - batch.first).double() / exist.sum(1).clamp_min(1)
        scale = (exist * counts[:, None])[..., None]
        gain = ((advantages * taken).sum(2) * left * scale).sum(1)
        spread = ((share * advantages.square()).sum(2) * mass * scale).sum(1)
        drift = ((mean - states).square() * scale).sum(1)
        self.parts.append(torch.stack([gain, spread, drift]).cpu())

    def reports(self) -> list[AdvantageReport | None]:
        """One for each head; None where nothing can be said (one response to each prompt, or all alike)."""
        found: list[AdvantageReport | None] = []
        table = torch.cat(self.parts, 1)
        for column, noise in enumerate(self.noise.tolist()):
            gain, spread, drift = (table[..., column] / noise).unbind() if noise > 0 else table[..., column].unbind()
            if not noise > 0 or not float(spread.mean()) > LEAST_SPREAD:
                found.append(None)
                continue
            # A negative gain pulls the reward down: that efficiency is worse than none.
            efficiency = float(gain.mean() * gain.mean().abs() / spread.mean())
            error = 2 * float(gain.mean().abs() * gain.std() / spread.mean()) / math.sqrt(len(gain))
            found.append(
                AdvantageReport(
                    efficiency, error, float(gain.mean()), float(spread.mean()), float(drift.mean()), len(gain)
                )
            )
        return found


def _variance_within(rewards: torch.Tensor, prompts: list[int]) -> torch.Tensor:
    """Of rewards [N, M] among responses to one prompt, the mean over prompts with several: [M], 0 without any."""
    groups, places = torch.tensor(prompts).unique(return_inverse=True)
    counts = torch.bincount(places).double()
    sums = torch.zeros(len(groups), rewards.shape[1], dtype=torch.float64).index_add_(0, places, rewards)
    means = sums / counts[:, None]
    squares = torch.zeros_like(sums).index_add_(0, places, (rewards - means[places]).square())
    several = counts > 1
    if not bool(several.any()):
        return torch.zeros(rewards.shape[1], dtype=torch.float64)
    return (squares[several] / (counts[several, None] - 1)).mean(0)
