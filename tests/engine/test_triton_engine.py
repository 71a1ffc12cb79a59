"""Whole engines over the Triton kernels against the same engines over the reference."""

from __future__ import annotations

import dataclasses
import importlib
import random

import pytest
import torch

pytest.importorskip("triton")

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.engine.conftest import VOCAB, distributional, drain, engine, llama, network
from vas_engine.engine.engine import Engine
from vas_engine.engine.event import TokenEvent
from vas_engine.model import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXED = (
    HeadConfig("plain", "plain"),
    HeadConfig("bounded", "bounded", bounds=(-1.0, 1.0)),
    distributional(name="dist"),
)
# The interpreter is NumPy, which warns of the infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def base(backend: str) -> CausalLM:
    """The same weights for either backend."""
    model = llama(layers=2).model
    return CausalLM.load(model, device=DEVICE, attention_backend=backend)


def build(backend: str, kinds: dict[str, tuple[str, tuple[HeadConfig, ...] | None]], **options) -> Engine:
    lm = base(backend)
    scorers = {name: network(kind, lm, heads, seed=place) for place, (name, (kind, heads)) in enumerate(kinds.items())}
    if DEVICE == "cuda":
        for scorer in scorers.values():
            scorer.bind(lm)
    return engine(lm, scorers, **options)


def requests(names: list[str], exact: list[str], count: int = 5, **changes) -> list[tuple[list[int], SamplingParams]]:
    """Weights of both signs on some of the values, clips, tilts, baselines; some requests without values."""
    rng = random.Random(len(names))
    made = []
    for i in range(count):
        optimal = bool(exact) and i % 2 == 1
        usable = exact if optimal else names
        values = {name: rng.uniform(-3, 3) for name in usable if rng.random() < 0.8} if i != 2 else {}
        settings = {
            "values": values,
            "num_candidates": rng.choice([1, 4, 6]),
            "temperature": rng.choice([0.0, 1.0]),
            "tail": rng.choice(["keep", "drop"]),
            "advantage_clip": rng.choice([None, 0.3]),
            "baseline": rng.choice(["state", "candidate-mean"]),
            "tilt": "optimal" if optimal else "mean",
            "seed": i,
            "max_tokens": rng.choice([2, 4]),
            "ignore_eos": True,
            "logprobs": 2 if i == 1 else 0,
            **changes,
        }
        made.append(([rng.randrange(VOCAB - 1) for _ in range(rng.randrange(1, 8))], SamplingParams(**settings)))
    return made


def run(running: Engine, asked) -> list[TokenEvent]:
    for i, (prompt, params) in enumerate(asked):
        running.add_request(str(i), prompt, params)
    return drain(running)


def assert_same(ours: list[TokenEvent], wanted: list[TokenEvent]) -> None:
    def key(event):
        return event.request_id, event.index

    assert len(ours) == len(wanted) > 0
    for mine, theirs in zip(sorted(ours, key=key), sorted(wanted, key=key), strict=True):
        mine, theirs = (dataclasses.asdict(event) for event in (mine, theirs))
        assert mine["token_id"] == theirs["token_id"]
        for name in ("log_prob", "tilted_log_prob", "kl", "values", "prompt_values"):
            assert mine.pop(name) == pytest.approx(theirs.pop(name), abs=2e-4, nan_ok=True)
        for one, other in zip(mine.pop("top_logprobs") or (), theirs.pop("top_logprobs") or (), strict=True):
            assert one[0] == other[0]
            assert one[1:3] == pytest.approx(other[1:3], abs=2e-4, nan_ok=True)
            assert one[3] == pytest.approx(other[3], abs=2e-4)
        assert mine == theirs


SETTINGS = {
    "lookahead": {"v": ("lookahead", None)},
    "model": {"v": ("model", None)},
    "several": {"r": ("reader", (distributional(),)), "s": ("side", MIXED), "a": ("action", None)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_equal_tokens_and_values(name, monkeypatch):
    """Every kind of network and head, weights mixed in a batch with requests that have none."""
    kinds = SETTINGS[name]
    launches = []
    tilt = importlib.import_module("vas_engine.kernels.value_tilt")
    gather = importlib.import_module("vas_engine.kernels.candidate_input")
    for module, kernel in ((tilt, "value_head_tilt"), (gather, "candidate_input")):
        function = getattr(module, kernel)

        def counted(*args, _function=function, _kernel=kernel, **how):
            launches.append(_kernel)
            return _function(*args, **how)

        monkeypatch.setattr(module, kernel, counted)
    mine, wanted = (build(backend, kinds) for backend in ("triton", "reference"))
    exact = [
        value
        for value in mine.value_names
        for network_ in mine.guide.networks
        for place, head in enumerate(network_.scorer.config.heads)
        if head.distributional and mine.guide.value_names[network_.columns][place] == value
    ]
    asked = requests(mine.value_names, exact)
    assert_same(run(mine, asked), run(wanted, asked))
    assert "value_head_tilt" in launches
    assert "candidate_input" in launches or name == "model"
    assert mine.stats == wanted.stats


def test_bfloat16_side_network():
    """Heads that keep bfloat16 copies of their hidden layer: the same tokens but for rounding, so values are close."""
    asked = requests(["v"], [], 3, logprobs=0)
    seen = []
    for backend in ("triton", "reference"):
        model = llama(layers=2).model.to(torch.bfloat16)
        lm = CausalLM.load(model, device=DEVICE, attention_backend=backend)
        running = engine(lm, {"v": network("side", lm)})
        seen.append({(e.request_id, e.index): e for e in reversed(run(running, asked))})
    first, second = seen
    assert first.keys() == second.keys()
    for place, event in first.items():
        assert event.prompt_values == pytest.approx(second[place].prompt_values, abs=0.05)


def test_values_that_are_not_finite_end_their_request_alone():
    running = build("triton", {"v": ("side", None)})
    asked = requests(["v"], [], 3, logprobs=0, values={"v": 1.0})
    wanted = run(build("triton", {"v": ("side", None)}), asked)
    (poisoned,) = (n.scorer for n in running.guide.networks)
    run_features = poisoned.features

    def features(token_ids, hidden, hidden_index, batch, rows=None):
        made = run_features(token_ids, hidden, hidden_index, batch, rows)
        if len(batch.group_offsets) == 4:  # the step of all three: its second request's rows
            made[batch.group_offsets[1] : batch.group_offsets[2]] = torch.nan
        return made

    poisoned.features = features
    events = run(running, asked)
    failed = [e for e in events if e.error is not None]
    assert [e.request_id for e in failed] == ["1"]
    assert "values" in str(failed[0].error)
    for other in ("0", "2"):
        of = [[e.token_id for e in found if e.request_id == other] for found in (events, wanted)]
        assert of[0] == of[1]
