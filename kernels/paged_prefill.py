"""Causal attention of prompt chunks over pages; its twin is `reference.candidate_attention` without own keys.

The body is `candidate_attention`'s: a row of a chunk is a candidate whose prefix takes its own key in. Only the
launch differs: large tiles, and no splits unless the items ask for them, as chunks fill the device by themselves. A
tile reads from the first position that one of its rows sees to the last; what none of them sees is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vas_engine.kernels.candidate_attention import (
    LARGEST_TILE,
    Configuration,
    Items,
    attention_variants,
    candidate_attention,
    device_items,
    is_wide,
)
from vas_engine.kernels.candidate_attention import (
    configuration as configuration_of_candidates,
)

if TYPE_CHECKING:
    from vas_engine.kernels.compile import Variant


def configuration(head_dim: int, wide: bool) -> Configuration:
    """The launch of prompt chunks: the largest tiles of candidates."""
    return configuration_of_candidates(LARGEST_TILE, head_dim, wide)


def paged_prefill(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_tables: Tensor,
    group_offsets: Tensor,
    prefix_lens: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    positions: Tensor | None = None,
    items: Items | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of chunks whose keys and values are in the pages already.

    Args:
        q: [R, H, D]; the rows of a group stand at consecutive positions (others are right too, but read more).
        prefix_lens: int32 [R], a row's position + 1 in a causal chunk.
        positions: int64 [R], wanted for a window; left out: prefix_lens - 1.
        Everything else: see `candidate_attention`.

    Returns:
        [R, H, D] in q's dtype; a row with nothing to see gives 0.
    """
    rows, heads, head_dim = q.shape
    if items is None:
        launch = configuration(head_dim, is_wide(q.dtype, k_pages.dtype))
        items = Items(device_items(group_offsets, rows, heads // k_pages.shape[2], launch.pairs, 1), launch, False)
    if window > 0 and positions is None:
        positions = prefix_lens.to(torch.int64) - 1
    return candidate_attention(
        q, k_pages, v_pages, block_tables, group_offsets, prefix_lens,
        scale=scale, softcap=softcap, window=window, positions=positions, items=items, out=out,
    )  # fmt: skip


def _operator(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, group_offsets: Tensor, prefix_lens: Tensor,
    positions: Tensor | None, scale: float, softcap: float, window: int,
) -> Tensor:  # fmt: skip
    return paged_prefill(
        q, k_pages, v_pages, block_tables, group_offsets, prefix_lens,
        scale=scale, softcap=softcap, window=window, positions=positions,
    )  # fmt: skip


_library = torch.library.Library("vas_engine", "FRAGMENT")
_library.define(
    "paged_prefill(Tensor q, Tensor k_pages, Tensor v_pages, Tensor block_tables, Tensor group_offsets, "
    "Tensor prefix_lens, Tensor? positions, float scale, float softcap, int window) -> Tensor"
)
_library.impl("paged_prefill", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("vas_engine::paged_prefill", lambda q, *_: q.new_empty(q.shape), lib=_library)


def variants() -> list[Variant]:
    """The shipped configurations."""
    return [
        variant
        for head_dim, dtype in ((64, "bf16"), (128, "bf16"), (256, "bf16"), (128, "fp32"))
        for variant in attention_variants(
            "paged_prefill", configuration(head_dim, dtype == "fp32"), head_dim, dtype, own=False
        )
    ]
