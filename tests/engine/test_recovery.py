"""After a step that raised: its requests end, those that wait go on, and no page is lost or trusted."""

from __future__ import annotations

import pytest

from tests.engine.conftest import KINDS, drain, engine, generate, llama, network, tokens
from vas_engine.params import SamplingParams


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"seed": 1, "max_tokens": 12, "ignore_eos": True, "num_candidates": 5, **changes})


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("where", ["forward", "logits", "select"])
def test_recovery(kind: str | None, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vas_engine.engine import engine as module

    lm = llama()
    nets = {"v": network(kind, lm)} if kind else {}
    values = {"v": 2.0} if kind else {}
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    expected = generate(engine(lm, nets), prompt, params(values=values))[0]
    running = engine(lm, nets, max_num_seqs=3)
    running.add_request("several", prompt, params(values=values, n=2))
    running.add_request("short", prompt, params(values={}, max_tokens=2))
    running.add_request("waits", prompt, params(values=values))
    for _ in range(2):
        running.step()
    owner = {"forward": lm, "logits": lm, "select": module}[where]
    whole = getattr(owner, where)

    def broken(*arguments, **named):
        raise RuntimeError("injected")

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, broken)
        with pytest.raises(RuntimeError, match="injected") as raised:
            drain(running)  # a lookahead's step need not choose anything
    assert getattr(owner, where) == whole
    ended = running.recover(raised.value)
    assert {(event.request_id, event.index) for event in ended} >= {("several", 0), ("several", 1)}
    assert all(event.error is raised.value and event.finish_reason == "error" for event in ended)
    assert not running.is_live("several")
    if running.is_live("waits"):
        assert tokens(drain(running))[("waits", 0)] == expected
    running.scheduler.check()
    assert running.blocks.num_used == 0
    assert generate(running, prompt, params(values=values))[0] == expected


def test_requests_whose_end_was_lost_are_told(lm) -> None:
    """A sequence that ended in the very step that raised has left the engine; the front ends its request."""
    from vas_engine.engine.output import OutputFront

    running = engine(lm)
    front = OutputFront(running, None)
    output = front.add("ends", [1, 2, 3], params(max_tokens=1))
    step = running.step

    def step_and_fail():
        step()
        raise RuntimeError("injected")

    running.step = step_and_fail
    with pytest.raises(RuntimeError) as raised:
        front.step()
    assert front.recover(raised.value) == [output]
    assert (output.outputs[0].finish_reason, output.error) == ("error", raised.value)
    assert not front.has_unfinished
