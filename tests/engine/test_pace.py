"""Latency bound and deadlines: what is left out, what never is, and that without them nothing depends on time."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.conftest import drain, engine, generate, network, tokens
from vas_engine.engine import clock as clock_module
from vas_engine.engine.pace import Pace, first_guess, spend
from vas_engine.errors import InvalidArgumentError
from vas_engine.params import SamplingParams
from vas_engine.sampling import Selection

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def params(**changes) -> SamplingParams:
    return SamplingParams(
        **{"seed": 1, "max_tokens": 12, "ignore_eos": True, "num_candidates": 8, "values": {"v": 2.0}, **changes}
    )


class Fixed(Pace):
    """A pace that says what it is told to."""

    def __init__(self, prompt: int = 10**6, scored: int = 10**6) -> None:
        super().__init__(1.0)
        self.prompt, self.scored = prompt, scored

    def prompt_rows(self, rows: int, context: int, floor: int) -> int:
        return self.prompt

    def candidates(self, elapsed: float) -> int:
        return self.scored


# -- the model of a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("truth", [(2e-2, 3e-5, 1e-7, 5e-5), (1e-4, 1e-6, 1e-10, 2e-7), (1.0, 1e-2, 1e-5, 1e-3)])
def test_measurements_correct_the_first_guess(truth: tuple) -> None:
    rng = random.Random(1)
    pace = Pace(10.0, (1e-3, 1e-5, 1e-8, 2e-6))

    def step() -> tuple[int, int, int]:
        rows = rng.randrange(1, 200)
        return rows, rows * rng.randrange(10, 500), rng.randrange(0, 21 * rows)

    def seconds(rows: int, context: int, scored: int) -> float:
        return float(np.dot(truth, (1, rows, context, scored)))

    for i in range(400):
        made = step()
        pause = 50.0 if i % 97 == 96 else 1.0  # the machine does something else now and then
        pace.observe(*made, seconds(*made) * rng.uniform(0.97, 1.03) * pause)
    for _ in range(50):
        made = step()
        assert pace.predict(*made) == pytest.approx(seconds(*made), rel=0.15)


def test_shares_follow_from_the_model() -> None:
    pace = Pace(1.0, (0.1, 0.01, 0.0001, 0.001))
    assert pace.prompt_rows(0, 0, 0) == 90
    assert pace.prompt_rows(10, 1000, 100) == 60
    assert pace.prompt_rows(1000, 0, 0) == 0
    assert pace.candidates(0.5) == 500
    assert pace.candidates(2.0) == 0
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(InvalidArgumentError, match="itl_slo"):
            Pace(bad)


def test_first_guess_grows_with_the_work(lm) -> None:
    plain, guided = first_guess(lm, []), first_guess(lm, [network("reader", lm), network("model", lm)])
    assert all(part > 0 for part in (*plain, *guided))
    assert guided[0] > plain[0]


# -- sharing out ---------------------------------------------------------------------------------------------


def selection(scores: list[list[float]]) -> Selection:
    score = np.array(scores)
    count = np.isfinite(score).sum(1)
    none = np.zeros(len(score))
    ids = np.broadcast_to(np.arange(score.shape[1]), score.shape)
    return Selection(ids, score, np.zeros_like(score), count, none.astype(int) - 1, none, none == 0)


def test_near_ties_come_first() -> None:
    chosen = selection([[-1.0, -1.1, -5.0, -6.0], [-2.0, -2.6, -2.7, -9.0]])
    needed = np.ones((2, 4), bool)
    one = np.array([1, 1])
    assert spend(chosen, needed, one, 0).tolist() == [[True, False, False, False]] * 2
    assert spend(chosen, needed, one, 3).tolist() == [[True, True, False, False], [True, False, False, False]]
    assert spend(chosen, needed, one, 5).tolist() == [[True, True, False, False], [True, True, True, False]]
    assert spend(chosen, needed, one, 100).all()
    assert spend(chosen, needed, np.array([1, 3]), 0).sum(1).tolist() == [1, 3]
    assert spend(chosen, needed, np.array([9, 1]), 0).sum(1).tolist() == [4, 1]


def test_what_is_spent_is_needed_and_keeps_the_floors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        score = np.sort(rng.normal(size=(7, 9)))[:, ::-1]
        needed = rng.random((7, 9)) < 0.6
        floors, rows = rng.integers(1, 5, 7), int(rng.integers(0, 50))
        kept = spend(selection(score.tolist()), needed, floors, rows)
        assert not (kept & ~needed).any()
        least = np.minimum(floors, needed.sum(1))
        assert (kept.sum(1) >= least).all()
        assert kept.sum() == min(max(rows, least.sum()), needed.sum())


# -- in the engine -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["action", "reader", "side", "model"])
def test_a_tight_bound_leaves_out_candidates_down_to_the_floor(lm, kind: str) -> None:
    nets = {"v": network(kind, lm)}
    running = engine(lm, nets)
    running.pace = Fixed(scored=0)
    running.add_request("bare", PROMPT, params())
    running.add_request("floor", PROMPT, params(min_candidates=4))
    running.add_request("exact", PROMPT, params(report_kl=True))
    running.add_request("plain", PROMPT, params(values={}))
    events = drain(running)
    evaluated = {name: [e.evaluations for e in events if e.request_id == name] for name in ("bare", "floor", "plain")}
    assert set(evaluated["bare"]) == {1}
    assert set(evaluated["floor"]) == {4}
    assert set(evaluated["plain"]) == {0}
    assert running.stats.pruned_rows == 0  # they might have won
    produced = tokens(events)
    exact = [event for event in events if event.request_id == "exact"]
    assert all(event.evaluations == 9 and not event.limited and np.isfinite(event.kl) for event in exact)
    assert produced[("exact", 0)] == generate(engine(lm, nets), PROMPT, params(report_kl=True))[0]
    assert produced[("plain", 0)] == generate(engine(lm), PROMPT, params(values={}))[0]
    limited = [event for event in events if event.limited]
    assert {event.request_id for event in limited} == {"bare", "floor"}
    assert running.stats.limited_tokens == len(limited)
    # One candidate, the best by chance and base probability, is what plain decoding takes.
    assert produced[("bare", 0)] == produced[("plain", 0)]


def test_a_wide_bound_changes_nothing(lm) -> None:
    nets = {"v": network("reader", lm)}
    expected = generate(engine(lm, nets), PROMPT, params())[0]
    running = engine(lm, nets)
    running.bound_latency(1000.0)
    assert generate(running, PROMPT, params())[0] == expected
    assert running.stats.limited_tokens == 0
    assert running.pace._seen == running.stats.steps
    running.bound_latency(None)
    assert running.pace is None


class Clock(Pace):
    """Notes what steps are said to take."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.seconds: list[float] = []

    def observe(self, rows: int, context: int, scored: int, seconds: float) -> None:
        self.seconds.append(seconds)


def test_what_the_caller_does_between_steps_counts_and_idleness_does_not(lm, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound is one on the time between tokens."""
    now = 0.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: now))
    running = engine(lm)
    for request in ("one", "two"):
        running.pace = Clock()
        running.add_request(request, PROMPT, params(values={}, max_tokens=3))
        while running.has_unfinished:
            running.step()
            now += 0.3
        # The second request comes after a pause in which there was nothing to do.
        assert running.pace.seconds == pytest.approx([0.0, 0.3, 0.3])


def test_prompts_and_newcomers_wait_for_room(lm) -> None:
    running = engine(lm, block_size=4)
    running.pace = Fixed(prompt=0)
    plain = params(values={})
    running.add_request("first", PROMPT, plain)
    assert len(running.step()) == 1  # nothing decodes yet, so nothing is held back
    running.add_request("second", list(range(20)), plain)
    running.step()
    assert (running.scheduler.num_running, running.scheduler.num_waiting) == (1, 1)
    running.pace.prompt = 3
    running.step()
    assert (running.scheduler.num_running, running.scheduler.num_waiting) == (2, 0)
    running.pace.prompt = 0  # a prompt in progress always gets on
    rows = running.stats.model_rows
    running.step()
    assert 1 < running.stats.model_rows - rows <= 1 + 5
    produced = tokens(drain(running))
    assert produced[("second", 0)] == generate(engine(lm), list(range(20)), plain)[0]
    running.scheduler.check()


def test_without_a_bound_nothing_depends_on_time(lm, monkeypatch: pytest.MonkeyPatch) -> None:
    nets = {"v": network("side", lm)}
    expected = generate(engine(lm, nets), PROMPT, params())[0]
    rng = random.Random(0)
    clock = iter(np.cumsum([rng.expovariate(0.1) for _ in range(100_000)]).tolist())
    monkeypatch.setattr(clock_module.time, "monotonic", lambda: next(clock))
    running = engine(lm, nets)
    for i in range(20):
        running.add_request(f"other{i}", PROMPT[: 1 + i % 7], params(seed=i))
    running.add_request("mine", PROMPT, params())
    assert tokens(drain(running))[("mine", 0)] == expected
    assert running.stats.limited_tokens == 0


# -- deadlines -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_a_deadline_ends_a_request_with_what_it_has(lm, n: int) -> None:
    running = engine(lm, {"v": network("reader", lm)}, max_num_seqs=2)
    running.add_request("late", PROMPT, params(n=n, max_tokens=None), deadline=time.monotonic() + 1000)
    running.add_request("never", PROMPT, params())
    events = [event for _ in range(4) for event in running.step()]
    for sequence in running._live["late"]:
        sequence.deadline = time.monotonic()
    events += drain(running)
    ended = [event for event in events if event.request_id == "late" and event.finish_reason]
    assert [event.index for event in ended] == list(range(n))
    assert all(event.overdue and event.finish_reason == "length" and event.error is None for event in ended)
    assert len(tokens(events)[("late", 0)]) == 4
    assert len(tokens(events)[("never", 0)]) == 12
    assert not running._timed
    assert running.blocks.num_used == 0
    running.scheduler.check()


def test_a_request_that_is_behind_looks_at_fewer_candidates(lm) -> None:
    nets = {"v": network("reader", lm)}
    running = engine(lm, nets)
    running.clock.usual = 1e6  # at this pace it cannot be done in time
    running.add_request("behind", PROMPT, params(min_candidates=2), deadline=time.monotonic() + 1000)
    running.add_request("other", PROMPT, params())
    events = running.step()
    assert [(event.evaluations, event.limited) for event in events if event.request_id == "behind"] == [(2, True)]
    events += drain(running)
    assert tokens(events)[("other", 0)] == generate(engine(lm, nets), PROMPT, params())[0]
