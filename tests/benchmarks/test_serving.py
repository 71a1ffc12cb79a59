"""The load test's traces and figures, and one small run of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serving needs pip install 'vas-engine[serve]'")

from benchmarks.serving import Served, main, summarise, weights
from benchmarks.traces import FILES, SHARED, Arrival, read_trace, scale


def the_trace(name: str) -> list[Arrival]:
    if not (SHARED / "traces" / FILES[name]).is_file():
        pytest.skip(f"no traces in {SHARED}; point VAS_SHARED at the folder that holds them")
    return read_trace(name)


@pytest.mark.parametrize("name", sorted(FILES))
def test_traces_are_scaled_to_the_context(name: str) -> None:
    trace = the_trace(name)
    requests = scale(trace, 500, 10.0, 512, 1000, 200)
    assert len(requests) == 500
    assert requests[-1].seconds == pytest.approx(50.0)
    times = [request.seconds for request in requests]
    assert times == sorted(times)
    stretch = 50.0 / (trace[499].seconds - trace[0].seconds)
    assert times == pytest.approx([(arrival.seconds - trace[0].seconds) * stretch for arrival in trace[:500]])
    assert all(1 <= len(r.prompt) <= 384 and 1 <= r.output <= 127 for r in requests)
    assert len(requests[0].prompt) < max(len(r.prompt) for r in requests)
    assert len({request.user for request in requests}) > 100
    assert requests == scale(trace, 500, 10.0, 512, 1000, 200)


def test_prompts_share_what_their_hashes_share() -> None:
    trace = [Arrival(0.0, 1024, 9, (7, 8)), Arrival(1.0, 1500, 9, (7, 8, 9)), Arrival(2.0, 1024, 9, (8, 7))]
    first, second, third = (request.prompt for request in scale(trace, 3, 1.0, 4096, 1000, 5))
    assert first == second[:1024]
    assert first[512:] == third[:512]
    one, other = (request.prompt for request in scale([Arrival(0.0, 99, 1), Arrival(1.0, 99, 1)], 2, 1.0, 512, 1000, 5))
    assert one != other


def test_figures() -> None:
    seen = [Served(0.1, [0.01] * 98 + [0.5], 100, 10, 200), Served(0.3, [0.02], 2), Served(error="429")]
    figures = summarise(seen, 2.0)
    assert (figures["completed"], figures["failed"], figures["tokens"]) == (2, 1, 102)
    assert figures["tokens_per_second"] == 51
    assert figures["ttft_p50"] == pytest.approx(0.2)
    assert figures["itl_p50"] == 0.01
    assert 0.02 < figures["itl_p99"] <= 0.5
    assert figures["limited_share"] == pytest.approx(10 / 102)


def test_every_user_has_weights_of_their_own() -> None:
    assert len({json.dumps(weights(user)) for user in range(200)}) == 200
    assert weights(3) == weights(3)


@pytest.mark.slow
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    the_trace("mooncake")
    file = tmp_path / "serving.json"
    words = "--setting tiny --trace mooncake --requests 12 --rate 20 --contenders plain guided guided-slo --itl-slo 5ms"
    assert main([*words.split(), "--json", str(file)]) == 0
    figures = json.loads(file.read_text())["figures"]
    assert list(figures) == ["plain", "guided", "guided-slo"]
    assert figures["plain"]["tokens"] == figures["guided"]["tokens"]
    assert figures["guided"]["evaluations_per_token"]["median"] > 1
    assert figures["guided"]["limited_share"]["max"] == 0
    assert "tokens/s" in capsys.readouterr().out
