"""The latency bound and deadlines over HTTP."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.engine.test_pace import Fixed
from tests.serving.conftest import Served, make_llm, serving
from tests.serving.test_faults import StepGate
from vas_engine import LLM, SamplingParams
from vas_engine.commands.serve import seconds
from vas_engine.engine import clock as clock_module
from vas_engine.engine.engine import Engine
from vas_engine.engine.event import TokenEvent
from vas_engine.engine.pace import Pace

GUIDED = {"prompt": "Once", "seed": 5, "max_tokens": 30, "ignore_eos": True, "vas_weights": {"kind": 3.0}}


def test_what_was_left_out_is_told(served: Served) -> None:
    free = served.complete(**GUIDED)
    assert free["vas"]["limited_tokens"] == 0
    with serving(itl_slo=30.0) as bound:
        assert bound.complete(**GUIDED)["choices"] == free["choices"]
        bound.llm.engine.pace = Fixed(scored=0)
        tight = bound.complete(**GUIDED)
        assert tight["vas"]["limited_tokens"] > 0
        assert tight["vas"]["value_evaluations"] == 30
        floor = bound.complete(**GUIDED, vas_min_candidates=5)
        assert floor["vas"]["value_evaluations"] == 150
        exact = bound.complete(**GUIDED, vas_return_kl=True)
        assert exact["vas"]["limited_tokens"] == 0
        assert exact["choices"][0]["text"] == free["choices"][0]["text"]
        total = tight["vas"]["limited_tokens"] + floor["vas"]["limited_tokens"]
        with bound.client() as client:
            assert f'vas:limited_tokens_total{{model_name="tiny"}} {total}.0' in client.get("/metrics").text


# -- a machine of known speed --------------------------------------------------------------------------------

FIXED, ROW, CANDIDATE = 4e-3, 2e-4, 1e-4
"""Seconds of a step, of a row of the base model, of a candidate scored, on the machine below."""
BOUND = 20e-3
LEARNING = 20
"""Steps in which the machine's speed is found out."""
FLOOR = 3


class Machine:
    """Has an engine's clock go on by its work alone, and notes when tokens come."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine: Engine = llm.engine
        self.now = 0.0
        self.gaps: list[float] = []
        self.events: list[TokenEvent] = []
        self._last: dict[str, float] = {}
        self._forward, self._decide = llm.lm.forward, llm.engine.guide.decide
        monkeypatch.setattr(clock_module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(llm.lm, "forward", self.forward)
        monkeypatch.setattr(llm.engine.guide, "decide", self.decide)

    def forward(self, tokens, *others):
        self.now += FIXED + ROW * len(tokens)
        return self._forward(tokens, *others)

    def decide(self, sequences, selection, needed, *others):
        self.now += CANDIDATE * int(needed.sum())
        return self._decide(sequences, selection, needed, *others)

    def step(self) -> None:
        for event in self.engine.step():
            self.events.append(event)
            if event.token_id is not None:
                if event.request_id in self._last and self.engine.stats.steps > LEARNING:
                    self.gaps.append(self.now - self._last[event.request_id])
                self._last[event.request_id] = self.now

    def run(self) -> Machine:
        """Newcomers with prompts of 100 tokens come faster than they can be served."""
        rng = np.random.default_rng(0)
        for i in range(40):
            prompt = rng.integers(3, 200, 100).tolist()
            params = SamplingParams(
                seed=i, max_tokens=25, ignore_eos=True, values={"kind": 3.0}, num_candidates=20, min_candidates=FLOOR
            )
            self.engine.add_request(str(i), prompt, params)
            for _ in range(2):
                self.step()
        while self.engine.has_unfinished:
            self.step()
        return self


@pytest.mark.parametrize("bounded", [False, True])
def test_the_bound_is_kept_where_work_alone_takes_time(monkeypatch: pytest.MonkeyPatch, bounded: bool) -> None:
    llm = make_llm(max_num_seqs=16, kv_cache_memory="8MiB", enable_prefix_caching=False)
    llm.engine.bound_latency(BOUND if bounded else None)
    machine = Machine(llm, monkeypatch).run()
    gaps, limited = machine.gaps, [event.limited for event in machine.events]
    evaluations = [event.evaluations for event in machine.events if event.token_id is not None]
    assert len(evaluations) == 40 * 25
    assert llm.engine.stats.limited_tokens == sum(limited)
    if bounded:
        assert max(gaps) <= BOUND
        assert np.median(gaps) > BOUND / 2  # what there is time for is used
        assert min(evaluations) >= FLOOR
        assert 0 < sum(limited) < len(limited)
        assert all(event.limited for event in machine.events if event.token_id is not None and event.evaluations < 21)
    else:
        assert np.median(gaps) > BOUND
        assert set(evaluations) == {21}
        assert not any(limited)


@pytest.mark.parametrize("kind", ["quiet", "jitter", "spikes", "slower now and then"])
def test_few_steps_are_late_on_a_machine_that_does_other_things_too(kind: str) -> None:
    """Steps of which two parts are stretched by chance, one before and one after their candidates are chosen."""
    rng, pace, bound = np.random.default_rng(0), Pace(0.03), 0.03
    late, spent = [], []
    for i in range(3000):
        stretch = rng.lognormal(0, 0.15 if kind in ("jitter", "slower now and then") else 0.03, 2)
        if kind == "spikes":
            stretch *= np.where(rng.random(2) < 0.05, 2.5, 1.0)
        if kind == "slower now and then" and i // 150 % 2:
            stretch *= 1.8
        users = int(12 + 8 * np.sin(i / 100) + rng.integers(0, 3))
        elapsed = (5e-3 + 5e-5 * users) * stretch[0]
        scored = max(min(pace.candidates(elapsed), 21 * users), users)
        seconds = elapsed + (3e-3 + 45e-6 * scored) * stretch[1]
        pace.observe(users, 150 * users, scored, seconds)
        late.append(seconds > bound)
        spent.append(scored / users)
    assert np.mean(late[200:]) < 0.015
    assert np.mean(spent[200:]) > (20 if kind == "quiet" else 11)


# -- deadlines -----------------------------------------------------------------------------------------------


def test_a_deadline_ends_with_what_there_is() -> None:
    llm = make_llm()
    gate = StepGate(llm)
    with serving(llm) as served:
        gate.permit()
        lines = []
        body = {"model": "tiny", **GUIDED, "max_tokens": 100, "stream": True, "vas_deadline_ms": 3_600_000}
        with served.client() as client, client.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if not line:
                    continue
                lines.append(line)
                if len(lines) < 3:
                    gate.permit()
                elif len(lines) == 3:
                    for sequence in llm.engine._sequences():
                        sequence.deadline = 0.0
                    gate.open()
        assert '"finish_reason":"length","stop_reason":"deadline"' in lines[-2]
        assert len(lines) == 5  # three tokens, the end, [DONE]
        served.check_idle()


@pytest.mark.parametrize("deadline", [0, -1, 1e12, "1"])
def test_deadlines_that_are_none(served: Served, deadline) -> None:
    answer = served.post("/v1/completions", {"model": "tiny", "prompt": "a", "vas_deadline_ms": deadline})
    assert answer.json()["error"]["param"] == "vas_deadline_ms"


def test_times_on_the_command_line() -> None:
    assert (seconds("30ms"), seconds("0.03s"), seconds("0.03"), seconds("2s")) == (0.03, 0.03, 0.03, 2.0)
    for bad in ("", "ms", "-1ms", "0", "nan", "1h", "1e9"):
        with pytest.raises(ValueError):  # noqa: PT011, argparse names the option and the text
            seconds(bad)
