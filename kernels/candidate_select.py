"""Candidates, champion of the tail and log-softmax statistics in one read; twin of `reference.candidate_select`.

A program of the first kernel reads one tile of one sequence's logits: it keeps the tile's best tokens (every
candidate is among the best of its tile), and of all others their largest score, the sum of their exponentials and the
one with the largest score + noise. The second kernel merges a sequence's tiles.

What runs in float64: one exponential a token, the sums, and the noise of the few tokens that may be champion, which
float32 noise singles out. On a data-centre GPU (half the float32 rate) the exponentials cost about what reading
bfloat16 logits from memory does; on others (a 64th of the rate) they dominate.

Requests with a bias, penalties, top_k, top_p or min_p are computed in plain torch (`limited_scores`) and go through
the same kernels as float64 scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.device import where_tensors_lie
from vas_engine.kernels.noise import gumbel, rough_gumbel
from vas_engine.kernels.reference import TOP_P_SLACK, SelectionTensors
from vas_engine.kernels.transfer import to_device

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

MAX_TILES = 64
_TILES = (1024, 2048, 4096, 8192)
MAX_VOCABULARY = MAX_TILES * _TILES[-1]
_NONE = tl.constexpr(2**31 - 1)  # a token id that loses every tie
# Twice what the rough noise and score of a token may be off.
_MARGIN = tl.constexpr(1e-3)


@triton.jit(do_not_specialize=["sequences", "kept"])
def _tile(
    logits, stride, settings, lines, found, sequences, vocabulary, tiles, kept,
    BLOCK: tl.constexpr, SCORED: tl.constexpr,
):  # fmt: skip
    """One tile of one sequence.

    found: float64 [S, tiles, 2 kept + 6]: scores of the best tokens, their ids; then of the others the largest score,
    the sum of exp(score - largest), and the champion's score + noise, score and id; then whether a score is NaN or
    inf. SCORED: line i of `logits` holds the scores of sequence lines[i]; otherwise every sequence reads the row its
    settings name.
    """
    index, tile = tl.program_id(0), tl.program_id(1)
    s = index
    row = tl.load(settings + index).to(tl.int64)
    if SCORED:
        s = tl.load(lines + index)
        row = index.to(tl.int64)
    temperature = tl.load(settings + sequences + s).to(tl.float64, bitcast=True)
    candidates = tl.load(settings + 4 * sequences + s)
    greedy = temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, temperature)
    if SCORED:
        scale = 1.0 + 0.0 * scale
    first = tile * BLOCK
    offsets = tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + first + offsets, mask=first + offsets < vocabulary, other=-float("inf"))
    if not SCORED:
        values = values.to(tl.float32)
    fine = values < float("inf")
    bad = tl.max(tl.where(fine, 0, 1), 0)
    values = tl.where(fine, values, -float("inf"))
    found += (s.to(tl.int64) * tiles + tile) * (2 * kept + 6)

    # Scores are in the order of the raw values, and float32 compares faster.
    for place in range(tl.minimum(candidates, kept).to(tl.int32)):
        best, where = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(found + place, best.to(tl.float64) * scale)
        tl.store(found + kept + place, (first + where).to(tl.float64))
        values = tl.where(offsets == where, -float("inf"), values)

    largest, where = tl.max(values, 0, return_indices=True, return_indices_tie_break_left=True)
    shift = largest.to(tl.float64) * scale
    there = shift > -float("inf")
    below = values.to(tl.float64) * scale - tl.where(there, shift, 0.0)
    found += 2 * kept
    tl.store(found, shift)
    tl.store(found + 1, tl.sum(tl.exp(below), 0))
    tl.store(found + 2, shift)
    tl.store(found + 3, shift)
    tl.store(found + 4, (first + where).to(tl.float64))
    tl.store(found + 5, bad.to(tl.float64))
    drawn = (candidates == 0) | (tl.load(settings + 5 * sequences + s) != 0)
    if there & drawn & (not greedy):
        seed = tl.load(settings + 2 * sequences + s)
        position = tl.load(settings + 3 * sequences + s)
        rough = below.to(tl.float32) + rough_gumbel(seed, position, first, BLOCK)
        bound, where = tl.max(rough, 0, return_indices=True, return_indices_tie_break_left=True)
        perturbed = shift - float("inf")
        champion = where
        while (bound > -float("inf")) & (bound.to(tl.float64) + shift + _MARGIN >= perturbed):
            # Seldom more than one token comes so close.
            value = tl.max(tl.where(offsets == where, values, -float("inf")), 0).to(tl.float64) * scale
            exact = value + gumbel(seed, position, first + where)
            better = (exact > perturbed) | ((exact == perturbed) & (where < champion))
            tl.store(found + 2, exact, mask=better)
            tl.store(found + 3, value, mask=better)
            tl.store(found + 4, (first + where).to(tl.float64), mask=better)
            perturbed = tl.where(better, exact, perturbed)
            champion = tl.where(better, where, champion)
            rough = tl.where(offsets == where, -float("inf"), rough)
            bound, where = tl.max(rough, 0, return_indices=True, return_indices_tie_break_left=True)


# The fields lie behind one another in one buffer, anywhere.
@triton.jit(
    do_not_specialize=[
        "token_ids", "log_probs", "noise", "count", "tail", "tail_log_mass", "finite", "sequences", "tiles", "width"
    ]
)  # fmt: skip
def _merge(
    settings, found, token_ids, log_probs, noise, count, tail, tail_log_mass, finite,
    sequences, tiles, width,
    TILES: tl.constexpr, KEPT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tiles of one sequence, to a line of every field of `SelectionTensors`."""
    s = tl.program_id(0)
    greedy = tl.load(settings + sequences + s).to(tl.float64, bitcast=True) == 0.0
    seed = tl.load(settings + 2 * sequences + s)
    position = tl.load(settings + 3 * sequences + s)
    candidates = tl.load(settings + 4 * sequences + s)
    kept = tl.minimum(candidates, KEPT).to(tl.int32)

    tile = tl.arange(0, TILES)
    inside = tile < tiles
    found += s.to(tl.int64) * tiles * (2 * KEPT + 6)
    statistics = found + tile * (2 * KEPT + 6) + 2 * KEPT
    maxima = tl.load(statistics, mask=inside, other=-float("inf"))
    sums = tl.load(statistics + 1, mask=inside, other=0.0)
    perturbed = tl.load(statistics + 2, mask=inside, other=-float("inf"))
    champion_scores = tl.load(statistics + 3, mask=inside, other=-float("inf"))
    champions = tl.load(statistics + 4, mask=inside, other=_NONE).to(tl.int32)
    bad = tl.max(tl.load(statistics + 5, mask=inside, other=0.0), 0)

    # Tile by tile and best first within one: among equal scores the earlier entry has the smaller id.
    entry = tl.arange(0, TILES * KEPT)
    entry_tile, place = entry // KEPT, entry % KEPT
    listed = (entry_tile < tiles) & (place < kept)
    source = found + entry_tile * (2 * KEPT + 6) + place
    scores = tl.load(source, mask=listed, other=-float("inf"))
    tokens = tl.load(source + KEPT, mask=listed, other=_NONE).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    chosen_scores = tl.full([COLUMNS], -float("inf"), tl.float64)
    chosen = tl.full([COLUMNS], -1, tl.int32)
    for turn in range(kept):
        best, where = tl.max(scores, 0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.min(tl.where(entry == where, tokens, _NONE), 0)
        token = tl.where(best > -float("inf"), token, -1)
        chosen_scores = tl.where(column == turn, best, chosen_scores)
        chosen = tl.where(column == turn, token, chosen)
        scores = tl.where(entry == where, -float("inf"), scores)
    cut = tl.sum((chosen >= 0).to(tl.int32), 0)

    # Relative to its own largest score: the tail may be so far below the candidates that its sum would be 0.
    tail_max = tl.maximum(tl.max(maxima, 0), tl.max(scores, 0))
    has_tail = tail_max > -float("inf")
    safe = tl.where(has_tail, tail_max, 0.0)
    tail_sum = tl.sum(tl.where(maxima > -float("inf"), sums * tl.exp(maxima - safe), 0.0), 0)
    tail_sum += tl.sum(tl.exp(scores - safe), 0)
    largest = tl.maximum(tl.max(chosen_scores, 0), tail_max)
    sound = (bad == 0.0) & (largest > -float("inf"))
    top = tl.where(sound, largest, 0.0)
    total = tl.sum(tl.exp(chosen_scores - top), 0) + tl.where(has_tail, tail_sum * tl.exp(safe - top), 0.0)
    log_total = tl.log(tl.where(sound, total, 1.0))

    drawn = sound & has_tail & ((candidates == 0) | (tl.load(settings + 5 * sequences + s) != 0))
    if drawn:
        others = scores
        if not greedy:
            others = scores + gumbel(seed, position, tokens)
        winning = tl.maximum(tl.max(perturbed, 0), tl.max(others, 0))
        champion = tl.minimum(
            tl.min(tl.where(perturbed == winning, champions, _NONE), 0),
            tl.min(tl.where(others == winning, tokens, _NONE), 0),
        )
        score = tl.maximum(
            tl.max(tl.where(champions == champion, champion_scores, -float("inf")), 0),
            tl.max(tl.where(tokens == champion, scores, -float("inf")), 0),
        )
        chosen = tl.where(column == cut, champion, chosen)
        chosen_scores = tl.where(column == cut, score, chosen_scores)

    chosen = tl.where(sound, chosen, -1)
    used = chosen >= 0
    noises = tl.zeros([COLUMNS], tl.float64)
    if not greedy:
        noises = tl.where(used, gumbel(seed, position, chosen), 0.0)
    at = s.to(tl.int64) * width + column
    tl.store(token_ids + at, tl.where(used, chosen, -1).to(tl.int64), mask=column < width)
    tl.store(log_probs + at, tl.where(used, chosen_scores - top - log_total, -float("inf")), mask=column < width)
    tl.store(noise + at, noises, mask=column < width)
    tl.store(count + s, tl.sum(used.to(tl.int64), 0))
    tl.store(tail + s, tl.where(drawn, cut, -1).to(tl.int64))
    mass = (safe - top) + tl.log(tl.where(has_tail, tail_sum, 1.0)) - log_total
    tl.store(tail_log_mass + s, tl.where(sound & has_tail, mass, -float("inf")))
    tl.store(finite + s, sound)


def tile_size(vocabulary: int) -> int:
    """Tokens of a tile: few, for there are few sequences, but not so few that merging is long."""
    return next(size for size in _TILES if size * MAX_TILES >= vocabulary)


def pack_settings(rows: np.ndarray, arrays: Any, vocabulary: int) -> np.ndarray:
    """The settings the kernels read, in one array for one copy: int64 [SETTINGS, S].

    Args:
        rows: int64 [S], the row of logits each sequence reads.
        arrays: a `sampling.SamplingArrays`.
        vocabulary: no more candidates than this are asked for.
    """
    return np.stack([
        rows,
        arrays.temperature.view(np.int64),
        arrays.seed.view(np.int64),
        arrays.position,
        np.minimum(arrays.num_candidates, vocabulary),
        arrays.keep_tail,
        arrays.top_k,
        arrays.top_p.view(np.int64),
        arrays.min_p.view(np.int64),
    ]).astype(np.int64, copy=False)  # fmt: skip


def limited(arrays: Any, vocabulary: int) -> np.ndarray:
    """bool [S]: sequences whose scores are not just logits over temperature."""
    penalised = (arrays.repetition_penalty != 1) | (arrays.presence_penalty != 0) | (arrays.frequency_penalty != 0)
    return (
        (np.diff(arrays.bias_offsets) > 0)
        | (penalised & (np.diff(arrays.history_offsets) > 0))
        | ((arrays.top_k > 0) & (arrays.top_k < vocabulary))
        | (arrays.top_p < 1)
        | (arrays.min_p > 0)
    )


def pack_changes(arrays: Any, vocabulary: int, lines: np.ndarray) -> list[np.ndarray]:
    """The `Changes` of some sequences' logits, in their order.

    Args:
        arrays: a `sampling.SamplingArrays` of S sequences.
        vocabulary: tokens of a row.
        lines: int64 [P], the sequences that have limits.
    """

    def entries(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat places [n] of the ragged entries, their indices, and the sequence of each."""
        offsets = getattr(arrays, f"{name}_offsets")
        counts = np.diff(offsets)[lines]
        owner = np.repeat(np.arange(len(lines)), counts)
        index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts) + offsets[lines][owner]
        ids = getattr(arrays, f"{name}_ids")[index].astype(np.int64)
        return owner * vocabulary + ids, index, lines[owner]

    biased, index, _ = entries("bias")
    seen, among, owner = entries("history")
    counts = arrays.history_counts[among]
    numbers = [
        arrays.bias_values[index],
        arrays.repetition_penalty[owner],
        arrays.frequency_penalty[owner] * counts,
        arrays.presence_penalty[owner] * (counts > 0),
    ]
    return [biased, seen, *(each.astype(np.float64, copy=False) for each in numbers)]


@dataclass(frozen=True)
class Changes:
    """What biases and penalties do to the logits of P sequences.

    Attributes:
        biased, seen: int64 [n], [m], places in the flat scores with a bias, and of tokens that were there before.
        bias: float64 [n].
        repetition, frequency, presence: float64 [m], by what the places are scaled, then what is taken off.
    """

    biased: Tensor
    seen: Tensor
    bias: Tensor
    repetition: Tensor
    frequency: Tensor
    presence: Tensor


def limited_scores(logits: Tensor, settings: Tensor, lines: Tensor, changes: Changes | None = None) -> Tensor:
    """Scores after bias, penalties and temperature, -inf outside what top_k, top_p and min_p leave.

    The rules are those of `reference.process_scores` and `reference.support_order`, for P sequences at once.

    Args:
        logits: [B, V], any float dtype.
        settings: int64 [SETTINGS, S] from `pack_settings`, on the logits' device.
        lines: int64 [P], the sequences.
        changes: biases and penalties; None: there are none.

    Returns:
        float64 [P, V] on the logits' device.
    """
    rows, temperature, _, _, _, _, top_k, top_p, min_p = settings.index_select(1, lines)
    temperature, top_p, min_p = (bits.view(torch.float64) for bits in (temperature, top_p, min_p))
    scores = logits.index_select(0, rows).double()
    if changes is not None:
        flat = scores.view(-1)
        flat[changes.biased] += changes.bias
        was = flat[changes.seen]
        scaled = torch.where(was < 0, was * changes.repetition, was / changes.repetition)
        flat[changes.seen] = scaled - changes.frequency - changes.presence
    scores /= torch.where(temperature == 0, 1.0, temperature)[:, None]
    return _mask(scores, top_k[:, None], top_p[:, None], min_p[:, None])


def _mask(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Limits int64, float64, float64 [P, 1]. Lines that are not finite come back as they are, to be refused as such."""
    sound = (scores < math.inf).all(1, keepdim=True)
    values, ids = torch.sort(torch.where(sound, scores, 0.0), dim=1, descending=True, stable=True)
    keep = values > -math.inf
    last = values.gather(1, (top_k - 1).clamp(0, values.shape[1] - 1))
    keep &= (values >= last) | (top_k == 0) | (top_k >= values.shape[1])
    # A line without a finite score makes NaN here, and keeps nothing.
    probabilities = torch.softmax(values.masked_fill(~keep, -math.inf), 1)
    before = probabilities.cumsum(1) - probabilities
    nucleus = (before < top_p - TOP_P_SLACK) | (top_p >= 1)
    nucleus[:, 0] = True
    keep &= nucleus & ((values >= values[:, :1] + min_p.log()) | (min_p == 0))
    masked = torch.full_like(scores, -math.inf).scatter_(1, ids, values.masked_fill(~keep, -math.inf))
    return torch.where(sound, masked, scores)


def views(buffer: Tensor, sequences: int, width: int) -> SelectionTensors:
    """The fields that `select_packed` wrote to its buffer, here or on the host."""
    wide, line = 8 * sequences * width, 8 * sequences

    def part(start: int, size: int, dtype: torch.dtype, *shape: int) -> Tensor:
        return buffer[start : start + size].view(dtype).view(shape)

    return SelectionTensors(
        part(0, wide, torch.int64, sequences, width),
        part(wide, wide, torch.float64, sequences, width),
        part(2 * wide, wide, torch.float64, sequences, width),
        part(3 * wide, line, torch.int64, sequences),
        part(3 * wide + line, line, torch.int64, sequences),
        part(3 * wide + 2 * line, line, torch.float64, sequences),
        part(3 * wide + 3 * line, sequences, torch.bool, sequences),
    )


@torch.library.custom_op("vas_engine::candidate_select", mutates_args=())
@where_tensors_lie
def select_packed(
    logits: Tensor,
    settings: Tensor,
    width: int,
    scores: Tensor | None = None,
    lines: Tensor | None = None,
    block: int = 0,
) -> Tensor:
    """`candidate_select` with everything on the device, in one buffer: launches only, no synchronisation.

    Args:
        logits: [B, V] float32, bfloat16 or float16; tokens are adjacent, rows any stride apart.
        settings: int64 [SETTINGS, S] from `pack_settings`, on the device.
        width: W, one more than the most candidates; up to MAX_CANDIDATES + 1.
        scores: float64 [P, V] from `limited_scores`, contiguous.
        lines: int64 [P], the sequences the scores belong to.
        block: tokens of a tile, a power of two; 0 chooses.

    Returns:
        uint8 buffer on the device, which `views` takes apart.
    """
    sequences, vocabulary = settings.shape[1], logits.shape[1]
    buffer = logits.new_empty(_buffer_size(sequences, width), dtype=torch.uint8)
    if sequences == 0:
        return buffer
    block = block or tile_size(vocabulary)
    tiles = triton.cdiv(vocabulary, block)
    kept = triton.next_power_of_2(max(width - 1, 1))
    found = logits.new_empty(sequences, tiles, 2 * kept + 6, dtype=torch.float64)
    shape = (found, sequences, vocabulary, tiles, kept)
    warps = _tile_warps(block)
    _tile[sequences, tiles](
        logits, logits.stride(0), settings, settings, *shape, BLOCK=block, SCORED=False, num_warps=warps
    )
    if scores is not None and lines is not None and len(lines):
        # Their tiles of plain logits are written over.
        _tile[len(lines), tiles](
            scores, scores.stride(0), settings, lines, *shape, BLOCK=block, SCORED=True, num_warps=warps
        )
    entries = triton.next_power_of_2(tiles) * kept
    _merge[sequences,](
        settings, found, *vars(views(buffer, sequences, width)).values(), sequences, tiles, width,
        TILES=triton.next_power_of_2(tiles), KEPT=kept, COLUMNS=triton.next_power_of_2(kept + 1),
        num_warps=_merge_warps(entries),
    )  # fmt: skip
    return buffer


@select_packed.register_fake
def _(logits, settings, width, scores=None, lines=None, block=0):
    return logits.new_empty(_buffer_size(settings.shape[1], width), dtype=torch.uint8)


def _buffer_size(sequences: int, width: int) -> int:
    return sequences * (24 * width + 25)


def _tile_warps(block: int) -> int:
    return max(1, min(16, block // 256))


def _merge_warps(entries: int) -> int:
    return max(1, min(16, entries // 128))


def candidate_select(logits: Tensor, rows: np.ndarray, arrays: Any, block: int = 0) -> SelectionTensors:
    """Candidates and the champion of the tail of every sequence.

    Args:
        logits: [B, V] float32, bfloat16 or float16, V up to MAX_VOCABULARY; not modified.
        rows: int64 [S], the row of logits each sequence reads.
        arrays: a `sampling.SamplingArrays` of S sequences, at most MAX_CANDIDATES candidates each (or V).
        block: tokens of a tile, a power of two; 0 chooses.

    Returns:
        A `SelectionTensors` whose fields are on the logits' device, all in one buffer; see `sampling.Selection`.
    """
    width = select_width(arrays, logits.shape[1])
    buffer = select_buffer(logits, rows, arrays, block)
    return views(buffer, len(rows), width)


def select_width(arrays: Any, vocabulary: int) -> int:
    """W, columns of a selection."""
    return min(int(arrays.num_candidates.max(initial=0)), vocabulary) + 1


def select_buffer(logits: Tensor, rows: np.ndarray, arrays: Any, block: int = 0) -> Tensor:
    """`candidate_select`, as the buffer that `views` takes apart."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    vocabulary = logits.shape[1]
    packed = [pack_settings(rows, arrays, vocabulary)]
    those = np.flatnonzero(limited(arrays, vocabulary))
    if len(those):
        packed += [those, *pack_changes(arrays, vocabulary, those)]
    settings, *limits = to_device(packed, logits.device)
    lines = limits[0] if limits else None
    scores = None if lines is None else limited_scores(logits, settings, lines, Changes(*limits[1:]))
    return select_packed(logits, settings, select_width(arrays, vocabulary), scores, lines, block)


def variants() -> list[Variant]:
    """The shipped configurations: every size of tile and number (float16 is as bfloat16), small to large merges."""
    from vas_engine.kernels.compile import Variant

    signature = {"stride": "i64", "settings": "*i64", "lines": "*i64", "found": "*fp64"}
    signature |= dict.fromkeys(("sequences", "vocabulary", "tiles", "kept"), "i32")
    listed = [
        Variant(
            f"candidate_select tile {block} {dtype}", _tile, signature | {"logits": f"*{dtype}"},
            {"BLOCK": block, "SCORED": dtype == "fp64"}, num_warps=_tile_warps(block),
            aligned=("logits", "settings", "found"),
        )
        for block in _TILES for dtype in ("bf16", "fp32", "fp64")
    ]  # fmt: skip
    signature = {"settings": "*i64", "found": "*fp64", "finite": "*i1"}
    signature |= dict.fromkeys(("token_ids", "count", "tail"), "*i64")
    signature |= dict.fromkeys(("log_probs", "noise", "tail_log_mass"), "*fp64")
    signature |= dict.fromkeys(("sequences", "tiles", "width"), "i32")
    listed += [
        Variant(
            f"candidate_select merge {tiles}x{kept}", _merge, signature,
            {"TILES": tiles, "KEPT": kept, "COLUMNS": triton.next_power_of_2(kept + 1)},
            num_warps=_merge_warps(tiles * kept), aligned=("settings", "found"),
        )
        for tiles, kept in ((1, 1), (8, 8), (64, 1), (64, 8), (32, 32), (64, 32), (32, 64), (64, 64))
    ]  # fmt: skip
    return listed
