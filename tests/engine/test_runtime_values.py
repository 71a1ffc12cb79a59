"""Values that come and go while requests run: nobody's tokens change, no page of one value serves another."""

from __future__ import annotations

import pytest

from tests.engine.conftest import KINDS, drain, engine, generate, network, tokens
from vas_engine.errors import InvalidArgumentError, KVCacheError
from vas_engine.params import SamplingParams

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def params(seed: int = 1, **changes) -> SamplingParams:
    return SamplingParams(
        **{"seed": seed, "max_tokens": 16, "ignore_eos": True, "num_candidates": 5, "values": {"a": 2.0}, **changes}
    )


def events_of(running, steps: int) -> list:
    return [event for _ in range(steps) for event in running.step()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["reader", "side", "lookahead"])
def test_coming_and_going_changes_nobody(lm, kind: str, other: str) -> None:
    mine, second, third = network(kind, lm), network(other, lm, seed=3), network("reader", lm, seed=4)
    alone = generate(engine(lm, {"a": mine}), PROMPT, params())[0]
    plain = generate(engine(lm), PROMPT, params(values={}))[0]
    both = generate(engine(lm, {"a": mine, "b": second}), PROMPT, params(values={"a": 1.0, "b": -2.0}))[0]
    only = generate(engine(lm, {"b": second}), PROMPT, params(values={"b": -2.0}))[0]

    # In chunks of 8 rows, so that the prompt is half done when the second value comes.
    running = engine(lm, {"x": third, "a": mine}, max_num_batched_tokens=30)
    running.add_request("first", PROMPT, params())
    running.add_request("plain", PROMPT, params(values={}))
    events = events_of(running, 2)
    running.add_value("b", second)
    assert running.value_names == ["x", "a", "b"]
    running.add_request("both", PROMPT, params(values={"a": 1.0, "b": -2.0}))
    events += events_of(running, 3)
    running.remove_value("x")  # nobody uses it: the columns of the others move at once
    assert running.value_names == ["a", "b"]
    events += events_of(running, 2)
    running.remove_value("a")
    assert running.value_names == ["b"]
    with pytest.raises(InvalidArgumentError, match="'a'"):
        running.add_request("late", PROMPT, params())
    with pytest.raises(InvalidArgumentError, match="still running"):
        running.add_value("a", second)
    running.add_request("only", PROMPT, params(values={"b": -2.0}))
    events += drain(running)
    produced = tokens(events)
    assert produced[("first", 0)] == alone
    assert produced[("plain", 0)] == plain
    assert produced[("both", 0)] == both
    assert produced[("only", 0)] == only
    for event in events:
        if event.token_id is not None:
            assert (
                set(event.values)
                == {"first": {"a"}, "plain": set(), "both": {"a", "b"}, "only": {"b"}}[event.request_id]
            )
    assert [n.name for n in running.guide.networks] == ["b"]
    running.scheduler.check()


@pytest.mark.parametrize("kind", ["side", "model"])
def test_a_name_taken_again_finds_no_pages_of_the_one_before(lm, kind: str) -> None:
    first, second = network(kind, lm), network(kind, lm, seed=5)
    expected = generate(engine(lm, {"a": second}), PROMPT, params())[0]
    running = engine(lm, {"a": first})
    assert generate(running, PROMPT, params())[0] != expected
    running.remove_value("a")
    running.add_value("a", second)
    assert generate(running, PROMPT, params())[0] == expected
    before = running.blocks.prefix_hit_tokens
    assert generate(running, PROMPT, params())[0] == expected
    assert running.blocks.prefix_hit_tokens > before


def test_what_cannot_be_loaded_leaves_everything_as_it_was(lm, monkeypatch: pytest.MonkeyPatch) -> None:
    from vas_engine.engine import engine as module
    from vas_engine.values.config import HeadConfig

    running = engine(lm, {"a": network("reader", lm)})
    with pytest.raises(InvalidArgumentError, match="is loaded"):
        running.add_value("a", network("reader", lm))
    with pytest.raises(InvalidArgumentError, match="two networks give this name"):
        running.add_value("", network("reader", lm, heads=(HeadConfig("a", "a"),)))
    with pytest.raises(InvalidArgumentError, match="did you mean 'a'"):
        running.remove_value("aa")
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    with pytest.raises(KVCacheError, match="pages take"):
        running.add_value("side", network("side", lm))
    assert running.value_names == ["a"]
    assert len(generate(running, PROMPT, params())[0]) == 16


def test_salts_of_callers_share_nothing(lm) -> None:
    running = engine(lm)
    for salt, expected in ((b"", 0), (b"", 8), (b"x", 0), (b"x", 8), (b"y", 0)):
        before = running.blocks.prefix_hit_tokens
        running.add_request("r", PROMPT, params(values={}, n=2), salt=salt)
        tokens(drain(running))
        assert running.blocks.prefix_hit_tokens - before == expected, salt
    running.scheduler.check()
