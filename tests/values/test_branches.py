"""Candidates valued beside whole sequences equal those of each sequence written out and run by itself."""

from __future__ import annotations

import pytest
import torch
from value_models import CONFIGS, KINDS, base_model, make_network

from vas_engine.model.branches import Branches, branch_attention

PLACES = torch.tensor([[0, 4, 7], [2, 3, 8]])
CANDIDATES = torch.randint(3, 61, (2, 3, 4), generator=torch.Generator().manual_seed(4))


def sequences() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    return tokens, torch.tensor([9, 9])


def written_out(value, tokens: torch.Tensor, branches: Branches) -> torch.Tensor:
    """[B, P, K, O]: every candidate behind its prefix, one uncached run each."""
    rows = []
    for row, place_of, tokens_of in zip(tokens, branches.places, branches.token_ids, strict=True):
        for place, candidates in zip(place_of.tolist(), tokens_of, strict=True):
            for candidate in candidates:
                rows.append(value(torch.cat([row[: place + 1], candidate[None]])[None])[0, -1])
    return torch.stack(rows).unflatten(0, branches.token_ids.shape)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_base_model_runs_branches(architecture: str) -> None:
    lm = base_model(architecture)
    tokens, lengths = sequences()
    branches = Branches(PLACES, CANDIDATES)
    plain = lm.dense(tokens, lengths, states=(1,))
    both = lm.dense(tokens, lengths, states=(1,), branches=branches)
    for index in (1, None):

        def state(output, index=index):
            return output.last_hidden if index is None else output.hidden[index]

        found = branches.split(state(both))
        torch.testing.assert_close(found[0], state(plain), atol=1e-5, rtol=1e-4)
        expected = written_out(lambda row, state=state: state(lm.dense(row, states=(1,))), tokens, branches)
        torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_networks_value_branches(architecture: str, kind: str) -> None:
    lm = base_model(architecture)
    network = make_network(kind, lm)
    tokens, lengths = sequences()
    branches = Branches(PLACES, CANDIDATES)
    with torch.no_grad():
        plain = network.train_values(lm, tokens, lengths)
        values, there = branches.split(network.train_values(lm, tokens, lengths, branches))
        expected = written_out(
            lambda row: network.train_values(lm, row, torch.tensor([row.shape[1]])), tokens, branches
        )
    torch.testing.assert_close(values, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(there, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_gradients_of_branches_are_those_of_the_sequences_written_out(kind: str) -> None:
    lm = base_model("llama")
    network = make_network(kind, lm)
    tokens, lengths = sequences()
    branches = Branches(PLACES, CANDIDATES)
    weights = torch.randn(2, 3, 4, 9, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in network.parameters() if p.requires_grad]

    def gradients(there: torch.Tensor) -> list[torch.Tensor]:
        return torch.autograd.grad((there * weights).sum(), parameters, allow_unused=True)

    _, there = branches.split(network.train_values(lm, tokens, lengths, branches))
    expected = written_out(lambda row: network.train_values(lm, row, torch.tensor([row.shape[1]])), tokens, branches)
    for found, wanted in zip(gradients(there), gradients(expected), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


def test_a_branch_that_sees_nothing_gets_zeros() -> None:
    keys = torch.randn(1, 2, 5, 4)
    seen = branch_attention(torch.randn(1, 4, 1, 4), keys, keys, torch.tensor([[3]]), None, 0.5, window=1)
    assert bool((seen == 0).all())
