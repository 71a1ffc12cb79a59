"""write_pages and kv_commit in Triton against the reference, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from vas_engine.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")

from vas_engine.kernels.kv_commit import address_table, kv_commit, write_pages  # after the check: it imports Triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS, BLOCK = 5, 4


def poisoned(kv_heads: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((BLOCKS, BLOCK, kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)


def rows_of(count: int, kv_heads: int, dim: int, dtype: torch.dtype, transposed: bool = True) -> torch.Tensor:
    """[count, kv_heads, dim], a view of tensors [kv_heads, count, dim] as transformers hands them over."""
    made = torch.randn(kv_heads, count, dim, device=DEVICE).to(dtype).transpose(0, 1)
    return made if transposed else made.contiguous()


def same(mine: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> None:
    for pages, should in zip(mine, wanted, strict=True):
        torch.testing.assert_close(pages, should, rtol=0, atol=0, equal_nan=True)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "dim"), [(2, 8), (3, 20), (1, 1), (9, 128)])
def test_write_leaves_out_what_has_no_slot(dtype, kv_heads, dim):
    """9 heads of 128 are more numbers than are copied at once."""
    k, v = rows_of(5, kv_heads, dim, dtype), rows_of(5, kv_heads, dim, dtype, transposed=False)
    slots = integers(7, -1, 0, 19, -1)
    mine, wanted = ([poisoned(kv_heads, dim, dtype) for _ in "kv"] for _ in range(2))
    write_pages(k, v, *mine, slots)
    reference.write_pages(k, v, *wanted, slots)
    same(mine, wanted)
    rows, slots = integers(4, 0, 4, 2), integers(11, 3, 2, -1)
    write_pages(k, v, *mine, slots, rows)
    reference.write_pages(k[rows], v[rows], *wanted, slots)
    same(mine, wanted)
    write_pages(k[:0], v[:0], *mine, slots[:0])


def test_heads_farther_apart_than_two_to_the_31():
    """As those of a prompt's rows are; memory that nobody touches costs nothing."""
    try:
        memory = torch.empty(2**31 + 4, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no room for 4 GiB of addresses: {error}")
    rows = memory.as_strided((1, 3, 4), (4, 2**30, 1))
    rows.copy_(torch.arange(12).view(1, 3, 4))
    pages = [poisoned(3, 4, torch.bfloat16) for _ in "kv"]
    write_pages(rows, rows, *pages, integers(9))
    for each in pages:
        assert torch.equal(each.view(-1, 12)[9], torch.arange(12, device=DEVICE).bfloat16())


def test_numbers_become_those_of_the_pages():
    k, v = (torch.tensor([1.5, -2.25, 1e-3, 3.0], device=DEVICE).view(1, 1, 4) for _ in "kv")
    pages = [poisoned(1, 4, torch.float16) for _ in "kv"]
    write_pages(k, v, *pages, integers(9))
    assert torch.equal(pages[0].view(-1, 4)[9], k.half().view(4))


LAYERS = [(2, 8, torch.float32), (1, 12, torch.float32), (2, 8, torch.float32), (2, 8, torch.bfloat16)]


def test_commit_copies_the_named_rows_of_every_layer():
    """Layers of several shapes; one that begins at an odd address; views and copies."""
    keys = [rows_of(6, *layer) for layer in LAYERS]
    values = [rows_of(6, *layer, transposed=False) for layer in LAYERS]
    keys[2] = torch.randn(2 * 6 * 8 + 1, device=DEVICE)[1:].view(2, 6, 8).transpose(0, 1)
    mine, wanted = ([[poisoned(*layer) for layer in LAYERS] for _ in "kv"] for _ in range(2))
    rows, slots = integers(4, 1, 5), integers(3, -1, 17)
    kv_commit(keys, values, *mine, rows, slots)
    reference.kv_commit(keys, values, *wanted, rows, slots)
    for pages, should in zip(mine, wanted, strict=True):
        same(pages, should)


@pytest.mark.parametrize("offset", [0, 1])
def test_commit_by_addresses_made_beforehand(offset):
    """One table serves any rows; tensors that begin at an odd address are told apart."""
    made = torch.randn(2, 3, 64 + offset, device=DEVICE)[..., offset:]
    keys, values = ([made[i, j].view(4, 2, 8) for j in range(3)] for i in range(2))
    mine, wanted = ([[poisoned(2, 8, torch.float32) for _ in range(3)] for _ in "kv"] for _ in range(2))
    addresses = address_table(keys, values, *mine)
    assert addresses.table.shape == (4, 3)
    assert addresses.aligned == (offset == 0)
    for rows, slots in ((integers(2), integers(8)), (integers(0, 3), integers(1, 2))):
        kv_commit(keys, values, *mine, rows, slots, addresses)
        reference.kv_commit(keys, values, *wanted, rows, slots)
    for pages, should in zip(mine, wanted, strict=True):
        same(pages, should)


def test_operators_say_what_they_write():
    k, v = rows_of(3, 2, 8, torch.float32), rows_of(3, 2, 8, torch.float32)
    rows, slots = integers(2, 0), integers(5, 6)
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.vas_engine
    fresh = [poisoned(2, 8, torch.float32).nan_to_num(0) for _ in "kv"]
    torch.library.opcheck(operators.write_pages.default, (k, v, *fresh, integers(1, 2, -1)), test_utils=checks)
    arguments = ([k, v], [v, k], fresh, [pages.clone() for pages in fresh], rows, slots)
    torch.library.opcheck(operators.kv_commit.default, arguments, test_utils=checks)
    mine, wanted = ([[poisoned(2, 8, torch.float32)] for _ in "kv"] for _ in range(2))
    operators.kv_commit([k], [v], *mine, rows, slots)
    reference.kv_commit([k], [v], *wanted, rows, slots)
    for pages, should in zip(mine, wanted, strict=True):
        same(pages, should)
