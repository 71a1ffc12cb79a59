import numpy as np
import pytest
import torch
from batches import random_batch, seeds
from hypothesis import given, settings

from vas_engine.errors import InvalidArgumentError
from vas_engine.sampling import SamplingArrays, Selection, choose, select

BACKENDS = ["cpp", "reference"]
ONE = np.zeros(1, np.int64)


def _policy(log_probs, tilt, keep):
    """pi over the vocabulary from log pi0 and tilts of some tokens (dict), by the definition."""
    weights = np.exp(log_probs)
    out = np.zeros_like(weights)
    for token, weight in enumerate(weights):
        if token in tilt:
            out[token] = weight * np.exp(tilt[token])
        elif keep:
            out[token] = weight
    return out / out.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("cut", [{}, {"top_k": 9}, {"top_p": 0.9}])
def test_statistics_by_enumeration(backend, keep, temperature, cut):
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2)) * 1.5
    rng = np.random.default_rng(0)
    support = select(logits, ONE, SamplingArrays.build(1, temperature=temperature, num_candidates=30, **cut), backend)
    log_probs = np.full(30, -np.inf)
    log_probs[support.token_ids[0, : support.count[0]]] = support.log_probs[0, : support.count[0]]
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1)
    for seed in range(20):
        arrays = SamplingArrays.build(1, temperature=temperature, num_candidates=6, keep_tail=keep, seed=seed, **cut)
        selection = select(logits, ONE, arrays, backend)
        tilt = rng.normal(size=selection.token_ids.shape) * 2
        tilt[0, 6:] = 0
        winner = choose(selection, tilt, backend)
        candidates = dict(zip(selection.token_ids[0, :6].tolist(), tilt[0, :6].tolist(), strict=True))
        policy = _policy(log_probs, candidates, keep)
        token = winner.token_id[0]
        np.testing.assert_allclose(winner.log_prob[0], log_probs[token], rtol=1e-12)
        np.testing.assert_allclose(winner.tilted_log_prob[0], np.log(policy[token]), rtol=1e-11)
        inside = policy > 0
        kl = (policy[inside] * (np.log(policy[inside]) - log_probs[inside])).sum()
        np.testing.assert_allclose(winner.kl[0], kl, rtol=1e-10, atol=1e-12)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_backends_agree(seed):
    rng = np.random.default_rng(seed)
    selection = select(*random_batch(seed))
    tilt = rng.normal(size=selection.token_ids.shape) * rng.choice([0, 1, 30])
    tilt[rng.random(tilt.shape) < rng.choice([0, 0.3])] = -np.inf
    tilt[rng.random(tilt.shape) < rng.choice([0, 0.05])] = np.nan
    tilt[np.arange(tilt.shape[1]) == selection.tail[:, None]] = 0
    a, b = (choose(selection, tilt, backend) for backend in BACKENDS)
    for name in vars(a):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=1e-11, atol=1e-11, err_msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_step_has_no_divergence(backend):
    selection = select(torch.randn(3, 200), np.arange(3), SamplingArrays.build(3, seed=range(3)), backend)
    winner = choose(selection, np.zeros((3, 1)), backend)
    np.testing.assert_array_equal(winner.token_id, selection.token_ids[:, 0])
    np.testing.assert_array_equal(winner.tilted_log_prob, winner.log_prob)
    assert winner.kl.tolist() == [0, 0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruned_columns_leave_no_statistics(backend):
    selection = select(torch.zeros(1, 9), ONE, SamplingArrays.build(1, num_candidates=3, temperature=0), backend)
    winner = choose(selection, np.array([[-np.inf, 1.0, 1.0, 0.0]]), backend)
    assert (winner.column[0], winner.token_id[0]) == (1, 1)  # equal scores: the smaller column
    assert np.isfinite(winner.log_prob[0])
    assert np.isnan([winner.tilted_log_prob[0], winner.kl[0]]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tilt_and_bad_logits_stay_alone(backend):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    logits[3, 0] = torch.nan
    selection = select(logits, np.arange(5), SamplingArrays.build(5, num_candidates=3), backend)
    tilt = np.zeros((5, 4))
    good = choose(selection, tilt, backend)
    tilt[0, 1], tilt[1, 0], tilt[4] = np.nan, np.inf, -np.inf
    winner = choose(selection, tilt, backend)
    assert winner.column.tolist() == [-1, -1, good.column[2], -1, -1]
    assert winner.token_id.tolist() == [-1, -1, good.token_id[2], -1, -1]
    assert np.isnan(winner.log_prob[[0, 1, 3, 4]]).all()
    assert winner.kl[2] == good.kl[2] < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_columns_not_in_use_are_not_read(backend):
    arrays = SamplingArrays.build(2, num_candidates=[1, 6], keep_tail=False)
    selection = select(torch.zeros(1, 20), np.zeros(2, np.int64), arrays, backend)
    tilt = np.where(selection.filled, 0.0, np.nan)
    assert (choose(selection, tilt, backend).column >= 0).all()
    assert isinstance(selection, Selection)
    with pytest.raises(InvalidArgumentError, match="tilt"):
        choose(selection, tilt[:, :2], backend)
