import math
import random

import pytest
import torch

from tests.evaluation.conftest import PROMPTS, WORDS
from tests.oracle import enumerate_policy, next_logits
from vas_engine.evaluation.dense import log_probs, sequence_kl
from vas_engine.evaluation.measure import distinct, measure, run, summarise
from vas_engine.params import SamplingParams


def test_zero_weight_is_the_base(llm, reward):
    params = SamplingParams(max_tokens=6, num_candidates=6)
    base = measure(llm, PROMPTS, params, [reward], samples=5, kl=False)
    zero = measure(llm, PROMPTS, params.replace(values={"v": 0.0}), [reward], samples=5)
    assert base.responses == zero.responses
    assert base.kl is None
    assert zero.kl.mean == pytest.approx(0.0, abs=1e-9)
    assert base.pools["a"] == [[text.count("a") for text in texts] for texts in base.responses]
    assert base.rewards["a"].count == 20
    assert base.value_rows_per_token == 0.0
    assert zero.value_rows_per_token > 0.0
    # A prompt is processed once for its samples, and a response's last token not at all: about one row a token.
    assert 0.7 < base.model_rows_per_token < 1.3


def exact(llm, params, prompt) -> tuple[float, float]:
    """KL to the base at temperature 1, and mean log-probability under it, over all responses of the policy."""
    ids = [WORDS.index(word) for word in prompt.split()]
    networks = {"v": (llm.values["v"], 0)}
    policy = enumerate_policy(llm.lm, networks, params, ids, params.max_tokens, {1})
    plain = params.replace(values={}, temperature=1.0)
    base = enumerate_policy(llm.lm, networks, plain, ids, params.max_tokens, {1})
    kl = sum(p * math.log(p / base[response]) for response, p in policy.items())
    return kl, sum(p * math.log(base[response]) for response, p in policy.items())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_divergence_and_likelihood_are_those_of_the_enumerated_policy(llm, reward, temperature):
    """Also where a temperature moves the policy away from a base that keeps its own."""
    params = SamplingParams(max_tokens=3, values={"v": 4.0}, num_candidates=4, temperature=temperature)
    kl, log_prob = exact(llm, params, "b c")
    [found] = run(llm, ["b c"], [params], samples=600)
    assert found.kl_kind == ("exact" if temperature == 1.0 else "log-ratio")
    assert kl > 0.05
    for column, expected in (([r.kl for r in found.responses], kl), ([r.log_prob for r in found.responses], log_prob)):
        numbers = torch.tensor(column, dtype=torch.float64)
        assert abs(float(numbers.mean()) - expected) < 4 * float(numbers.std()) / math.sqrt(len(numbers))


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_bias": {2: 3.0}},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 3.0},
        {"min_tokens": 3},
    ],
)
def test_penalties_and_bias_cost_divergence(llm, changes):
    """Where they are the whole policy too: likelihoods are the base model's, divergence that from it."""
    params = SamplingParams(max_tokens=4, **changes)
    [found] = run(llm, PROMPTS, [params], samples=50)
    assert found.kl_kind == "log-ratio"
    assert sum(r.kl for r in found.responses) > 0
    ids = [[WORDS.index(word) for word in PROMPTS[r.prompt].split()] for r in found.responses]
    dense = log_probs(llm.lm, ids, [r.token_ids for r in found.responses])
    assert [r.log_prob for r in found.responses] == pytest.approx(dense, abs=1e-4)


def test_a_greedy_response_has_all_the_probability(llm):
    params = SamplingParams(max_tokens=4, values={"v": 1.0}, num_candidates=4, temperature=0.0)
    [found] = run(llm, PROMPTS, [params], samples=2)
    ids = [[WORDS.index(word) for word in PROMPTS[r.prompt].split()] for r in found.responses]
    dense = log_probs(llm.lm, ids, [r.token_ids for r in found.responses])
    assert [-r.kl for r in found.responses] == pytest.approx(dense, abs=1e-4)


def test_log_probs_and_divergences_of_ragged_responses(llm, monkeypatch):
    """Padding, batches of any size and the prompt's own tokens make no difference."""
    from tests.evaluation.conftest import word_model
    from vas_engine.evaluation import dense
    from vas_engine.model.lm import CausalLM

    other = CausalLM.load(word_model(seed=1), device="cpu", dtype="float32")
    chooser = random.Random(0)
    prompts = [[chooser.randrange(6) for _ in range(chooser.randrange(1, 5))] for _ in range(7)]
    responses = [[chooser.randrange(6) for _ in range(chooser.randrange(1, 6))] for _ in range(7)]
    monkeypatch.setattr(dense, "BATCH_LOGITS", 120)
    likelihoods = log_probs(llm.lm, prompts, responses)
    divergences = sequence_kl(other, llm.lm, prompts, responses)
    for place, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        likelihood = divergence = 0.0
        for t, token in enumerate(response):
            ours, theirs = (
                torch.log_softmax(next_logits(lm, [prompt + response[:t]])[0], -1) for lm in (other, llm.lm)
            )
            likelihood += float(theirs[token])
            divergence += float((ours.exp() * (ours - theirs)).sum())
        assert likelihoods[place] == pytest.approx(likelihood, abs=1e-4)
        assert divergences[place] == pytest.approx(divergence, abs=1e-4)


def test_a_mixed_batch_gives_what_each_setting_gives_alone(llm, reward):
    settings = [
        SamplingParams(max_tokens=6, values={"v": weight}, num_candidates=4) if weight else SamplingParams(max_tokens=6)
        for weight in (0.0, 1.0, -2.0)
    ]
    together = run(llm, PROMPTS, settings, samples=4)
    for setting, mixed in zip(settings, together, strict=True):
        [alone] = run(llm, PROMPTS, [setting], samples=4)
        assert [r.token_ids for r in mixed.responses] == [r.token_ids for r in alone.responses]
        assert mixed.value_rows == alone.value_rows
        assert mixed.tokens == mixed.delivered == alone.tokens
    assert together[0].flops < together[1].flops


def test_many_samples_are_several_requests(llm, reward, monkeypatch):
    from vas_engine.evaluation import measure as module

    monkeypatch.setattr(module, "REQUEST_SAMPLES", 3)
    [found] = run(llm, PROMPTS, [SamplingParams(max_tokens=16, ignore_eos=True)], samples=8)
    assert [r.prompt for r in found.responses] == [place for place in range(4) for _ in range(8)]
    summary = summarise(found, PROMPTS, [reward])
    assert [len(pool) for pool in summary.pools["a"]] == [8] * 4
    # No two of them draw from the same seed.
    assert len({tuple(r.token_ids) for r in found.responses if r.prompt == 1}) == 8


def test_perplexity_and_distinct_ngrams(llm, reward):
    assert distinct([1, 1, 1, 1]) == (1 / 4, 1 / 3, 1 / 2)
    assert distinct([1, 2, 3]) == (1.0, 1.0, 1.0)
    assert distinct([4]) == (1.0, 1.0, 1.0)
    [found] = run(llm, PROMPTS, [SamplingParams(max_tokens=6)], samples=4)
    summary = summarise(found, PROMPTS, [reward])
    tokens = sum(len(r.token_ids) for r in found.responses)
    assert math.log(summary.perplexity) == pytest.approx(-sum(r.log_prob for r in found.responses) / tokens)
    assert summary.distinct[0] == pytest.approx(
        sum(len(set(r.token_ids)) / len(r.token_ids) for r in found.responses) / len(found.responses)
    )
