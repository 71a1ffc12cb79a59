"""Sampled frequencies against the exact guided policy, on a model small enough to enumerate.

The values are those of dynamic programming: every kind of network is fitted to the exact distribution of returns of
every state, the engine samples with it, and the frequencies of whole completions are held against the policy computed
from the definition (tests/oracle.py).
"""

from __future__ import annotations

import itertools
import zlib
from collections import Counter

import pytest
import torch

from tests.engine.conftest import KINDS, drain, engine, llama, network, tokens
from tests.oracle import chi_squared_p, enumerate_policy, next_logits, pad
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig, Support

VOCAB, EOS, HORIZON = 5, 4, 3
PROMPT = [1, 3]
SAMPLES = 2400
LIMIT = 1e-4
"""Smallest p-value accepted; seeds are fixed, so a pass stays a pass."""

HEADS = (
    HeadConfig("ones", "ones", support=Support(0.0, 3.0, 4)),
    HeadConfig("ended", "ended", support=Support(0.0, 1.0, 2)),
)


def rewards(completion: tuple[int, ...]) -> tuple[int, int]:
    """Two rewards with whole numbers: how often token 1 occurs, and whether the completion ended by itself."""
    return completion.count(1), int(completion[-1:] == (EOS,))


def returns_by_dynamic_programming(lm) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """Exact distribution of both returns, under the frozen model, after every prefix of a completion."""
    tables: dict[tuple[int, ...], list[torch.Tensor]] = {}

    def visit(done: tuple[int, ...]) -> list[torch.Tensor]:
        if len(done) == HORIZON or done[-1:] == (EOS,):
            table = [torch.zeros(head.support.bins, dtype=torch.float64) for head in HEADS]
            for row, reward in zip(table, rewards(done), strict=True):
                row[reward] = 1.0
        else:
            policy = torch.softmax(next_logits(lm, [[*PROMPT, *done]])[0], -1)
            table = [torch.zeros(head.support.bins, dtype=torch.float64) for head in HEADS]
            for token in range(VOCAB):
                for row, below in zip(table, visit((*done, token)), strict=True):
                    row += policy[token] * below
        tables[done] = table
        return table

    visit(())
    return tables


class World:
    """The enumerable model, its exact returns, and a network of each kind fitted to them."""

    def __init__(self) -> None:
        self.lm = llama(layers=2, vocab=VOCAB, seed=5)
        with torch.no_grad():
            # Less sharp, so that every completion occurs often enough to be counted.
            self.lm.model.get_output_embeddings().weight.mul_(0.4)
        self.tables = returns_by_dynamic_programming(self.lm)
        self.fitted: dict[str, object] = {}

    def network(self, kind: str):
        if kind not in self.fitted:
            self.fitted[kind] = self._fit(kind)
        return self.fitted[kind]

    def _fit(self, kind: str):
        made = network(kind, self.lm, HEADS)
        complete = [c for c in self.tables if len(c) == HORIZON or c[-1:] == (EOS,)]
        batch, lengths = pad([[*PROMPT, *c] for c in complete])
        places = [(b, len(PROMPT) - 1 + k) for b, c in enumerate(complete) for k in range(len(c) + 1)]
        rows, columns = (torch.tensor(x) for x in zip(*places, strict=True))
        targets = [
            torch.stack([self.tables[c[:k]][m] for c in complete for k in range(len(c) + 1)]).float()
            for m in range(len(HEADS))
        ]
        optimiser = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
        made.train()
        for _ in range(250):
            output = made.train_values(self.lm, batch, lengths)[rows, columns]
            parts = output.split([head.support.bins for head in HEADS], -1)
            loss = sum(-(t * p.log_softmax(-1)).sum(-1).mean() for t, p in zip(targets, parts, strict=True))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return made.eval()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def sample(lm, net, params: SamplingParams, total: int = SAMPLES) -> Counter:
    running = engine(lm, {"": net} if net else {}, num_blocks=4000, max_num_seqs=800, max_num_batched_tokens=8192)
    seed = zlib.crc32(repr(params).encode())
    for i in range(total // 800):
        running.add_request(f"r{i}", PROMPT, params.replace(n=800, max_tokens=HORIZON, seed=seed + i))
    counts = Counter(tuple(ids) for ids in tokens(drain(running)).values())
    running.scheduler.check()
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_networks_learn_the_values_of_dynamic_programming(world: World, kind: str) -> None:
    net = world.network(kind)
    states = [c for c in world.tables if c]
    batch, lengths = pad([[*PROMPT, *c] for c in states])
    with torch.no_grad():
        output = net.train_values(world.lm, batch, lengths)[torch.arange(len(states)), lengths - 1]
    exact = torch.stack(
        [torch.stack([world.tables[c][m] @ net.heads.atoms(m).double() for m in range(len(HEADS))]) for c in states]
    )
    error = (net.heads.mean(output).double() - exact).abs().mean().item()
    # Heads on frozen states see less than networks that read the prefix.
    assert error < (0.2 if kind in ("action", "lookahead") else 0.05)


@pytest.mark.parametrize("tilt", ["mean", "optimal"])
@pytest.mark.parametrize("baseline", ["state", "candidate-mean"])
@pytest.mark.parametrize("tail", ["keep", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_follow_the_guided_policy(world: World, kind: str, tail: str, baseline: str, tilt: str) -> None:
    net = world.network(kind)
    # Weights of both signs, two values at once; which sign goes where differs from case to case.
    flip = -1.0 if zlib.crc32(f"{kind}{tail}{baseline}{tilt}".encode()) % 2 else 1.0
    params = SamplingParams(
        values={"ones": 1.3 * flip, "ended": -1.5 * flip}, num_candidates=3, tail=tail, baseline=baseline, tilt=tilt
    )
    networks = {"ones": (net, 0), "ended": (net, 1)}
    expected = enumerate_policy(world.lm, networks, params, PROMPT, HORIZON, {EOS})
    assert sum(expected.values()) == pytest.approx(1.0)
    counts = sample(world.lm, net, params)
    assert chi_squared_p(counts, expected, SAMPLES) > LIMIT
    # The test can fail: plain sampling is another distribution.
    plain = enumerate_policy(world.lm, {}, SamplingParams(), PROMPT, HORIZON, {EOS})
    assert chi_squared_p(counts, plain, SAMPLES) < LIMIT


CUTS = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"temperature": 1.4, "top_p": 0.9, "min_p": 0.05},
    {"advantage_clip": 0.3},
]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("cuts", CUTS, ids=lambda c: "-".join(c) or "none")
def test_cuts_and_clip(world: World, cuts: dict, guided: bool) -> None:
    net = world.network("reader")
    values = {"ones": -2.0, "ended": 1.0} if guided else {}
    params = SamplingParams(values=values, num_candidates=2, **cuts)
    expected = enumerate_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, PROMPT, HORIZON, {EOS})
    assert chi_squared_p(sample(world.lm, net, params), expected, SAMPLES) > LIMIT


def test_optimal_tilt_is_the_solution_of_the_regularised_problem(world: World) -> None:
    """With the exact return distribution, pi(sequence) is pi0(sequence) exp(w R) / Z: check it on the frequencies."""
    net = world.network("side")
    weight = 1.5
    params = SamplingParams(values={"ones": weight}, num_candidates=VOCAB, tilt="optimal")
    plain = enumerate_policy(world.lm, {}, SamplingParams(), PROMPT, HORIZON, {EOS})
    tilted = {c: p * torch.tensor(weight * rewards(c)[0]).exp().item() for c, p in plain.items()}
    total = sum(tilted.values())
    tilted = {c: p / total for c, p in tilted.items()}
    counts = sample(world.lm, net, params)
    frequency = {c: counts.get(c, 0) / SAMPLES for c in tilted}
    distance = 0.5 * sum(abs(frequency[c] - tilted[c]) for c in tilted)
    far = 0.5 * sum(abs(frequency[c] - plain[c]) for c in tilted)
    assert distance < 0.08 < far


def test_temperature_zero_takes_the_argmax_of_log_probability_and_tilt(world: World) -> None:
    from tests.oracle import guided_policy

    for kind, tail in itertools.product(KINDS, ("keep", "drop")):
        net = world.network(kind)
        params = SamplingParams(
            values={"ones": 3.0, "ended": 1.0}, num_candidates=3, tail=tail, temperature=0.0, max_tokens=HORIZON
        )
        running = engine(world.lm, {"": net})
        running.add_request("greedy", PROMPT, params)
        produced = tokens(drain(running))[("greedy", 0)]
        prefix = list(PROMPT)
        for token in produced:
            policy = guided_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, prefix)
            assert token == int(policy.argmax())
            prefix.append(token)
