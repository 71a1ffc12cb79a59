"""Whole models over the Triton kernels against the same models over the reference."""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
import torch

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.model.conftest import CONFIGS, VOCAB, random_model
from tests.model.test_forward import BLOCK, Sequence, make_sequences
from vas_engine.engine.rows import Rows, group_offsets
from vas_engine.errors import InvalidArgumentError
from vas_engine.model import AttentionBatch, CausalLM, KVCache, LayerShape, backend
from vas_engine.model.backend import resolve_backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def load(name: str, attention_backend: str, blocks: int) -> CausalLM:
    """One model of random weights, its pages poisoned."""
    lm = CausalLM.load(random_model(CONFIGS[name]), device=DEVICE, attention_backend=attention_backend)
    cache = lm.allocate(blocks, BLOCK)
    for pages in (*cache.keys, *cache.values):
        pages.fill_(float("nan"))
    return lm


def step(works: list[tuple[Sequence, list[int], bool]], on_host: bool) -> AttentionBatch:
    """(sequence, positions, slotted) works as a batch; `on_host`: with the numbers the engine knows."""
    tables, places, slotted = zip(*((work[0].table, work[1], work[2]) for work in works), strict=True)
    batch = AttentionBatch.from_sequences(tables, places, slotted, BLOCK, DEVICE)
    if on_host:
        positions, slots = batch.positions.cpu().numpy(), batch.slots.cpu().numpy()
        offsets = group_offsets([len(place) for place in places])
        lengths = batch.prefix_lens.cpu().numpy()
        batch.host = Rows((), np.zeros(len(slots), np.int64), positions, slots, lengths, offsets)
    return batch


@needs_triton
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chunks_decodes_candidates_and_commits(name, monkeypatch):
    """Steps that mix prompt chunks (longer than a tile of candidates), decodes and candidates of three sequences."""
    sequences = make_sequences([40, 9, 1], seed=2)
    blocks = sum(len(sequence.table) for sequence in sequences)
    mine, wanted = load(name, "triton", blocks), load(name, "reference", blocks)
    assert mine.attention_backend == "triton"
    prefill = importlib.import_module("vas_engine.kernels.paged_prefill")
    chunks, run = [], prefill.paged_prefill
    monkeypatch.setattr(prefill, "paged_prefill", lambda *args, **how: chunks.append(1) or run(*args, **how))
    first, second, third = sequences
    rng = random.Random(0)
    plan = [
        [(first, list(range(33)), True), (second, [0, 1], True), (third, [0], True)],
        [(first, [33], True), (second, list(range(2, 9)), True), (third, [1] * 5, False)],
        [(first, [34] * 3, False), (second, [9], False), (third, [1], True)],
        [(first, [34, 35], True), (second, [9], True), (third, [2], False)],
    ]
    for number, works in enumerate(plan):
        batch = step(works, on_host=number % 2 == 0)
        token_ids = torch.tensor([rng.randrange(VOCAB) for _ in range(batch.num_rows)], device=DEVICE)
        out, same = (lm.forward(token_ids, batch).last_hidden for lm in (mine, wanted))
        torch.testing.assert_close(out, same, **CLOSE)
        for layer in (0, 1):  # a reader's look, with other numbers of heads than the model's
            spec = mine.layers[layer]
            queries = torch.randn(batch.num_rows, 3 * spec.kv_heads, spec.head_dim, device=DEVICE)
            got, should = (lm.attend(layer, queries, batch) for lm in (mine, wanted))
            torch.testing.assert_close(got, should, **CLOSE)
        if number == 2:
            rows, slots = torch.tensor([2, 3]), torch.tensor([first.table[8] * BLOCK + 2, second.table[2] * BLOCK + 1])
            for lm in (mine, wanted):
                lm.commit(rows.to(DEVICE), slots.to(DEVICE))
    for lm_pages, same_pages in zip(
        (*mine.cache.keys, *mine.cache.values), (*wanted.cache.keys, *wanted.cache.values), strict=True
    ):
        assert torch.equal(lm_pages.isnan(), same_pages.isnan())  # nothing written elsewhere
        torch.testing.assert_close(lm_pages.nan_to_num(0), same_pages.nan_to_num(0), **CLOSE)
    assert chunks


@needs_triton
def test_a_batch_is_planned_once_by_its_numbers_or_its_shapes(monkeypatch):
    """With the engine's numbers or from shapes alone the results are the same, and the layers share the plan."""
    kernels = importlib.import_module("vas_engine.kernels.candidate_attention")
    monkeypatch.setattr(kernels, "processors", lambda device: 3)
    first, second = make_sequences([300, 9], seed=5)
    cache = KVCache([LayerShape(2, 8)], len(first.table) + len(second.table), BLOCK, torch.float32, DEVICE, "triton")
    for pages in (*cache.keys, *cache.values):
        pages.normal_()
    q, k, v = (torch.randn(5, heads, 8, device=DEVICE) for heads in (6, 2, 2))
    outs = []
    for on_host in (True, False):
        batch = step([(first, [299] * 4, False), (second, [8], True)], on_host)
        if not on_host:  # as on a GPU, where reading the batch would mean to wait for it
            monkeypatch.setattr(backend, "_host_numbers", lambda batch: None)
        outs.append(cache.attend(0, q, k, v, batch, scale=0.3))
        if on_host:
            ((decodes, chunks),) = batch.cache.values()
            assert chunks is None
            assert decodes.merges  # the long one is split, the short one is not
            assert decodes.table.tolist() == [[0, 0, 0, 2], [0, 0, 1, 2], [1, 0, 0, 1]]
            cache.attend(0, q, k, v, batch, scale=0.3)
            assert len(batch.cache) == 1
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


@needs_triton
def test_what_does_not_fit_is_refused():
    cache = KVCache([LayerShape(2, 8)], 4, BLOCK, torch.float32, DEVICE, "triton")
    batch = AttentionBatch.from_sequences([[0]], [[0]], [True], BLOCK, DEVICE)
    q, k = torch.randn(1, 4, 8, device=DEVICE), torch.randn(1, 2, 8, device=DEVICE)
    cache.attend(0, q, k, k, batch, scale=1.0)
    for bad in (q[:, :, :4], q[:, :3], torch.cat([q, q])):
        with pytest.raises(InvalidArgumentError, match="q="):
            cache.attend(0, bad, k, k, batch, scale=1.0)
    with pytest.raises(InvalidArgumentError, match="k, v"):
        cache.attend(0, q, k[:, :1], k, batch, scale=1.0)


def test_which_backend_serves(monkeypatch):
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda device: (7, 0))  # older than flash-attn serves
    assert resolve_backend("auto", CUDA, torch.bfloat16) == "triton"
    assert resolve_backend("triton", CUDA, torch.float16) == "triton"
    assert resolve_backend("auto", CUDA, torch.float64) == "reference"
    assert resolve_backend("auto", CPU, torch.float32) == ("cpp" if backend.has_extension() else "reference")
    with pytest.raises(InvalidArgumentError, match="float64"):
        resolve_backend("triton", CUDA, torch.float64)
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert resolve_backend("auto", CUDA, torch.bfloat16) == "reference"
    with pytest.raises(InvalidArgumentError, match=r"pip install vas-engine\[gpu\]"):
        resolve_backend("triton", CUDA, torch.bfloat16)


@needs_triton
def test_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", CPU, torch.float32) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(InvalidArgumentError, match="TRITON_INTERPRET"):
        resolve_backend("triton", CPU, torch.float32)
