import math
from dataclasses import replace

import pytest

from vas_engine.evaluation.estimate import Estimate
from vas_engine.evaluation.frontier import Point
from vas_engine.evaluation.headline import headlines
from vas_engine.evaluation.optimum import Optimum

OPTIMUM = Optimum([[float(number) for number in range(101)]])
"""Of rewards 0 to 100."""


def point(method: str, strength: float | None, score: float, kl: float = 1.0, **changes) -> Point:
    known = {name: Estimate(number, math.nan, math.nan, 1) for name, number in (("score", score), ("kl", kl))}
    made = Point(
        label=f"{method} {strength}",
        method=method,
        strength=strength,
        objective={"r": 1.0},
        rewards={"r": known["score"]},
        kl_kind="exact",
        optimum_kl=0.0,
        efficiency=known["kl"],
        perplexity=4.0,
        distinct=(1.0, 1.0, 1.0),
        response_tokens=10.0,
        flops_per_token=100.0,
        tokens_per_second=10.0,
        model_rows_per_token=1.0,
        value_rows_per_token=0.0,
        responses=1,
        **known,
    )
    return replace(made, **changes)


BASE = point("base", None, 50.0, 0.0)
BEST = [
    point("best-of-n", 4.0, 60.0, 0.6, flops_per_token=400.0, tokens_per_second=2.5),
    point("best-of-n", 16.0, 80.0, 1.8, flops_per_token=1600.0, tokens_per_second=0.625),
]


def test_between_two_points():
    curve = [
        point("vas", 4.0, 70.0, 2.0, flops_per_token=200.0, tokens_per_second=5.0, perplexity=6.0),
        point("vas", 2.0, 50.0, 1.0, flops_per_token=100.0, tokens_per_second=10.0, perplexity=4.0),
    ]
    four, sixteen = headlines(BASE, BEST, curve, OPTIMUM)
    assert four.reached
    assert (four.n, four.target, four.best) == (4, 60.0, 70.0)
    assert (four.strength, four.kl, four.bound) == (3.0, 1.5, 0.6)
    assert four.efficiency == pytest.approx(OPTIMUM.kl_at(60.0) / 1.5)
    assert four.perplexity_ratio == pytest.approx(5.0 / 4.0)
    assert four.flops_ratio == pytest.approx(400 / 150)
    assert four.time_ratio == pytest.approx(0.4 / 0.15)
    assert not sixteen.reached
    assert sixteen.best == 70.0
    assert math.isnan(sixteen.kl)


def test_a_target_below_the_curve_gets_its_weakest_point():
    [four, _] = headlines(BASE, BEST, [point("args", 1.0, 65.0, 9.0)], OPTIMUM)
    assert (four.strength, four.kl, four.flops_ratio) == (1.0, 9.0, 4.0)


@pytest.mark.parametrize("kl", [0.0, 1e-12])
def test_what_spends_nothing_has_no_efficiency(kl):
    """A weight of 0 whose samples happen to be better than the pool's."""
    [four, _] = headlines(BASE, BEST, [point("vas", 0.0, 60.5, kl)], OPTIMUM)
    assert (four.reached, four.kl) == (True, kl)
    assert math.isnan(four.efficiency)


def test_methods_apart_and_points_without_strength_left_out():
    points = [point("vas", 1.0, 90.0), point("args", 1.0, 90.0), point("tuned", None, 90.0)]
    found = headlines(BASE, BEST, points, OPTIMUM)
    assert [(line.method, line.n) for line in found] == [("vas", 4), ("vas", 16), ("args", 4), ("args", 16)]
