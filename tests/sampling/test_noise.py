from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from scipy import stats
from vas_engine.kernels import reference

from vas_engine import _sampling
from vas_engine.errors import InvalidArgumentError
from vas_engine.sampling import fork_seed, gumbel_noise

BACKENDS = ["cpp", "reference"]


def _words(backend, high, low):
    if backend == "cpp":
        return _sampling.gumbel_of_words(np.array(high, np.uint32), np.array(low, np.uint32))
    return reference.gumbel_of_words(torch.tensor(high), torch.tensor(low)).numpy()


def _exact(high, low):
    with localcontext() as context:
        context.prec = 60
        v = (Decimal(high * 2**32 + low) + Decimal("0.5")) / Decimal(2**64)
        return float(-((-(1 - v).ln()).ln()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_tails_follow_the_formula(backend):
    """No clipping: float32 uniforms would stop at about 16 and -2.8; 64 bits reach 45.05 and -3.81."""
    top = 2**32 - 1
    pairs = [
        (0, 0),
        (0, 1),
        (0, top),
        (1, 0),
        (2**20, 5),
        (2**31 - 1, top),
        (2**31, 0),
        (top, 0),
        (top, top - 1),
        (top, top),
    ]
    high, low = zip(*pairs, strict=True)
    expected = [_exact(h, w) for h, w in pairs]
    np.testing.assert_allclose(_words(backend, high, low), expected, rtol=1e-14, atol=1e-15)
    assert expected[0] > 45.05
    assert expected[-1] < -3.8


@pytest.mark.parametrize("backend", BACKENDS)
def test_gumbel_law(backend):
    noise = gumbel_noise(2**63 + 12345, 77, np.arange(200_000), backend)
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-4
    for threshold in (8.0, 10.0):  # the far upper tail, which the KS test hardly sees
        expected = 200_000 * stats.gumbel_r.sf(threshold)
        assert stats.binomtest(int((noise > threshold).sum()), 200_000, expected / 200_000).pvalue > 1e-4
    expected = stats.gumbel_r.cdf(-2.2)
    assert stats.binomtest(int((noise < -2.2).sum()), 200_000, expected).pvalue > 1e-4


def test_backends_agree():
    tokens = np.concatenate([np.arange(2000), [2**31 - 1, 2**31 - 2]])
    for seed, position in ((0, 0), (2**64 - 1, 2**63 - 1), (1 << 32, 1 << 32), (7, 2**32 - 1)):
        a, b = (gumbel_noise(seed, position, tokens, backend) for backend in BACKENDS)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_neighbours_are_independent():
    n = 100_000
    tokens = np.arange(n)
    base = gumbel_noise(5, 9, tokens)
    others = {
        "seed": gumbel_noise(6, 9, tokens),
        "high word of the seed": gumbel_noise(5 + 2**32, 9, tokens),
        "position": gumbel_noise(5, 10, tokens),
        "high word of the position": gumbel_noise(5, 9 + 2**32, tokens),
        "seed and position swapped": gumbel_noise(9, 5, tokens),
        "token": np.roll(base, 1),
        "pair of tokens": np.roll(base, 2),
        "fork": gumbel_noise(fork_seed(5, 1), 9, tokens),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 4.5 / np.sqrt(n), name
        assert abs(np.corrcoef(base > 2, other > 2)[0, 1]) < 4.5 / np.sqrt(n), name
    along = np.array([gumbel_noise(5, position, np.array([3]))[0] for position in range(20_000)])
    assert stats.kstest(along, "gumbel_r").pvalue > 1e-4
    assert abs(np.corrcoef(along[1:], along[:-1])[0, 1]) < 4.5 / np.sqrt(20_000)


def test_a_token_sees_only_its_own_key():
    whole = gumbel_noise(3, 4, np.arange(50).reshape(5, 10))
    assert whole.shape == (5, 10)
    assert gumbel_noise(3, 4, np.array([17]))[0] == whole[1, 7]
    rolled = reference.gumbel_noise(3, torch.tensor([[4], [5]]), torch.arange(50))
    np.testing.assert_allclose(rolled[0], whole.reshape(-1), rtol=1e-12)
    np.testing.assert_allclose(rolled[1], gumbel_noise(3, 5, np.arange(50)), rtol=1e-12)


def test_fork_seeds():
    assert fork_seed(123, 0) == 123
    seeds = {fork_seed(base, index) for base in range(64) for index in range(64)}
    assert len(seeds) == 64 * 64
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert fork_seed(2**64 - 1, 3) == fork_seed(2**64 - 1, 3)
    bits = np.array([[fork_seed(s, 1) >> bit & 1 for bit in range(64)] for s in range(400)])
    assert abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / 20


@pytest.mark.parametrize("arguments", [(-1, 0, [0]), (2**64, 0, [0]), (0, -1, [0]), (0, 0, [-1]), (0, 0, [2**31])])
def test_out_of_range_is_refused(arguments):
    seed, position, tokens = arguments
    with pytest.raises(InvalidArgumentError):
        gumbel_noise(seed, position, np.array(tokens))


def test_negative_fork_is_refused():
    with pytest.raises(InvalidArgumentError, match="index"):
        fork_seed(1, -1)
