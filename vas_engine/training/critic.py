"""A critic that knows what a response has earned so far, and teaches values that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vas_engine.training.batches import Batch
from vas_engine.training.returns import lambda_returns
from vas_engine.training.rollouts import Rollouts
from vas_engine.values.heads import rms_norm

__all__ = ["Critic", "CriticLosses", "features_of"]

HIDDEN = 64
# Responses of one standard deviation that seem to say: the reward so far tells nothing.
DOUBT = 10.0


@dataclass(frozen=True)
class CriticLosses:
    """What each part of training with a critic has yet to learn: float32 [M], in variances of the rewards; autograd.

    Attributes:
        values: V against the λ-returns that bootstrap from the critic.
        critic: the critic against its own.
        guesses: the reward so far, as V's features tell it.
    """

    values: Tensor
    critic: Tensor
    guesses: Tensor


class Critic(nn.Module):
    """W(h, r, s): the value of a state for one who reads the reward r of the response so far beside V's own features h,
    and its share s of the longest response.

    Where r says much about the final reward, W is far better than V early in training, and less noisy than rewards are
    all along. It is used in training alone (an asymmetric critic: Pinto et al. 2018), in two ways: λ-returns
    bootstrap from it, at the states whose rewards are known, and h learns to tell r.

    Args:
        network: whose values are trained.
        rollouts: with partial rewards.
        train: which of them are trained on; moments are theirs.
        rewards: names of the rewards of its heads, M of them.
        seed: of the initial weights.

    Attributes:
        mean, std: float32 [M], of the final rewards: what returns and values are counted from and in. Discounting what
            is so counted would teach mean + γ^k (R - mean) instead of γ^k R; hence γ = 1.
        every: tokens from one partial reward to the next.
        partial: float32 [rollouts, parts, M], the reward so far less the mean of all beginnings of that length, since
            rewards that accumulate are far below the final ones until the end. In standard deviations of these or of
            the final rewards, whichever is larger: what hardly varies so early, or in few responses so long, is not
            blown up.
        earned: likewise, the final reward by the line that fits it best to the reward so far, for each length of a
            beginning on its own: so W starts from what r tells, be it all or nothing.
    """

    def __init__(
        self, network: Any, rollouts: Rollouts, train: Sequence[int], rewards: list[str], seed: int = 0
    ) -> None:
        super().__init__()
        whole = rollouts.rewards(rewards)[list(train)]
        device = next(network.heads.parameters()).device
        self.mean, self.std = (moment.float().to(device) for moment in (whole.mean(0), whole.std(0)))
        self.every = rollouts.header.part_tokens
        parts = rollouts.partial_rewards(rewards)
        ours = parts[list(train)]
        spread = (ours - ours.nanmean(0)).square().nanmean(0).sqrt()
        self.partial = (parts - ours.nanmean(0)) / torch.maximum(spread, self.std.cpu())
        final = ((whole - whole.mean(0)) / whole.std(0)).float()
        self.earned = _fitted(self.partial[list(train)], final, self.partial)
        self.longest = float(rollouts.header.settings["max_tokens"])
        width, count = network.heads.width, len(rewards)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(width + 2 * count + 1, HIDDEN)
            self.output = nn.Linear(HIDDEN, count)
            self.guess = nn.Linear(width, count)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.to(device)

    def forward(self, features: Tensor, rewards: Tensor, earned: Tensor, share: Tensor) -> Tensor:
        """[..., width], [..., M], [..., M], [..., 1] -> W [..., M]; it starts from `earned`."""
        seen = torch.cat([features, rewards, share, earned], -1)
        return earned + self.output(F.silu(self.hidden(seen)))

    def losses(self, heads: Any, output: Tensor, features: Tensor, batch: Batch, lam: float) -> CriticLosses:
        """Judge a batch.

        Args:
            heads: scalar ones, or of two atoms.
            output: [B, T, O] float32 of all states. features: [B, T, width], what it was made of.
            lam: λ from one partial reward to the next.
        """
        partial, earned = (table[list(batch.indices)].to(output.device) for table in (self.partial, self.earned))
        count = torch.arange(1, partial.shape[1] + 1, device=output.device)
        places = batch.first[:, None] + self.every * count
        known = (places < batch.last[:, None])[..., None]
        # What does not exist is read at the last state and masked.
        places = torch.minimum(places, batch.last[:, None])
        partial, earned = (torch.where(known, table, table.new_zeros(())) for table in (partial, earned))
        share = (self.every * count / self.longest).clamp(max=1.0).expand(len(places), -1)[..., None]
        there = rms_norm(_at(features, places))
        weights = batch.weights.gather(1, places)[..., None] * known
        values = (heads.mean(output) - self.mean) / self.std
        rewards = (batch.rewards - self.mean) / self.std

        with torch.no_grad():
            judged = self(there, partial, earned, share)
            spread = torch.zeros_like(values).scatter_(1, places[..., None].expand_as(judged), judged)
            marks = torch.zeros(values.shape[:2], dtype=torch.bool, device=output.device).scatter_(1, places, True)
            # The last state's reward is known: no bootstrap there.
            marks &= torch.arange(values.shape[1], device=output.device) < batch.last[:, None]
            after = lambda_returns(spread, rewards, batch.last, lam, known=marks)
            targets = torch.where(marks[..., None], (1 - lam) * spread + lam * after, after)
        # A state that is marked has W itself in its target: what the critic knows is carried over into V.
        plain = batch.mean(0.5 * (values - targets).square())
        own = 0.5 * (self(there, partial, earned, share) - _at(after, places)).square()
        guesses = 0.5 * (self.guess(there) - partial).square()
        total = weights.sum().clamp_min(1e-9)
        critic, guessed = ((weights * loss).sum((0, 1)) / total for loss in (own, guesses))
        return CriticLosses(plain, critic, guessed)


def _fitted(seen: Tensor, final: Tensor, partial: Tensor) -> Tensor:
    """Final rewards by the lines that fit best to those [N, M] of seen beginnings [N, K, M], for each of [P, K, M]."""
    known = ~seen.isnan()
    count, seen = known.sum(0), seen.nan_to_num()
    level = (known * final[:, None]).sum(0) / (count + DOUBT)
    slope = (seen * (final[:, None] - level)).sum(0) / (seen.square().sum(0) + DOUBT)
    return level + slope * partial


@contextmanager
def features_of(heads: nn.Module) -> Iterator[list[Tensor]]:
    """Meanwhile the list receives what the heads read, each time they run."""
    seen: list[Tensor] = []
    handle = heads.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


def _at(tensor: Tensor, places: Tensor) -> Tensor:
    """[B, T, C], [B, K] -> [B, K, C]."""
    return tensor.gather(1, places[..., None].expand(-1, -1, tensor.shape[-1]))
