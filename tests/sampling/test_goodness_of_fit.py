"""The sampler draws from the distribution it says: chi-squared against exact probabilities."""

import numpy as np
import pytest
import torch
from scipy import stats

from vas_engine.sampling import SamplingArrays, choose, fork_seed, prune, select

DRAWS = 20_000
CUTS = {
    "whole": {},
    "hot": {"temperature": 1.5},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
}


def _logits(vocabulary):
    return torch.randn(vocabulary, generator=torch.Generator().manual_seed(11)) * 1.5


def _base(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """pi0 over the vocabulary, written out in numpy independently of the package."""
    p = np.exp(logits.double().numpy() / temperature)
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    if top_p < 1:
        order = np.argsort(-p)
        cumulative = np.cumsum(p[order]) / p.sum()
        p[order[1:][cumulative[:-1] >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def _settings(varied, **settings):
    if varied == "seed":
        settings["seed"] = [fork_seed(99, index) for index in range(DRAWS)]
    else:
        settings |= {"seed": 2**40 + 7, "position": np.arange(DRAWS)}
    return SamplingArrays.build(DRAWS, **settings)


def _p_value(tokens, probabilities):
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities * DRAWS
    order = np.argsort(expected)
    order = order[expected[order] > 0]
    rare = order[expected[order] < 5]
    common = order[expected[order] >= 5]
    observed, expected = [*counts[common]], [*expected[common]]
    if len(rare):
        observed[0] += counts[rare].sum()
        expected[0] += DRAWS * probabilities[rare].sum()
    return stats.chisquare(observed, expected).pvalue


@pytest.mark.parametrize("varied", ["seed", "position"])
@pytest.mark.parametrize("cut", CUTS)
def test_plain(cut, varied):
    logits = _logits(37)
    selection = select(logits[None], np.zeros(DRAWS, np.int64), _settings(varied, **CUTS[cut]))
    assert _p_value(selection.token_ids[:, 0], _base(logits, **CUTS[cut])) > 1e-4


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("cut", CUTS)
def test_guided(cut, pruned, keep):
    logits = _logits(37)
    tilt_of = np.random.default_rng(1).uniform(-1, 1.5, 37)
    arrays = _settings("seed", num_candidates=5, keep_tail=keep, **CUTS[cut])
    selection = select(logits[None], np.zeros(DRAWS, np.int64), arrays)
    candidates = selection.token_ids[0, :5]
    tilt = np.where(np.arange(selection.token_ids.shape[1]) == selection.tail[:, None], 0, tilt_of[selection.token_ids])
    if pruned:
        low, high = np.full(DRAWS, -1.0), np.full(DRAWS, 1.5)
        tilt[~prune(selection, low, high, np.zeros(DRAWS, bool))] = -np.inf
    policy = _base(logits, **CUTS[cut])
    inside = np.isin(np.arange(37), candidates)
    policy = np.where(inside, policy * np.exp(tilt_of), policy if keep else 0)
    winner = choose(selection, tilt)
    assert _p_value(winner.token_id, policy / policy.sum()) > 1e-4


def test_wide_vocabulary():
    """Thousands of tokens, several slices, most never drawn: grouped into 40 bins of tokens by id."""
    logits = _logits(20_000)
    probabilities = _base(logits)
    selection = select(logits[None], np.zeros(DRAWS, np.int64), _settings("seed"))
    bins = np.arange(20_000) * 40 // 20_000
    assert _p_value(bins[selection.token_ids[:, 0]], np.bincount(bins, probabilities)) > 1e-4
    by_rank = np.argsort(np.argsort(-probabilities)) * 40 // 20_000
    assert _p_value(by_rank[selection.token_ids[:, 0]], np.bincount(by_rank, probabilities)) > 1e-4


def test_champion_follows_the_tail():
    """Also alone, without the candidates: the champion is a draw from pi0 restricted to the tail."""
    logits = _logits(37)
    selection = select(logits[None], np.zeros(DRAWS, np.int64), _settings("seed", num_candidates=5))
    tail = _base(logits)
    tail[selection.token_ids[0, :5]] = 0
    np.testing.assert_allclose(np.exp(selection.tail_log_mass), tail.sum(), rtol=1e-12)
    assert _p_value(selection.token_ids[:, 5], tail / tail.sum()) > 1e-4


def test_the_test_can_fail():
    logits = _logits(37)
    selection = select(logits[None], np.zeros(DRAWS, np.int64), _settings("seed", temperature=1.05))
    assert _p_value(selection.token_ids[:, 0], _base(logits)) < 1e-4
