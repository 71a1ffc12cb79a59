"""The load test's traces and figures, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")

from benchmarks.serving import Served, look, main, summarise, weights
from benchmarks.traces import FILES, SHARED, Arrival, read_trace, scale

TEXT = np.random.default_rng(0).integers(1000, size=5000)


def the_trace(name: str) -> list[Arrival]:
    if not (SHARED / "traces" / FILES[name]).is_file():
        pytest.skip(f"no traces in {SHARED}; point VAS_SHARED at the folder that holds them")
    return read_trace(name)


@pytest.mark.parametrize("name", sorted(FILES))
def test_traces_are_scaled_to_the_context(name: str) -> None:
    trace = the_trace(name)
    requests = scale(trace, 500, 10.0, 512, TEXT, 200)
    assert len(requests) == 500
    assert requests[-1].seconds == pytest.approx(50.0)
    times = [request.seconds for request in requests]
    assert times == sorted(times)
    stretch = 50.0 / (trace[499].seconds - trace[0].seconds)
    assert times == pytest.approx([(arrival.seconds - trace[0].seconds) * stretch for arrival in trace[:500]])
    assert all(1 <= len(r.prompt) <= 384 and 1 <= r.output <= 127 for r in requests)
    assert len(requests[0].prompt) < max(len(r.prompt) for r in requests)
    assert len({request.user for request in requests}) > 100
    assert requests == scale(trace, 500, 10.0, 512, TEXT, 200)


def test_prompts_share_what_their_hashes_share() -> None:
    trace = [Arrival(0.0, 1024, 9, (7, 8)), Arrival(1.0, 1500, 9, (7, 8, 9)), Arrival(2.0, 1024, 9, (8, 7))]
    first, second, third = (request.prompt for request in scale(trace, 3, 1.0, 4096, TEXT, 5))
    assert [len(first), len(second), len(third)] == [32, 47, 32]  # a block is a page of 16
    assert first == second[:32]
    assert first[16:] == third[:16]
    one, other = (request.prompt for request in scale([Arrival(0.0, 99, 1), Arrival(1.0, 99, 1)], 2, 1.0, 512, TEXT, 5))
    assert one != other
    anew = scale(trace, 3, 1.0, 4096, TEXT, 5, seed=1)
    assert anew[0].prompt != first
    assert anew[0].prompt == anew[1].prompt[:32]


def test_events_count_when_their_end_has_come() -> None:
    event = b'data: {"choices": [{"text": "a"}]}\n\n'
    end = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\ndata: [DONE]\n\n'
    told = b'data: {"choices": [{}], "vas": {"limited_tokens": 1, "value_evaluations": 42}}\n\n'
    seen = look([(1.5, event[:10]), (2.0, event[10:]), (2.25, event + told), (3.0, end)], 1.0)
    assert (seen.first, seen.gaps) == (1.0, [0.25, 0.0])
    assert (seen.prompt_tokens, seen.tokens, seen.limited, seen.evaluations) == (3, 2, 1, 42)
    assert look([(1.0, event + b'data: {"error": {"message": "no"}}\n\n')], 0.0).error == "no"


def test_figures() -> None:
    long = Served(0.1, [0.01] * 98 + [0.5], 7, tokens=100, limited=10, evaluations=200)
    seen = [long, Served(0.3, [0.02], 8, tokens=2), Served(error="429")]
    figures = summarise(seen, 2.0)
    assert (figures["completed"], figures["failed"], figures["tokens"]) == (2, 1, 102)
    assert figures["prompt_tokens"] == 15
    assert figures["tokens_per_second"] == 51
    assert figures["ttft_p50"] == pytest.approx(0.2)
    assert figures["itl_p50"] == 0.01
    assert 0.02 < figures["itl_p99"] <= 0.5
    assert figures["tpot_p50"] == pytest.approx((1.48 / 99 + 0.02) / 2)
    assert figures["limited_share"] == pytest.approx(10 / 102)


def test_every_user_has_weights_of_their_own() -> None:
    scales = {"kind": 0.5, "length": 20.0}
    wanted = [weights(user, scales) for user in range(200)]
    assert len({json.dumps(each) for each in wanted}) == 200
    assert weights(3, scales) == wanted[3]
    for name, scale_of in scales.items():
        assert 2.5 < max(abs(each[name]) * scale_of for each in wanted) <= 3


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    the_trace("mooncake")
    file = tmp_path / "serving.json"
    words = "--setting tiny --trace mooncake --requests 12 --rate 20 --contenders plain reader reader-slo --itl-slo 5ms"
    assert main([*words.split(), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert list(figures) == ["plain", "reader", "reader-slo"]
    assert figures["plain"]["tokens"] == figures["reader"]["tokens"]
    assert figures["reader"]["evaluations_per_token"]["median"] > 1
    assert figures["reader"]["limited_share"]["max"] == 0
    assert file.with_suffix(".svg").is_file()
    assert "tokens/s" in capsys.readouterr().out
