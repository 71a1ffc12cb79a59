"""The latency bound and deadlines over HTTP."""

from __future__ import annotations

import pytest

from tests.engine.test_pace import Fixed
from tests.serving.conftest import Served, make_llm, serving
from tests.serving.test_faults import StepGate
from vas_engine.commands.serve import seconds

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
