import numpy as np
import pytest
import torch
from batches import DTYPES, assert_same, random_batch, seeds
from hypothesis import given, settings

from vas_engine import _sampling
from vas_engine.errors import InvalidArgumentError
from vas_engine.sampling import SamplingArrays, Selection, backend, select


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_extension_equals_reference(seed):
    batch = random_batch(seed)
    assert_same(select(*batch, backend="cpp"), select(*batch, backend="reference"))


@settings(max_examples=50, deadline=None)
@given(seeds)
def test_taken_apart_and_put_together_again(seed):
    whole = select(*random_batch(seed))
    lines = [whole.pick(slice(i, i + 1), int(count)) for i, count in enumerate(whole.count)]
    width = whole.token_ids.shape[1]
    assert_same(Selection.stack(lines, width), whole, tolerance=0)
    assert Selection.stack(lines).token_ids.shape[1] == max(line.token_ids.shape[1] for line in lines)
    order = np.arange(len(lines))[::-1]
    assert_same(Selection.stack([lines[i] for i in order], width), whole.pick(order), tolerance=0)


@pytest.mark.parametrize("name", ["avx512", "avx2", "generic"])
def test_every_instruction_set_equals_reference(name):
    if not _sampling.set_instruction_set(name):
        pytest.skip(f"this processor has no {name}")
    try:
        for seed in range(40):
            batch = random_batch(seed)
            assert_same(select(*batch, backend="cpp"), select(*batch, backend="reference"))
    finally:
        assert _sampling.set_instruction_set("auto")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("top", [{"top_k": 200}, {"top_p": 0.999}, {"min_p": 0.9}, {"top_k": 40, "top_p": 0.5}])
def test_ties_across_slices(backend, top):
    """Coarse bfloat16 logits: more tokens tie at the border than the lists of top tokens hold."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randint(0, 3, (1, 30_000), generator=generator).to(torch.bfloat16)
    arrays = SamplingArrays.build(4, seed=range(4), num_candidates=[0, 5, 5, 100], temperature=[1, 1, 0, 2], **top)
    rows = np.zeros(4, np.int64)
    ours = select(logits, rows, arrays, backend)
    first = torch.nonzero(logits[0] == 2)[:, 0]
    np.testing.assert_array_equal(ours.token_ids[3, :100], first[:100])
    assert_same(ours, select(logits, rows, arrays, "reference"))


def test_flat_nucleus():
    """A nucleus of tens of thousands of tokens is found without sorting; all logits equal is its worst
    case."""
    flat = torch.zeros(1, 50_000)
    wide = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(3)) * 0.7
    narrow = wide * 1e-3
    for logits in (flat, wide, narrow):
        arrays = SamplingArrays.build(3, top_p=[0.9, 0.5, 0.97], top_k=[0, 40_000, 0], min_p=[0, 0, 0.2])
        arrays.num_candidates[:] = 50_000  # shows the whole support
        rows = np.zeros(3, np.int64)
        ours = select(logits, rows, arrays, "cpp")
        assert_same(ours, select(logits, rows, arrays, "reference"))
        assert (ours.count > 1000).all()
        arrays.num_candidates[:] = 2
        assert_same(select(logits, rows, arrays, "cpp"), select(logits, rows, arrays, "reference"))


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_alone_equals_in_batch(seed):
    """Bit for bit: neither neighbours nor a fork on the same row matter."""
    logits, rows, arrays = random_batch(seed)
    together = select(logits, rows, arrays)
    for s in range(len(rows)):
        alone = select(logits[rows[s] : rows[s] + 1], np.zeros(1, np.int64), _one(arrays, s))
        width = int(alone.count[0])
        assert together.count[s] == width
        for name in ("token_ids", "log_probs", "noise"):
            np.testing.assert_array_equal(getattr(together, name)[s, :width], getattr(alone, name)[0, :width])
        if alone.finite[0]:
            assert together.tail_log_mass[s] == alone.tail_log_mass[0]


def test_threads_do_not_change_a_bit(threads):
    for seed in range(25):
        batch = random_batch(seed, vocabulary=40_000)
        results = []
        for count in (1, 2, 3, 8):
            threads(count)
            results.append(select(*batch))
        for other in results[1:]:
            assert_same(results[0], other, tolerance=0)


def _one(arrays: SamplingArrays, s: int) -> SamplingArrays:
    fields = {}
    for name, array in vars(arrays).items():
        owner = name.split("_")[0]
        if owner in ("history", "bias"):
            begin, end = getattr(arrays, f"{owner}_offsets")[s : s + 2]
            fields[name] = np.array([0, end - begin]) if name.endswith("offsets") else array[begin:end].copy()
        else:
            fields[name] = array[s : s + 1].copy()
    return SamplingArrays(**fields)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", [0, 5])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, "banned"])
def test_bad_row_stays_alone(backend, dtype, candidates, poison):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)).to(dtype)
    arrays = SamplingArrays.build(4, seed=range(4), num_candidates=candidates)
    rows = np.array([0, 1, 2, 1])
    clean = select(logits, rows, arrays, backend)
    dirty = logits.clone()
    if poison == "banned":
        dirty[1] = -torch.inf
    else:
        dirty[1, 1999] = poison
    result = select(dirty, rows, arrays, backend)
    assert result.finite.tolist() == [True, False, True, False]
    assert result.count[[1, 3]].tolist() == [0, 0]
    for good in (0, 2):
        np.testing.assert_array_equal(result.token_ids[good], clean.token_ids[good])
        np.testing.assert_array_equal(result.log_probs[good], clean.log_probs[good])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bias_that_bans_everything(backend):
    bias = [dict.fromkeys(range(10), -np.inf), {}]
    result = select(torch.zeros(1, 10), np.zeros(2, np.int64), SamplingArrays.build(2, bias=bias), backend)
    assert result.finite.tolist() == [False, True]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_more_candidates_than_tokens(backend):
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 3.0]])
    arrays = SamplingArrays.build(3, num_candidates=[3, 10**9, 2], keep_tail=[True, True, False])
    result = select(logits, np.zeros(3, np.int64), arrays, backend)
    assert result.token_ids.tolist() == [[3, 1, 0, -1, -1], [3, 1, 0, -1, -1], [3, 1, -1, -1, -1]]
    assert result.tail.tolist() == [-1, -1, -1]
    assert result.tail_log_mass[:2].tolist() == [-np.inf, -np.inf]
    expected = torch.log_softmax(logits[0].double(), 0)
    np.testing.assert_allclose(result.tail_log_mass[2], expected[0], rtol=1e-14)
    np.testing.assert_allclose(result.log_probs[0, :3], expected[[3, 1, 0]], rtol=1e-14)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_plain_draws_although_the_tail_is_dropped(backend):
    arrays = SamplingArrays.build(1, num_candidates=0, keep_tail=False)
    result = select(torch.zeros(1, 10), np.zeros(1, np.int64), arrays, backend)
    assert (result.count[0], result.tail[0], result.tail_log_mass[0]) == (1, 0, 0.0)


def test_greedy_takes_the_smaller_id_and_no_noise():
    logits = torch.tensor([[1.0, 4.0, 4.0, 2.0, 4.0]])
    arrays = SamplingArrays.build(2, temperature=0, num_candidates=[0, 2])
    result = select(logits, np.zeros(2, np.int64), arrays)
    assert result.token_ids.tolist() == [[1, -1, -1], [1, 2, 4]]
    assert not result.noise.any()
    np.testing.assert_allclose(result.log_probs[0, 0], torch.log_softmax(logits[0].double(), 0)[1])


def test_plain_equals_guided_without_tilt():
    """The coupling of one seed: candidates + champion hold the token that plain sampling draws."""
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(0)) * 3
    rows = np.zeros(500, np.int64)
    plain = select(logits, rows, SamplingArrays.build(500, seed=range(500)))
    guided = select(logits, rows, SamplingArrays.build(500, seed=range(500), num_candidates=20))
    best = (guided.log_probs + guided.noise).argmax(1)
    np.testing.assert_array_equal(guided.token_ids[np.arange(500), best], plain.token_ids[:, 0])
    assert len(set(best)) > 10


def test_the_best_logits_are_banned():
    """The bound on the top tokens is taken from raw logits; here most of those that reach it are banned."""
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(0))
    best = logits[0].topk(120).indices.tolist()
    bias = [dict.fromkeys(best, -np.inf), dict.fromkeys(best, -9.0), {best[119]: 50.0}]
    arrays = SamplingArrays.build(3, seed=range(3), num_candidates=20, bias=bias)
    batch = logits, np.zeros(3, np.int64), arrays
    ours = select(*batch, backend="cpp")
    assert ours.count.tolist() == [21, 21, 21]
    assert_same(ours, select(*batch, backend="reference"))


def test_extreme_scores():
    """Spreads beyond what exp can hold, on both sides of the candidates."""
    logits = torch.tensor([[5e4, -5e4, -5e4 - 1, -6e4, 1e4]])
    temperature = [1, 1, 1, 1, 1e-6, 50]
    arrays = SamplingArrays.build(6, seed=range(6), num_candidates=[0, 1, 2, 3, 2, 2], temperature=temperature)
    rows = np.zeros(6, np.int64)
    assert_same(select(logits, rows, arrays, "cpp"), select(logits, rows, arrays, "reference"))


def test_float16_values_are_read_exactly():
    """Every finite float16, subnormals included."""
    words = torch.arange(2**16).to(torch.int32).to(torch.int16).view(torch.float16)
    finite = words[words.isfinite()][None]
    arrays = SamplingArrays.build(1, num_candidates=200, temperature=30.0)
    for logits in (finite, finite * 2**-14):
        batch = (logits, np.zeros(1, np.int64), arrays)
        assert_same(select(*batch, backend="cpp"), select(*batch, backend="reference"))


def test_strided_logits_are_read_in_place():
    wide = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0))
    arrays = SamplingArrays.build(2, num_candidates=3)
    rows = np.array([1, 0])
    for view in (wide[::2, :2500], wide[:2, 5:1000], wide.T[:, :3]):
        before = view.clone()
        assert_same(select(view, rows, arrays), select(view.contiguous(), rows, arrays), tolerance=0)
        assert torch.equal(view, before)


def test_no_sequences():
    assert select(torch.zeros(2, 5), np.zeros(0, np.int64), SamplingArrays.build(0)).token_ids.shape == (0, 1)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", np.nan),
        ("temperature", 1e-12),
        ("top_k", -1),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", np.inf),
        ("frequency_penalty", np.nan),
        ("position", -1),
        ("num_candidates", -2),
        ("bias_ids", 10),
        ("bias_values", np.inf),
        ("history_ids", -1),
        ("history_counts", -1),
        ("history_offsets", 7),
    ],
)
def test_wrong_settings_are_named(backend, name, value):
    arrays = SamplingArrays.build(2, history=[{1: 1}, {2: 0}], bias=[{1: 1.0}, {2: 1.0}])
    getattr(arrays, name)[1] = value
    with pytest.raises(InvalidArgumentError) as caught:
        select(torch.zeros(1, 10), np.zeros(2, np.int64), arrays, backend)
    assert caught.value.argument == name


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_wrong_shapes_and_dtypes_are_named(backend):
    arrays, rows, logits = SamplingArrays.build(2), np.zeros(2, np.int64), torch.zeros(1, 10)

    def refused(*arguments):
        with pytest.raises(InvalidArgumentError) as caught:
            select(*arguments, backend=backend)
        return caught.value.argument

    assert refused(logits, np.array([0, 1]), arrays) == "rows"
    assert refused(logits, np.array([0, -1]), arrays) == "rows"
    assert refused(logits, rows[:1], arrays) == "rows"
    assert refused(logits, rows.astype(np.int32), arrays) == "rows"
    assert refused(logits.double(), rows, arrays) == "logits"
    assert refused(logits[0], rows, arrays) == "logits"
    arrays.top_p = arrays.top_p.astype(np.float32)
    assert refused(logits, rows, arrays) == "top_p"
    with pytest.raises(InvalidArgumentError, match="top_k"):
        SamplingArrays.build(2, topk=3)
    with pytest.raises(InvalidArgumentError, match="backend"):
        select(logits, rows, SamplingArrays.build(2), backend="cuda")


def test_a_name_means_what_runs_where_the_tensors_are(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert backend.resolve_backend("auto", gpu) == backend.resolve_backend("triton", gpu) == "triton"
    assert backend.resolve_backend("auto", cpu) == backend.resolve_backend("auto") == "cpp"
    with pytest.raises(InvalidArgumentError, match="the tensors lie on cuda"):
        backend.resolve_backend("cpp", gpu)
    with pytest.raises(InvalidArgumentError, match="one of auto, cpp, reference"):
        backend.resolve_backend("triton")  # arrays on the host
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    assert backend.resolve_backend("auto", gpu) == "reference"
    with pytest.raises(InvalidArgumentError, match="Triton is not installed"):
        backend.resolve_backend("triton", gpu)
