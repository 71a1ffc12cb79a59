"""Paged, batched, ragged forwards against full uncached ones."""

from __future__ import annotations

import random

import pytest
import torch

from tests.model.conftest import CONFIGS, VOCAB, Pair
from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.model import AttentionBatch

BLOCK = 4
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Sequence:
    """A token list whose keys and values are put into pages piece by piece."""

    def __init__(self, token_ids: list[int], table: list[int]) -> None:
        self.token_ids, self.table, self.done = token_ids, table, 0


def make_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    rng = random.Random(seed)
    blocks = list(range(sum(-(-(length + 2) // BLOCK) for length in lengths)))
    rng.shuffle(blocks)
    return [
        Sequence(
            [rng.randrange(VOCAB) for _ in range(length)],
            [blocks.pop() for _ in range(-(-(length + 2) // BLOCK))],
        )
        for length in lengths
    ]


def poison(pair: Pair, num_blocks: int) -> None:
    cache = pair.lm.allocate(num_blocks, BLOCK)
    for pages in (*cache.keys, *cache.values):
        pages.fill_(float("nan"))


def run(pair: Pair, works: list[tuple[Sequence, list[int], list[int], bool]]):
    """One forward over (sequence, tokens, positions, slotted) works; all hidden states."""
    batch = AttentionBatch.from_sequences(
        [work[0].table for work in works], [work[2] for work in works], [work[3] for work in works], BLOCK
    )
    token_ids = torch.tensor([token for work in works for token in work[1]])
    states = range(pair.lm.num_layers + 1)
    return pair.lm.forward(token_ids, batch, states)


def assert_row(pair: Pair, out, row: int, token_ids: list[int], **tolerance: float) -> None:
    """Row ``row`` is the last one of a full forward over ``token_ids``."""
    logits, hidden = pair.full(token_ids)
    found = pair.lm.logits(out.last_hidden[row, None])[0]
    torch.testing.assert_close(found, logits[-1], **(tolerance or TOLERANCE))
    for index, state in enumerate(hidden):
        torch.testing.assert_close(out.hidden[index][row], state[-1], **(tolerance or TOLERANCE))
    assert torch.equal(out.last_hidden, out.hidden[pair.lm.num_layers])


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_chunks_decodes_and_candidates_equal_recomputation(name, backend):
    """Several steps, each mixing prefill chunks, decodes and unslotted candidates of sequences of unlike lengths."""
    pair = Pair(name, backend)
    sequences = make_sequences([23, 9, 14, 1, 30])
    poison(pair, sum(len(sequence.table) for sequence in sequences))
    chunks = [[23], [4, 4, 1], [1] * 14, [1], [16, 14]]
    rng = random.Random(1)
    for step in range(14):
        works, expected = [], []
        for sequence, plan in zip(sequences, chunks, strict=True):
            if step < len(plan):
                positions = list(range(sequence.done, sequence.done + plan[step]))
                works.append((sequence, [sequence.token_ids[p] for p in positions], positions, True))
                expected += [sequence.token_ids[: p + 1] for p in positions]
                sequence.done += plan[step]
            elif sequence.done and rng.random() < 0.6:
                candidates = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 5))]
                works.append((sequence, candidates, [sequence.done] * len(candidates), False))
                expected += [[*sequence.token_ids, token] for token in candidates]
        out = run(pair, works)
        for row, token_ids in enumerate(expected):
            if row % 3 == 0 or row == len(expected) - 1:
                assert_row(pair, out, row, token_ids)
    assert all(sequence.done == len(sequence.token_ids) for sequence in sequences)


def test_commit_equals_having_run_the_winner(pair):
    """Candidates leave the pages as they were; committing one is as if it alone had been run."""
    first, second = make_sequences([11, 6], seed=4)
    poison(pair, len(first.table) + len(second.table))
    prompt = [(s, s.token_ids, list(range(len(s.token_ids))), True) for s in (first, second)]
    run(pair, prompt)
    cache = pair.lm.cache
    before = [pages.clone() for pages in (*cache.keys, *cache.values)]
    run(pair, [(first, [5, 6, 7], [11] * 3, False), (second, [8, 9], [6] * 2, False)])
    for pages, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(pages.nan_to_num(7.5), old.nan_to_num(7.5))
    slots = [first.table[11 // BLOCK] * BLOCK + 11 % BLOCK, second.table[6 // BLOCK] * BLOCK + 6 % BLOCK]
    pair.lm.commit(torch.tensor([1, 4]), torch.tensor(slots))
    committed = [pages.clone() for pages in (*cache.keys, *cache.values)]
    out = run(pair, [(first, [1], [12], True), (second, [2], [7], True)])
    assert_row(pair, out, 0, [*first.token_ids, 6, 1])
    assert_row(pair, out, 1, [*second.token_ids, 9, 2])
    poison(pair, len(first.table) + len(second.table))
    run(pair, prompt)
    run(pair, [(first, [6], [11], True), (second, [9], [6], True)])
    for pages, old in zip((*pair.lm.cache.keys, *pair.lm.cache.values), committed, strict=True):
        torch.testing.assert_close(pages.nan_to_num(7.5), old.nan_to_num(7.5), **TOLERANCE)


def test_dense_equals_the_eager_model(pair):
    lengths = [13, 5]
    sequences = make_sequences(lengths, seed=2)
    padded = torch.tensor([s.token_ids + [0] * (13 - len(s.token_ids)) for s in sequences])
    layers = range(pair.lm.num_layers)
    out = pair.lm.dense(padded, torch.tensor(lengths), range(pair.lm.num_layers + 1), layers, logits=True)
    poison(pair, sum(len(s.table) for s in sequences))
    run(pair, [(s, s.token_ids, list(range(len(s.token_ids))), True) for s in sequences])
    for index, sequence in enumerate(sequences):
        length = lengths[index]
        logits, hidden = pair.full(sequence.token_ids)
        torch.testing.assert_close(out.logits[index, :length], logits, **TOLERANCE)
        for state in range(pair.lm.num_layers + 1):
            torch.testing.assert_close(out.hidden[state][index, :length], hidden[state], **TOLERANCE)
        torch.testing.assert_close(out.last_hidden[index, :length], hidden[-1], **TOLERANCE)
        slots = [sequence.table[p // BLOCK] * BLOCK + p % BLOCK for p in range(length)]
        for layer in layers:
            paged = pair.lm.cache.keys[layer].flatten(0, 1)[slots].transpose(0, 1)
            torch.testing.assert_close(out.keys[layer][index, :, :length], paged, **TOLERANCE)
            paged = pair.lm.cache.values[layer].flatten(0, 1)[slots].transpose(0, 1)
            torch.testing.assert_close(out.values[layer][index, :, :length], paged, **TOLERANCE)


def test_attend_is_a_strict_look_at_one_layers_pages(pair):
    (sequence,) = make_sequences([12])
    poison(pair, len(sequence.table))
    run(pair, [(sequence, sequence.token_ids, list(range(12)), True)])
    layer, spec = 1, pair.lm.layers[1]
    dense = pair.lm.dense(torch.tensor([sequence.token_ids]), kv_layers=[layer])
    queries = torch.randn(3, 2 * spec.kv_heads, spec.head_dim)
    # A slotted row at position 4, one at 0, and an unslotted one behind the end: all look strictly below
    # themselves.
    batch = AttentionBatch.from_sequences([sequence.table], [[4, 0, 12]], [[True, True, False]], BLOCK)
    got = pair.lm.attend(layer, queries, batch)
    assert got[1].eq(0).all()
    for row, position in ((0, 4), (2, 12)):
        first = max(0, position - spec.window + 1) if spec.window else 0
        keys = dense.keys[layer][0, :, first:position].repeat_interleave(2, 0)
        values = dense.values[layer][0, :, first:position].repeat_interleave(2, 0)
        wanted = torch.nn.functional.scaled_dot_product_attention(queries[row][:, None], keys, values)[:, 0]
        torch.testing.assert_close(got[row], wanted, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_half_precision_is_as_near_as_the_eager_model(name, dtype):
    """Judged against float32: no further off than twice what the eager model is in the same dtype."""
    pair, exact = Pair(name, dtype=dtype), Pair(name)
    sequences = make_sequences([20, 7])
    poison(pair, sum(len(s.table) for s in sequences))
    run(pair, [(s, s.token_ids[:-1], list(range(len(s.token_ids) - 1)), True) for s in sequences])
    out = run(pair, [(s, s.token_ids[-1:], [len(s.token_ids) - 1], True) for s in sequences])
    logits = pair.lm.logits(out.last_hidden)
    assert logits.dtype == dtype
    for row, sequence in enumerate(sequences):
        exact.eager.load_state_dict(pair.eager.state_dict())
        truth = exact.full(sequence.token_ids)[0][-1]
        eager = pair.full(sequence.token_ids)[0][-1].float()
        allowed = max(2 * float((eager - truth).norm()), 1e-2 * float(truth.norm()))
        assert float((logits[row].float() - truth).norm()) <= allowed


def test_two_models_at_once_do_not_mix():
    first, second = Pair("llama"), Pair("qwen3")
    sequences = make_sequences([8])
    for pair in (first, second, first):
        if pair.lm.cache is None:
            poison(pair, 4)
        out = run(pair, [(sequences[0], sequences[0].token_ids, list(range(8)), True)])
        assert_row(pair, out, 7, sequences[0].token_ids)


def test_only_what_is_asked_for(pair):
    (sequence,) = make_sequences([6])
    poison(pair, len(sequence.table))
    batch = AttentionBatch.from_sequences([sequence.table], [list(range(6))], [True], BLOCK)
    out = pair.lm.forward(torch.tensor(sequence.token_ids), batch)
    assert out.hidden == {}
    logits = pair.lm.logits(out.last_hidden[[4, 1]])
    assert logits.shape == (2, pair.lm.vocab_size)
    torch.testing.assert_close(logits, pair.full(sequence.token_ids)[0][[4, 1]], **TOLERANCE)


def test_misuse_is_named():
    pair = Pair("llama")
    batch = AttentionBatch.from_sequences([[0]], [[0, 1]], [True], BLOCK)
    with pytest.raises(VASError, match="allocate"):
        pair.lm.forward(torch.tensor([1, 2]), batch)
    poison(pair, 4)
    with pytest.raises(InvalidArgumentError, match="token_ids"):
        pair.lm.forward(torch.tensor([1]), batch)
    with pytest.raises(InvalidArgumentError, match="states"):
        pair.lm.forward(torch.tensor([1, 2]), batch, states=[9])
    pair.lm.forward(torch.tensor([1, 2]), batch)
    with pytest.raises(VASError, match="commit"):
        pair.lm.commit(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(InvalidArgumentError, match="layer=3"):
        pair.lm.rotate(torch.zeros(1, 1, 8), torch.tensor([0]), 3)
    with pytest.raises(InvalidArgumentError, match="lengths"):
        pair.lm.dense(torch.tensor([[1, 2]]), torch.tensor([3]))
    with pytest.raises(VASError, match="forward"):
        pair.lm.model(input_ids=torch.tensor([[1, 2]]))
    # After an error in the middle of a forward the next one is as ever.
    with pytest.raises(ValueError, match="block"):
        pair.lm.forward(torch.tensor([1]), AttentionBatch.from_sequences([[77]], [[0]], [True], BLOCK))
    out = run(pair, [(Sequence([1, 2], [0]), [1, 2], [0, 1], True)])
    assert_row(pair, out, 1, [1, 2])


def test_training_flows_gradients_through_dense():
    pair = Pair("llama")
    pair.lm.model.requires_grad_(True)
    out = pair.lm.dense(torch.tensor([[1, 2, 3, 4]]))
    out.last_hidden.pow(2).sum().backward()
    pair.eager.requires_grad_(True)
    hidden = pair.eager(torch.tensor([[1, 2, 3, 4]]), output_hidden_states=True).hidden_states[-1]
    hidden.pow(2).sum().backward()
    wanted = {name: parameter.grad for name, parameter in pair.eager.named_parameters()}
    for name, parameter in pair.lm.model.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4)
