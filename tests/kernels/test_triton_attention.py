"""candidate_attention and paged_prefill in Triton against the reference: interpreted on a CPU, as they are on a GPU."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vas_engine.kernels import reference

from tests.kernels.test_attention import DTYPES, Case, check, make_case

pytest.importorskip("triton", reason="Triton is not installed")

from vas_engine.kernels.candidate_attention import (  # after the check: it imports Triton
    SHORTEST_SPLIT,
    Items,
    candidate_attention,
    configuration,
    device_items,
    host_items,
    plan,
)
from vas_engine.kernels.paged_prefill import paged_prefill

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GARBAGE = -7
"""Blocks of `make_case` that must never be looked at: `fenced` puts NaN there."""


def fenced(case: Case) -> Case:
    """The case on the device, where pages of blocks that are not there would be NaN rather than foreign memory."""

    def behind_a_fence(pages: torch.Tensor) -> torch.Tensor:
        fence = torch.full((-GARBAGE, *pages.shape[1:]), float("nan"), dtype=pages.dtype)
        return torch.cat([fence, pages]).to(DEVICE)[-GARBAGE:]

    moved = {
        field.name: value.to(DEVICE)
        for field in dataclasses.fields(case)
        if isinstance(value := getattr(case, field.name), torch.Tensor)
    }
    moved |= {"k_pages": behind_a_fence(case.k_pages), "v_pages": behind_a_fence(case.v_pages)}
    return dataclasses.replace(case, **moved)


def compare(case: Case, own: bool, splits: int | None = None, **how) -> Items:
    """Runs the kernel into a poisoned output and judges it against the reference in float32."""
    case = fenced(case)
    pages = (case.k_pages, case.v_pages)
    layout = (case.tables, case.offsets, case.prefixes)
    extra = (case.k, case.v, case.see_self) if own else ()
    how = {"scale": 0.7 * case.q.shape[-1] ** -0.5, **how}
    wide = [tensor.float() if tensor is not None and tensor.is_floating_point() else tensor for tensor in extra]
    wanted = reference.candidate_attention(case.q.float(), *(p.float() for p in pages), *layout, *wide, **how)
    out = torch.full(case.q.shape, float("nan"), dtype=case.q.dtype, device=DEVICE)
    items = plan(case.q, case.k_pages, case.tables, case.offsets, case.prefixes, splits)
    assert candidate_attention(case.q, *pages, *layout, *extra, **how, items=items, out=out) is out
    check(out.cpu(), wanted.double().cpu(), case.q.dtype)
    return items


def compare_alone(case: Case, splits: int | None = None, **how) -> None:
    """Runs the kernel over rows alone in their groups, in whose places there is NaN before; judges what it gives, and
    that the pages are left as `write_pages` would leave them.
    """
    case, size = fenced(case), case.k_pages.shape[1]
    last = case.prefixes.long() - 1
    slots = case.tables.gather(1, (last // size)[:, None]).flatten() * size + last % size
    pages = case.k_pages, case.v_pages
    for one in pages:
        one.view(-1, *one.shape[2:])[slots] = float("nan")
    expected = [one.clone() for one in pages]
    layout, how = (case.tables, case.offsets, case.prefixes), {"scale": 0.7 * case.q.shape[-1] ** -0.5, **how}
    wide = [tensor.float() for tensor in (case.q, *expected, case.k, case.v)]
    wanted = reference.candidate_attention(*wide[:3], *layout, *wide[3:], **how, slots=slots)
    reference.write_pages(case.k, case.v, *expected, slots)
    items = plan(case.q, case.k_pages, case.tables, case.offsets, case.prefixes, splits)
    got = candidate_attention(case.q, *pages, *layout, case.k, case.v, **how, slots=slots, items=items)
    check(got.cpu(), wanted.double().cpu(), case.q.dtype)
    for one, other in zip(pages, expected, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@given(
    shape=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "groups": st.lists(st.lists(st.integers(0, 40), max_size=6), min_size=1, max_size=3),
            "kv_heads": st.integers(1, 2),
            "share": st.sampled_from([1, 2, 3, 5, 7]),
            "dim": st.sampled_from([1, 8, 12, 16, 40, 64, 80, 128]),
            "block_size": st.sampled_from([1, 3, 4, 16, 32]),
            "dtype": st.sampled_from(DTYPES),
        }
    ),
    own=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 1.5, 30.0]),
    window=st.sampled_from([0, 0, 1, 5, 33]),
    splits=st.sampled_from([None, 2, 5]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_equals_the_reference(shape, own, softcap, window, splits):
    compare(make_case(**shape), own, splits, softcap=softcap, window=window)


EDGES = [[0], [], [1], [15, 16, 17, 0], [32], [], [33, 31], [65, 65]]
"""Empty groups, an empty prefix, one of one token, ends at and beside the ends of blocks and of tiles."""


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 9])
def test_edges_of_prefixes_and_more_splits_than_positions(own, splits):
    items = compare(make_case(3, EDGES, block_size=16), own, splits)
    assert items.merges == (splits > 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 256])
def test_a_head_of_256_and_large_blocks(dtype, block_size):
    compare(make_case(4, [[40, 39]], 1, 2, dim=256, block_size=block_size, dtype=dtype), True, softcap=20.0, window=30)


@pytest.mark.parametrize("rows", [1, 20, 64])
def test_every_size_of_tile(rows):
    """64 rows of 3 heads are more pairs than the largest tile holds, and heads of a row may lie in two tiles."""
    case = make_case(5, [[70] * rows, [3]], 1, share=3, dim=16, block_size=16, dtype=torch.bfloat16)
    pairs = compare(case, True).launch.pairs
    assert pairs == configuration(-(-(rows + 1) // 2) * 3, 16, False).pairs
    alone = make_case(5, [[70] * rows], 1, share=3, dim=16, block_size=16, dtype=torch.bfloat16)
    assert compare(alone, True).launch.pairs == {1: 16, 20: 64, 64: 128}[rows]


def test_positions_say_where_a_window_begins():
    case = make_case(6, [[20, 20, 3], [9]], block_size=4)
    compare(case, False, window=6, positions=torch.tensor([20, 23, 5, 40], device=DEVICE))
    compare(case, True, 3, window=6, positions=torch.tensor([20, 23, 5, 40], device=DEVICE))


def test_own_keys_are_seen_by_all_where_nothing_else_is_said():
    case = make_case(7, [[5, 0], [9]])
    case.see_self = None
    compare(case, True)


@given(
    shape=st.fixed_dictionaries(
        {
            "seed": st.integers(0, 2**31),
            "groups": st.lists(st.lists(st.integers(1, 70), min_size=1, max_size=1), min_size=1, max_size=4),
            "kv_heads": st.integers(1, 3),
            "share": st.sampled_from([1, 2, 5, 20]),
            "dim": st.sampled_from([8, 12, 16, 80]),
            "block_size": st.sampled_from([1, 3, 16]),
            "dtype": st.sampled_from(DTYPES),
        }
    ),
    softcap=st.sampled_from([0.0, 1.5]),
    window=st.sampled_from([0, 1, 9]),
    splits=st.sampled_from([None, 3]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_rows_alone_in_their_groups_are_written_and_seen(shape, softcap, window, splits):
    compare_alone(make_case(**shape), splits, softcap=softcap, window=window)


def test_queries_may_be_wider_than_the_pages():
    case = make_case(14, [[30, 31]], dim=32, dtype=torch.bfloat16)
    case.q = torch.randn(case.q.shape)
    compare(case, False)
    compare(case, True)


def test_strided_inputs_are_read_in_place():
    case = fenced(make_case(13, [[5, 6], [17]], share=2, dim=16))
    layout = (case.k_pages, case.v_pages, case.tables, case.offsets, case.prefixes)
    wanted = candidate_attention(case.q, *layout, case.k, case.v, case.see_self, scale=0.3)
    wide = torch.randn(3, 3 * 4 * 16, device=DEVICE)
    wide[:, :64] = case.q.flatten(1)
    k = case.k.transpose(0, 1).contiguous().transpose(0, 1)
    v = torch.randn(3, 2, 32, device=DEVICE)
    v[..., :16] = case.v
    assert not k.is_contiguous()
    got = candidate_attention(wide[:, :64].unflatten(1, (4, 16)), *layout, k, v[..., :16], case.see_self, scale=0.3)
    assert torch.equal(got, wanted)


def test_not_finite_rows_stay_not_finite_and_alone():
    case = fenced(make_case(15, [[20, 20], [20]], dim=16))
    layout = (case.k_pages, case.v_pages, case.tables, case.offsets, case.prefixes)
    clean = candidate_attention(case.q, *layout, scale=0.3)
    case.q[1, 2, 3] = float("nan")
    for splits in (1, 2):
        items = plan(case.q, case.k_pages, case.tables, case.offsets, case.prefixes, splits)
        got = candidate_attention(case.q, *layout, scale=0.3, items=items)
        assert got[1, 2].isnan().all()
        got[1, 2] = clean[1, 2]
        torch.testing.assert_close(got, clean)


def untouched(*shape: int) -> torch.Tensor:
    """Memory that costs nothing where nobody touches it."""
    try:
        return torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GiB of addresses: {error}")


def test_addresses_beyond_two_to_the_31():
    """Numbers of the pages are counted in 64 bits. Keys serve as values."""
    blocks, block_size, dim = 2**31 // (16 * 64) + 2, 16, 64
    pages = untouched(blocks, block_size, 1, dim)
    torch.manual_seed(0)
    pages[-1] = torch.randn(block_size, 1, dim)
    layout = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([[0]], [0, 1], [16])]
    q = torch.randn(1, 2, dim, device=DEVICE).bfloat16()
    wanted = reference.candidate_attention(q.float(), *[pages[-1:].float()] * 2, *layout, scale=0.2)
    layout[0] += blocks - 1
    check(candidate_attention(q, pages, pages, *layout, scale=0.2).cpu(), wanted.double().cpu(), torch.bfloat16)


def test_heads_farther_apart_than_two_to_the_31():
    """As those of a prompt's rows are, whose heads lie behind one another. Queries serve as keys and values."""
    case = make_case(16, [[20]], kv_heads=3, share=1, dim=64, dtype=torch.bfloat16)
    case.q = untouched(2**31 + 64).as_strided((1, 3, 64), (64, 2**30, 1))
    case.q.copy_(torch.randn(1, 3, 64))
    case.k = case.v = case.q
    compare(case, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (7, 0.0), (0, 3.0)])
def test_prefill_of_chunks(dtype, window, softcap):
    """What lies before the first row's window is poisoned too: no tile may begin there."""
    chunks = [range(1, 49), range(30, 41), [], range(1, 2)]
    case = make_case(8, [list(chunk) for chunk in chunks], 1, share=3, dim=16, block_size=4, dtype=dtype)
    if window:
        case.k_pages[case.tables[1, : (30 - window) // 4]] = float("nan")
        case.v_pages[case.tables[1, : (30 - window) // 4]] = float("nan")
        case.tables[1, : (30 - window) // 4] = GARBAGE
    case = fenced(case)
    layout = (case.tables, case.offsets, case.prefixes)
    how = {"scale": 0.4, "window": window, "softcap": softcap, "positions": case.prefixes.long() - 1}
    tables = case.tables.clamp(min=0)
    wanted = reference.candidate_attention(
        case.q.float(), case.k_pages.float(), case.v_pages.float(), tables, *layout[1:], **how
    )
    out = torch.full_like(case.q, float("nan"))
    paged_prefill(case.q, case.k_pages, case.v_pages, *layout, **how, out=out)
    check(out.cpu(), wanted.double().cpu(), dtype)
    how.pop("positions")
    assert torch.equal(paged_prefill(case.q, case.k_pages, case.v_pages, *layout, **how), out)


counts_of_groups = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@given(counts=counts_of_groups, lengths=st.data(), share=st.integers(1, 9), programs=st.integers(1, 600))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_items_cover_every_pair_once(counts, lengths, share, programs):
    """Planned on the host or on the device, the items hold each split of each tile once, and fill what they should."""
    offsets = torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)
    prefix = np.array([lengths.draw(st.integers(0, 5000)) for _ in counts])
    groups = np.flatnonzero(counts)
    pairs, some = 16, np.array(counts)[groups]
    host = host_items(groups, some, prefix[groups], share, 2, pairs, programs)
    device = device_items(offsets, sum(counts), share, pairs, 3).numpy()
    assert host.dtype == device.dtype == np.int32
    seen = torch.from_numpy(np.repeat(prefix, counts).astype(np.int32))
    balanced = device_items(offsets, sum(counts), share, pairs, prefix_lens=seen, kv_heads=2, programs=programs).numpy()
    assert balanced[balanced[:, 0] >= 0].tolist() == host.tolist()
    for table in (host, device[device[:, 0] >= 0]):
        expected = []
        for group in groups:
            splits = set(table[table[:, 0] == group, 3].tolist())
            assert len(splits) == 1
            (count,) = splits
            firsts = range(0, counts[group] * share, pairs)
            expected += [[group, first, split, count] for first in firsts for split in range(count)]
        assert table.tolist() == expected
    tiles = -(-some * share // pairs)
    assert len(host) * 2 <= programs + 2 * tiles.sum()
    assert (host[:, 3] <= np.maximum(prefix[host[:, 0]] // SHORTEST_SPLIT, 1)).all()


def test_operators_have_shapes_without_being_run():
    case = fenced(make_case(1, [[5, 6], [2]], block_size=4))
    layout = (case.k_pages, case.v_pages, case.tables, case.offsets, case.prefixes)
    arguments = (case.q, *layout, case.k, case.v, case.see_self, None, 0.3, 0.0, 0)
    operator = torch.ops.vas_engine.candidate_attention.default
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    wanted = candidate_attention(case.q, *layout, case.k, case.v, case.see_self, scale=0.3)
    assert torch.equal(operator(*arguments), wanted)
    operator = torch.ops.vas_engine.paged_prefill.default
    torch.library.opcheck(operator, (case.q, *layout, None, 0.3, 0.0, 0), test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(operator(case.q, *layout, None, 0.3, 0.0, 0), paged_prefill(case.q, *layout, scale=0.3))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("requests", [1, 7, 64])
def test_decoding_at_full_size(requests, dtype):
    """Eight kv heads of 128 numbers, four query heads each, prefixes of very different lengths."""
    lengths = [1 + 3001 * i % 1500 for i in range(requests)]
    compare_alone(make_case(9, [[n] for n in lengths], 8, share=4, dim=128, block_size=16, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_graph_holds_the_plan():
    """What is captured waits for nothing and follows the numbers of the batch, not those of its capture."""
    case = fenced(make_case(2, [[700] * 20, [300], [5] * 3], share=4, dim=64, block_size=16, dtype=torch.bfloat16))
    layout = (case.k_pages, case.v_pages, case.tables, case.offsets, case.prefixes, case.k, case.v, case.see_self)
    candidate_attention(case.q, *layout, scale=0.2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = candidate_attention(case.q, *layout, scale=0.2)
    for offsets in ([0, 20, 21, 24], [0, 2, 4, 24]):
        case.offsets.copy_(torch.tensor(offsets, dtype=torch.int32))
        case.prefixes.clamp_(max=5 if offsets[1] == 2 else 650)
        case.q.normal_()
        out.fill_(float("nan"))
        graph.replay()
        wide = [tensor.float() if tensor.is_floating_point() else tensor for tensor in (case.q, *layout)]
        check(out.cpu(), reference.candidate_attention(*wide, scale=0.2).double().cpu(), torch.bfloat16)
