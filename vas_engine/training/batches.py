"""Rollouts cut into padded batches, and split into a part to train on and one held out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.returns import importance_weights
from vas_engine.training.rollouts import Rollouts

__all__ = ["Batch", "make_batch", "plan_batches", "split"]

HOLDOUT_UNITS = ("auto", "prompt", "sample")
# With fewer prompts held out than this their own differences would drown everything else.
LEAST_HELDOUT_PROMPTS = 5
# Batches are cut from this many batches' worth of rollouts sorted by length: little padding, still well mixed.
SORTED_BATCHES = 16


@dataclass(frozen=True)
class Batch:
    """Rollouts as tensors, B of them, padded on the right to T tokens.

    Attributes:
        indices: their places among all rollouts.
        token_ids: int64 [B, T], prompt and response. lengths: int64 [B].
        first: int64 [B], the prompt's last position: the first state that is valued.
        rewards: float32 [B, M].
        weights: float32 [B, T], how much each state counts: 1, or its importance weight where values guided the
            sampling.
    """

    indices: Sequence[int]
    token_ids: torch.Tensor
    lengths: torch.Tensor
    first: torch.Tensor
    rewards: torch.Tensor
    weights: torch.Tensor

    def rewarded(self, rewards: torch.Tensor) -> Batch:
        """The same batch, and the very same tokens, with other rewards, given for all rollouts: [rollouts, M]."""
        chosen = rewards[list(self.indices)].float()
        return replace(self, rewards=chosen.to(self.token_ids.device))

    def mean(self, losses: torch.Tensor) -> torch.Tensor:
        """[B, T, M] -> [M], over the states that are valued, weighted."""
        weights = self.weights[self.mask]
        return weights @ losses[self.mask] / weights.sum()

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw states of each response, without repetition, among those that a token follows.

        Returns:
            Their positions, int64 [B, P], P at most ``count``; and whether they exist, bool [B, P].
        """
        positions = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        open_ = (positions >= self.first[:, None]) & (positions < self.last[:, None])
        draws = torch.rand(open_.shape, generator=generator).to(open_.device).masked_fill(~open_, -1.0)
        found = draws.topk(min(count, open_.shape[1]), -1)
        exist = found.values >= 0
        return torch.where(exist, found.indices, self.first[:, None]), exist

    @property
    def last(self) -> torch.Tensor:
        """int64 [B], the last position, EOS included: the state that the reward was given for."""
        return self.lengths - 1

    @property
    def mask(self) -> torch.Tensor:
        """bool [B, T], the states that are valued: from the prompt alone to the whole episode."""
        return self._from(self.first)

    @property
    def response_positions(self) -> torch.Tensor:
        """int64 [B, T], tokens of the response behind each valued state: 0 for the prompt alone."""
        return torch.arange(self.token_ids.shape[1], device=self.token_ids.device) - self.first[:, None]

    @property
    def last_quarter(self) -> torch.Tensor:
        """bool [B, T], of those the ones with more than three quarters of the response behind them."""
        return self._from(self.first + 3 * (self.last - self.first) // 4 + 1) | self._from(self.last)

    def _from(self, start: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(self.token_ids.shape[1], device=self.token_ids.device)
        return (positions >= start[:, None]) & (positions <= self.last[:, None])


def make_batch(
    rollouts: Rollouts,
    indices: Sequence[int],
    rewards: torch.Tensor,
    device: torch.device,
    ratio_clip: float = math.inf,
) -> Batch:
    """Pad some rollouts into one batch.

    Args:
        indices: which of them.
        rewards: of all rollouts, [rollouts, M].
        ratio_clip: largest importance weight.
    """
    rows = [rollouts.rollouts[index] for index in indices]
    tokens = [torch.tensor([*row.prompt_ids, *row.response_ids], dtype=torch.int64) for row in rows]
    lengths = torch.tensor([len(ids) for ids in tokens])
    first = torch.tensor([max(len(row.prompt_ids) - 1, 0) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    weights = torch.ones(padded.shape)
    for place, row in enumerate(rows):
        if row.log_ratios is not None:
            states = importance_weights(torch.tensor(row.log_ratios), ratio_clip)
            weights[place, int(first[place]) : int(lengths[place])] = states
    padded, lengths, first, weights = (tensor.to(device) for tensor in (padded, lengths, first, weights))
    return Batch(indices, padded, lengths, first, torch.empty(0), weights).rewarded(rewards)


def plan_batches(
    lengths: Sequence[int],
    indices: Sequence[int],
    batch_tokens: int,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Group rollouts of similar length into batches of at most ``batch_tokens`` padded tokens (or of one).

    Args:
        lengths: tokens of every rollout.
        indices: the ones to group.
        generator: shuffles them; without one the plan goes by length alone.
    """
    order = list(indices)
    if generator is None:
        return _cut(sorted(order, key=lambda index: lengths[index]), lengths, batch_tokens)
    order = [order[place] for place in torch.randperm(len(order), generator=generator).tolist()]
    mean = sum(lengths[index] for index in order) / max(len(order), 1)
    chunk = max(int(SORTED_BATCHES * batch_tokens / max(mean, 1.0)), 1)
    batches: list[list[int]] = []
    for start in range(0, len(order), chunk):
        piece = sorted(order[start : start + chunk], key=lambda index: lengths[index])
        batches += _cut(piece, lengths, batch_tokens)
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


def _cut(order: list[int], lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        # In ascending order the newcomer is the longest, so it sets the width.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def split(rollouts: Rollouts, holdout: float, by: str, seed: int) -> tuple[list[int], list[int], str]:
    """Choose the rollouts to hold out.

    ``by="prompt"`` holds out all responses to some prompts, which asks how the value does on new prompts;
    ``"sample"`` some responses, whatever their prompt. ``"auto"`` is "prompt" where at least five prompts
    would be held out, else "sample".

    Returns:
        Indices to train on, indices held out, and which of the two ways was taken.

    Raises:
        TrainingDataError: too few rollouts (or prompts) to have two parts.
    """
    if by not in HOLDOUT_UNITS:
        raise InvalidArgumentError("holdout_by", by, f"use one of {', '.join(HOLDOUT_UNITS)}")
    groups = rollouts.prompt_groups
    prompts = list(dict.fromkeys(groups))
    if by == "auto":
        by = "prompt" if round(holdout * len(prompts)) >= LEAST_HELDOUT_PROMPTS else "sample"
    units = prompts if by == "prompt" else list(range(len(rollouts)))
    count = max(round(holdout * len(units)), 1)
    if len(units) < 2 or count >= len(units):
        raise TrainingDataError(
            f"cannot hold out {holdout:g} of {len(units)} {by}s: collect more, or change holdout or holdout_by"
        )
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    held = {units[place] for place in order[:count]}
    unit_of = groups if by == "prompt" else units
    heldout = [index for index, unit in enumerate(unit_of) if unit in held]
    train = [index for index, unit in enumerate(unit_of) if unit not in held]
    return train, heldout, by
