"""Paged, batched, shared = full uncached recomputation: values, log-probabilities and KL of whole engine runs.

Several faults of the method's first published decoder would show here: cached tokens fed again, a cache judged valid by
its first row, repeated caches paired with other rows, padding attended to.
"""

from __future__ import annotations

import math

import pytest
import torch

from tests.engine.conftest import KINDS, VOCAB, drain, engine, llama, network
from tests.model.conftest import CONFIGS, random_model
from tests.oracle import base_log_probs, guided_policy, head_outputs, next_logits
from vas_engine.model import CausalLM
from vas_engine.params import SamplingParams

PROMPTS = {"long": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], "one": [7], "pair": [2, 8], "block": [1, 6, 1, 8]}


def check_against_recomputation(lm, nets: dict, params: SamplingParams, **options) -> int:
    """Run all prompts in one batch and compare every event with the definition; returns how many were compared."""
    running = engine(lm, nets, **options)
    heads = {name: (net, 0) for name, net in nets.items()}
    for i, (name, prompt) in enumerate(PROMPTS.items()):
        running.add_request(name, prompt, params.replace(seed=i))
    prefixes: dict = {}
    events = drain(running)
    running.scheduler.check()
    for event in events:
        assert event.error is None, event.error
        prefix = prefixes.setdefault((event.request_id, event.index), list(PROMPTS[event.request_id]))
        policy = guided_policy(lm, heads, params, prefix).log()
        base = base_log_probs(next_logits(lm, [prefix])[0], params, prefix)
        assert event.log_prob == pytest.approx(base[event.token_id].item(), abs=1e-4)
        assert event.tilted_log_prob == pytest.approx(policy[event.token_id].item(), abs=1e-4)
        kl = torch.where(policy > -math.inf, policy.exp() * (policy - base), 0.0).nansum().item()
        assert event.kl == pytest.approx(kl, abs=1e-4)
        prefix.append(event.token_id)
        for name, net in nets.items():
            value = net.heads.mean(head_outputs(lm, net, [prefix]))[0, 0].item()
            assert event.values[name] == pytest.approx(value, abs=1e-4)
    return len(events)


def params(**changes) -> SamplingParams:
    return SamplingParams(
        **{
            "values": {"v": 1.5},
            "num_candidates": 6,
            "max_tokens": 7,
            "ignore_eos": True,
            "report_kl": True,
            "n": 2,
            **changes,
        }
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [16, 1024], ids=["chunked", "whole"])
def test_every_kind(lm: CausalLM, kind: str, chunk: int) -> None:
    """k = 6 divides no chunk of anything here; prompts are ragged; two samples share each prompt."""
    compared = check_against_recomputation(lm, {"v": network(kind, lm)}, params(), max_num_batched_tokens=chunk)
    assert compared == len(PROMPTS) * 2 * 7


@pytest.mark.parametrize("kinds", [("reader", "side"), ("lookahead", "action"), ("side-lookahead", "model", "reader")])
def test_several_networks_at_once(lm: CausalLM, kinds: tuple[str, ...]) -> None:
    nets = {kind: network(kind, lm, seed=i + 1) for i, kind in enumerate(kinds)}
    weights = {kind: (-1.0) ** i * (1.0 + i) for i, kind in enumerate(kinds)}
    check_against_recomputation(lm, nets, params(values=weights, n=1))


@pytest.mark.parametrize("kind", ["reader", "side", "lookahead", "model"])
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_every_architecture(architecture: str, kind: str) -> None:
    base = CausalLM.load(random_model(CONFIGS[architecture], 2.0), device="cpu")
    net = network(kind, base)
    check_against_recomputation(base, {"v": net}, params(n=1, max_tokens=5))


def test_preempted_and_resumed(lm: CausalLM) -> None:
    """A cache that cannot hold everybody: sequences lose their pages and are computed again."""
    for kind in KINDS:
        net = network(kind, lm)
        running = engine(lm, {"v": net}, num_blocks=14)
        for i, (name, prompt) in enumerate(PROMPTS.items()):
            running.add_request(name, prompt, params(n=1, max_tokens=12, seed=i))
        drain(running)
        assert running.scheduler.num_preemptions > 0
        check_against_recomputation(lm, {"v": net}, params(n=1, max_tokens=12), num_blocks=14)


def test_end_of_sequence_is_a_candidate_with_a_value(lm: CausalLM) -> None:
    """V at s + EOS is scored like any other and reported when it wins."""
    net = network("side", lm)
    eos = VOCAB - 1
    running = engine(lm, {"v": net})
    # EOS is always among the candidates and the bias makes it win.
    ask = SamplingParams(values={"v": 1.0}, num_candidates=4, logit_bias={eos: 50.0}, seed=0)
    running.add_request("end", PROMPTS["long"], ask)
    (event,) = drain(running)
    assert event.token_id == eos
    assert event.finish_reason == "stop"
    value = net.heads.mean(head_outputs(lm, net, [[*PROMPTS["long"], eos]]))[0, 0].item()
    assert event.values["v"] == pytest.approx(value, abs=1e-4)


def test_broken_recomputation_is_noticed() -> None:
    """The comparison is sharp: values of a slightly different network do not pass it."""
    base = llama()
    net, other = network("side", base), network("side", base)
    with torch.no_grad():
        other.heads.output.weight.mul_(1.01)
    running = engine(base, {"v": net})
    running.add_request("one", PROMPTS["long"], params(n=1, seed=1))
    first = drain(running)[0]
    wrong = other.heads.mean(head_outputs(base, other, [[*PROMPTS["long"], first.token_id]]))[0, 0].item()
    assert first.values["v"] != pytest.approx(wrong, abs=1e-4)
