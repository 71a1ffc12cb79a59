"""Likelihoods of given texts are those that the engine reports for texts it draws."""

from __future__ import annotations

import math

import pytest

from tests.engine.conftest import KINDS, distributional, network
from tests.tiny import tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.errors import InvalidArgumentError, NonFiniteError
from vas_engine.evaluation import likelihood
from vas_engine.evaluation.likelihood import likelihoods

PROMPTS = [[3, 4, 5], [1], [7, 7, 2, 9, 8, 1, 3], [10, 4]]
SETTINGS = [
    {},
    {"tail": "drop"},
    {"baseline": "candidate-mean", "advantage_clip": 0.5},
    {"tilt": "optimal", "num_candidates": 257},
]


class Random:
    """A random network of some kind, made when its base model is known."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def bind(self, lm, tokenizer):
        return network(self.kind, lm, (distributional(),))


@pytest.fixture(scope="module", params=KINDS)
def llm(request) -> LLM:
    options = {"skip_tokenizer_init": True, "kv_cache_memory": "4MiB", "device": "cpu"}
    return LLM(tiny_llama(), {"kind": Random(request.param)}, **options)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "default")
def test_drawn_texts(llm, settings, monkeypatch) -> None:
    """Several texts in a batch, of unlike lengths, in one pass and in many."""
    params = SamplingParams(values={"kind": 2.0}, max_tokens=8, **({"num_candidates": 5} | settings))
    each = [params.replace(seed=seed, logprobs=0, max_tokens=3 + seed) for seed in range(len(PROMPTS))]
    drawn = [output.outputs[0] for output in llm.generate(PROMPTS, each, use_tqdm=False)]
    texts = [completion.token_ids for completion in drawn]
    found = likelihoods(llm, PROMPTS, texts, params)
    for likely, completion in zip(found, drawn, strict=True):
        assert likely.log_prob == pytest.approx(completion.cumulative_tilted_logprob, abs=1e-4)
    plain = [likely.log_prob for likely in likelihoods(llm, PROMPTS, texts)]
    assert plain == pytest.approx([completion.cumulative_logprob for completion in drawn], abs=1e-4)
    assert max(abs(a - likely.log_prob) for a, likely in zip(plain, found, strict=True)) > 1e-2
    monkeypatch.setattr(likelihood, "BRANCH_SCORES", 100)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 8)
    apart = likelihoods(llm, PROMPTS, texts, params)
    assert [likely.log_prob for likely in apart] == pytest.approx([likely.log_prob for likely in found], abs=1e-4)


def test_greedy_texts(llm) -> None:
    params = SamplingParams(values={"kind": 2.0}, num_candidates=5, temperature=0.0, max_tokens=6)
    texts = [output.outputs[0].token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]
    assert all(likely.greedy for likely in likelihoods(llm, PROMPTS, texts, params))
    for place in (0, -1):
        others = [list(text) for text in texts]
        for other in others:
            other[place] = (other[place] + 1) % 257
        assert not any(likely.greedy for likely in likelihoods(llm, PROMPTS, others, params))


def test_all_next_tokens_sum_to_one(llm) -> None:
    for tail in ("keep", "drop"):
        params = SamplingParams(values={"kind": -1.5}, num_candidates=7, tail=tail)
        found = likelihoods(llm, [[5, 6, 7]] * 257, [[token] for token in range(257)], params)
        assert sum(math.exp(likely.log_prob) for likely in found) == pytest.approx(1.0, abs=1e-5)
        assert [likely.greedy for likely in found].count(True) == 1


def test_errors() -> None:
    llm = LLM(tiny_llama(), {"kind": Random("side")}, skip_tokenizer_init=True, kv_cache_memory="4MiB", device="cpu")
    guided = SamplingParams(values={"kind": 1.0})
    with pytest.raises(InvalidArgumentError, match="need a token each"):
        likelihoods(llm, [[]], [[1]])
    with pytest.raises(InvalidArgumentError, match="kind"):
        likelihoods(llm, [[1]], [[1]], SamplingParams(values={"kindd": 1.0}))
    assert len(likelihoods(llm, [[1] * 128], [[1]])) == 1
    assert len(likelihoods(llm, [[1] * 127], [[1]], guided)) == 1
    with pytest.raises(InvalidArgumentError, match="cut the context"):
        likelihoods(llm, [[1] * 128], [[1]], guided)
    llm.values["kind"].heads.output.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError):
        likelihoods(llm, [[1, 2]], [[3]], guided)
