"""After a step that raised: its requests end, those that wait go on, and no page is lost or trusted."""

from __future__ import annotations

import random

import pytest

from tests.engine.conftest import KINDS, drain, engine, generate, llama, network, tokens
from vas_engine.engine.engine import Engine
from vas_engine.engine.output import OutputFront
from vas_engine.errors import InvalidArgumentError
from vas_engine.params import SamplingParams
from vas_engine.sampling import fork_seed


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
    ended = [event for event in running.recover(raised.value) if event.finish_reason is not None]
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


def test_what_a_step_had_drawn_before_it_raised_is_told() -> None:
    """A graph's winner is read, then its sequence is pushed out by another, whose forward raises."""
    lm = llama(2)
    want = generate(engine(lm), [1, 2, 3], params())[0]
    running = engine(lm, graphs=True, max_num_seqs=1)
    front = OutputFront(running, None)
    pushed_out = front.add("pushed out", [1, 2, 3], params(), priority=5)
    for _ in range(5):
        front.step()
    front.add("better", [4, 5, 6, 7], params())
    whole = lm.forward
    lm.forward = fail
    with pytest.raises(Injected) as raised:
        front.step()
    lm.forward = whole
    assert [output.request_id for output in front.recover(raised.value)] == ["pushed out", "better"]
    while front.has_unfinished:
        front.step()
    assert (pushed_out.outputs[0].token_ids, pushed_out.error) == (want, None)


class Injected(RuntimeError):
    pass


def fail(*arguments, **named):
    raise Injected


PLACES = ("_accept", "_event", "_alternatives", "_fork", "_end_overdue", "_end", "_plan_and_run", "step")


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_a_fault_anywhere_strands_nobody(where: str, graphs: bool) -> None:
    """Requests in any mix, and steps that raise after something has been done: each request is told of once, those
    that end well have the tokens that they have alone."""
    rng = random.Random(PLACES.index(where))
    lm, alone = llama(2), llama(2)
    kinds = ("reader", "side", "lookahead")
    nets = {kind: network(kind, lm, seed=i) for i, kind in enumerate(kinds)}
    reference = OutputFront(engine(alone, {kind: network(kind, alone, seed=i) for i, kind in enumerate(kinds)}), None)
    for _ in range(8):
        sizes = {"num_blocks": rng.choice([24, 60]), "max_num_seqs": rng.choice([2, 4]), "max_num_batched_tokens": 40}
        running = engine(lm, nets, graphs=graphs, max_model_len=60, **sizes)
        armed = arm(running, where)
        front = OutputFront(running, None)
        asked = {}
        for i in range(rng.randint(2, 6)):
            chosen = params(
                seed=i,
                n=rng.choice([1, 2, 3]),
                max_tokens=rng.choice([2, 5, 12]),
                num_candidates=3,
                values=dict.fromkeys(rng.sample(kinds, rng.randint(0, 2)), 1.0),
                stop_token_ids=[1, 2, 3],
                logprobs=rng.choice([None, 2]),
            )
            prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5][: rng.randint(1, 9)]
            output = front.add(str(i), prompt, chosen, priority=rng.choice([0, 1]))
            asked[str(i)] = prompt, chosen, output
        for number in range(300):
            if not running.has_unfinished:
                break
            if number in (2, 7):
                armed[0] = rng.randint(1, 4)
            try:
                front.step()
            except Injected as error:
                told = [output.request_id for output in front.recover(error)]
                assert len(told) == len(set(told))
            running.scheduler.check()
        assert not running.has_unfinished
        assert not front.has_unfinished
        assert running.blocks.num_used == 0
        for prompt, chosen, output in asked.values():
            assert output.finished
            if output.error is None:
                want = reference.add("alone", prompt, chosen)
                while reference.has_unfinished:
                    reference.step()
                assert [o.token_ids for o in output.outputs] == [o.token_ids for o in want.outputs]


def arm(running: Engine, where: str) -> list[int]:
    """Has a method raise when it has done its work, at the call that the number counts down to."""
    whole, armed = getattr(running, where), [0]

    def broken(*arguments, **named):
        result = whole(*arguments, **named)
        armed[0] -= 1
        if armed[0] == 0:
            fail()
        return result

    setattr(running, where, broken)
    return armed


def test_samples_that_never_started_end_as_their_request_does(lm) -> None:
    running = engine(lm)
    running.add_request("several", [1, 2, 3], params(n=3))
    running.cancel("several")
    with pytest.raises(InvalidArgumentError, match="has not been reported"):
        running.add_request("several", [1, 2, 3], params())  # its events could not be told from these
    ended = running.step()
    assert [(event.index, event.finish_reason) for event in ended] == [(i, "abort") for i in range(3)]
    assert [event.seed for event in ended] == [1, fork_seed(1, 1), fork_seed(1, 2)]
