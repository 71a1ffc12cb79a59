"""Keys and values to their pages; twins of `reference.write_pages` and `reference.kv_commit`.

`write_pages` puts the rows of one layer to their slots. `kv_commit` copies the winners' rows of all layers from
scratch in one launch; it finds the layers by a table of addresses, as each layer has tensors of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.device import where_tensors_lie

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

AT_ONCE = 1024
"""Numbers of a key that a program copies at a time."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Addresses(NamedTuple):
    """Where the tensors of each layer begin.

    Attributes:
        table: int64 [4, layers] on their device: keys, values, key pages, value pages.
        aligned: whether all begin at multiples of 16 bytes.
    """

    table: Tensor
    aligned: bool


@triton.jit
def _copy(source, target, row, slot, row_stride, head_stride, KV_HEADS, HEAD_DIM, AT_ONCE):
    """One row [KVH, D] to one slot of its pages."""
    width: tl.constexpr = KV_HEADS * HEAD_DIM
    target += slot * width
    source += row * row_stride
    for start in tl.static_range(0, width, AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)
        inside = at < width
        taken = tl.load(source + (at // HEAD_DIM).to(tl.int64) * head_stride + at % HEAD_DIM, inside)
        tl.store(target + at, taken.to(target.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "slots"])
def _write(
    k, v, k_pages, v_pages, rows, slots, k_row, k_head, v_row, v_head,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Program i: row i, or with PICKED row rows[i], to slots[i]."""
    place = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + place)
    if slot < 0:
        return
    row = tl.load(rows + place) if PICKED else place
    _copy(k, k_pages, row, slot, k_row, k_head, KV_HEADS, HEAD_DIM, AT_ONCE)
    _copy(v, v_pages, row, slot, v_row, v_head, KV_HEADS, HEAD_DIM, AT_ONCE)


@triton.jit(do_not_specialize=["rows", "slots"])
def _commit(
    addresses, rows, slots, k_row, k_head, v_row, v_head, layers,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
    SOURCE: tl.constexpr, TARGET: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Program (i, layer); addresses int64 [4, layers] of keys, values, key pages, value pages."""
    place = tl.program_id(0)
    slot = tl.load(slots + place)
    if slot < 0:
        return
    row = tl.load(rows + place)
    entry = addresses + tl.program_id(1)
    k = tl.load(entry).to(tl.pointer_type(SOURCE))
    v = tl.load(entry + layers).to(tl.pointer_type(SOURCE))
    k_pages = tl.load(entry + 2 * layers).to(tl.pointer_type(TARGET))
    v_pages = tl.load(entry + 3 * layers).to(tl.pointer_type(TARGET))
    if ALIGNED:  # nothing is known of an address that was loaded; wide accesses need this
        k, v = tl.multiple_of(k, 16), tl.multiple_of(v, 16)
        k_pages, v_pages = tl.multiple_of(k_pages, 16), tl.multiple_of(v_pages, 16)
    _copy(k, k_pages, row, slot, k_row, k_head, KV_HEADS, HEAD_DIM, AT_ONCE)
    _copy(v, v_pages, row, slot, v_row, v_head, KV_HEADS, HEAD_DIM, AT_ONCE)


@where_tensors_lie
def write_pages(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, rows: Tensor | None = None
) -> None:
    """Writes keys and values to their slots.

    Args:
        k, v: [R, KVH, D], D dense, any float dtype.
        k_pages, v_pages: [num_blocks, block_size, KVH, D], contiguous.
        slots: int64 [n], `block * block_size + offset`, each one once; -1 is left out.
        rows: int64 [n], which row of k and v goes to each slot; None: row i to slot i.
    """
    if len(slots) == 0:
        return
    _, _, kv_heads, head_dim = k_pages.shape
    _write[(len(slots),)](
        k, v, k_pages, v_pages, slots if rows is None else rows, slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, AT_ONCE=_width(kv_heads, head_dim), PICKED=rows is not None,
    )  # fmt: skip


def kv_commit(
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    key_pages: Sequence[Tensor],
    value_pages: Sequence[Tensor],
    rows: Tensor,
    slots: Tensor,
    addresses: Addresses | None = None,
) -> None:
    """Copies rows of every layer's scratch to their slots; one launch for all layers of one shape.

    Args:
        keys, values: [R, KVH, D] a layer, D dense.
        key_pages, value_pages: [num_blocks, block_size, KVH, D] a layer, contiguous.
        rows, slots: int64 [n]; slot -1 is left out.
        addresses: `address_table` of the four, made beforehand. To capture this in a CUDA graph, give it (the
            tensors then stay where they are); all layers must be of one shape.
    """
    if len(slots) == 0 or len(keys) == 0:
        return
    if addresses is not None:
        _launch(keys[0], values[0], key_pages[0], addresses, rows, slots)
        return
    alike: dict[object, list[int]] = {}
    for layer, (k, v, pages) in enumerate(zip(keys, values, key_pages, strict=True)):
        kind = (k.stride(), v.stride(), k.dtype, pages.shape[2:], pages.dtype)
        alike.setdefault(kind, []).append(layer)
    for layers in alike.values():
        group = [[tensors[layer] for layer in layers] for tensors in (keys, values, key_pages, value_pages)]
        _launch(group[0][0], group[1][0], group[2][0], address_table(*group), rows, slots)


def address_table(
    keys: Sequence[Tensor], values: Sequence[Tensor], key_pages: Sequence[Tensor], value_pages: Sequence[Tensor]
) -> Addresses:
    """For the `addresses` of `kv_commit`, which says what the arguments are."""
    found = [[tensor.data_ptr() for tensor in tensors] for tensors in (keys, values, key_pages, value_pages)]
    table = torch.tensor(found, dtype=torch.int64)
    aligned = not bool((table % 16).any())
    device = keys[0].device
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    return Addresses(table, aligned)


@where_tensors_lie
def _launch(k: Tensor, v: Tensor, pages: Tensor, addresses: Addresses, rows: Tensor, slots: Tensor) -> None:
    kv_heads, head_dim = pages.shape[2:]
    layers = addresses.table.shape[1]
    _commit[(len(slots), layers)](
        addresses.table, rows, slots, k.stride(0), k.stride(1), v.stride(0), v.stride(1), layers,
        KV_HEADS=kv_heads, HEAD_DIM=head_dim, AT_ONCE=_width(kv_heads, head_dim),
        SOURCE=_TYPES[k.dtype], TARGET=_TYPES[pages.dtype], ALIGNED=addresses.aligned,
    )  # fmt: skip


def _width(kv_heads: int, head_dim: int) -> int:
    return min(AT_ONCE, triton.next_power_of_2(kv_heads * head_dim))


# As operators, so that compiled code and graphs see what is written. Defined directly: see candidate_attention.
_library = torch.library.Library("vas_engine", "FRAGMENT")
_library.define("write_pages(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor slots) -> ()")
_library.define(
    "kv_commit(Tensor[] keys, Tensor[] values, Tensor(a!)[] key_pages, Tensor(b!)[] value_pages, Tensor rows, "
    "Tensor slots) -> ()"
)
for _name, _function in (("write_pages", write_pages), ("kv_commit", kv_commit)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vas_engine::{_name}", lambda *_: None, lib=_library)


def variants() -> list[Variant]:
    """The shipped configurations: a grouped-query cache, and one of more numbers a token than are copied at once."""
    from vas_engine.kernels.compile import Variant

    strides = ("k_row", "k_head", "v_row", "v_head")
    shared = dict.fromkeys(strides, "i32") | {"rows": "*i64", "slots": "*i64"}
    write = shared | dict.fromkeys(("k", "v", "k_pages", "v_pages"), "*bf16")
    commit = shared | {"addresses": "*i64", "layers": "i32"}
    listed = []
    for kv_heads in (8, 32):
        shape = {"KV_HEADS": kv_heads, "HEAD_DIM": 128, "AT_ONCE": AT_ONCE}
        listed.append(
            Variant(f"write_pages h{kv_heads}", _write, write, shape | {"PICKED": False}, aligned=tuple(write))
        )
        constants = shape | {"SOURCE": tl.bfloat16, "TARGET": tl.bfloat16, "ALIGNED": True}
        aligned = (*strides, "rows", "slots", "addresses")
        listed.append(Variant(f"kv_commit h{kv_heads}", _commit, commit, constants, aligned=aligned))
    return listed
