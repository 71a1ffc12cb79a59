"""What best-of-n's reward costs by another method: between the points of its curve.

Straight lines join the points. Divergence grows faster than reward, so what is read off between two points is no less
than the method's own. A reward below the curve's weakest point is given that point's figures, which are too high; a
line to plain sampling would flatter methods that do not begin there (a dropped tail, a greedy choice).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vas_engine.evaluation.frontier import Point
from vas_engine.evaluation.optimum import LEAST_KL, Optimum

__all__ = ["Headline", "headlines"]


@dataclass(frozen=True)
class Headline:
    """One method at the reward of best-of-n; NaN throughout where none of its points gets there.

    Attributes:
        target: mean score of best-of-n. best: the highest of the method's points.
        strength: at which the curve crosses the target.
        kl: nats there. bound: nats of best-of-n at most.
        efficiency: nats of the exact optimum over `kl`; NaN where next to nothing is spent.
        perplexity_ratio: over plain sampling's.
        flops_ratio, time_ratio: best-of-n's FLOPs and seconds per delivered token, over the method's.
    """

    method: str
    n: int
    target: float
    best: float
    reached: bool
    strength: float
    kl: float
    bound: float
    efficiency: float
    perplexity_ratio: float
    flops_ratio: float
    time_ratio: float


def headlines(base: Point, best: Sequence[Point], points: Sequence[Point], optimum: Optimum) -> list[Headline]:
    """Every swept method at the reward of every best-of-n.

    Args:
        base: plain sampling. best: best-of-n by the same objective, the point's strength being n.
        points: those of one objective; methods are told apart by `method`, and their points by `strength`
            (those without one are no curve).
        optimum: of that objective.
    """
    found = []
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method and point.strength is not None]
        curve = sorted(own, key=lambda point: point.strength or 0.0)
        if curve:
            found += [_headline(base, curve, rival, optimum) for rival in best]
    return found


def _headline(base: Point, curve: list[Point], rival: Point, optimum: Optimum) -> Headline:
    target, unknown = rival.score.mean, math.nan
    shared = (curve[0].method, int(rival.strength or 0), target, max(point.score.mean for point in curve))
    crossing = _crossing(curve, target)
    if crossing is None:
        return Headline(*shared, False, unknown, unknown, rival.kl.mean, unknown, unknown, unknown, unknown)
    before, after, share = crossing

    def between(name: str) -> float:
        return getattr(before, name) * (1 - share) + getattr(after, name) * share

    kl = before.kl.mean * (1 - share) + after.kl.mean * share
    return Headline(
        *shared,
        reached=True,
        strength=between("strength"),
        kl=kl,
        bound=rival.kl.mean,
        efficiency=optimum.kl_at(target) / kl if kl >= LEAST_KL else unknown,
        perplexity_ratio=between("perplexity") / base.perplexity,
        flops_ratio=rival.flops_per_token / between("flops_per_token"),
        time_ratio=rival.seconds_per_token / between("seconds_per_token"),
    )


def _crossing(curve: list[Point], target: float) -> tuple[Point, Point, float] | None:
    """The first two neighbours that the target lies between, and how far along."""
    if curve[0].score.mean >= target:
        return curve[0], curve[0], 0.0
    for before, after in pairwise(curve):
        low, high = before.score.mean, after.score.mean
        if low < target <= high:
            return before, after, (target - low) / (high - low)
    return None
