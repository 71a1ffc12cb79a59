"""Packing: single-token decodes, chunks, warm rows and candidates in one forward."""

from __future__ import annotations

import numpy as np
import torch

from vas_engine.engine.rows import pack, unslotted
from vas_engine.engine.scheduler import Work
from vas_engine.engine.sequence import Sequence

BLOCK = 4


def sequence(name: str, tokens: list[int], table: list[int], pending: list[int] | None = None) -> Sequence:
    made = Sequence(name, len(tokens), tokens, block_table=table)
    made.pending = None if pending is None else np.array(pending)
    return made


def test_rows_of_every_kind_of_work() -> None:
    decode = sequence("decode", [5, 6, 7, 8, 9], [3, 1])
    chunk = sequence("chunk", [11, 12, 13, 14, 15, 16], [7, 2])
    looking = sequence("looking", [21, 22], [4], pending=[31, 32, 33])
    warm = sequence("warm", [41, 42, 43, 44, 45], [0, 6])
    works = [
        Work(chunk, 1, 4, False),
        Work(decode, 4, 1, True),
        Work(looking, 2, 3, True, True),
        Work(warm, 4, 1, True),
    ]
    ordered, rows = pack(works, {3}, BLOCK)
    assert [w.sequence.request_id for w in ordered] == ["decode", "chunk", "looking", "warm"]
    assert rows.offsets.tolist() == [0, 1, 5, 8, 10]
    assert rows.token_ids.tolist() == [9, 12, 13, 14, 15, 31, 32, 33, 44, 45]
    assert rows.positions.tolist() == [4, 1, 2, 3, 4, 2, 2, 2, 3, 4]
    # decode: block 1, offset 0; chunk: block 7 offsets 1..3, then block 2; candidates and the warm row stay in scratch.
    assert rows.slots.tolist() == [4, 29, 30, 31, 8, -1, -1, -1, -1, 24]
    # A slotted row sees itself in the pages, an unslotted one only what is before it.
    assert rows.prefix_lens.tolist() == [5, 2, 3, 4, 5, 2, 2, 2, 3, 5]


def test_candidates_stand_at_one_position_and_touch_no_page() -> None:
    users = [sequence("a", [1, 2, 3], [0]), sequence("b", [4], [1])]
    rows = unslotted(users, np.array([7, 8, 9]), np.array([3, 1]), np.array([2, 1]))
    assert rows.offsets.tolist() == [0, 2, 3]
    assert rows.positions.tolist() == [3, 3, 1]
    assert rows.prefix_lens.tolist() == [3, 3, 1]
    assert (rows.slots == -1).all()


def test_a_batch_carries_the_numbers_it_was_made_of() -> None:
    """A backend plans on the host with them, for a reader's look at the same rows too."""
    works = [
        Work(sequence("decode", [5, 6, 7, 8, 9], [3, 1]), 4, 1, True),
        Work(sequence("looking", [21, 22], [4], pending=[31, 32, 33]), 2, 3, True, True),
    ]
    _, rows = pack(works, set(), BLOCK)
    _, batch, _ = rows.to_device(torch.device("cpu"))
    for each in (batch, batch.strict):
        assert each.host is not None
        assert each.host.prefix_lens.tolist() == each.prefix_lens.tolist()
        assert each.host.prefix_lens.dtype == np.int32
        assert each.host.slots.tolist() == each.slots.tolist()
        assert each.host.offsets.tolist() == each.group_offsets.tolist()
    assert batch.has_unslotted
    assert batch.strict.prefix_lens.tolist() == [4, 2, 2, 2]
    _, plain = pack(works[:1], set(), BLOCK)
    assert not plain.to_device(torch.device("cpu"))[1].has_unslotted
