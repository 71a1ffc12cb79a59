"""The loss of value networks on TD(λ) returns."""

from __future__ import annotations

from typing import Any

import torch

from vas_engine.errors import InvalidArgumentError
from vas_engine.training.returns import discounted_rewards, lambda_returns

__all__ = ["consistency_loss", "value_loss"]


def value_loss(
    heads: Any,
    output: torch.Tensor,
    rewards: torch.Tensor,
    last: torch.Tensor,
    lam: float,
    gamma: float,
    bootstrap: torch.Tensor | None = None,
    sigma: float = 0.0,
) -> torch.Tensor:
    """Loss of every position and head against its TD(λ) target.

    A scalar head has the λ-return as target. A distributional head has the λ-mixture of distributions, of
    which the last is the reward itself, spread over its neighbouring atoms; so it learns the distribution of
    rewards, not of returns that have been averaged before.

    Args:
        heads: the network's heads.
        output: float32 [B, T, O], with autograd.
        rewards: float [B, M], in the heads' order.
        last: int64 [B], where each episode ends.
        lam, gamma: of the returns.
        bootstrap: output [B, T, O] whose predictions the targets use where λ < 1; by default ``output``
            itself.
        sigma: how targets are spread over atoms: 0 for two-hot, else HL-Gauss (see `Heads.spread`).

    Returns:
        float32 [B, T, M]; what it says outside the episode's trained positions means nothing.

    Raises:
        InvalidArgumentError: λ < 1 and γ < 1 with a distributional head, which would need its atoms moved.
    """
    rewards = rewards.to(output.dtype)
    if lam == 1.0:
        return heads.loss(output, discounted_rewards(rewards, last, output.shape[1], gamma), sigma)
    predictions = (output if bootstrap is None else bootstrap).detach()
    losses = heads.loss(output, lambda_returns(heads.mean(predictions), rewards, last, lam, gamma), sigma)
    columns = list(losses.unbind(-1))
    for index, (part, distributional) in enumerate(zip(heads.slices, heads.distributional, strict=True)):
        if distributional:
            if gamma != 1.0:
                raise InvalidArgumentError("gamma", gamma, "a distributional head with lam < 1 needs gamma=1")
            spread = heads.spread(index, rewards[:, index], sigma)
            mixture = lambda_returns(predictions[..., part].softmax(-1), spread, last, lam)
            columns[index] = -(mixture * output[..., part].log_softmax(-1)).sum(-1)
    return torch.stack(columns, -1)


def consistency_loss(values: torch.Tensor, last: torch.Tensor, gamma: float) -> torch.Tensor:
    """Half the squared step from each state to the next, ½ (V_t − γ V_{t+1})², V_{t+1} taken as given.

    What a token was worth is often seen some tokens late. V is right on average all the same and its R² hardly tells,
    but credit that comes late comes to all candidates of a state alike, and steers nothing. Under the base model V is a
    martingale, so its steps are noise around zero, and their size is what this makes small: TD(0), beside the returns
    that keep V where it belongs.

    Args:
        values: float32 [B, T, M], with autograd.
        last: int64 [B], where each episode ends; the state there has no next.

    Returns:
        float32 [B, T, M] in squares of the values' unit, 0 from ``last`` on.
    """
    steps = values - gamma * torch.cat([values[:, 1:], values[:, -1:]], 1).detach()
    places = torch.arange(values.shape[1], device=values.device)
    return 0.5 * steps.square() * (places < last[:, None])[..., None]
