"""Candidates as rows, and what the winners' rows say, in a launch each; twins of the functions in `reference`.

What they do is little, but one operator of torch after another it would be a dozen launches each, and a launch of a
graph takes longer than any of their work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.device import where_tensors_lie
from vas_engine.kernels.reference import CandidateRows, WinnerRows

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

_ROWS = 32
"""Of a program, which looks at all sequences for each."""


@triton.jit(
    do_not_specialize=[
        "count", "uses", "token_ids", "positions", "offsets", "groups", "owner", "column", "tokens", "places",
        "prefix_lens", "sequences", "rows", "width",
    ]
)  # fmt: skip
def _lay(
    count, uses, token_ids, positions, offsets, groups, owner, column, tokens, places, prefix_lens,
    sequences, rows, width,
    PARTLY: tl.constexpr, SEQUENCES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.arange(0, SEQUENCES)
    there = sequence < sequences
    counts = tl.load(count + sequence, mask=there, other=0).to(tl.int32)
    if PARTLY:
        counts = tl.where(tl.load(uses + sequence, mask=there, other=0) != 0, counts, 0)
    ends = tl.cumsum(counts, 0)
    if tl.program_id(0) == 0:
        tl.store(offsets, 0)
        tl.store(groups, 0)
        tl.store(offsets + 1 + sequence, ends, mask=there)
        tl.store(groups + 1 + sequence, tl.where(sequence == sequences - 1, rows, ends), mask=there)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    mine = tl.sum((there[None, :] & (ends[None, :] <= row[:, None])).to(tl.int32), 1)
    owned = mine < sequences
    mine = tl.where(owned, mine, sequences - 1)
    first = tl.sum(tl.where(sequence[None, :] < mine[:, None], counts[None, :], 0), 1)
    which = tl.where(row - first < width, row - first, width - 1)
    token = tl.load(token_ids + mine.to(tl.int64) * width + which, mask=inside, other=0)
    place = tl.where(owned, tl.load(positions + mine, mask=inside, other=0), 0)
    tl.store(owner + row, mine.to(tl.int64), mask=inside)
    tl.store(column + row, which, mask=inside)
    tl.store(tokens + row, tl.where(token < 0, 0, token), mask=inside)
    tl.store(places + row, place, mask=inside)
    tl.store(prefix_lens + row, place.to(tl.int32), mask=inside)


@where_tensors_lie
def candidate_rows(
    count: Tensor, uses: Tensor | None, token_ids: Tensor, positions: Tensor, rows: int
) -> CandidateRows:
    """`reference.candidate_rows` in one launch; all tensors are contiguous."""
    (sequences, width), device = token_ids.shape, token_ids.device
    wide = torch.empty(3, rows, dtype=torch.int64, device=device)
    narrow = torch.empty(2, rows, dtype=torch.int32, device=device)
    bounds = torch.empty(2, sequences + 1, dtype=torch.int32, device=device)
    laid = CandidateRows(bounds[0], bounds[1], wide[0], narrow[0], wide[1], wide[2], narrow[1])
    _lay[(max(1, triton.cdiv(rows, _ROWS)),)](
        count, count if uses is None else uses, token_ids, positions, *vars(laid).values(), sequences, rows, width,
        PARTLY=uses is not None, SEQUENCES=triton.next_power_of_2(sequences), ROWS=_ROWS,
    )  # fmt: skip
    return laid


@triton.jit(
    do_not_specialize=[
        "column", "uses", "offsets", "slots", "values", "utilities", "rows", "targets", "own_values", "own_utilities",
        "heads",
    ]
)  # fmt: skip
def _pick(
    column, uses, offsets, slots, values, utilities, rows, targets, own_values, own_utilities, heads,
    HEADS: tl.constexpr,
):  # fmt: skip
    """Sequence `program_id(0)`."""
    s, head = tl.program_id(0), tl.arange(0, HEADS)
    won = tl.load(column + s)
    moves = (tl.load(uses + s) != 0) & (won >= 0)
    row = tl.where(moves, tl.load(offsets + s) + won, 0)
    tl.store(rows + s, row)
    tl.store(targets + s, tl.where(moves, tl.load(slots + s), -1))
    inside = head < heads
    value = tl.load(values + row * heads + head, mask=inside & moves, other=0.0)
    utility = tl.load(utilities + row * heads + head, mask=inside & moves, other=0.0)
    tl.store(own_values + s * heads + head, value, mask=inside)
    tl.store(own_utilities + s * heads + head, utility, mask=inside)


@where_tensors_lie
def winner_rows(
    column: Tensor, uses: Tensor, offsets: Tensor, slots: Tensor, values: Tensor, utilities: Tensor
) -> WinnerRows:
    """`reference.winner_rows` in one launch; all tensors are contiguous."""
    sequences, heads = len(column), values.shape[1]
    places = torch.empty(2, sequences, dtype=torch.int64, device=column.device)
    own = torch.empty(2, sequences, heads, dtype=torch.float32, device=column.device)
    found = WinnerRows(places[0], places[1], own[0], own[1])
    _pick[(sequences,)](
        column, uses, offsets, slots, values, utilities, *vars(found).values(), heads,
        HEADS=triton.next_power_of_2(heads), num_warps=1,
    )  # fmt: skip
    return found


def variants() -> list[Variant]:
    """The shipped configurations: few sequences and many, one head and several."""
    from vas_engine.kernels.compile import Variant

    lay = dict.fromkeys(("count", "token_ids", "positions", "owner", "tokens", "places"), "*i64")
    lay |= dict.fromkeys(("offsets", "groups", "column", "prefix_lens"), "*i32") | {"uses": "*i1"}
    lay |= dict.fromkeys(("sequences", "rows", "width"), "i32")
    pick = dict.fromkeys(("column", "slots", "rows", "targets"), "*i64") | {"uses": "*i1", "offsets": "*i32"}
    pick |= dict.fromkeys(("values", "utilities", "own_values", "own_utilities"), "*fp32") | {"heads": "i32"}
    listed = [
        Variant(f"candidate_rows {sequences}", _lay, lay, {"PARTLY": True, "SEQUENCES": sequences, "ROWS": _ROWS})
        for sequences in (1, 64, 256)
    ]
    return listed + [Variant(f"winner_rows {heads}", _pick, pick, {"HEADS": heads}, 1) for heads in (1, 8)]
