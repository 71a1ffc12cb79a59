"""Compiled forwards against eager ones and against recomputation."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engine.conftest import drain, engine, llama, network, tokens
from tests.model.conftest import CONFIGS, VOCAB, Pair
from tests.model.test_forward import BLOCK, assert_row, make_sequences, poison, run
from tests.tiny import tiny_llama
from vas_engine.errors import VASError
from vas_engine.llm import LLM
from vas_engine.model import AttentionBatch
from vas_engine.model.compiled import CompiledFunction
from vas_engine.params import SamplingParams

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def compiled_pair(name: str, backend: str = "auto", states=None) -> Pair:
    pair = Pair(name, backend)
    pair.lm.compile(range(pair.lm.num_layers + 1) if states is None else states)
    return pair


@pytest.fixture(scope="module")
def compiled() -> Pair:
    return compiled_pair("llama")


def pages(pair: Pair) -> list[torch.Tensor]:
    return [*pair.lm.cache.keys, *pair.lm.cache.values]


def assert_same_pages(pair: Pair, other: Pair) -> None:
    for mine, theirs in zip(pages(pair), pages(other), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())  # nothing written elsewhere
        torch.testing.assert_close(mine.nan_to_num(0), theirs.nan_to_num(0), **CLOSE)


def drive(pair: Pair, eager: Pair) -> set[int]:
    """Steps of prompt chunks, decodes and candidates, committing winners; gives the numbers of rows met."""
    sequences = make_sequences([19, 9, 26, 1], seed=6)
    for each in (pair, eager):
        poison(each, sum(len(sequence.table) for sequence in sequences))
    rng = random.Random(2)
    sizes = set()
    chunks = [[1, 12], [4, 4], [16, 3], [1]]
    while any(sequence.done < len(sequence.token_ids) for sequence in sequences):
        works, expected, winners, slots = [], [], [], []
        for sequence, plan in zip(sequences, chunks, strict=True):
            left = len(sequence.token_ids) - sequence.done
            if not left or rng.random() < 0.3:
                continue
            start = len(expected)
            if plan or rng.random() < 0.4:
                count = min(plan.pop(0) if plan else 1, left)
                places = list(range(sequence.done, sequence.done + count))
                works.append((sequence, [sequence.token_ids[p] for p in places], places, True))
                expected += [sequence.token_ids[: p + 1] for p in places]
                sequence.done += count
            else:
                place, winner = sequence.done, rng.randrange(3)
                candidates = [rng.randrange(VOCAB) for _ in range(3)]
                candidates[winner] = sequence.token_ids[place]
                works.append((sequence, candidates, [place] * 3, False))
                expected += [[*sequence.token_ids[:place], token] for token in candidates]
                winners.append(start + winner)
                slots.append(sequence.table[place // BLOCK] * BLOCK + place % BLOCK)
                sequence.done += 1
        if not works:
            continue
        sizes.add(len(expected))
        out, same = run(pair, works), run(eager, works)
        logits = (pair.lm.logits(out.last_hidden), eager.lm.logits(same.last_hidden))
        torch.testing.assert_close(*logits, **CLOSE)
        torch.testing.assert_close(out.last_hidden, same.last_hidden, **CLOSE)
        for row in (0, len(expected) - 1):
            assert_row(pair, out, row, expected[row], **CLOSE)
        assert_same_pages(pair, eager)
        if winners:
            for each in (pair, eager):
                each.lm.commit(torch.tensor(winners), torch.tensor(slots))
            assert_same_pages(pair, eager)
    return sizes


def test_ragged_batches_with_candidates_and_commits(compiled):
    """Numbers of rows from one up, all run by the code that was compiled first."""
    sizes = drive(compiled, Pair("llama"))
    assert 1 in sizes
    assert len(sizes) > 4
    assert list(compiled.lm._compiled) == [tuple(range(compiled.lm.num_layers))]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_architecture(name, backend):
    drive(compiled_pair(name, backend), Pair(name))


def test_models_side_by_side_and_other_states(compiled):
    """Two models of one shape keep to their own weights, pages and code; sets of states to theirs."""
    other = Pair("llama")
    for model in (other.lm.model, other.eager):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    other.lm.compile()
    (sequence,) = make_sequences([14], seed=8)
    ids = torch.tensor(sequence.token_ids)
    batch = AttentionBatch.from_sequences([sequence.table], [list(range(14))], [True], BLOCK)
    for pair in (other, compiled):
        poison(pair, len(sequence.table))
    for pair, states in ((other, ()), (compiled, (0, 1, 2)), (other, (2,)), (other, (3, 0)), (other, (0, 3))):
        logits, hidden = pair.full(sequence.token_ids)
        out = pair.lm.forward(ids, batch, states)
        torch.testing.assert_close(pair.lm.logits(out.last_hidden[[13, 4]]), logits[[13, 4]], **CLOSE)
        torch.testing.assert_close(out.last_hidden, hidden[-1], **CLOSE)
        assert list(out.hidden) == list(states)
        for index in states:
            torch.testing.assert_close(out.hidden[index], hidden[index], **CLOSE)


def test_a_bfloat16_model_is_as_near_to_float32_as_when_run_eagerly():
    """Fused code rounds at other places than the eager one, not more."""
    exact = Pair("llama")
    half, eager = Pair("llama", dtype=torch.bfloat16), Pair("llama", dtype=torch.bfloat16)
    half.lm.compile()
    sequences = make_sequences([40], seed=3)
    errors = []
    for pair in (exact, half, eager):
        poison(pair, len(sequences[0].table))
        batch = AttentionBatch.from_sequences([sequences[0].table], [list(range(40))], [True], BLOCK)
        out = pair.lm.forward(torch.tensor(sequences[0].token_ids), batch)
        errors.append(pair.lm.logits(out.last_hidden).float())
    truth, mine, theirs = errors
    assert (mine - truth).norm() < 1.3 * (theirs - truth).norm()
    assert not torch.equal(mine, theirs)  # the code that runs is another one


def guided_tokens(lm, scorers: dict) -> dict:
    running = engine(lm, scorers)
    for i in range(5):
        values = {} if i == 2 else {"look": 2.0 - i, "act": 1.0}
        params = SamplingParams(
            values=values, num_candidates=4, max_tokens=6 + 5 * i, n=1 + i % 2, seed=i, ignore_eos=True
        )
        running.add_request(f"r{i}", [1 + i, 2, 3] * (1 + i), params)
    return tokens(drain(running))


def test_a_guided_engine_chooses_the_same_tokens():
    lm = llama()
    scorers = {"look": network("lookahead", lm), "act": network("action", lm)}
    expected = guided_tokens(lm, scorers)
    lm.compile({index for scorer in scorers.values() for index in scorer.states})
    assert guided_tokens(lm, scorers) == expected
    assert len(lm._compiled) == 1  # what compile() was told is what the engine asks for
    assert sum(map(len, expected.values())) > 60


@pytest.mark.parametrize("enforce_eager", [None, True, False])
def test_enforce_eager(enforce_eager):
    llm = LLM(tiny_llama(), skip_tokenizer_init=True, enforce_eager=enforce_eager, kv_cache_memory="1MiB")
    assert llm.lm.compiled is (enforce_eager is False)
    (output,) = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 4


def test_what_cannot_be_compiled_is_a_typed_error():
    def prints(given: torch.Tensor) -> torch.Tensor:
        return given + len(open(__file__).read())

    with pytest.raises(VASError, match="enforce_eager=True"):
        CompiledFunction(prints).compile(torch.zeros(1, 1))


def test_code_taken_away_is_an_error_rather_than_a_wrong_result():
    function = CompiledFunction(lambda given: given * given.shape[1])
    function.compile(torch.zeros(1, 1))
    for rows in (1, 2, 5):
        assert function(torch.ones(1, rows)).tolist() == [[rows] * rows]
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="recompile"):
        function(torch.ones(1, 3))
