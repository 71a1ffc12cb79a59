import numpy as np
import pytest
import torch
from batches import random_batch, seeds
from hypothesis import given, settings

from vas_engine.errors import InvalidArgumentError
from vas_engine.sampling import SamplingArrays, choose, prune, select, tilt_limits, value_tilt

BACKENDS = ["cpp", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_tilt_is_the_sum_of_clipped_advantages(backend):
    rng = np.random.default_rng(0)
    utilities, baselines = (
        rng.normal(size=(50, 3)).astype(np.float32),
        rng.normal(size=(4, 3)).astype(np.float32),
    )
    limits = rng.choice([0.0, 0.3, 2.0, np.inf], (4, 3))
    owner = rng.integers(0, 4, 50)
    tilt = value_tilt(utilities, baselines, limits, owner, backend)
    for row, s in enumerate(owner):
        terms = [
            max(-limits[s, m], min(limits[s, m], float(utilities[row, m]) - float(baselines[s, m]))) for m in range(3)
        ]
        np.testing.assert_allclose(tilt[row], sum(terms), rtol=1e-14, atol=1e-15)
    utilities[7, 1] = np.nan
    again = value_tilt(utilities, baselines, limits, owner, backend)
    assert np.isnan(again[7])
    assert np.isfinite(np.delete(again, 7)).all()


def test_limits_are_the_weights_times_the_clip():
    weights = np.array([[2.0, 0.0, -0.5]], np.float32)
    np.testing.assert_array_equal(tilt_limits(weights, None), [[np.inf, 0.0, np.inf]])
    np.testing.assert_array_equal(tilt_limits(weights, 0.3), [[0.6, 0.0, 0.15]])


def _bounded_tilts(seed):
    """A selection, bounds of its sequences and tilts within them."""
    rng = np.random.default_rng(seed)
    selection = select(*random_batch(seed))
    shape = selection.token_ids.shape
    centre, half = rng.normal(size=shape[0]), rng.choice([0.0, 0.25, 0.5, 1.5], shape[0])
    low, high = centre - half, centre + half
    tilt = rng.uniform(low[:, None], high[:, None], shape)
    ends = rng.choice([0, 1, 2], shape)
    tilt = np.where(ends == 1, low[:, None], np.where(ends == 2, high[:, None], tilt))
    tilt[np.arange(shape[1]) == selection.tail[:, None]] = 0
    return selection, low, high, tilt


@settings(max_examples=300, deadline=None)
@given(seeds)
def test_pruning_never_changes_the_winner(seed):
    selection, low, high, tilt = _bounded_tilts(seed)
    whole = choose(selection, tilt)
    needed = prune(selection, low, high, np.zeros(len(low), bool))
    pruned = choose(selection, np.where(needed, tilt, -np.inf))
    np.testing.assert_array_equal(pruned.token_id, whole.token_id)
    np.testing.assert_array_equal(pruned.column, whole.column)
    np.testing.assert_array_equal(pruned.log_prob, whole.log_prob)


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_pruning_keeps_no_candidate_in_vain(seed):
    """Each column that is kept does win (or tie) under some tilts within the bounds."""
    selection, low, high, _ = _bounded_tilts(seed)
    needed = prune(selection, low, high, np.zeros(len(low), bool))
    base = selection.log_probs + selection.noise
    for s, column in zip(*np.nonzero(needed), strict=True):
        champion = np.arange(base.shape[1]) == selection.tail[s]
        score = base[s] + np.where(champion, 0, low[s])
        score[column] = base[s, column] + (0 if champion[column] else high[s])
        assert score[column] >= score[: selection.count[s]].max()


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_backends_prune_alike(seed):
    selection, low, high, _ = _bounded_tilts(seed)
    all_needed = np.random.default_rng(seed).random(len(low)) < 0.3
    ours = prune(selection, low, high, all_needed, "cpp")
    np.testing.assert_array_equal(ours, prune(selection, low, high, all_needed, "reference"))
    np.testing.assert_array_equal(ours[all_needed], selection.filled[all_needed])


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruning_saves_most_evaluations(backend):
    """With a spread of one nat DESIGN expects fewer than three of twenty."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(0)) * 3
    arrays = SamplingArrays.build(500, seed=range(500), num_candidates=20)
    selection = select(logits, np.zeros(500, np.int64), arrays)
    bound, nothing = np.full(500, 0.5), np.zeros(500, bool)
    assert prune(selection, -bound, bound, nothing, backend).sum(1).mean() < 3
    unknown = np.full(500, np.inf)
    assert prune(selection, -unknown, unknown, nothing, backend).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend):
    selection = select(*random_batch(1))
    zeros = np.zeros(len(selection.count))
    flags = zeros.astype(bool)

    def refused(call, *arguments):
        with pytest.raises(InvalidArgumentError) as caught:
            call(*arguments, backend)
        return caught.value.argument

    assert refused(prune, selection, zeros + 1, zeros, flags) == "low, high"
    assert refused(prune, selection, zeros * np.nan, zeros, flags) == "low, high"
    assert refused(prune, selection, zeros, np.zeros(99), flags) == "high"
    f32, f64 = np.zeros((2, 3), np.float32), np.zeros((2, 3))
    assert refused(value_tilt, f32, f32, f64, np.array([0, 2])) == "row_sequence"
    assert refused(value_tilt, f32, f32, f64 - 1, np.array([0, 1])) == "limits"
    assert refused(value_tilt, f32, f32[:, :2], f64, np.array([0, 1])) == "baselines"
    assert refused(value_tilt, f32, f32, f64, np.array([0])) == "utilities"
