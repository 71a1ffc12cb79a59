"""The sampling reference against Hugging Face's logits processors and against published vectors."""

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from vas_engine.kernels import reference

from vas_engine import _sampling
from vas_engine.sampling import SamplingArrays

# Known answers published with the Random123 library: counter, key, output.
PHILOX = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
OPTIONS = {
    "temperature": [1.0, 0.6, 1.7],
    "top_k": [0, 1, 7, 1000],
    "top_p": [1.0, 0.9, 0.35, 0.0],
    "min_p": [0.0, 0.05, 1.0],
    "repetition_penalty": [1.0, 1.4, 0.7],
    "bias": [{}, {3: 2.5, 11: -4.0, 12: -np.inf}],
}
ONE_AT_A_TIME = [{name: value} for name, values in OPTIONS.items() for value in values]
COMBINATIONS = [dict(zip(OPTIONS, choice, strict=True)) for choice in list(itertools.product(*OPTIONS.values()))[::29]]


def _support(logits, **settings):
    """ids and log-probabilities of everything that may be drawn, from the reference."""
    ragged = {name: [settings.pop(name)] for name in ("bias", "history") if name in settings}
    arrays = SamplingArrays.build(1, num_candidates=len(logits), **settings, **ragged)
    result = reference.candidate_select(logits[None], np.zeros(1, np.int64), arrays)
    count = int(result.count)
    return result.token_ids[0, :count], result.log_probs[0, :count]


def _warped(logits, seen, **s):
    """Log-probabilities [V] after Hugging Face's processors, in float64."""
    chain = LogitsProcessorList()
    if s.get("bias"):
        chain.append(SequenceBiasLogitsProcessor([[[token], float(value)] for token, value in s["bias"].items()]))
    if s.get("repetition_penalty", 1) != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(s["repetition_penalty"]))
    if s.get("temperature", 1) != 1:
        chain.append(TemperatureLogitsWarper(s["temperature"]))
    if s.get("top_k", 0):
        chain.append(TopKLogitsWarper(s["top_k"]))
    if s.get("top_p", 1) < 1:
        chain.append(TopPLogitsWarper(s["top_p"]))
    if s.get("min_p", 0):
        chain.append(MinPLogitsWarper(s["min_p"]))
    return torch.log_softmax(chain(torch.tensor([seen]), logits.double()[None])[0], 0)


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_known_answers(counter, key, words):
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in reference.philox4x32(tensors, key)) == words
    assert _sampling.philox4x32(*counter, *key) == words


@pytest.mark.parametrize("settings", ONE_AT_A_TIME + COMBINATIONS, ids=str)
def test_equals_hugging_face(settings):
    seen = [3, 5, 5, 9]
    for seed in range(5):
        logits = torch.randn(40, generator=torch.Generator().manual_seed(seed)) * 2
        expected = _warped(logits, seen, **settings)
        ids, log_probs = _support(logits, history=dict.fromkeys(seen, 0), **settings)
        kept = torch.nonzero(expected > -torch.inf)[:, 0]
        assert sorted(ids.tolist()) == kept.tolist()
        torch.testing.assert_close(log_probs, expected[ids], rtol=1e-6, atol=1e-6)  # they hold the bias in float32
        if not settings.get("bias"):
            torch.testing.assert_close(log_probs, expected[ids], rtol=1e-12, atol=1e-12)


def test_penalties_count_generated_tokens_only():
    logits = torch.tensor([1.0, -2.0, 3.0, 0.5])
    settings = {
        "presence_penalty": 0.25,
        "frequency_penalty": 0.5,
        "repetition_penalty": 2.0,
        "bias": {1: 1.0},
    }
    ids, log_probs = _support(logits, history={0: 0, 1: 3, 2: 1}, **settings)
    # Token 0 stands only in the prompt: repetition alone. Token 1 was generated three times: the bias comes
    # first.
    scores = torch.tensor([0.5, -1.0 * 2 - 1.5 - 0.25, 1.5 - 0.5 - 0.25, 0.5], dtype=torch.float64)
    torch.testing.assert_close(log_probs, torch.log_softmax(scores, 0)[ids], rtol=1e-14, atol=1e-14)


def test_top_k_keeps_all_ties_as_hugging_face():
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0, 1.0])
    ids, _ = _support(logits, top_k=2)
    assert ids.tolist() == [1, 0, 2, 4]
    expected = _warped(logits, [0], top_k=2)
    assert sorted(ids.tolist()) == torch.nonzero(expected > -torch.inf)[:, 0].tolist()


@pytest.mark.parametrize(("p", "count"), [(0.05, 1), (0.1, 1), (0.11, 2), (0.5, 5), (0.9, 9), (0.91, 10)])
def test_top_p_border_of_equal_tokens(p, count):
    """A sum that equals p exactly ends the nucleus, whatever the rounding; equal tokens go by smaller id."""
    assert _support(torch.zeros(10), top_p=p)[0].tolist() == list(range(count))


def test_top_p_renormalises_after_top_k():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    assert _support(logits, top_p=0.55)[0].tolist() == [0, 1]
    assert _support(logits, top_p=0.55, top_k=2)[0].tolist() == [0]  # 0.4 / 0.7 is above 0.55


def test_forks_share_a_row():
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    arrays = SamplingArrays.build(3, seed=[1, 2, 1], temperature=[1, 1, 1])
    result = reference.candidate_select(logits, np.array([1, 1, 0]), arrays)
    for s, (row, seed) in enumerate([(1, 1), (1, 2), (0, 1)]):
        perturbed = torch.log_softmax(logits[row].double(), 0) + reference.gumbel_noise(seed, 0, torch.arange(30))
        assert int(result.token_ids[s, 0]) == int(perturbed.argmax())
