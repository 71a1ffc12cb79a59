"""What a value network starts from, gathered and summed in one pass; twin of `reference.candidate_input`.

The states and the table are projected beforehand (once a request, once a vocabulary), so that a row is a sum of two
or three lines of the network's width and no [rows, hidden size] copy is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor
from vas_engine.kernels.device import where_tensors_lie

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant

_WARPS = 4


@triton.jit(
    do_not_specialize=["state_index", "token_ids", "place_index", "state_stride", "table_stride", "place_stride"]
)
def _gather(
    states, state_index, table, token_ids, places, place_index, out, state_stride, table_stride, place_stride, width,
    BLOCK: tl.constexpr, TABLE: tl.constexpr, PLACES: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    x = tl.load(states + tl.load(state_index + row) * state_stride + column, mask=inside).to(tl.float32)
    if TABLE:
        x += tl.load(table + tl.load(token_ids + row) * table_stride + column, mask=inside).to(tl.float32)
    if PLACES:
        place = tl.load(place_index + row) if PLACED else row
        x += tl.load(places + place * place_stride + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, x, mask=inside)


@torch.library.custom_op("vas_engine::candidate_input", mutates_args=())
@where_tensors_lie
def candidate_input(
    states: Tensor,
    state_index: Tensor,
    table: Tensor | None = None,
    token_ids: Tensor | None = None,
    places: Tensor | None = None,
    place_index: Tensor | None = None,
) -> Tensor:
    """`reference.candidate_input` in one launch.

    Args:
        states: [N, width] float32, bfloat16 or float16; columns adjacent, as in the others.
        state_index: int64 [R], contiguous, as the other indices.
        table: [V, width] with token_ids int64 [R]; both or none.
        places: [P, width] with place_index int64 [R] (None: row i takes line i), or None.

    Returns:
        float32 [R, width].
    """
    rows, width = len(state_index), states.shape[1]
    out = states.new_empty(rows, width, dtype=torch.float32)
    if not rows:
        return out
    block = _block(width)
    _gather[(rows, triton.cdiv(width, block))](
        states, state_index,
        states if table is None else table, state_index if token_ids is None else token_ids,
        states if places is None else places, state_index if place_index is None else place_index,
        out, states.stride(0), 0 if table is None else table.stride(0), 0 if places is None else places.stride(0),
        width,
        BLOCK=block, TABLE=table is not None, PLACES=places is not None, PLACED=place_index is not None,
        num_warps=_WARPS,
    )  # fmt: skip
    return out


@candidate_input.register_fake
def _(states, state_index, table=None, token_ids=None, places=None, place_index=None):
    return states.new_empty(len(state_index), states.shape[1], dtype=torch.float32)


def _block(width: int) -> int:
    return min(512, max(16, triton.next_power_of_2(width)))


def variants() -> list[Variant]:
    """The shipped configurations: both widths of states and table, with everything to add."""
    from vas_engine.kernels.compile import Variant

    signature = dict.fromkeys(("state_index", "token_ids", "place_index"), "*i64") | {"out": "*fp32", "width": "i32"}
    signature |= dict.fromkeys(("state_stride", "table_stride", "place_stride"), "i64")
    return [
        Variant(
            f"candidate_input {dtype} {block}", _gather,
            signature | dict.fromkeys(("states", "table", "places"), f"*{dtype}"),
            {"BLOCK": block, "TABLE": True, "PLACES": True, "PLACED": block == 64}, num_warps=_WARPS,
            aligned=("states", "table", "places", "out", "width"),
        )
        for dtype in ("bf16", "fp32") for block in (64, 512)
    ]  # fmt: skip
