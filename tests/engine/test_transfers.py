"""How often an ordinary step, one that is no graph, waits for the device: on one in software, whole engines."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.emulation import emulated
from tests.engine.conftest import distributional, engine_on, tokens
from vas_engine.engine.engine import Engine
from vas_engine.engine.event import TokenEvent
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig

# The interpreter is NumPy, which warns of the infinities that are meant.
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, the emulation takes its place"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
KINDS = {
    "reader": ("reader", None),
    "side": ("side", (HeadConfig("plain", "plain"), distributional(name="of9"))),
    "ahead": ("lookahead", None),
    "model": ("model", None),
}
LIMITS = {"top_k": 20, "top_p": 0.9, "presence_penalty": 0.5, "logit_bias": {3: 1.0}}
# What requests ask beside the seed; waits of a step: for what was selected, drawn, and said of prompts.
TRAFFIC: dict[str, tuple[list[dict[str, Any]], int]] = {
    "plain": ([{}, {"n": 2}, {"temperature": 0.0}], 1),
    "guided": ([{"values": {"reader": 1.0}}, {"values": {"side.plain": 1.0, "model": -1.0}}, {}], 2),
    "optimal": ([{"values": {"side.of9": 1.0}, "tilt": "optimal"}], 2),
    "limited": ([LIMITS | {"values": {"reader": 1.0}}, LIMITS, {"values": {"model": 1.0}}], 2),
    "lookahead": ([{"values": {"ahead": 1.0}}, {"values": {"ahead": 1.0, "reader": 0.5}}], 2),
}


def run(running: Engine, asked: list[dict[str, Any]], after_step: Callable[[bool], None] = lambda prompt: None) -> dict:
    """Tokens of requests; the last joins when the others decode. ``after_step`` learns whether a prompt was in it."""
    rng = random.Random(1)
    events: list[TokenEvent] = []
    for turn, more in enumerate(asked):
        params = SamplingParams(**{"num_candidates": 5, "seed": turn, "max_tokens": 4, "ignore_eos": True, **more})
        running.add_request(str(turn), [rng.randrange(30) for _ in range(3 + turn)], params)
        if turn < len(asked) - 2:
            continue
        events += running.step()
        after_step(True)
    while running.has_unfinished:
        events += running.step()
        after_step(False)
    return tokens(events)


@pytest.mark.parametrize("kind", TRAFFIC)
def test_ordinary_steps_wait_for_results_alone(kind: str) -> None:
    """Whatever a step needs lies ready on the device before it asks; what comes back comes together."""
    asked, most = TRAFFIC[kind]
    expected = run(engine_on("cpu", "cpp", KINDS), asked)
    with emulated() as device:
        running = engine_on("cuda", "triton", KINDS)
        run(running, asked)  # kernels' copies of the heads are made once
        before = Counter(device.waits)
        steps: list[tuple[bool, Counter[str]]] = []

        def note(prompt: bool) -> None:
            steps.append((prompt, Counter(device.waits) - before))
            before.update(steps[-1][1])

        assert run(running, asked, note) == expected
    guided = any("values" in each for each in asked)
    for prompt, waits in steps:
        assert set(waits) == {"event"}, waits
        assert waits["event"] <= most + (prompt and guided), waits
    assert len(steps) >= 4
