"""TD(λ) returns and how well values predict them."""

from __future__ import annotations

import torch

from vas_engine.errors import InvalidArgumentError

__all__ = ["discounted_rewards", "importance_weights", "lambda_returns", "r_squared"]


def lambda_returns(
    values: torch.Tensor,
    rewards: torch.Tensor,
    last: torch.Tensor,
    lam: float = 1.0,
    gamma: float = 1.0,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Targets of the values of an episode that is rewarded once, where it ends.

    With L the last position, G[L] = V[L] = reward, and before it G[p] = γ ((1 - λ) V[p + 1] + λ G[p + 1]):
    the forward view of TD(λ) (Sutton and Barto, 2nd edition, equation 12.3) without rewards on the way. λ = 1
    is Monte Carlo, G[p] = γ^(L - p) reward; λ = 0 is one-step TD. Position L, the episode with its EOS, has
    the reward itself as its target.

    The trailing dimension may hold several rewards, or the bins of distributions (of the reward, with γ = 1:
    then the result is the λ-mixture of the distributions).

    Args:
        values: predictions, float [B, T, M]; position p values the state of tokens 0..p. Not differentiated;
            what lies at or after position L is not read.
        rewards: float [B, M].
        last: L of each episode, int64 [B].
        lam: λ in [0, 1].
        gamma: discount per token, in [0, 1].
        known: bool [B, T], the states whose values are bootstrapped from; past others the return goes on as it is
            (λ = 1 there). None: all.

    Returns:
        Float [B, T, M]; zero after position L. Positions of the prompt get targets as well; leave them out of
        the loss.
    """
    for name, factor in (("lam", lam), ("gamma", gamma)):
        if not 0.0 <= factor <= 1.0:
            raise InvalidArgumentError(name, factor, "give a number from 0 to 1")
    returns = torch.zeros_like(values)
    following = bootstrap = torch.zeros_like(rewards)
    trusted = None
    for position in range(values.shape[1] - 1, -1, -1):
        if lam < 1.0:
            mixed = (1.0 - lam) * bootstrap + lam * following
            following = mixed if trusted is None else torch.where(trusted, mixed, following)
        # Where an episode ends its reward is known: it takes the place of the prediction. Beyond that nothing holds.
        ends, beyond = (last == position)[:, None], (last < position)[:, None]
        following = torch.where(ends, rewards, torch.where(beyond, torch.zeros_like(rewards), gamma * following))
        bootstrap = torch.where(ends, rewards, values[:, position])
        trusted = None if known is None else known[:, position, None]
        returns[:, position] = following
    return returns.detach()


def discounted_rewards(rewards: torch.Tensor, last: torch.Tensor, length: int, gamma: float = 1.0) -> torch.Tensor:
    """What was in fact received, seen from each position: γ^(L - p) reward, [B, length, M] (zero after L)."""
    return lambda_returns(rewards.new_zeros(len(rewards), length, rewards.shape[1]), rewards, last, 1.0, gamma)


def importance_weights(log_ratios: torch.Tensor, clip: float) -> torch.Tensor:
    """What a state of a guided response counts for the frozen model's values: π0 / π of all tokens still to come.

    A function of the rest of the response, weighted so, has the mean that it has when the frozen model goes on from
    that state, whoever wrote the state's own tokens (per-decision importance sampling, Precup et al. 2000). So it
    holds for λ-returns as for rewards. Weights are clipped from above, which trades variance for a bias towards the
    guided policy's own values.

    Args:
        log_ratios: log π - log π0 of the tokens of one response, float [L].
        clip: largest weight.

    Returns:
        float [L + 1], for the states from the prompt alone to the whole response, whose weight is 1.
    """
    to_come = torch.cat([log_ratios, log_ratios.new_zeros(1)]).flip(0).cumsum(0).flip(0)
    # The state behind i tokens has the ratios i to L - 1 to come; the zero stands for the end.
    return (-to_come).exp().clamp(max=clip)


def r_squared(predictions: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Share of the targets' variance that predictions explain: 1 for perfect ones, 0 for their mean.

    The mean is that of these very targets, so no constant predictor can do better than 0.

    Args:
        predictions, targets: float [N, M].
        weights: of the rows, float [N]; all alike if left out.

    Returns:
        float64 [M]; NaN where the targets do not vary.
    """
    predictions, targets = predictions.double(), targets.double()
    shares = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights.double()
    shares = (shares / shares.sum()).to(targets.device)
    residual = shares @ (predictions - targets).square()
    variation = shares @ (targets - shares @ targets).square()
    return torch.where(variation > 0, 1.0 - residual / variation, torch.nan)
