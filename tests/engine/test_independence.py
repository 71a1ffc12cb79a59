"""A request's tokens do not depend on what runs beside it, on preemption, on the prefix cache or on pruning.

Noise is keyed by (seed, position, token), so what could differ is rounding: matrix products of another shape may add
in another order. On float32 that moves scores by about 1e-6, and a token changes only where two perturbed scores are
closer than that. These tests compare a few thousand tokens and expect all of them equal.
"""

from __future__ import annotations

import random

import pytest

from tests.engine.conftest import KINDS, distributional, drain, engine, generate, network, tokens
from vas_engine.params import SamplingParams
from vas_engine.sampling import fork_seed
from vas_engine.values.config import HeadConfig

NEEDLE = [3, 1, 4, 1, 5, 9, 2, 6, 5]
SETTINGS = [None, *KINDS]


def needle_params(kind: str | None, **changes) -> SamplingParams:
    values = {"v": -2.0} if kind else {}
    return SamplingParams(
        **{"values": values, "num_candidates": 5, "max_tokens": 20, "ignore_eos": True, "seed": 77, **changes}
    )


def scorers(kind: str | None, lm) -> dict:
    return {"v": network(kind, lm)} if kind else {}


def hay(rng: random.Random, kind: str | None) -> tuple[list[int], SamplingParams]:
    values = {"v": rng.uniform(-3, 3)} if kind and rng.random() < 0.7 else {}
    return [rng.randrange(30) for _ in range(rng.randrange(1, 25))], SamplingParams(
        values=values,
        num_candidates=rng.randrange(1, 9),
        max_tokens=rng.randrange(1, 25),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        seed=rng.randrange(1000),
        n=rng.choice([1, 1, 3]),
        top_k=rng.choice([0, 4]),
        repetition_penalty=rng.choice([1.0, 1.3]),
    )


@pytest.mark.parametrize("kind", SETTINGS)
def test_alone_in_a_mix_and_joining_late(lm, kind: str | None) -> None:
    nets = scorers(kind, lm)
    alone = generate(engine(lm, nets), NEEDLE, needle_params(kind))[0]
    rng = random.Random(5)
    for trial in range(3):
        running = engine(lm, nets, max_num_batched_tokens=rng.choice([32, 64, 500]), max_num_seqs=rng.choice([3, 30]))
        for i in range(6):
            running.add_request(f"hay{i}", *hay(rng, kind))
        events = []
        for _ in range(rng.randrange(6)):
            events += running.step()
        running.add_request("needle", NEEDLE, needle_params(kind))
        for i in range(6, 9):
            running.add_request(f"hay{i}", *hay(rng, kind))
        events += drain(running)
        assert tokens(events)[("needle", 0)] == alone, f"trial {trial}"
        running.scheduler.check()


@pytest.mark.parametrize("kind", SETTINGS)
def test_preempted_and_resumed(lm, kind: str | None) -> None:
    nets = scorers(kind, lm)
    alone = generate(engine(lm, nets), NEEDLE, needle_params(kind))[0]
    running = engine(lm, nets, num_blocks=16, enable_prefix_caching=False)
    # The needle arrives last, so it is the one to give way; the others then finish and let it go on.
    for i in range(3):
        running.add_request(f"first{i}", [i + 1] * 6, needle_params(kind, seed=i, max_tokens=18))
    running.add_request("needle", NEEDLE, needle_params(kind))
    produced = tokens(drain(running))
    assert running.scheduler.num_preemptions > 0
    assert produced[("needle", 0)] == alone


@pytest.mark.parametrize("kind", SETTINGS)
def test_prefix_cached(lm, kind: str | None) -> None:
    nets = scorers(kind, lm)
    fresh = generate(engine(lm, nets, enable_prefix_caching=False), NEEDLE, needle_params(kind))[0]
    running = engine(lm, nets)
    assert generate(running, NEEDLE, needle_params(kind))[0] == fresh
    before = running.blocks.prefix_hit_tokens
    assert generate(running, NEEDLE, needle_params(kind))[0] == fresh
    assert running.blocks.prefix_hit_tokens > before


def test_plain_pages_do_not_serve_a_network_with_pages_of_its_own(lm) -> None:
    """The salt: a plain request fills no side pages, so a guided one must not take its prefix over."""
    nets = {"v": network("side", lm)}
    fresh = generate(engine(lm, nets), NEEDLE, needle_params("side"))[0]
    running = engine(lm, nets)
    generate(running, NEEDLE, needle_params(None))
    assert generate(running, NEEDLE, needle_params("side"))[0] == fresh
    assert running.blocks.prefix_hit_tokens == 0


@pytest.mark.parametrize("kind", SETTINGS)
def test_samples_of_one_request_equal_requests_of_their_own(lm, kind: str | None) -> None:
    nets = scorers(kind, lm)
    together = generate(engine(lm, nets), NEEDLE, needle_params(kind, n=4))
    assert len({tuple(ids) for ids in together.values()}) > 1
    for index, ids in together.items():
        single = generate(engine(lm, nets), NEEDLE, needle_params(kind, seed=fork_seed(77, index)))[0]
        assert single == ids
    # Too few seats for all four at once: the others wait and come out the same.
    assert generate(engine(lm, nets, max_num_seqs=2), NEEDLE, needle_params(kind, n=4)) == together


@pytest.mark.parametrize("kind", SETTINGS)
def test_without_weight_it_is_plain_sampling(lm, kind: str | None) -> None:
    nets = scorers(kind, lm)
    plain = generate(engine(lm), NEEDLE, needle_params(None))[0]
    assert generate(engine(lm, nets), NEEDLE, needle_params(None))[0] == plain
    if kind:
        assert generate(engine(lm, nets), NEEDLE, needle_params(kind, values={"v": 0.0}))[0] == plain
        assert generate(engine(lm, nets), NEEDLE, needle_params(kind))[0] != plain


BOUNDED = HeadConfig("v", "v", bounds=(-0.5, 0.5))
BOUNDS: dict[str, tuple[tuple[HeadConfig, ...] | None, dict]] = {
    "head": ((BOUNDED,), {}),
    "clip": (None, {"advantage_clip": 0.4}),
    "several": ((BOUNDED, distributional(-1.0, 0.2, name="w")), {"values": {"v.v": 1.5, "v.w": -3.0}}),
    "optimal": ((distributional(-0.1, 0.9, name="v"),), {"values": {"v": -3.0}, "tilt": "optimal"}),
    "optimal and clip": ((distributional(name="v"),), {"tilt": "optimal", "advantage_clip": 0.3}),
    "mean of all": (None, {"advantage_clip": 0.4, "baseline": "candidate-mean"}),
}
"""What bounds a tilt: a weight below 0 turns an interval round. The mean over all candidates leaves none out."""
EVERY_KIND = [(kind, bound) for kind in KINDS for bound in ("head", "clip")]


@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize(
    ("kind", "bound"), [*EVERY_KIND, *(("reader", b) for b in BOUNDS if b not in ("head", "clip"))]
)
def test_pruned_equals_unpruned(lm, kind: str, tail: str, bound: str) -> None:
    heads, options = BOUNDS[bound]
    nets = {"v": network(kind, lm, heads)}
    spared = 0
    for seed in range(4):
        ask = needle_params(kind, seed=seed, num_candidates=12, tail=tail, max_tokens=25, **options)
        pruning, whole = engine(lm, nets), engine(lm, nets)
        assert generate(pruning, NEEDLE, ask) == generate(whole, NEEDLE, ask.replace(prune=False))
        assert whole.stats.pruned_rows == 0
        spared += pruning.stats.pruned_rows
    assert (spared > 0) == (kind not in ("lookahead", "side-lookahead") and bound != "mean of all")


def test_guided_rows_of_one_step_cost_no_extra_row_of_the_base_model(lm) -> None:
    """A reader or side network scores its candidates beside the base: it sees one row a token, as in plain decoding."""
    counts = {}
    for kind in (None, "reader", "side", "lookahead"):
        running = engine(lm, scorers(kind, lm))
        generate(running, NEEDLE, needle_params(kind))
        counts[kind] = running.stats.model_rows
    assert counts["reader"] == counts["side"] == counts[None] == len(NEEDLE) + 19
    assert counts["lookahead"] > counts[None]
