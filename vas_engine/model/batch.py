"""The rows of one forward: whose they are, what they see and where their keys and values go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError

ArrayLike = torch.Tensor | np.ndarray | Sequence[int]


def _tensor(values: Any, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    return torch.as_tensor(values, dtype=dtype, device=device).contiguous()


@dataclass(eq=False)
class AttentionBatch:
    """R rows in G groups (one group per sequence, its rows next to one another). All tensors are contiguous.

    A *slotted* row (``slots[r] >= 0``) writes its key and value to the pages before anything is read, and its prefix
    takes it in: ``prefix_lens[r] == positions[r] + 1``. An *unslotted* row (``slots[r] == -1``) leaves the pages as
    they are, sees the pages below its position, ``prefix_lens[r] == positions[r]``, and itself besides; rows of one
    group never see one another's unslotted keys.

    Attributes:
        block_tables: int32 [G, max_blocks], block of every page of a group; entries past a group's prefix
            are not read.
        group_offsets: int32 [G + 1], rows of group g are ``[group_offsets[g], group_offsets[g + 1])``.
        prefix_lens: int32 [R], a row sees the page positions ``[0, prefix_lens[r])``.
        slots: int64 [R], ``block * block_size + offset``, or -1.
        positions: int64 [R], place of the row's token in its sequence.
    """

    block_tables: torch.Tensor
    group_offsets: torch.Tensor
    prefix_lens: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    host: Any = field(default=None, repr=False)
    """The same numbers as arrays, of whoever built the batch (a dataclass with `offsets`, `prefix_lens`, `slots` and
    `positions`, as `engine.rows.Rows`), for what the host plans; None: they would have to be fetched."""
    unslotted: bool | None = None
    """Of a batch whose numbers only the device knows, and nobody may fetch: whether all rows are unslotted, or none."""
    alone: bool = False
    """Whether every group is known to be one slotted row, as in a decoding step."""
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What is worked out once and used in every layer."""

    @classmethod
    def build(
        cls,
        block_tables: ArrayLike,
        group_offsets: ArrayLike,
        positions: ArrayLike,
        slots: ArrayLike,
        device: torch.device | str = "cpu",
        prefix_lens: ArrayLike | None = None,
    ) -> AttentionBatch:
        """From arrays or lists; ``prefix_lens`` follow from positions and slots when left out."""
        places = _tensor(positions, torch.int64, device)
        targets = _tensor(slots, torch.int64, device)
        if prefix_lens is None:
            prefix_lens = places + (targets >= 0)
        batch = cls(
            block_tables=_tensor(block_tables, torch.int32, device),
            group_offsets=_tensor(group_offsets, torch.int32, device),
            prefix_lens=_tensor(prefix_lens, torch.int32, device),
            slots=targets,
            positions=places,
        )
        batch.check_shapes()
        return batch

    @classmethod
    def from_sequences(
        cls,
        block_tables: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        slotted: Sequence[Sequence[bool] | bool],
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """One list per sequence; slots come from the block tables. For tests and tools, not for the hot path."""
        width = max((len(table) for table in block_tables), default=0)
        tables = np.zeros((len(block_tables), width), dtype=np.int32)
        offsets, places, slots = [0], [], []
        for index, (table, group, flags) in enumerate(zip(block_tables, positions, slotted, strict=True)):
            tables[index, : len(table)] = table
            each = [flags] * len(group) if isinstance(flags, bool) else flags
            for position, has_slot in zip(group, each, strict=True):
                places.append(position)
                slots.append(table[position // block_size] * block_size + position % block_size if has_slot else -1)
            offsets.append(len(places))
        return cls.build(tables, offsets, places, slots, device)

    def check_shapes(self) -> None:
        """Shapes that do not fit one another are an :class:`InvalidArgumentError`."""
        rows = self.positions.numel()
        for name in ("prefix_lens", "slots"):
            if getattr(self, name).shape != (rows,):
                raise InvalidArgumentError(
                    name, tuple(getattr(self, name).shape), f"one entry a row is needed: [{rows}]"
                )
        if self.block_tables.dim() != 2:
            raise InvalidArgumentError("block_tables", tuple(self.block_tables.shape), "needs [groups, blocks]")
        if self.group_offsets.shape != (self.block_tables.shape[0] + 1,):
            raise InvalidArgumentError(
                "group_offsets",
                tuple(self.group_offsets.shape),
                f"needs one entry more than block_tables has rows: [{self.block_tables.shape[0] + 1}]",
            )

    @property
    def num_rows(self) -> int:
        return self.positions.shape[0]

    @property
    def device(self) -> torch.device:
        return self.positions.device

    @cached_property
    def see_self(self) -> torch.Tensor:
        """bool [R]: rows that bring a key of their own, the unslotted ones."""
        return self.slots < 0

    @cached_property
    def has_unslotted(self) -> bool:
        if self.unslotted is not None:
            return self.unslotted
        return bool(self.see_self.any() if self.host is None else (self.host.slots < 0).any())

    @cached_property
    def has_slotted(self) -> bool:
        """Whether any row may be slotted: where only the device knows a row's slot, it may be -1 nonetheless."""
        if self.unslotted is not None:
            return not self.unslotted
        return self.host is None or bool((self.host.slots >= 0).any())

    @cached_property
    def offsets(self) -> list[int]:
        """``group_offsets`` as Python integers."""
        return self.group_offsets.tolist()

    @cached_property
    def strict(self) -> AttentionBatch:
        """The same rows looking at positions strictly below their own and at no key of theirs: a reader's look."""
        if self.unslotted:
            return self
        below = torch.minimum(self.prefix_lens.to(torch.int64), self.positions).to(torch.int32)
        nowhere = torch.full_like(self.slots, -1)
        host = self.host
        if host is not None:
            lengths = np.minimum(host.prefix_lens, host.positions).astype(np.int32)
            host = replace(host, prefix_lens=lengths, slots=np.full_like(host.slots, -1))
        known = None if self.unslotted is None else True
        return AttentionBatch(self.block_tables, self.group_offsets, below, nowhere, self.positions, host, known)
