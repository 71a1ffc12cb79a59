"""candidate_attention: C++ and reference against brute force over torch's own attention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from vas_engine.kernels import reference

from vas_engine.errors import InvalidArgumentError
from vas_engine.model import AttentionBatch, KVCache, LayerShape
from vas_engine.model.backend import candidate_attention, has_extension, make_layer

needs_cpp = pytest.mark.skipif(not has_extension(), reason="the C++ extension is not built")
BACKENDS = [pytest.param("reference"), pytest.param("cpp", marks=needs_cpp)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Rows of several sequences over shuffled pages whose unused slots are NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_pages: torch.Tensor
    v_pages: torch.Tensor
    tables: torch.Tensor
    offsets: torch.Tensor
    prefixes: torch.Tensor
    see_self: torch.Tensor
    histories: list[tuple[torch.Tensor, torch.Tensor]]

    def groups(self) -> list[int]:
        counts = self.offsets.diff().tolist()
        return [group for group, count in enumerate(counts) for _ in range(count)]


def make_case(
    seed: int,
    groups: list[list[int]],
    kv_heads: int = 2,
    share: int = 2,
    dim: int = 8,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """``groups[g]`` lists the prefix length of each row of group g."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng).to(dtype)

    lengths = [max(group, default=0) for group in groups]
    blocks = [-(-length // block_size) for length in lengths]
    total = sum(blocks) + 2
    order = torch.randperm(total, generator=rng).tolist()
    shape = (total, block_size, kv_heads, dim)
    k_pages, v_pages = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    width = max([*blocks, 1])
    tables = torch.full((len(groups), width), -7, dtype=torch.int32)  # no such block: must never be looked at
    histories = []
    for index, (length, count) in enumerate(zip(lengths, blocks, strict=True)):
        mine = [order.pop() for _ in range(count)]
        tables[index, :count] = torch.tensor(mine, dtype=torch.int32)
        keys, values = normal(length, kv_heads, dim), normal(length, kv_heads, dim)
        for position in range(length):
            block, offset = mine[position // block_size], position % block_size
            k_pages[block, offset], v_pages[block, offset] = keys[position], values[position]
        histories.append((keys, values))
    rows = sum(len(group) for group in groups)
    return Case(
        q=normal(rows, kv_heads * share, dim),
        k=normal(rows, kv_heads, dim),
        v=normal(rows, kv_heads, dim),
        k_pages=k_pages,
        v_pages=v_pages,
        tables=tables,
        offsets=torch.tensor(np.cumsum([0] + [len(group) for group in groups]), dtype=torch.int32),
        prefixes=torch.tensor([length for group in groups for length in group], dtype=torch.int32),
        see_self=torch.rand(rows, generator=rng) < 0.5,
        histories=histories,
    )


def brute_force(case: Case, own: bool, scale: float, softcap: float = 0.0, window: int = 0) -> torch.Tensor:
    """Row by row, in float64, by torch's scaled_dot_product_attention where there is no softcap."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    share = case.q.shape[1] // case.k.shape[1]
    for row, group in enumerate(case.groups()):
        prefix = int(case.prefixes[row])
        keys, values = case.histories[group][0][:prefix], case.histories[group][1][:prefix]
        itself = own and bool(case.see_self[row])
        place = prefix if itself or not own else prefix - 1
        first = max(0, place - window + 1) if window else 0
        keys, values = keys[first:], values[first:]
        if itself:
            keys, values = (
                torch.cat([keys, case.k[row : row + 1]]),
                torch.cat([values, case.v[row : row + 1]]),
            )
        if len(keys) == 0:
            continue
        query = case.q[row].double()[:, None]
        keys = keys.double().repeat_interleave(share, 1).transpose(0, 1)
        values = values.double().repeat_interleave(share, 1).transpose(0, 1)
        if softcap:
            scores = softcap * torch.tanh(query @ keys.transpose(1, 2) * scale / softcap)
            out[row] = (torch.softmax(scores, -1) @ values)[:, 0]
        else:
            out[row] = F.scaled_dot_product_attention(query, keys, values, scale=scale)[:, 0]
    return out


def attend(case: Case, backend: str, own: bool, **options: float) -> torch.Tensor:
    extra = (case.k, case.v, case.see_self) if own else ()
    return candidate_attention(
        case.q,
        case.k_pages,
        case.v_pages,
        case.tables,
        case.offsets,
        case.prefixes,
        *extra,
        backend=backend,
        **options,
    )


def check(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    assert torch.isfinite(got).all()
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    else:
        assert (got.double() - wanted).norm() <= 1e-2 * wanted.norm()


shapes = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**31),
        "groups": st.lists(st.lists(st.integers(0, 70), max_size=7), min_size=1, max_size=4),
        "kv_heads": st.integers(1, 3),
        "share": st.integers(1, 5),
        "dim": st.sampled_from([1, 4, 8, 12, 16, 24, 32, 40, 64, 80, 128]),
        "block_size": st.sampled_from([1, 3, 4, 16, 32]),
        "dtype": st.sampled_from(DTYPES),
    }
)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    shape=shapes,
    own=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 30.0]),
    window=st.sampled_from([0, 0, 1, 5, 33]),
)
@settings(max_examples=120, deadline=None)
def test_equals_brute_force(backend, shape, own, softcap, window):
    case = make_case(**shape)
    scale = 0.7 * shape["dim"] ** -0.5
    got = attend(case, backend, own, scale=scale, softcap=softcap, window=window)
    check(got, brute_force(case, own, scale, softcap, window), shape["dtype"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 32, 33, 255, 256, 257, 600, 1025])
def test_long_and_edge_prefixes(backend, dtype, length):
    case = make_case(5, [[length], [length - 1, length, 0]], share=3, dim=64, block_size=16, dtype=dtype)
    check(attend(case, backend, True, scale=0.3), brute_force(case, True, 0.3), dtype)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_every_instruction_set_agrees(dtype, softcap):
    from vas_engine import _attention

    levels = _attention.levels()
    case = make_case(9, [[40, 41, 42], [300], [0, 7]], share=3, dim=40, block_size=16, dtype=dtype)
    wanted = brute_force(case, True, 0.3, softcap, 37)
    try:
        for level in levels:
            _attention.use_level(level)
            assert _attention.level() == level
            check(attend(case, "cpp", True, scale=0.3, softcap=softcap, window=37), wanted, dtype)
    finally:
        _attention.use_level(levels[0])


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bitwise_the_same_alone_and_in_a_batch(dtype):
    groups = [[700] * 5, [3, 9], [259], [0, 1, 64, 90], list(range(40, 80))]
    case = make_case(11, groups, share=3, dim=64, block_size=16, dtype=dtype)
    together = attend(case, "cpp", True, scale=0.2, window=0)
    ends = torch.tensor([0, 1], dtype=torch.int32)
    for row, group in enumerate(case.groups()):
        at = slice(row, row + 1)
        alone = candidate_attention(
            case.q[at], case.k_pages, case.v_pages, case.tables[group : group + 1], ends,
            case.prefixes[at], case.k[at], case.v[at], case.see_self[at], scale=0.2, backend="cpp",
        )  # fmt: skip
        assert torch.equal(alone, together[at])


@needs_cpp
def test_the_number_of_threads_does_not_change_a_bit():
    case = make_case(12, [[1500, 1400], [900]], share=3, dim=64, block_size=16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attend(case, "cpp", True, scale=0.2)
    finally:
        torch.set_num_threads(before)
    split = attend(case, "cpp", True, scale=0.2)
    assert before > 1 or torch.get_num_threads() == 1
    assert torch.equal(one, split)


@needs_cpp
def test_strided_inputs_are_read_in_place():
    case = make_case(13, [[5, 6], [17]], share=2, dim=16)
    wanted = attend(case, "cpp", True, scale=0.3)
    wide = torch.randn(3, 3 * 4 * 16)
    wide[:, :64] = case.q.flatten(1)
    heads_first = case.k.transpose(0, 1).contiguous().transpose(0, 1)
    assert not heads_first.is_contiguous()
    got = candidate_attention(
        wide[:, :64].unflatten(1, (4, 16)), case.k_pages, case.v_pages,
        case.tables, case.offsets, case.prefixes,
        heads_first, case.v, case.see_self, scale=0.3, backend="cpp",
    )  # fmt: skip
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_may_be_wider_than_the_pages(backend):
    case = make_case(14, [[30, 31]], dim=32, dtype=torch.bfloat16)
    case.q = torch.randn(case.q.shape)
    check(attend(case, backend, False, scale=0.3), brute_force(case, False, 0.3), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_rows_stay_not_finite_and_alone(backend):
    case = make_case(15, [[20, 20], [20]], dim=16)
    clean = attend(case, backend, False, scale=0.3)
    case.q[1, 2, 3] = float("nan")
    got = attend(case, backend, False, scale=0.3)
    assert got[1, 2].isnan().all()
    got[1, 2] = clean[1, 2]
    torch.testing.assert_close(got, clean)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_slotted_rows_are_written_before_anything_is_read(backend, dtype):
    block_size, heads, dim = 4, 2, 8
    cache = KVCache([LayerShape(heads, dim)], 8, block_size, dtype, backend=backend)
    cache.keys[0].fill_(float("nan"))
    cache.values[0].fill_(float("nan"))
    batch = AttentionBatch.from_sequences(
        [[5, 2], [7]], [[0, 1, 2, 3, 4], [0, 1, 1]], [True, [True, False, False]], block_size
    )
    q, k, v = (
        torch.randn(8, 4, dim).to(dtype),
        torch.randn(8, heads, dim).to(dtype),
        torch.randn(8, heads, dim).to(dtype),
    )
    got = cache.attend(0, q, k, v, batch, scale=0.5)
    wanted = torch.zeros(8, 4, dim)
    for row, seen in enumerate([[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [5], [5, 6], [5, 7]]):
        keys = k[seen].float().repeat_interleave(2, 1).transpose(0, 1)
        values = v[seen].float().repeat_interleave(2, 1).transpose(0, 1)
        wanted[row] = F.scaled_dot_product_attention(q[row].float()[:, None], keys, values, scale=0.5)[:, 0]
    check(got, wanted.double(), dtype)
    slots = [20, 21, 22, 23, 8, 28]
    assert torch.equal(cache.keys[0].view(-1, heads, dim)[slots], k[:6])
    assert torch.equal(cache.values[0].view(-1, heads, dim)[slots], v[:6])
    untouched = torch.ones(32, dtype=torch.bool)
    untouched[slots] = False
    assert cache.keys[0].view(-1, heads, dim)[untouched].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_commit_copies_the_named_rows_only(backend):
    cache = KVCache([LayerShape(2, 4), LayerShape(1, 6)], 3, 2, torch.float32, backend=backend)
    keys = [torch.randn(5, layer.kv_heads, layer.head_dim) for layer in cache.layers]
    values = [torch.randn(5, layer.kv_heads, layer.head_dim) for layer in cache.layers]
    cache.commit(keys, values, torch.tensor([4, 1]), torch.tensor([3, 0]))
    for layer in range(2):
        flat = cache.keys[layer].flatten(0, 1)
        assert torch.equal(flat[[3, 0]], keys[layer][[4, 1]])
        assert torch.equal(cache.values[layer].flatten(0, 1)[[3, 0]], values[layer][[4, 1]])
        assert flat[[1, 2, 4, 5]].eq(0).all()


def test_copy_blocks_and_sizes():
    layers = [LayerShape(2, 4), LayerShape(1, 6)]
    cache = KVCache(layers, 4, 2, torch.bfloat16)
    for pages in (*cache.keys, *cache.values):
        pages.normal_()
    before = [pages.clone() for pages in (*cache.keys, *cache.values)]
    cache.copy_blocks([0, 1], [3, 2])
    for pages, old in zip((*cache.keys, *cache.values), before, strict=True):
        assert torch.equal(pages[[3, 2]], old[[0, 1]])
        assert torch.equal(pages[:2], old[:2])
    assert KVCache.bytes_per_block(layers, 2, torch.bfloat16) == 2 * (2 * 8 + 2 * 6) * 2
    assert cache.num_bytes == sum(pages.numel() * 2 for pages in before)


@needs_cpp
def test_what_does_not_fit_is_refused():
    case = make_case(16, [[5]], dim=8)
    layer = make_layer(case.k_pages, case.v_pages, "cpp")

    def batch(table=((0, 1),), offsets=(0, 1), prefix=5, slot=-1, position=5):
        return AttentionBatch.build(list(table), offsets, [position], [slot], prefix_lens=[prefix])

    layer.attend(case.q, None, None, batch(), 1.0)
    for bad in (
        batch(prefix=9),
        batch(table=((0, 99),)),
        batch(table=((-1, 1),)),
        batch(slot=10**6),
        batch(prefix=-1),
    ):
        with pytest.raises(ValueError, match=r"block|prefix|slots"):
            layer.attend(case.q, None, None, bad, 1.0)
    with pytest.raises(ValueError, match="group_offsets"):
        layer.attend(case.q, None, None, batch(offsets=(0, 2)), 1.0)
    with pytest.raises(InvalidArgumentError, match="q="):
        layer.attend(case.q[:, :, :4], None, None, batch(), 1.0)
    with pytest.raises(InvalidArgumentError, match="k, v"):
        layer.attend(case.q, case.k[:, :1], case.v, batch(), 1.0)
    with pytest.raises(InvalidArgumentError, match="cpp"):
        make_layer(case.k_pages, case.v_pages, "cp")
    with pytest.raises(InvalidArgumentError, match="block_size"):
        KVCache([], 1, 0, torch.float32)


def test_reference_positions_follow_from_the_prefix():
    prefixes = torch.tensor([3, 3], dtype=torch.int32)
    see = torch.tensor([True, False])
    assert reference.own_positions(prefixes, see, True).tolist() == [3, 2]
    assert reference.own_positions(prefixes, None, False).tolist() == [3, 3]
