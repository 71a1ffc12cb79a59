"""The exact optimum of KL-regularised reward, from samples of the base: what any method is to be judged against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.estimate import Estimate

__all__ = ["Optimum"]

LEAST_SAMPLES = 16.0
"""Effective samples per prompt down to which the curve is given. There the plug-in divergence is some 4 % too large
for rewards of Gaussian tails (measured on pools of 1024 and 4096), and it falls off quickly beyond."""
STRENGTHS = np.concatenate([[0.0], np.geomspace(0.02, 50.0, 160)])
RESAMPLES = 400
LEAST_KL = 1e-9
"""Nats under which a divergence is rounding: nothing was spent."""


class Optimum:
    """The policies pi ~ pi0 exp(lambda R), which have the highest mean reward of all policies at their KL.

    Each prompt's pool of N plain samples is reweighted with w ~ exp(lambda R) (self-normalised): reward sum(w R),
    divergence sum(w log(N w)) of whole responses. One lambda serves all prompts, which is what is best for the means
    over prompts. Negative lambdas give the least reward at each KL.

    The pool bounds what can be seen: beyond `LEAST_SAMPLES` effective samples (1 / sum w^2) there is no curve.

    Args:
        pools: rewards of each prompt's samples.
    """

    def __init__(self, pools: Sequence[Sequence[float]]) -> None:
        if not pools or min(map(len, pools)) < 1:
            raise InvalidArgumentError("pools", [len(pool) for pool in pools], "give samples of every prompt")
        rewards = [np.asarray(pool, np.float64) for pool in pools]
        scale = float(np.concatenate(rewards).std()) or 1.0
        # [signs, lambdas, prompts]: the curve upwards and the one downwards.
        tilts = np.stack([STRENGTHS, -STRENGTHS]) / scale
        curves = [_reweight(pool, tilts) for pool in rewards]
        self._rewards, self._kl, samples = (np.stack(parts, -1) for parts in zip(*curves, strict=True))
        self._ends = np.maximum((samples.mean(-1) >= LEAST_SAMPLES).sum(-1), 1)

    def curve(self, upwards: bool = True) -> tuple[list[float], list[float]]:
        """(KL in nats, mean reward) from the base on, as far as the pool carries."""
        side = 0 if upwards else 1
        end = self._ends[side]
        kl, rewards = self._kl[side, :end].mean(-1), self._rewards[side, :end].mean(-1)
        return kl.tolist(), rewards.tolist()

    def kl_at(self, reward: float) -> float:
        """Nats that the optimum spends for a mean reward; NaN where the pool does not reach it."""
        return float(self._kl_at(np.array([reward]), self._rewards.mean(-1)[None], self._kl.mean(-1)[None])[0])

    def efficiency(self, rewards: Sequence[float], kl: Sequence[float]) -> Estimate:
        """KL efficiency: nats of the optimum at the same mean reward, over the nats spent.

        Args:
            rewards: mean reward of each prompt's responses. kl: nats per response of each prompt.

        Returns:
            The ratio; its interval is the bootstrap's over prompts (NaN with a single one). NaN where nothing was
            spent or the pool does not reach the reward.
        """
        gained, spent = np.asarray(rewards, np.float64), np.asarray(kl, np.float64)
        prompts = self._rewards.shape[-1]
        if gained.shape != (prompts,) or spent.shape != (prompts,):
            raise InvalidArgumentError("rewards", gained.shape, f"give one mean for each of {prompts} prompts")
        if spent.mean() < LEAST_KL:
            return Estimate(math.nan, math.nan, math.nan, prompts)
        ratio = self.kl_at(float(gained.mean())) / float(spent.mean())
        if prompts < 2 or math.isnan(ratio):
            return Estimate(ratio, math.nan, math.nan, prompts)
        drawn = np.random.default_rng(0).integers(prompts, size=(RESAMPLES, prompts))
        shares = np.stack([np.bincount(row, minlength=prompts) for row in drawn]) / prompts
        curves = (np.einsum("slp,bp->bsl", table, shares) for table in (self._rewards, self._kl))
        ratios = self._kl_at(shares @ gained, *curves) / np.maximum(shares @ spent, 1e-12)
        low, high = np.nanquantile(ratios, [0.025, 0.975])
        return Estimate(ratio, float(low), float(high), prompts)

    def _kl_at(self, goals: np.ndarray, rewards: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Interpolates tables [B, 2, lambdas] at goals [B] along rewards [B, 2, lambdas]."""
        found = np.full(len(goals), np.nan)
        for i, goal in enumerate(goals):
            side = 0 if goal >= rewards[i, 0, 0] else 1
            end = self._ends[side]
            along, sign = rewards[i, side, :end], 1 - 2 * side
            # Where the reward cannot grow any more the curve is flat: its first point is the cheapest.
            rising = np.concatenate([[True], np.diff(along) * sign > 0])
            found[i] = np.interp(sign * goal, sign * along[rising], table[i, side, :end][rising], right=np.nan)
        return found


def _reweight(rewards: np.ndarray, tilts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reward, KL and effective samples of one pool [N] under each tilt."""
    exponents = tilts[..., None] * rewards
    exponents -= exponents.max(-1, keepdims=True)
    weights = np.exp(exponents)
    total = weights.sum(-1, keepdims=True)
    weights /= total
    # log(N w) = exponent - log(total / N)
    kl = (weights * exponents).sum(-1) - np.log(total[..., 0] / len(rewards))
    return weights @ rewards, kl, 1.0 / np.square(weights).sum(-1)
