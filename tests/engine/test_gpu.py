"""A GPU against the CPU, and graphs against ordinary steps, whole engines in float32; emulated where there is none."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import pytest
import torch

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.emulation import emulated
from tests.engine.conftest import distributional, drain, engine_on, network, tokens
from vas_engine.engine.engine import Engine
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig

HAS_GPU = torch.cuda.is_available()
# The interpreter takes a minute for what a GPU does in seconds.
pytestmark = [pytest.mark.gpu, *([] if HAS_GPU else [pytest.mark.slow, pytest.mark.timeout(900)])]
KINDS = {
    "r": ("reader", None),
    "s": ("side", (HeadConfig("plain", "plain"), distributional(name="of9"))),
    "l": ("lookahead", None),
    "m": ("model", None),
}


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    if HAS_GPU:
        yield
        return
    pytest.importorskip("triton")
    with emulated():
        yield


def build(device: str, backend: str, graphs: bool = False) -> Engine:
    return engine_on(device, backend, KINDS, graphs=graphs)


def traffic(running: Engine, limited: bool) -> dict:
    rng = random.Random(1)
    names = running.value_names
    before, after = [name for name in names if name != "l"], ["l", "m"]
    events = []
    for i in range(12):
        # Values that look ahead are graphs unless they go with values that read the state before.
        some = names if limited else rng.choice([before, after])
        params = SamplingParams(
            values={name: rng.uniform(-2, 2) for name in some if rng.random() < 0.4},
            num_candidates=rng.choice([1, 5, 20]),
            temperature=rng.choice([0.0, 1.0]),
            top_p=0.9 if i % 3 == 0 else 1.0,
            presence_penalty=0.5 if limited and i % 4 == 1 else 0.0,
            advantage_clip=rng.choice([None, 0.5]),
            seed=i,
            max_tokens=rng.randrange(8, 30),
            ignore_eos=True,
        )
        running.add_request(str(i), [rng.randrange(30) for _ in range(rng.randrange(1, 20))], params)
        if i > 6:
            events += running.step()
    return tokens(events + drain(running))


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_tokens_equal_those_of_the_cpu(limited: bool, graphs: bool) -> None:
    """Seeded and greedy, any mix of values, joining at any time."""
    running = build("cuda", "triton", graphs)
    assert traffic(running, limited) == traffic(build("cpu", "cpp"), limited)
    if graphs and not limited:
        assert running.stats.graph_steps > 5


@pytest.mark.parametrize("limited", [False, True])
def test_graphs_change_no_token(limited: bool) -> None:
    plain, kept = build("cuda", "triton"), build("cuda", "triton", graphs=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA graph")  # a step that cannot be captured is warned of
        assert traffic(kept, limited) == traffic(plain, limited)
    again = build("cuda", "triton", graphs=True)
    first, second = traffic(again, limited), traffic(again, limited)  # the second time nothing is captured
    assert first == second
    assert len(again.graphs) > 0


def test_graphs_are_captured_again_after_values_came() -> None:
    """With the old graphs the pool of their memory went, and new ones need another."""
    found = []
    for graphs in (False, True):
        running = build("cuda", "triton", graphs=graphs)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*CUDA graph")
            events = [traffic(running, limited=False)]
            running.add_value("new", network("action", running.lm, seed=9))
            events.append(traffic(running, limited=False))
        found.append(events)
        assert not graphs or len(running.graphs) > 0
    assert found[0] == found[1]
