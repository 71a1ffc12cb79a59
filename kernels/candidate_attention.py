"""Attention of candidate rows over paged keys and values; twin of `reference.candidate_attention`.

A *tile* is up to M of the (row, query head) pairs of one group and one kv head, rows in order and the query heads
of a row next to one another: all of them meet the same keys, which are read once for the tile. A tile's prefix may
be cut into *splits*; each is an *item* of work, one program a kv head. An item that is its tile's only one writes
the result; others leave (sum of values, maximum, sum of weights) in scratch, and a second kernel merges them by
log-sum-exp. One body serves decoding, lookahead, readers and (`paged_prefill`) prompt chunks: they differ in the
size of the tile only.

Sums are taken in an order that the items fix, without atomics: one plan gives the same bits every time. Another plan
(a batch with other groups may be cut elsewhere) gives results that differ by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels import reference
from vas_engine.kernels.device import where_tensors_lie

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

LARGEST_TILE = 128
MAX_SPLITS = 128
SHORTEST_SPLIT = 128
"""Positions; a shorter piece of a prefix costs more to merge than it gains."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs aimed at: two run at once on a multiprocessor, and twice as many even out unequal ends."""
_STAGES, _STAGES_AMD = 5, 2
STAGES = _STAGES_AMD if torch.version.hip else _STAGES
"""Of the pipeline: a step waits for block numbers, then for keys and values, so 5 have two tiles of each in flight. An
AMD GPU has shared memory for one."""
_PROCESSORS_ON_CPU = 1  # under the interpreter
_FAR = tl.constexpr(2**31 - 1)
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Configuration:
    """How the body is launched: pairs of a tile, positions read at a time, warps, stages of the pipeline."""

    pairs: int
    positions: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Items:
    """The work of a launch.

    Attributes:
        table: int32 [W, 4] on the device: group (-1: nothing to do), first pair of the tile, split, splits.
            Items of a tile are next to one another, in the order of the splits.
        launch: how; the tiles hold `launch.pairs`.
        merges: whether any tile has more than one split.
    """

    table: Tensor
    launch: Configuration
    merges: bool


# What changes from step to step must not have a kernel compiled anew: neither numbers nor where indices lie, which are
# parts of larger buffers.
@triton.jit(
    do_not_specialize=[
        "tables", "offsets", "prefix_lens", "positions", "see_self", "slots", "items", "window", "table_row", "partials"
    ]
)  # fmt: skip
def _body(
    q, k_pages, v_pages, tables, offsets, prefix_lens, positions, k, v, see_self, slots, items, out, partial, stats,
    scale, softcap, window, table_row, partials,
    q_row, q_head, k_row, k_head, v_row, v_head,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    OWN: tl.constexpr, WRITES: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One item of one kv head a program."""
    item = tl.program_id(0) // KV_HEADS
    group = tl.load(items + item * 4)
    if group < 0:
        return
    attend_item(
        item, tl.program_id(0) % KV_HEADS, group,
        tl.load(items + item * 4 + 1), tl.load(items + item * 4 + 2), tl.load(items + item * 4 + 3),
        q, q, k_pages, v_pages, tables, offsets, prefix_lens, positions, k, v, see_self, slots, out, partial, stats,
        scale, softcap, window, table_row, partials, q_row, q_head, k_row, k_head, v_row, v_head,
        KV_HEADS, SHARE, HEAD_DIM, BLOCK_SIZE, M, N, D, OWN, WRITES, WINDOWED, CAPPED, WIDE, False,
    )  # fmt: skip


@triton.jit
def attend_item(
    item, kv_head, group, first, split, splits,
    q, turns, k_pages, v_pages, tables, offsets, prefix_lens, positions, k, v, see_self, slots, out, partial, stats,
    scale, softcap, window, table_row, partials,
    q_row, q_head, k_row, k_head, v_row, v_head,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    OWN: tl.constexpr, WRITES: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, WIDE: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """One item of one kv head: the tile from pair `first` of a group on, and of its prefix the given split.

    Rows' own keys and values come with OWN; `see_self` [R] says who sees them. With WRITES all do, and their prefixes
    end with them, whose keys and values go to `slots` here: no other program reads them. WIDE: products in float32, for
    float32 pages and for queries of another dtype than the pages. stats holds [maximum, sum] x partials. With TURNED
    the halves of a query are rotated against each other by `turns` [R, HEAD_DIM], cosines and behind them sines.
    """
    compute = tl.float32 if WIDE else k_pages.dtype.element_ty

    pair = first + tl.arange(0, M)
    row = tl.load(offsets + group) + pair // SHARE
    valid = row < tl.load(offsets + group + 1)
    head = kv_head * SHARE + pair % SHARE
    row = row.to(tl.int64)
    dim = tl.arange(0, D)
    in_head = dim < HEAD_DIM
    query = tl.load(
        q + (row * q_row + head * q_head)[:, None] + dim[None, :], valid[:, None] & in_head[None, :], other=0.0
    )
    if TURNED:
        half: tl.constexpr = HEAD_DIM // 2
        mask, turn = valid[:, None] & in_head[None, :], turns + (row * HEAD_DIM)[:, None] + (dim % half)[None, :]
        across = q + (row * q_row + head * q_head)[:, None] + ((dim + half) % HEAD_DIM)[None, :]
        across = tl.load(across, mask, other=0.0).to(tl.float32)
        across = tl.where((dim < half)[None, :], -across, across) * tl.load(turn + half, mask, other=0.0)
        query = (query.to(tl.float32) * tl.load(turn, mask, other=0.0) + across).to(q.dtype.element_ty)

    # What the rows see of the pages, [low, high) each, and what any of them sees, [bottom, top).
    high = tl.load(prefix_lens + row, valid, other=0)
    if WRITES:
        high -= 1
    if WINDOWED:
        place = tl.load(positions + row, valid, other=0)
        low = tl.maximum(place - window + 1, 0).to(tl.int32)
        bottom = tl.min(tl.where(low < high, low, _FAR), 0)
        top = tl.max(tl.where(low < high, high, 0), 0)
    else:
        low = tl.zeros([M], tl.int32)
        bottom = 0
        top = tl.max(high, 0)
    length = tl.maximum(top - bottom, 0)
    each = tl.cdiv(tl.cdiv(length, N), splits) * N
    begin = bottom + tl.minimum(split * each, length)
    end = tl.minimum(begin + each, top)

    # The first split starts from the rows' own keys, whose weight relative to themselves is 1.
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, D], tl.float32)
    if OWN:
        mine = valid & (split == 0)
        if not WRITES:
            mine = mine & (tl.load(see_self + row, valid, other=0) != 0)
        mask = mine[:, None] & in_head[None, :]
        key = tl.load(k + (row * k_row + kv_head * k_head)[:, None] + dim[None, :], mask, other=0.0)
        score = _score(tl.sum(query.to(tl.float32) * key.to(tl.float32), 1), scale, softcap, CAPPED)
        highest = tl.where(mine, score, highest)
        total = tl.where(mine, 1.0, total)
        value = tl.load(v + (row * v_row + kv_head * v_head)[:, None] + dim[None, :], mask, other=0.0)
        result = value.to(tl.float32)
        if WRITES:
            own_slot = tl.load(slots + row, mine, other=0)
            target = ((own_slot * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + dim[None, :]
            once = mask & (pair % SHARE == 0)[:, None]
            tl.store(k_pages + target, key.to(k_pages.dtype.element_ty), once)
            tl.store(v_pages + target, value.to(v_pages.dtype.element_ty), once)

    query = query.to(compute)
    table = tables + group.to(tl.int64) * table_row
    for start in range(begin, end, N):
        at = start + tl.arange(0, N)
        inside = at < end
        block = tl.load(table + at // BLOCK_SIZE, inside, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + at % BLOCK_SIZE
        entry = slot * (KV_HEADS * HEAD_DIM) + kv_head * HEAD_DIM
        keys = tl.load(k_pages + entry[None, :] + dim[:, None], inside[None, :] & in_head[:, None], other=0.0)
        scores = tl.dot(query, keys.to(compute), input_precision="ieee")
        scores = _score(scores, scale, softcap, CAPPED)
        seen = at[None, :] < high[:, None]  # splits end where their steps do, so this is below `end`
        if WINDOWED:
            seen = seen & (at[None, :] >= low[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        reference_score = tl.where(risen == float("-inf"), 0.0, risen)  # nothing seen yet: weights are 0, not NaN
        weights = tl.exp2(scores - reference_score[:, None])
        shrink = tl.exp2(highest - reference_score)
        total = total * shrink + tl.sum(weights, 1)
        vals = tl.load(v_pages + entry[:, None] + dim[None, :], inside[:, None] & in_head[None, :], other=0.0)
        result = tl.dot(weights.to(compute), vals.to(compute), result * shrink[:, None], input_precision="ieee")
        highest = risen

    if splits == 1:
        result = result / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (row * (KV_HEADS * SHARE) + head) * HEAD_DIM
        tl.store(out + place[:, None] + dim[None, :], result, valid[:, None] & in_head[None, :])
    else:
        place = (item.to(tl.int64) * KV_HEADS + kv_head) * M + tl.arange(0, M)
        tl.store(partial + place[:, None] * D + dim[None, :], result, valid[:, None])
        tl.store(stats + place, highest, valid)
        tl.store(stats + partials + place, total, valid)


@triton.jit
def _score(product, scale, softcap, CAPPED: tl.constexpr):
    """Scores in units of log 2, so that weights are powers of 2."""
    if CAPPED:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), right at both ends.
        cap = softcap * _LOG2E
        score = cap - 2.0 * cap / (tl.exp2(product * (scale / softcap * 2.0 * _LOG2E)) + 1.0)
    else:
        score = product * (scale * _LOG2E)
    return score


@triton.jit(do_not_specialize=["offsets", "items", "partials"])
def _merge(
    offsets, items, out, partial, stats, partials,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) // KV_HEADS
    group = tl.load(items + item * 4)
    splits = tl.load(items + item * 4 + 3)
    if (group < 0) | (splits == 1):
        return
    merge_item(
        item, tl.program_id(0) % KV_HEADS, group, tl.load(items + item * 4 + 1), tl.load(items + item * 4 + 2), splits,
        offsets, out, partial, stats, partials, KV_HEADS, SHARE, HEAD_DIM, M, D, SPLITS, AT_ONCE,
    )  # fmt: skip


@triton.jit
def merge_item(
    item, kv_head, group, first, split, splits, offsets, out, partial, stats, partials,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr,
    M: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The splits of a tile share the merging: split s takes pairs s, s + splits and so on."""
    first_row = tl.load(offsets + group)
    pairs = tl.minimum((tl.load(offsets + group + 1) - first_row) * SHARE - first, M)
    base = (item - split).to(tl.int64) * KV_HEADS + kv_head
    every = tl.arange(0, SPLITS)
    some = tl.arange(0, AT_ONCE)
    dim = tl.arange(0, D)
    for pair in range(split, pairs, splits):
        place = (base + every * KV_HEADS) * M + pair
        maxima = tl.load(stats + place, every < splits, other=float("-inf"))
        sums = tl.load(stats + partials + place, every < splits, other=0.0)
        highest = tl.max(maxima, 0)
        highest = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(maxima - highest) * sums, 0)
        result = tl.zeros([D], tl.float32)
        for start in range(0, splits, AT_ONCE):
            which = start + some
            source = (base + which * KV_HEADS) * M + pair
            weight = tl.exp2(tl.load(stats + source, which < splits, other=float("-inf")) - highest)
            piece = tl.load(partial + source[:, None] * D + dim[None, :], (which < splits)[:, None], other=0.0)
            result += tl.sum(weight[:, None] * piece, 0)
        result = result / tl.where(total == 0.0, 1.0, total)
        row = (first_row + (first + pair) // SHARE).to(tl.int64)
        head = kv_head * SHARE + (first + pair) % SHARE
        target = (row * (KV_HEADS * SHARE) + head) * HEAD_DIM
        tl.store(out + target + dim, result, dim < HEAD_DIM)


def configuration(pairs: int, head_dim: int, wide: bool) -> Configuration:
    """The launch for tiles that should hold `pairs` of a group; there are three sizes of them."""
    size = padded(head_dim)
    if wide:
        return Configuration(16, 16, 4, 3)
    if pairs <= 16:
        return Configuration(16, 64 if size <= 128 else 32, 4, STAGES)
    # 32 positions keep every variant in the registers of an Ampere, and two programs on a multiprocessor of a Hopper.
    positions = 64 if size <= 64 else 32
    if pairs <= 64 or size > 128:
        return Configuration(64, positions, 4 if size <= 64 else 8, STAGES)
    return Configuration(LARGEST_TILE, positions, 8, STAGES)


def padded(head_dim: int) -> int:
    """Width of a head in registers: a power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(head_dim))


def is_wide(q_dtype: torch.dtype, pages_dtype: torch.dtype) -> bool:
    """Whether products are float32: for float32, and where queries and pages differ."""
    return pages_dtype == torch.float32 or q_dtype != pages_dtype


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    if device.type != "cuda":
        return _PROCESSORS_ON_CPU
    return torch.cuda.get_device_properties(device).multi_processor_count


def host_items(
    groups: np.ndarray, counts: np.ndarray, lengths: np.ndarray, share: int, kv_heads: int, pairs: int, programs: int
) -> np.ndarray:
    """Items of some groups, for a host that knows the batch: long prefixes get more splits than short ones.

    Args:
        groups: int [n], their numbers. counts: rows of each. lengths: longest prefix of each (the split of the
            work follows from it; what a row sees is read on the device).
        share: query heads per kv head. pairs: of a tile. programs: how many of them fill the device.

    Returns:
        int32 [W, 4], see `Items`.
    """
    tiles = -(-counts * share // pairs)
    work = int((tiles * lengths).sum()) * kv_heads
    piece = max(SHORTEST_SPLIT, -(-work // programs))
    splits = np.clip(lengths // piece, 1, MAX_SPLITS)
    items = tiles * splits
    table = np.empty((int(items.sum()), 4), np.int32)
    table[:, 0] = np.repeat(groups, items)
    table[:, 3] = np.repeat(splits, items)
    place = np.arange(len(table)) - np.repeat(np.cumsum(items) - items, items)
    table[:, 1] = place // table[:, 3] * pairs
    table[:, 2] = place % table[:, 3]
    return table


@triton.jit(do_not_specialize=["offsets", "prefix_lens", "items", "groups", "splits", "programs", "length"])
def _plan(
    offsets, prefix_lens, items, groups, splits, programs, length,
    SHARE: tl.constexpr, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr, SHORTEST: tl.constexpr,
    GROUPS: tl.constexpr, SPLITS: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """The items of one tile a program: tiles are numbered through the groups. `length` is the table's."""
    tile, group, some = tl.program_id(0), tl.arange(0, GROUPS), tl.arange(0, SPLITS)
    live = group < groups
    end = tl.load(offsets + group + 1, mask=live, other=0)
    rows = end - tl.load(offsets + group, mask=live, other=0)
    tiles = (rows * SHARE + PAIRS - 1) // PAIRS
    if BALANCED:  # as `host_items`
        longest = tl.load(prefix_lens + end - 1, mask=live & (rows > 0), other=0).to(tl.int64)
        work = tl.sum(tiles * longest, 0) * KV_HEADS
        piece = tl.maximum((work + programs - 1) // programs, SHORTEST)
        each = tl.minimum(tl.maximum(longest // piece, 1), SPLITS).to(tl.int32)
    else:
        each = tl.zeros_like(tiles) + splits
    counts = tiles * each
    mine = tl.sum((live & (tl.cumsum(tiles, 0) <= tile)).to(tl.int32), 0)
    before = group < mine
    place, own = tile - tl.sum(tl.where(before, tiles, 0), 0), tl.sum(tl.where(group == mine, each, 0), 0)
    inside = (some < own) & (mine < groups)
    item = items + (tl.sum(tl.where(before, counts, 0), 0) + place * own + some) * 4
    tl.store(item, mine, mask=inside)
    tl.store(item + 1, place * PAIRS, mask=inside)
    tl.store(item + 2, some, mask=inside)
    tl.store(item + 3, own, mask=inside)
    # Nothing is to be done by the rest of the table, which the programs share.
    for start in range(tl.sum(counts, 0) + tile * SPLITS, length, tl.num_programs(0) * SPLITS):
        tl.store(items + (start + some) * 4, -1, mask=start + some < length)


@where_tensors_lie
def device_items(
    group_offsets: Tensor,
    rows: int,
    share: int,
    pairs: int,
    splits: int = 0,
    *,
    prefix_lens: Tensor | None = None,
    kv_heads: int = 1,
    programs: int = 1,
) -> Tensor:
    """Items worked out on the device, where the host knows shapes only.

    One launch; nothing is read back and every shape follows from the arguments' shapes, so a CUDA graph can hold this.
    Items that turn out not to be needed have group -1.

    Args:
        group_offsets: int32 [G + 1], G at least 1. rows: R. share, pairs, kv_heads, programs: as of `host_items`.
        splits: of every tile; 0 splits as `host_items` does, by the prefixes.
        prefix_lens: int32 [R], for that; the last row of a group speaks for all.

    Returns:
        int32 [W, 4], see `Items`.
    """
    groups = len(group_offsets) - 1
    tiles = min(rows, groups) + rows * share // pairs
    # Pieces are so long that splitting adds one for each program at most.
    length = tiles * splits if splits else tiles + programs // kv_heads
    items = group_offsets.new_empty(length if tiles else 0, 4)
    if tiles:
        _plan[(tiles,)](
            group_offsets, group_offsets if prefix_lens is None else prefix_lens, items,
            groups, splits, programs, length,
            SHARE=share, KV_HEADS=kv_heads, PAIRS=pairs, SHORTEST=SHORTEST_SPLIT, GROUPS=triton.next_power_of_2(groups),
            SPLITS=triton.next_power_of_2(splits) if splits else MAX_SPLITS, BALANCED=splits == 0, num_warps=1,
        )  # fmt: skip
    return items


def plan(
    q: Tensor,
    k_pages: Tensor,
    block_tables: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    splits: int | None = None,
) -> Items:
    """Items of all groups from shapes alone; `splits` of each prefix (left out: by their lengths, to fill the device).

    Args:
        prefix_lens: int32 [R], as of `candidate_attention`; the last row of a group speaks for all.
    """
    rows, heads, head_dim = q.shape
    block_size, kv_heads = k_pages.shape[1:3]
    groups, share = len(block_tables), heads // kv_heads
    launch = configuration(-(-rows // max(groups, 1)) * share, head_dim, is_wide(q.dtype, k_pages.dtype))
    programs = processors(q.device) * PROGRAMS_PER_PROCESSOR
    if block_tables.shape[1] * block_size < 2 * SHORTEST_SPLIT or programs < kv_heads:
        splits = splits or 1  # nothing to split, or nobody to split it for
    table = device_items(
        group_offsets, rows, share, launch.pairs, min(splits or 0, MAX_SPLITS),
        prefix_lens=prefix_lens, kv_heads=kv_heads, programs=programs,
    )  # fmt: skip
    return Items(table, launch, splits is None or splits > 1)


@where_tensors_lie
def candidate_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    see_self: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    positions: Tensor | None = None,
    slots: Tensor | None = None,
    items: Items | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of rows in groups; a group's rows share one paged prefix and never see one another.

    Nothing is read back from the device. Page entries past a tile's longest prefix may hold anything, and block
    table entries past it are not read.

    Args:
        q: [R, H, D], float32, bfloat16 or float16, D dense; H is a multiple of the kv heads.
        k_pages, v_pages: [num_blocks, block_size, KVH, D], contiguous, of one dtype.
        block_tables: int32 [G, max_blocks], rows dense. group_offsets: int32 [G + 1]. prefix_lens: int32 [R].
        k, v: [R, KVH, D], D dense, the rows' own keys and values, or None (nothing but pages).
        see_self: bool [R], which rows see their own key besides the prefix; None: all (with keys given).
        scale: factor on the scores. softcap: scores become ``softcap * tanh(score / softcap)``; 0 is off.
        window: a row at position p sees keys at positions above ``p - window``; 0 is off.
        positions: int64 [R]; left out they follow from the prefix, see `reference.own_positions`.
        slots: int64 [R], of rows that are alone in their groups: their keys and values are written there first.
            Prefixes take them in, see_self is not asked.
        items: what to do, see `plan`, which makes it when it is left out.
        out: [R, H, D] in q's dtype, contiguous; rows of groups without items stay as they are.

    Returns:
        [R, H, D] in q's dtype; a row with nothing to see gives 0.
    """
    rows, heads, head_dim = q.shape
    block_size, kv_heads = k_pages.shape[1:3]
    if out is None:
        out = torch.empty((rows, heads, head_dim), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    if items is None:
        items = plan(q, k_pages, block_tables, group_offsets, prefix_lens)
    work = len(items.table)
    if work == 0:
        return out
    own = k is not None and v is not None
    writes = own and slots is not None
    if window > 0 and positions is None:
        positions = prefix_lens.long() - 1 if writes else reference.own_positions(prefix_lens, see_self, own)
    if own and see_self is None and not writes:
        see_self = torch.ones(rows, dtype=torch.bool, device=q.device)
    wide, size = is_wide(q.dtype, k_pages.dtype), padded(head_dim)
    launch = items.launch
    partials = work * kv_heads * launch.pairs if items.merges else 0
    scratch = torch.empty(partials * (size + 2), dtype=torch.float32, device=q.device)
    partial, stats = scratch[: partials * size], scratch[partials * size :]
    # An argument that nothing is read from is given some tensor that is at hand.
    key, value = (k, v) if k is not None and v is not None else (q, q)
    q, key, value = (_within_reach(each) for each in (q, key, value))
    flags = see_self.view(torch.uint8) if own and see_self is not None and not writes else items.table
    shape: dict[str, Any] = {"KV_HEADS": kv_heads, "SHARE": heads // kv_heads, "HEAD_DIM": head_dim}
    grid = (work * kv_heads,)
    _body[grid](
        q, k_pages, v_pages, block_tables, group_offsets, prefix_lens,
        positions if window > 0 else prefix_lens, key, value, flags, slots if writes else items.table,
        items.table, out, partial, stats,
        scale, softcap, window, block_tables.stride(0), partials,
        *q.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        **shape, BLOCK_SIZE=block_size, M=launch.pairs, N=launch.positions, D=size,
        OWN=own, WRITES=writes, WINDOWED=window > 0, CAPPED=softcap > 0, WIDE=wide,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if items.merges:
        _merge[grid](
            group_offsets, items.table, out, partial, stats, partials,
            **shape, M=launch.pairs, D=size, SPLITS=MAX_SPLITS, AT_ONCE=16,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out


def _within_reach(tensor: Tensor) -> Tensor:
    """The tensor [R, H, D], its heads no farther apart than the 32 bits in which the kernel counts them; rows and pages
    are counted in 64.
    """
    return tensor if tensor.shape[1] * tensor.stride(1) < 2**31 else tensor.contiguous()


# As operators, planned from shapes, so that compiled code and graphs see through them. Defined directly rather than by
# torch.library.custom_op, whose wrapper costs more than a small attention.
def _operator(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, group_offsets: Tensor, prefix_lens: Tensor,
    k: Tensor | None, v: Tensor | None, see_self: Tensor | None, positions: Tensor | None,
    scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    return candidate_attention(
        q, k_pages, v_pages, block_tables, group_offsets, prefix_lens, k, v, see_self,
        scale=scale, softcap=softcap, window=window, positions=positions,
    )  # fmt: skip


_library = torch.library.Library("vas_engine", "FRAGMENT")
_library.define(
    "candidate_attention(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor group_offsets, "
    "Tensor prefix_lens, Tensor? k, Tensor? v, Tensor? see_self, Tensor? positions, float scale, float softcap, "
    "int window) -> Tensor"
)
_library.impl("candidate_attention", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("vas_engine::candidate_attention", lambda q, *_: q.new_empty(q.shape), lib=_library)


def attention_variants(
    name: str, launch: Configuration, head_dim: int, dtype: str, own: bool, plain: bool = True, writes: bool = False
) -> list[Variant]:
    """The body as it ships, NVIDIA's and AMD's; `plain`: without window and softcap."""
    from vas_engine.kernels.compile import TARGETS, Variant

    signature = dict.fromkeys(("q", "k_pages", "v_pages", "k", "v", "out"), f"*{dtype}")
    signature |= dict.fromkeys(("tables", "offsets", "prefix_lens", "items"), "*i32")
    signature |= {"positions": "*i32" if plain else "*i64", "see_self": "*u8" if own and not writes else "*i32"}
    signature |= {"slots": "*i64" if writes else "*i32"}
    signature |= {"partial": "*fp32", "stats": "*fp32", "scale": "fp32", "softcap": "fp32"}
    pointers = [argument for argument, kind in signature.items() if kind.startswith("*")]
    strides = ["q_row", "q_head", "k_row", "k_head", "v_row", "v_head"]
    signature |= dict.fromkeys(("window", "table_row", "partials", *strides), "i32")
    constants = {"KV_HEADS": 8, "SHARE": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16}
    constants |= {"M": launch.pairs, "N": launch.positions, "D": padded(head_dim)}
    constants |= {"OWN": own, "WRITES": writes, "WINDOWED": not plain, "CAPPED": not plain, "WIDE": dtype == "fp32"}
    options = {" own": own, " writes": writes, " window softcap": not plain}
    label = f"{name} d{head_dim} {dtype} m{launch.pairs}" + "".join(word for word, on in options.items() if on)
    amd = tuple(target for target, chip in TARGETS.items() if chip.backend == "hip")
    nvidia = tuple(target for target in TARGETS if target not in amd)
    return [
        Variant(label, _body, signature, constants, launch.warps, stages, (*pointers, *strides), targets)
        for stages, targets in (
            (_STAGES if launch.stages == STAGES else launch.stages, nvidia),
            (_STAGES_AMD if launch.stages == STAGES else launch.stages, amd),
        )
    ]


def variants() -> list[Variant]:
    """The shipped configurations: every size of tile, of a head and of a number; the options where they cost most."""
    from vas_engine.kernels.compile import Variant

    chosen = [
        (launch, head_dim, dtype, True, True)
        for dtype in ("bf16", "fp32")
        for head_dim in (64, 128, 256)
        for launch in dict.fromkeys(configuration(pairs, head_dim, dtype == "fp32") for pairs in (16, 64, LARGEST_TILE))
    ]
    small, medium, large = (configuration(pairs, 128, False) for pairs in (16, 64, LARGEST_TILE))
    chosen += [(launch, 128, "bf16", False, True) for launch in (small, medium, large)]
    chosen += [(large, 128, "fp16", True, True), (large, 128, "bf16", True, False)]
    chosen += [(configuration(LARGEST_TILE, 256, False), 256, "bf16", True, False), (large, 80, "bf16", True, True)]
    listed = [variant for choice in chosen for variant in attention_variants("candidate_attention", *choice)]
    for plain, dtype in ((True, "bf16"), (False, "bf16"), (True, "fp32")):
        launch = configuration(16, 128, dtype == "fp32")
        listed += attention_variants("candidate_attention", launch, 128, dtype, True, plain, writes=True)
    numbers = dict.fromkeys(("offsets", "prefix_lens", "items"), "*i32")
    numbers |= dict.fromkeys(("groups", "splits", "programs", "length"), "i32")
    for groups, splits, balanced in ((1, 1, False), (64, MAX_SPLITS, True), (256, MAX_SPLITS, True)):
        shape = {"SHARE": 4, "KV_HEADS": 8, "PAIRS": 64, "SHORTEST": SHORTEST_SPLIT, "GROUPS": groups}
        shape |= {"SPLITS": splits, "BALANCED": balanced}
        listed.append(Variant(f"plan {groups}x{splits}", _plan, numbers, shape, 1, 3, ("offsets", "items")))
    signature = {"offsets": "*i32", "items": "*i32", "out": "*bf16", "partial": "*fp32", "stats": "*fp32"}
    aligned = tuple(signature)
    constants = {"KV_HEADS": 8, "SHARE": 4, "M": 128, "SPLITS": MAX_SPLITS, "AT_ONCE": 16}
    for head_dim in (64, 256):
        shape = {**constants, "HEAD_DIM": head_dim, "D": padded(head_dim)}
        listed.append(Variant(f"merge d{head_dim}", _merge, signature | {"partials": "i32"}, shape, 4, 3, aligned))
    return listed
