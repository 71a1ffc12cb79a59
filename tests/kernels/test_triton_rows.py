"""candidate_rows and winner_rows in Triton against the reference, number for number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vas_engine.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")

from vas_engine.kernels.candidate_rows import candidate_rows, winner_rows  # after the check: it imports Triton

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=7)


def same(mine: object, wanted: object) -> None:
    assert vars(mine).keys() == vars(wanted).keys()
    for name, expected in vars(wanted).items():
        torch.testing.assert_close(vars(mine)[name], expected, rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}")


@given(counts=COUNTS, spare=st.integers(0, 40), partly=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_candidates_become_rows(counts: list[int], spare: int, partly: bool, seed: int) -> None:
    """Any numbers of candidates, some sequences without, any room behind them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.tensor(counts)
    width = max(counts) + 1
    # Behind a sequence's candidates stand tokens of nobody.
    token_ids = torch.randint(-1, 50, (len(counts), width), generator=generator)
    positions = torch.randint(0, 999, (len(counts),), generator=generator)
    uses = torch.rand(len(counts), generator=generator) < 0.6 if partly else None
    given = [None if x is None else x.to(DEVICE) for x in (count, uses, token_ids, positions)]
    rows = max(1, sum(counts) + spare)
    same(candidate_rows(*given, rows), reference.candidate_rows(*given, rows))


@given(counts=COUNTS, heads=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_winners_are_found_among_the_rows(counts: list[int], heads: int, seed: int) -> None:
    """Also of sequences without a winner, without rows, and where rows that count for nothing are not numbers."""
    generator = torch.Generator().manual_seed(seed)
    uses = (torch.rand(len(counts), generator=generator) < 0.7) & (torch.tensor(counts) > 0)
    count = torch.where(uses, torch.tensor(counts), 0)
    offsets = torch.nn.functional.pad(count.cumsum(0), (1, 0)).int()
    column = (torch.rand(len(counts), generator=generator) * torch.tensor(counts)).long()
    column = torch.where(torch.rand(len(counts), generator=generator) < 0.2, -1, column)
    slots = torch.randint(0, 999, (len(counts),), generator=generator)
    values, utilities = torch.randn(2, int(count.sum()) + 3, heads, generator=generator)
    values[int(count.sum()) :] = torch.nan
    given = [x.to(DEVICE) for x in (column, uses, offsets, slots, values.contiguous(), utilities.contiguous())]
    same(winner_rows(*given), reference.winner_rows(*given))
