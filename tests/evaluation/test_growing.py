"""Blockwise best-of-K and tree search on a decision problem of two tokens, whose every response can be listed."""

import math
from collections import Counter

import pytest
import torch

from tests.evaluation.conftest import PROMPTS, TableValue, word_model
from tests.oracle import next_logits
from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.blockwise import blockwise
from vas_engine.evaluation.measure import run
from vas_engine.evaluation.search import tree_search
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams

PROMPT, IDS = "a", [2]
WORTH = [3.0, 0.0, 1.0, -1.0, 1.0, -2.0]
"""Reward of a response by its last token."""


def reward(response) -> float:
    return WORTH[response[-1]]


@pytest.fixture(scope="module")
def problem():
    """The model, with a value that knows nothing before the last token; and the base's log-probabilities."""
    model = word_model()
    made = LLM(word_model(), skip_tokenizer_init=True, device="cpu", dtype="float32")
    value = TableValue(made.lm, [[0.0] * 6, WORTH], first=1)
    from tests.evaluation.conftest import word_tokenizer

    llm = LLM(model, values={"v": value}, tokenizer=word_tokenizer(), device="cpu", dtype="float32")
    base = {}
    first = torch.log_softmax(next_logits(llm.lm, [IDS])[0], -1).tolist()
    for a in range(6):
        second = torch.log_softmax(next_logits(llm.lm, [[*IDS, a]])[0], -1).tolist()
        for b in range(6):
            base[a, b] = first[a] + second[b]
    return llm, base


def mean_worth(found) -> float:
    return sum(reward(response.token_ids) for response in found.responses) / len(found.responses)


PLAIN = SamplingParams(max_tokens=2, num_candidates=6, ignore_eos=True)


def test_one_block_is_best_of_k(problem):
    """A block as long as the response: the highest of K draws, known from the list of responses."""
    llm, base = problem
    found = blockwise(llm, [PROMPT], {"v": 1.0}, 3, 2, PLAIN, samples=500)
    chances = Counter()
    for response, log_prob in base.items():
        chances[reward(response)] += math.exp(log_prob)
    expected = below = 0.0
    for worth in sorted(chances):
        reached = below + chances[worth]
        expected += worth * (reached**3 - below**3)
        below = reached
    assert mean_worth(found) == pytest.approx(expected, abs=0.25)
    assert expected > sum(reward(r) * math.exp(p) for r, p in base.items()) + 0.5
    bound = math.log(3) - 2 / 3
    assert {response.kl for response in found.responses} == {bound}
    assert found.kl_kind == "bound"
    for response in found.responses[:20]:
        assert response.log_prob == pytest.approx(base[tuple(response.token_ids)], abs=1e-4)


def test_a_negative_weight_keeps_the_lowest(problem):
    llm, _ = problem
    found = blockwise(llm, [PROMPT], {"v": -1.0}, 16, 2, PLAIN, samples=60)
    assert mean_worth(found) < -1.5


def test_blocks_add_up(problem):
    """Blocks of one token: the first is chosen blindly, the second by its worth; K times the rows, twice the bound."""
    llm, _ = problem
    found = blockwise(llm, [PROMPT], {"v": 1.0}, 3, 1, PLAIN, samples=200)
    assert {response.kl for response in found.responses} == {2 * (math.log(3) - 2 / 3)}
    assert found.delivered == 400
    assert found.tokens == 1200
    assert found.value_rows == pytest.approx(1200, rel=0.01)
    assert mean_worth(found) > 0.5


def test_search_looks_further_than_the_value(problem):
    """The value says nothing of the first token: tilting cannot choose it, searching does."""
    llm, base = problem
    params = PLAIN.replace(num_candidates=2)
    [tilted] = run(llm, [PROMPT], [params.replace(values={"v": 8.0}, tail="drop")], samples=200)
    found = tree_search(llm, [PROMPT], {"v": 8.0}, 60, params, samples=60)
    first = sorted(range(6), key=lambda a: -sum(math.exp(base[a, b]) for b in range(6)))[:2]
    best = max(WORTH[b] for a in first for b in sorted(range(6), key=lambda b: -base[a, b])[:2])
    assert mean_worth(tilted) < best - 0.3
    assert mean_worth(found) > best - 0.15
    for response in found.responses[:10]:
        assert response.log_prob == pytest.approx(base[tuple(response.token_ids)], abs=1e-4)


def test_the_divergence_of_search_is_that_of_what_it_draws(problem):
    llm, base = problem
    found = tree_search(llm, [PROMPT], {"v": 0.5}, 12, PLAIN.replace(num_candidates=3), samples=1500)
    drawn = Counter(tuple(response.token_ids) for response in found.responses)
    shares = {response: count / 1500 for response, count in drawn.items()}
    kl = sum(share * (math.log(share) - base[response]) for response, share in shares.items())
    assert found.kl_kind == "exact"
    assert kl > 0.2
    assert sum(r.kl for r in found.responses) / 1500 == pytest.approx(kl, abs=0.03)


def test_without_weight_visits_follow_the_priors(problem):
    llm, _ = problem
    found = tree_search(llm, [PROMPT], {"v": 0.0}, 300, PLAIN, samples=2)
    assert found.responses[0].kl < 0.02
    assert found.value_rows > 0


def test_texts_and_ends_are_the_engines(llm):
    """Responses that end by themselves, several prompts; texts as the engine writes them."""
    params = SamplingParams(max_tokens=6, num_candidates=4)
    [plain] = run(llm, PROMPTS, [params], samples=30)
    texts = {(r.prompt, tuple(r.token_ids)): (r.text, r.finish_reason) for r in plain.responses}
    seen = 0
    for found in (
        blockwise(llm, PROMPTS, {"v": 1.0}, 2, 2, params, samples=30),
        tree_search(llm, PROMPTS, {"v": 0.1}, 4, params, samples=30),
    ):
        assert [r.prompt for r in found.responses] == [place for place in range(4) for _ in range(30)]
        assert {r.finish_reason for r in found.responses} == {"stop", "length"}
        for response in found.responses:
            assert (response.finish_reason == "stop") == (response.token_ids[-1] == 1)
            assert len(response.token_ids) <= 6
            known = texts.get((response.prompt, tuple(response.token_ids)))
            seen += known is not None
            assert known in (None, (response.text, response.finish_reason))
    assert seen > 20


def test_sizes_that_cannot_work(problem):
    llm, _ = problem
    with pytest.raises(InvalidArgumentError, match="blocks=0"):
        blockwise(llm, [PROMPT], {"v": 1.0}, 0, 2, PLAIN)
    with pytest.raises(InvalidArgumentError, match="block_tokens=0"):
        blockwise(llm, [PROMPT], {"v": 1.0}, 2, 0, PLAIN)
    with pytest.raises(InvalidArgumentError, match="simulations=0"):
        tree_search(llm, [PROMPT], {"v": 1.0}, 0, PLAIN)
