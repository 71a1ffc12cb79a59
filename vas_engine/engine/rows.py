"""Packing: what the scheduler planned, as the flat rows that models and value networks process."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from vas_engine.engine.scheduler import Work
from vas_engine.engine.sequence import Sequence
from vas_engine.kernels.transfer import to_device
from vas_engine.model.batch import AttentionBatch

UNSLOTTED = -1


@dataclass(slots=True)
class Rows:
    """Rows of one forward, grouped: ``sequences[g]`` owns rows ``[offsets[g], offsets[g + 1])``.

    Attributes:
        sequences: one a group.
        token_ids: int64 [R].
        positions: int64 [R].
        slots: int64 [R]; where a row's K/V goes, -1 leaves it in scratch.
        prefix_lens: int32 [R]; the pages a row sees, itself included when it is slotted.
        offsets: int32 [G + 1].
    """

    sequences: Seq[Sequence]
    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    prefix_lens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)

    def to_device(
        self, device: torch.device, *others: np.ndarray
    ) -> tuple[torch.Tensor, AttentionBatch, list[torch.Tensor]]:
        """Token ids, their batch and whatever goes along, in one transfer that is not waited for."""
        tables = block_tables(self.sequences)
        own = [self.token_ids, tables, self.offsets, self.prefix_lens, self.slots, self.positions]
        moved = to_device([*own, *others], device)
        token_ids, pages, offsets, prefix_lens, slots, positions = moved[: len(own)]
        return token_ids, AttentionBatch(pages, offsets, prefix_lens, slots, positions, self), moved[len(own) :]


def block_tables(sequences: Seq[Sequence]) -> np.ndarray:
    """Block tables as int32 [G, longest]; unused entries are 0 and never read."""
    tables = np.zeros((len(sequences), max((len(s.block_table) for s in sequences), default=1) or 1), np.int32)
    for row, sequence in zip(tables, sequences, strict=True):
        row[: len(sequence.block_table)] = sequence.block_table
    return tables


def group_offsets(counts: Seq[int] | np.ndarray) -> np.ndarray:
    """int32 [G + 1]: group g of ``counts[g]`` rows is ``[offsets[g], offsets[g + 1])``."""
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def slot(sequence: Sequence, position: int, block_size: int) -> int:
    return sequence.block_table[position // block_size] * block_size + position % block_size


def unslotted(sequences: Seq[Sequence], token_ids: np.ndarray, positions: np.ndarray, counts: np.ndarray) -> Rows:
    """Candidate rows: ``counts[g]`` of them for each sequence, all at ``positions[g]``, none written to pages."""
    where = np.repeat(positions, counts)
    offsets = group_offsets(counts)
    return Rows(sequences, token_ids, where, np.full(len(where), UNSLOTTED, np.int64), where.astype(np.int32), offsets)


def pack(works: Seq[Work], warm: set[int], block_size: int) -> tuple[list[Work], Rows]:
    """Lay out the works of one step, single-token decodes first (they are the many).

    A work whose index is in ``warm`` gets one more row before its chunk: the token at ``start - 1``, recomputed
    unslotted for the sake of its hidden state, which a prefix-cache hit does not keep.

    Returns:
        The works in the order of the groups, and the rows.
    """
    single = [w for i, w in enumerate(works) if w.count == 1 and not w.is_candidates and i not in warm]
    rest = [(w, i in warm) for i, w in enumerate(works) if w.count != 1 or w.is_candidates or i in warm]
    n = len(single)
    start = np.fromiter((w.start for w in single), np.int64, n)
    token = np.fromiter((w.sequence.token_ids[w.start] for w in single), np.int64, n)
    block = np.fromiter((w.sequence.block_table[w.start // block_size] for w in single), np.int64, n)
    tokens, positions, slots = [token], [start], [block * block_size + start % block_size]
    counts = [1] * n
    for work, is_warm in rest:
        sequence = work.sequence
        first = work.start - is_warm
        if work.is_candidates:
            where = np.full(work.count, work.start, np.int64)
            tokens.append(np.asarray(sequence.pending, np.int64))
            target = np.full(work.count, UNSLOTTED, np.int64)
        else:
            where = np.arange(first, work.start + work.count, dtype=np.int64)
            tokens.append(np.asarray(sequence.token_ids[first : work.start + work.count], np.int64))
            table = np.asarray(sequence.block_table, np.int64)
            target = table[where // block_size] * block_size + where % block_size
            if is_warm:
                target[0] = UNSLOTTED
        positions.append(where)
        slots.append(target)
        counts.append(len(where))
    position, target = np.concatenate(positions), np.concatenate(slots)
    offsets = group_offsets(counts)
    ordered = single + [work for work, _ in rest]
    rows = Rows(
        [work.sequence for work in ordered],
        np.concatenate(tokens),
        position,
        target,
        (position + (target >= 0)).astype(np.int32),
        offsets,
    )
    return ordered, rows
