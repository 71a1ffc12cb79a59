"""A whole reader over the candidates of a step as one persistent kernel: its input, layers, heads and the winners.

As many programs as run at once deal the tiles of a phase out among themselves and wait for one another before the
next: the input, then for each layer queries, attention, the merge of its splits, output, feed-forward up and down, then
the heads' hidden layer, and last outputs, tilt and winner, a program a sequence. Between phases everything lies in
global memory, which at these sizes is cache. The parts it stands for are `candidate_input`, a reader's layers in torch
over `candidate_attention`, and `value_head_tilt`; attention and the end are those kernels' own functions.

Not part of any step yet: the parts run in the step's graph until this has been measured to be faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.candidate_attention import (
    MAX_SPLITS,
    SHORTEST_SPLIT,
    attend_item,
    merge_item,
    padded,
    processors,
)
from vas_engine.kernels.candidate_attention import configuration as attention_configuration
from vas_engine.kernels.device import where_tensors_lie
from vas_engine.kernels.reference import (
    NORM_EPS,
    HeadWeights,
    SelectionTensors,
    ValueSettings,
    ValueTilt,
    WinnerTensors,
)
from vas_engine.kernels.value_tilt import activate, launch_of, linear, precision, score_rows, settle

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WARPS, _WARPS_AMD = 8, 4
"""A program has a multiprocessor to itself, and with these all of its registers."""
_MOST_PAIRS = 64
_MOST_PROGRAMS = 1024
_ITEMS_PER_PROGRAM = 2
"""Pieces of attention that a program is to have at least, so that unequal ones even out."""
_PHASES = ("query", "output", "up", "down")
_EPS = tl.constexpr(NORM_EPS)
_ADDRESSES = tl.constexpr(2 + len(_PHASES))


@triton.jit
def _meet(arrivals, programs):
    """All programs wait here for one another: what any of them wrote before, each of them reads behind.

    The count only grows, so that nobody has to reset it: whoever arrives waits for the next multiple of the programs.
    Launches of other numbers of programs must therefore count elsewhere.
    """
    tl.debug_barrier()  # the release speaks for all threads of the program
    ticket = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    goal = (ticket // programs + 1) * programs
    while tl.atomic_add(arrivals, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    """Of numbers of a type. Weights and pages begin at multiples of 16 bytes, which a loaded address does not say."""
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _gather(
    program, programs, states, state_index, table, token_ids, places, x, squares, rows, width, columns,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The networks' input, see `candidate_input`: x [rows, width], and squares as `_product` leaves them."""
    tall = tl.cdiv(rows, M)
    for tile in range(program, tall * columns, programs):
        row, column = tile % tall * M + tl.arange(0, M), tile // tall * N + tl.arange(0, N)
        live = row < rows
        mask = live[:, None] & (column < width)[None, :]
        state, token = tl.load(state_index + row, live, other=0), tl.load(token_ids + row, live, other=0)
        total = tl.load(states + state[:, None] * width + column[None, :], mask, other=0.0).to(tl.float32)
        total += tl.load(table + token[:, None] * width + column[None, :], mask, other=0.0).to(tl.float32)
        total += tl.load(places + row[:, None] * width + column[None, :], mask, other=0.0).to(tl.float32)
        tl.store(x + row[:, None] * width + column[None, :], total, mask)
        tl.store(squares + row * columns + tile // tall, tl.sum(total * total, 1), live)


@triton.jit
def _product(
    program, programs, x, squares, weight, bias, result, rows, inputs, outputs, columns,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr,
    NORM: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x [rows, inputs] through weight [outputs, inputs] to result [rows, outputs].

    With NORM rows are divided by their root mean square, which `squares` [rows, columns] knows: sums of squares of N
    numbers each, as the phases that write the stream leave them. With ADD the result is added to what is there, the
    stream, and its squares are left.
    """
    tall = tl.cdiv(rows, M)
    # Tiles of the same columns are next to one another: they share their weights in the cache.
    for tile in range(program, tall * tl.cdiv(outputs, N), programs):
        row, unit, step = tile % tall * M + tl.arange(0, M), tile // tall * N + tl.arange(0, N), tl.arange(0, K)
        live, mine = row < rows, unit < outputs
        scale = tl.full([M], 1.0, tl.float32)
        if NORM:
            part = tl.arange(0, PARTS)
            sums = squares + row[:, None] * columns + part[None, :]
            sums = tl.load(sums, live[:, None] & (part < columns)[None, :], other=0.0)
            scale = 1.0 / tl.sqrt(tl.sum(sums, 1) / inputs + _EPS)
        total = tl.zeros([M, N], tl.float32)
        for k in range(0, inputs, K):
            inside = k + step < inputs
            given = tl.load(x + row[:, None] * inputs + (k + step)[None, :], live[:, None] & inside[None, :], other=0.0)
            w = tl.load(
                weight + unit[None, :] * inputs + (k + step)[:, None], inside[:, None] & mine[None, :], other=0.0
            )
            if NORM:
                given = given * scale[:, None]
            total = tl.dot(given.to(w.dtype), w, total, input_precision=PRECISION)
        if BIAS:
            total += tl.load(bias + unit, mine, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION != "":
            total = activate(total, ACTIVATION)
        at, mask = result + row[:, None] * outputs + unit[None, :], live[:, None] & mine[None, :]
        if ADD:
            total += tl.load(at, mask, other=0.0)
            tl.store(squares + row * columns + tile // tall, tl.sum(total * total, 1), live)
        tl.store(at, total, mask)


@triton.jit
def _tiles(offsets, groups, PAIRS: tl.constexpr, SHARE: tl.constexpr, GROUPS: tl.constexpr):
    """Tiles of attention that each group needs, [GROUPS]."""
    group = tl.arange(0, GROUPS)
    first = tl.load(offsets + group, group < groups, other=0)
    last = tl.load(offsets + group + 1, group < groups, other=0)
    return tl.cdiv((last - first) * SHARE, PAIRS)


@triton.jit
def _locate(piece, splits, tiles, KV_HEADS: tl.constexpr, PAIRS: tl.constexpr, GROUPS: tl.constexpr):
    """What a piece of attention is: its item and kv head, the group, the first of its pairs, and the split."""
    item = piece // KV_HEADS
    tile = item // splits
    ends = tl.cumsum(tiles, 0)
    group = tl.sum((ends <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, GROUPS) == group, ends - tiles, 0), 0)
    return item, piece % KV_HEADS, group, (tile - before) * PAIRS, item % splits


@triton.jit(
    do_not_specialize=["rows", "groups", "sequences", "layers", "heads", "splits", "partials", "table_row", "selected"]
)
def _run(
    states, state_index, table, row_tokens, places, turns, tables, offsets, prefix_lens, addresses,
    hidden, hidden_bias, output, output_bias, kinds, scales, starts, atoms,
    asked, limits, baselines, optimal, candidate_mean, row_offsets, columns,
    token_ids, log_probs, noise, count, tail, tail_log_mass, finite, tilt,
    values, utilities, winner, statistics,
    x, squares, q, seen, inner, middle, raw, partial, stats, arrivals,
    rows, groups, sequences, layers, heads, splits, partials, table_row, selected,
    width, mlp, hidden_size, outputs, scale,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PAIRS: tl.constexpr, POSITIONS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, SPLITS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    MERGES: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """See `reader_step`. x, squares, inner (of the feed-forward), middle (of the heads) and the others up to `stats`
    are scratch; `width` is the stream's, ROWS x FEW a tile of outputs of the heads."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    size: tl.constexpr = KV_HEADS * SHARE * HEAD_DIM
    TYPE: tl.constexpr = q.dtype.element_ty
    wide = tl.cdiv(width, N)
    _gather(
        program, programs, states, state_index, table, row_tokens, places, x, squares, rows, width, wide, M, N
    )  # fmt: skip
    _meet(arrivals, programs)
    tiles = _tiles(offsets, groups, PAIRS, SHARE, GROUPS)
    items = tl.sum(tiles, 0) * splits * KV_HEADS
    for layer in range(layers):
        own = addresses + layer * _ADDRESSES
        _product(
            program, programs, x, squares, _pointer(own + 2, TYPE), q, q, rows, width, size, wide,
            M, N, K, PARTS, True, False, False, "", PRECISION,
        )  # fmt: skip
        _meet(arrivals, programs)
        k_pages, v_pages = _pointer(own, TYPE), _pointer(own + 1, TYPE)
        for turn in range(tl.cdiv(items - program, programs)):
            item, kv_head, group, first, split = _locate(
                program + turn * programs, splits, tiles, KV_HEADS, PAIRS, GROUPS
            )  # fmt: skip
            attend_item(
                item, kv_head, group, first, split, splits,
                q, turns, k_pages, v_pages, tables, offsets, prefix_lens, prefix_lens, q, q, q, q, seen, partial, stats,
                scale, 0.0, 0, table_row, partials, size, HEAD_DIM, 0, 0, 0, 0,
                KV_HEADS, SHARE, HEAD_DIM, BLOCK_SIZE, PAIRS, POSITIONS, D, False, False, False, False, WIDE, True,
            )  # fmt: skip
        _meet(arrivals, programs)
        if MERGES:
            for turn in range(tl.cdiv(items - program, programs)):
                item, kv_head, group, first, split = _locate(
                    program + turn * programs, splits, tiles, KV_HEADS, PAIRS, GROUPS
                )  # fmt: skip
                merge_item(
                    item, kv_head, group, first, split, splits,
                    offsets, seen, partial, stats, partials, KV_HEADS, SHARE, HEAD_DIM, PAIRS, D, SPLITS, 16,
                )  # fmt: skip
            _meet(arrivals, programs)
        _product(
            program, programs, seen, squares, _pointer(own + 3, TYPE), q, x, rows, size, width, wide,
            M, N, K, PARTS, False, True, False, "", PRECISION,
        )  # fmt: skip
        _meet(arrivals, programs)
        _product(
            program, programs, x, squares, _pointer(own + 4, TYPE), q, inner, rows, width, mlp, wide,
            M, N, K, PARTS, True, False, False, ACTIVATION, PRECISION,
        )  # fmt: skip
        _meet(arrivals, programs)
        _product(
            program, programs, inner, squares, _pointer(own + 5, TYPE), q, x, rows, mlp, width, wide,
            M, N, K, PARTS, False, True, False, "", PRECISION,
        )  # fmt: skip
        _meet(arrivals, programs)
    _product(
        program, programs, x, squares, hidden, hidden_bias, middle, rows, width, hidden_size, wide,
        M, N, K, PARTS, NORM, False, True, ACTIVATION, PRECISION,
    )  # fmt: skip
    _meet(arrivals, programs)
    for turn in range(tl.cdiv(sequences - program, programs)):
        s = program + turn * programs
        first, last = tl.load(row_offsets + s), tl.load(row_offsets + s + 1)
        for start in range(first, last, ROWS):
            linear(
                middle, hidden_size, tl.full([ROWS], 1.0, tl.float32), start, last, output, output_bias, raw,
                hidden_size, outputs, ROWS, 32, FEW, False, "", PRECISION,
            )  # fmt: skip
            tl.debug_barrier()
            score_rows(
                raw, outputs, start, last, kinds, scales, starts, atoms, heads, asked + s * heads,
                tl.load(optimal + s) != 0, values, utilities, ROWS, BINS,
            )  # fmt: skip
            tl.debug_barrier()
        settle(
            s, first, last, asked, limits, baselines, candidate_mean, columns,
            token_ids, log_probs, noise, count, tail, tail_log_mass, finite, tilt, values, utilities, winner,
            statistics, sequences, heads, selected, 1, COLUMNS,
        )  # fmt: skip


def unfit(network: Any, lm: Any) -> str | None:
    """Why the kernel cannot run a value network bound to a base model; None if it can.

    Args:
        network: a `values.ValueNetwork`. lm: a `model.CausalLM`.
    """
    config = network.config
    if config.kind != "reader":
        return f"a network of kind {config.kind!r}, not a reader"
    reasons = {
        "layers without feed-forward": not config.mlp,
        "linear heads": not config.head_hidden,
        "an odd head size": config.head_dim % 2 == 1,
        f"numbers of {lm.dtype}": lm.dtype not in DTYPES,
        "sizes that 16 bytes do not divide": any(
            number * lm.dtype.itemsize % 16 for number in (config.width, config.mlp, config.head_dim)
        ),
        "a sliding window": any(lm.layers[layer].window for layer in config.layers),
        "a base model on several devices": lm.tensor_parallel_size > 1,
    }
    reason = next((reason for reason, applies in reasons.items() if applies), None)
    return reason or (None if _rotates_halves(lm, config.layers, config.head_dim) else "another rotation of queries")


def _rotates_halves(lm: Any, layers: Sequence[int], head_dim: int) -> bool:
    """Whether all these layers rotate the halves of a query against each other, by the same angles."""
    places = torch.arange(5, device=lm.device) * 37
    query = torch.randn(5, 1, head_dim, generator=torch.Generator().manual_seed(0)).to(lm.device, lm.dtype)
    known = turns(lm.rotate, places, head_dim, layers[0], lm.dtype).float().unsqueeze(1)
    (cos, sin), (a, b) = known.chunk(2, -1), query.float().chunk(2, -1)
    wanted = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    found = [lm.rotate(query, places, layer).float() for layer in layers]
    return all(bool((one - wanted).norm() <= 1e-2 * wanted.norm()) for one in found)


def turns(rotate: Callable[..., Tensor], positions: Tensor, head_dim: int, layer: int, dtype: torch.dtype) -> Tensor:
    """How a layer rotates queries at positions int64 [R]: [R, head_dim] cosines and behind them sines.

    Args:
        rotate: of the base model, whose own modules know the angles; the query (1, 0) of each pair tells them.
    """
    query = torch.zeros(1, 1, head_dim, dtype=dtype, device=positions.device)
    query[..., : head_dim // 2] = 1
    return rotate(query.expand(len(positions), -1, -1), positions, layer).flatten(1)


@dataclass(frozen=True, eq=False)
class Reader:
    """A frozen reader and the pages it looks at, as the kernel finds them.

    Attributes:
        addresses: int64 [layers, 6]: key and value pages, then weights of queries, output, up and down.
        heads: its heads, with a hidden layer.
        activation: "gelu", "relu" or "silu", of the layers.
        width, mlp, queries: of the layers. kv_heads, head_dim, block_size: of the pages.
        dtype: of pages and weights.
        arrivals: int64 [_MOST_PROGRAMS + 1, 2], how often programs ever came to a barrier, by their number in a launch;
            the second column keeps the first at multiples of 16 bytes.
        kept: the tensors behind the addresses.
    """

    addresses: Tensor
    heads: HeadWeights
    activation: str
    width: int
    mlp: int
    queries: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    arrivals: Tensor
    kept: tuple[Tensor, ...]

    @classmethod
    def of(cls, layers: Sequence[Any], heads: Any, keys: Mapping[int, Tensor], values: Mapping[int, Tensor]) -> Reader:
        """Of `values.ReaderLayer`s and `values.Heads` in the pages' dtype.

        Args:
            keys, values: base layer -> pages [num_blocks, block_size, KVH, D], contiguous.
        """
        kept: list[Tensor] = []
        for layer in layers:
            matrices = (part.weight.detach() for part in (layer.query, layer.output, layer.mlp.up, layer.mlp.down))
            kept += [keys[layer.layer], values[layer.layer], *(matrix.contiguous() for matrix in matrices)]
        weights, pages = HeadWeights.of(heads), kept[0]
        assert weights.hidden is not None
        addresses = torch.tensor([tensor.data_ptr() for tensor in kept], dtype=torch.int64).view(len(layers), -1)
        _, block_size, kv_heads, head_dim = pages.shape
        mlp, width = layers[0].mlp.up.weight.shape
        return cls(
            addresses.to(pages.device), weights, weights.activation, width, mlp, layers[0].shape[0],
            kv_heads, head_dim, block_size, pages.dtype,
            torch.zeros(_MOST_PROGRAMS + 1, 2, dtype=torch.int64, device=pages.device), tuple(kept),
        )  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    """Tiles of a launch: M x N x K of products, pairs and positions of attention; warps, stages of the pipeline."""

    m: int
    n: int
    k: int
    pairs: int
    positions: int
    warps: int
    stages: int


def configuration(rows: int, pairs: int, head_dim: int, wide: bool, amd: bool) -> Configuration:
    """The launch for so many rows, whose groups have about so many pairs of a row and a query head.

    Few rows get narrow tiles, so that every program has weights to read; many rows read each weight once for more.
    """
    # All phases share the registers of a program: the largest tiles of the parts would spill here.
    attention = attention_configuration(min(pairs, _MOST_PAIRS), head_dim, wide)
    m, n, k = (32, 32, 32) if wide else (32, 16, 128) if rows <= 32 else (64, 64, 64)
    warps, stages = _WARPS_AMD if amd else _WARPS, 2 if amd or wide else 4
    return Configuration(m, n, k, attention.pairs, attention.positions, warps, stages)


@where_tensors_lie
def reader_step(
    reader: Reader,
    states: Tensor,
    state_index: Tensor,
    table: Tensor,
    token_ids: Tensor,
    places: Tensor,
    turns: Tensor,
    block_tables: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    settings: ValueSettings,
    row_offsets: Tensor,
    columns: Tensor,
    selection: SelectionTensors,
    tilt: Tensor,
    splits: int | None = None,
    programs: int | None = None,
) -> ValueTilt:
    """A reader over candidate rows, from its projected input to the winners, in one launch.

    Equals `reference.candidate_input`, the reader's layers and `reference.value_head_tilt`, one after another. Nothing
    is read back from the device. Launches over one `reader` follow one another; two at a time would wait for ever.

    Args:
        reader: weights and pages.
        states: float32 [N, width] with state_index int64 [R], table: float32 [V, width] with token_ids int64 [R],
            places: float32 [R, width]; as of `candidate_input`, contiguous.
        turns: [R, D], see `turns`.
        block_tables: int32 [G, max_blocks], rows dense. group_offsets: int32 [G + 1], all R rows belong to a group.
        prefix_lens: int32 [R], the positions a row sees: those below its own.
        settings, row_offsets, columns, selection, tilt: as of `value_head_tilt`, which chooses.
        splits: of each prefix; left out as many as fill the device.
        programs: how many share the work, at most 1024, all of which must run at once; left out one a multiprocessor.
            One will do.

    Returns:
        A `ValueTilt` with winners; lines of rows that no sequence owns are not written.
    """
    rows, device = len(state_index), states.device
    (sequences, selected), groups, heads = tilt.shape, len(block_tables), reader.heads
    assert heads.hidden is not None
    hidden_size, outputs, share = len(heads.hidden), len(heads.output), reader.queries // reader.kv_heads
    wide, size = reader.dtype == torch.float32, padded(reader.head_dim)
    launch = configuration(rows, -(-rows // max(groups, 1)) * share, reader.head_dim, wide, bool(torch.version.hip))
    programs = min(programs or processors(device), _MOST_PROGRAMS)
    tiles = (min(rows, groups) + rows * share // launch.pairs) * reader.kv_heads
    if splits is None:
        longest = block_tables.shape[1] * reader.block_size
        splits = min(_ITEMS_PER_PROGRAM * programs // max(1, tiles), longest // SHORTEST_SPLIT)
    splits = min(max(1, splits), MAX_SPLITS)
    partials = tiles * splits * launch.pairs if splits > 1 else 0

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    parts = -(-reader.width // launch.n)
    values, utilities = scratch(rows, len(heads.kinds)), scratch(rows, len(heads.kinds))
    winner = scratch(3, sequences, dtype=torch.int64)
    statistics = scratch(3, sequences, dtype=torch.float64)
    ends = launch_of(selected, outputs, hidden_size, 0, wide)
    s, w = selection, settings
    _run[(programs,)](
        states, state_index, table, token_ids, places, turns, block_tables, group_offsets, prefix_lens,
        reader.addresses, heads.hidden, heads.hidden_bias,
        heads.output, heads.output_bias, heads.kinds, heads.scales, heads.starts, heads.atoms,
        w.weights, w.limits, w.baselines, w.optimal, w.candidate_mean, row_offsets, columns,
        s.token_ids, s.log_probs, s.noise, s.count, s.tail, s.tail_log_mass, s.finite, tilt,
        values, utilities, winner, statistics,
        scratch(rows, reader.width), scratch(rows, parts),
        scratch(rows, reader.queries * reader.head_dim, dtype=reader.dtype),
        scratch(rows, reader.queries * reader.head_dim, dtype=reader.dtype),
        scratch(rows, reader.mlp, dtype=reader.dtype), scratch(rows, hidden_size), scratch(rows, outputs),
        scratch(partials, size), scratch(2, partials), reader.arrivals[programs],
        rows, groups, sequences, len(reader.addresses), len(heads.kinds), splits, partials, block_tables.stride(0),
        selected, reader.width, reader.mlp, hidden_size, outputs, reader.head_dim**-0.5,
        KV_HEADS=reader.kv_heads, SHARE=share, HEAD_DIM=reader.head_dim, BLOCK_SIZE=reader.block_size,
        PAIRS=launch.pairs, POSITIONS=launch.positions, D=size, GROUPS=triton.next_power_of_2(max(groups, 1)),
        SPLITS=MAX_SPLITS, M=launch.m, N=launch.n, K=launch.k, PARTS=triton.next_power_of_2(parts), WIDE=wide,
        MERGES=splits > 1, NORM=heads.norm, ACTIVATION=reader.activation, PRECISION=precision(),
        COLUMNS=ends["COLUMNS"], ROWS=ends["ROWS"], FEW=ends["N"], BINS=ends["BINS"],
        num_warps=launch.warps, num_stages=launch.stages, launch_cooperative_grid=True,
    )  # fmt: skip
    return ValueTilt(values, utilities, WinnerTensors(winner[0], winner[1], *statistics), winner[2])


def variants() -> list[Variant]:
    """Few and many rows of the reader that goes with an 8B base, both widths of numbers."""
    from vas_engine.kernels.compile import TARGETS, Variant

    types = {
        "*fp32": "states table places output output_bias scales atoms asked baselines values utilities x squares "
        "middle raw partial stats",
        "*fp64": "limits log_probs noise tail_log_mass tilt statistics",
        "*i64": "state_index row_tokens addresses token_ids count tail winner arrivals",
        "*i32": "tables offsets prefix_lens kinds starts row_offsets columns",
        "*i1": "optimal candidate_mean finite",
        "i32": "rows groups sequences layers heads splits partials table_row selected width mlp hidden_size outputs",
        "fp32": "scale",
    }
    signature = {name: kind for kind, names in types.items() for name in names.split()}
    narrow = ("turns", "hidden", "hidden_bias", "q", "seen", "inner")
    aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    aligned += (*narrow, "width", "mlp", "hidden_size")
    listed = []
    for dtype, rows in (("bf16", 21), ("bf16", 672), ("fp32", 672)):
        for target, chip in TARGETS.items():
            amd, wide = chip.backend == "hip", dtype == "fp32"
            launch, ends = configuration(rows, 42, 128, wide, amd), launch_of(21, 1, 1472, 0, wide)
            constants = {
                "KV_HEADS": 8, "SHARE": 2, "HEAD_DIM": 128, "BLOCK_SIZE": 16, "PAIRS": launch.pairs,
                "POSITIONS": launch.positions, "D": 128, "GROUPS": 32, "SPLITS": MAX_SPLITS,
                "M": launch.m, "N": launch.n, "K": launch.k, "PARTS": triton.next_power_of_2(-(-1472 // launch.n)),
                "WIDE": wide, "MERGES": True, "NORM": True, "ACTIVATION": "gelu",
                "PRECISION": "ieee" if amd else "tf32x3",
                "COLUMNS": ends["COLUMNS"], "ROWS": ends["ROWS"], "FEW": ends["N"], "BINS": ends["BINS"],
            }  # fmt: skip
            listed.append(
                Variant(
                    f"reader_step {rows} rows {dtype}", _run,
                    signature | dict.fromkeys(narrow, f"*{dtype}"), constants,
                    launch.warps, launch.stages, aligned, (target,),
                )
            )  # fmt: skip
    return listed
