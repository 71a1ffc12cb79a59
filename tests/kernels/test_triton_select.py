"""candidate_select in Triton: the tokens of the C++ sampler and the numbers of the reference, tile by tile."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vas_engine.kernels import reference

from vas_engine.errors import InvalidArgumentError
from vas_engine.sampling import SamplingArrays, Selection, backend, select

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from vas_engine.kernels import candidate_select as kernels  # noqa: E402
from vas_engine.kernels import noise  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1] / "sampling"))
from batches import assert_same, random_batch, seeds  # noqa: E402

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"  # the interpreter's


@pytest.fixture(autouse=True)
def poison():
    """What a kernel forgets to write is NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def triton_select(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays, block: int = 0) -> Selection:
    result = kernels.candidate_select(logits.to(DEVICE), rows, arrays, block)
    return Selection(*(field.cpu().numpy() for field in vars(result).values()))


def assert_equals_host(logits: torch.Tensor, rows: np.ndarray, arrays: SamplingArrays, block: int = 0) -> Selection:
    result = triton_select(logits, rows, arrays, block)
    assert_same(result, select(logits, rows, arrays))
    return result


# -- noise -------------------------------------------------------------------------------------------------------


@triton.jit
def _noise_kernel(words, exact, rough, seed, position, first, N: tl.constexpr):
    index = tl.arange(0, N)
    key, place = tl.load(seed), tl.load(position)
    w0, w1, w2, w3 = noise._words(key, place, first // 2 + index)
    for_token = noise.gumbel(key, place, first + index)
    tl.store(words + 4 * index, w0.to(tl.int64))
    tl.store(words + 4 * index + 1, w1.to(tl.int64))
    tl.store(words + 4 * index + 2, w2.to(tl.int64))
    tl.store(words + 4 * index + 3, w3.to(tl.int64))
    tl.store(exact + index, for_token)
    tl.store(rough + index, noise.rough_gumbel(key, place, first, N))


@triton.jit
def _words_kernel(high, low, exact, rough, N: tl.constexpr):
    index = tl.arange(0, N)
    h, w = tl.load(high + index).to(tl.uint32), tl.load(low + index).to(tl.uint32)
    tl.store(exact + index, noise.gumbel_of_words(h, w))
    tl.store(rough + index, noise._rough_of_words(h, w))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**18))
def test_noise_is_the_references(seed, position, pair):
    count, first = 32, 2 * pair
    words = torch.zeros(count, 4, dtype=torch.int64, device=DEVICE)
    exact = torch.zeros(count, dtype=torch.float64, device=DEVICE)
    rough = torch.zeros(count, device=DEVICE)
    key = torch.from_numpy(np.array([seed], np.uint64).view(np.int64)).to(DEVICE)
    _noise_kernel[(1,)](words, exact, rough, key, torch.tensor([position], device=DEVICE), first, N=count)
    pairs = pair + torch.arange(count)
    place = torch.tensor(position)
    counter = (pairs, place & 0xFFFFFFFF, place >> 32, torch.zeros_like(pairs))
    expected = torch.stack(reference.philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)), 1)
    assert torch.equal(words.cpu(), expected)
    gumbel = reference.gumbel_noise(seed, position, first + torch.arange(count))
    torch.testing.assert_close(exact.cpu(), gumbel, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(rough.cpu().double(), gumbel, rtol=0, atol=1e-4)


def test_noise_at_both_ends():
    """The tails of the Gumbel distribution, where a variate is made of few of the 64 bits."""
    top, half = 2**32 - 1, 2**31
    pairs = [(0, 0), (0, 1), (0, top), (1, 0), (99, 5), (half // 8, 0), (half // 8 + 1, 0), (half - 1, top), (half, 0)]
    pairs += [(half, top), (half + 1, 3), (top - 1, 0), (top, 0), (top, 1), (top, top - 1), (top, top)]
    high, low = (torch.tensor(word, device=DEVICE) for word in zip(*pairs, strict=True))
    exact = torch.zeros(len(pairs), dtype=torch.float64, device=DEVICE)
    rough = torch.zeros(len(pairs), device=DEVICE)
    _words_kernel[(1,)](high, low, exact, rough, N=len(pairs))
    expected = reference.gumbel_of_words(high.cpu(), low.cpu())
    torch.testing.assert_close(exact.cpu(), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(rough.cpu().double(), expected, rtol=0, atol=1e-4)


# -- selection ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seeds, st.sampled_from([(1, 16), (2, 16), (7, 16), (50, 16), (130, 64), (130, 32), (333, 256), (1000, 256)]))
def test_equals_the_host(seed, shape):
    vocabulary, block = shape
    logits, rows, arrays = random_batch(seed, vocabulary)
    arrays.num_candidates[:] = np.minimum(arrays.num_candidates, reference.MAX_CANDIDATES)
    assert_equals_host(logits, rows, arrays, block)


@pytest.mark.parametrize("candidates", [0, 1, 5])
def test_equal_tokens_under_one_key(candidates):
    """Many keys over one row, shared by all: sampling draws what the host draws, token for token."""
    count = 40
    logits = torch.randn(1, 130, generator=torch.Generator().manual_seed(candidates)) * 2
    arrays = SamplingArrays.build(count, seed=range(count), position=range(count), num_candidates=candidates)
    result = assert_equals_host(logits, np.zeros(count, np.int64), arrays, block=64)
    drawn = result.token_ids[np.arange(count), (result.log_probs + result.noise).argmax(1)]
    assert len(set(drawn)) > 10


def test_ties_go_to_the_smaller_id():
    """Equal scores within a tile and across tiles, among candidates, at their border and for the greedy champion."""
    logits = torch.randint(0, 2, (1, 100), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    arrays = SamplingArrays.build(4, num_candidates=[0, 3, 20, 64], temperature=0)
    result = assert_equals_host(logits, np.zeros(4, np.int64), arrays, block=16)
    first = torch.nonzero(logits[0] == 1)[:, 0]
    np.testing.assert_array_equal(result.token_ids[2, :21], first[:21])
    assert result.token_ids[0, 0] == first[0]


@pytest.mark.parametrize("hair", [1e-9, -1e-9])
def test_a_hair_between_two_champions_is_seen(hair):
    """float32 noise only singles out the tokens that may win: here two that it cannot tell apart."""
    count, tokens = 10, 64
    perturbed = torch.stack([reference.gumbel_noise(seed, 0, torch.arange(tokens)) for seed in range(count)])
    scores = torch.zeros(count, tokens, dtype=torch.float64)
    scores[:, :5] = -50
    scores[:, 5] = perturbed[:, 6:].amax(1) - perturbed[:, 5] + hair
    arrays = SamplingArrays.build(count, seed=range(count))
    packed = torch.from_numpy(kernels.pack_settings(np.zeros(count, np.int64), arrays, tokens)).to(DEVICE)
    lines = torch.arange(count, dtype=torch.int32, device=DEVICE)
    logits = torch.zeros(1, tokens, device=DEVICE)
    buffer = kernels.select_packed(logits, packed, 1, scores.to(DEVICE), lines, 32)
    drawn = kernels.views(buffer.cpu(), count, 1).token_ids[:, 0]
    assert torch.equal(drawn, (scores + perturbed).argmax(1))
    assert (drawn == 5).all() == (hair > 0)


def test_banned_tiles_and_rows():
    logits = torch.randn(3, 90, generator=torch.Generator().manual_seed(0))
    logits[0, 20:60] = -torch.inf
    logits[1, :] = -torch.inf
    logits[1, 77] = -3.0
    logits[2] = -torch.inf
    arrays = SamplingArrays.build(6, num_candidates=[4, 0, 64, 3, 0, 2], seed=range(6))
    result = assert_equals_host(logits, np.array([0, 0, 0, 1, 1, 2]), arrays, block=16)
    assert result.finite.tolist() == [True] * 5 + [False]
    assert result.token_ids[3].tolist()[:2] == [77, -1]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_logits_stay_with_their_sequence(value):
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    logits[1, 66] = value
    arrays = SamplingArrays.build(5, num_candidates=[0, 0, 3, 3, 3], top_k=[0, 0, 0, 0, 2], seed=range(5))
    result = assert_equals_host(logits, np.array([0, 1, 1, 2, 1]), arrays, block=16)
    assert result.finite.tolist() == [True, False, False, True, False]


def test_extreme_scores():
    """Spreads beyond what exp can hold, on both sides of the candidates, and over more than a tile."""
    logits = torch.full((1, 40), -6e4)
    logits[0, [0, 1, 17, 39]] = torch.tensor([5e4, -5e4, -5e4 - 1, 1e4])
    temperature = [1, 1, 1, 1, 1e-6, 50]
    arrays = SamplingArrays.build(6, seed=range(6), num_candidates=[0, 1, 2, 3, 2, 2], temperature=temperature)
    assert_equals_host(logits, np.zeros(6, np.int64), arrays, block=16)


def test_limits_agree_with_the_reference():
    """Each rule alone and all at once, ties at every border included."""
    logits = torch.randint(0, 6, (2, 60), generator=torch.Generator().manual_seed(2)).float() * 0.7
    logits[1] = torch.zeros(60)
    options = [{"top_k": 9}, {"top_p": 0.5}, {"top_p": 0.0}, {"min_p": 0.2}, {"top_k": 30, "top_p": 0.6, "min_p": 0.1}]
    for option in options:
        arrays = SamplingArrays.build(3, num_candidates=60, seed=range(3), temperature=[1, 0.7, 0], **option)
        result = kernels.candidate_select(logits.to(DEVICE), np.array([0, 1, 0]), arrays, block=16)
        expected = reference.candidate_select(logits, np.array([0, 1, 0]), arrays)
        assert torch.equal(result.token_ids.cpu(), expected.token_ids), option


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_strided_logits_are_read_in_place(dtype):
    wide = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    arrays = SamplingArrays.build(2, num_candidates=3, seed=range(2))
    rows = np.array([1, 0])
    for view in (wide[::2, :90], wide[:2, 5:70], wide.T[:, :3]):
        before = view.clone()
        ours = kernels.candidate_select(view, rows, arrays, block=16)
        assert_same(Selection(*(f.cpu().numpy() for f in vars(ours).values())), select(view.cpu(), rows, arrays))
        assert torch.equal(view, before)


def test_alone_equals_in_batch():
    """Bit for bit, whatever the neighbours ask for: other widths, limits, forks of the same row."""
    logits, rows, arrays = random_batch(5, 130)
    arrays.num_candidates[:] = np.minimum(arrays.num_candidates, reference.MAX_CANDIDATES)
    together = triton_select(logits, rows, arrays, block=64)
    one = SamplingArrays.build(1, num_candidates=3, seed=8, position=9)
    more = SamplingArrays.build(3, num_candidates=[3, 40, 0], seed=[8, 1, 2], position=[9, 0, 0], top_k=[0, 5, 0])
    assert together.token_ids.shape[0] == len(rows)
    alone = triton_select(logits, rows[:1], one, block=64)
    mixed = triton_select(logits, rows[[0, 0, 0]], more, block=64)
    for name in ("token_ids", "log_probs", "noise"):
        np.testing.assert_array_equal(getattr(alone, name)[0], getattr(mixed, name)[0, :4])
    assert alone.tail_log_mass[0] == mixed.tail_log_mass[0]


def test_no_sequences():
    assert triton_select(torch.zeros(2, 5), np.zeros(0, np.int64), SamplingArrays.build(0)).token_ids.shape == (0, 1)


def test_select_offers_the_backend(monkeypatch):
    logits, rows, arrays = random_batch(3, 50)
    arrays.num_candidates[:] = 3
    assert_same(select(logits.to(DEVICE), rows, arrays, "triton"), select(logits, rows, arrays))
    wide, many = torch.randn(len(logits), 100), SamplingArrays.build(len(rows), num_candidates=65)
    assert_same(select(wide.to(DEVICE), rows, many, "triton"), select(wide, rows, many))  # no room: the reference
    with pytest.raises(InvalidArgumentError, match="rows"):
        select(logits.to(DEVICE), rows + 9, arrays, "triton")
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(InvalidArgumentError, match="Triton is not installed"):
        select(logits.to(DEVICE), rows, arrays, "triton")


def test_the_operator_is_what_it_says():
    """Schema, and shapes without data: what torch.compile and graph capture rely on."""
    arrays = SamplingArrays.build(2, num_candidates=2, seed=range(2))
    packed = torch.from_numpy(kernels.pack_settings(np.zeros(2, np.int64), arrays, 9)).to(DEVICE)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernels.select_packed, (torch.randn(1, 9, device=DEVICE), packed, 3), test_utils=checks)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "candidates"),
    [
        (32_000, torch.float16, 20),
        (128_256, torch.bfloat16, 20),
        (151_936, torch.float32, 64),
        (262_144, torch.bfloat16, 5),
    ],
)
@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_real_vocabularies(vocabulary, dtype, candidates):
    logits = (torch.randn(8, vocabulary) * 3).to(dtype)
    arrays = SamplingArrays.build(
        32, seed=np.random.default_rng().integers(0, 2**64, 32, np.uint64), position=range(32),
        num_candidates=[candidates, 0] * 16, temperature=[1, 1, 0.7, 0] * 8, top_p=[1] * 30 + [0.9] * 2,
    )  # fmt: skip
    assert_equals_host(logits, np.arange(32) % 8, arrays)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="no CUDA device")
def test_a_graph_replays_it():
    logits = torch.randn(4, 50_000, device="cuda")
    arrays = SamplingArrays.build(4, num_candidates=20)
    packed = torch.from_numpy(kernels.pack_settings(np.arange(4), arrays, 50_000)).cuda()
    kernels.select_packed(logits, packed, 21)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer = kernels.select_packed(logits, packed, 21)
    arrays = SamplingArrays.build(4, num_candidates=20, seed=range(5, 9))
    packed.copy_(torch.from_numpy(kernels.pack_settings(np.arange(4), arrays, 50_000)))
    logits.normal_()
    graph.replay()
    fields = vars(kernels.views(buffer.cpu(), 4, 21)).values()
    assert_same(Selection(*(field.numpy() for field in fields)), select(logits.cpu(), np.arange(4), arrays))
