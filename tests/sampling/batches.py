"""Random batches for the sampling tests."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from vas_engine.sampling import SamplingArrays, Selection

VOCABULARIES = (1, 2, 3, 17, 50, 333, 1023, 1024, 1025, 5000, 8193, 20001)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def random_batch(seed: int, vocabulary: int | None = None) -> tuple[torch.Tensor, np.ndarray, SamplingArrays]:
    """Logits, rows and settings in which everything varies from sequence to sequence, ties and bans included."""
    rng = np.random.default_rng(seed)
    v = vocabulary or int(rng.choice(VOCABULARIES))
    b, s = int(rng.integers(1, 4)), int(rng.integers(1, 7))
    logits = torch.from_numpy(rng.standard_normal((b, v)) * rng.choice([0.0, 0.3, 2.0, 6.0]))
    if rng.random() < 0.3:
        logits[torch.from_numpy(rng.random((b, v))) < 0.5] = -torch.inf
    dtype = DTYPES[rng.integers(len(DTYPES))]

    def pick(*values: float) -> np.ndarray:
        return rng.choice(values, s)

    arrays = SamplingArrays.build(
        s,
        temperature=pick(0, 0.5, 1, 1.7),
        top_k=pick(0, 0, 1, 5, 50, 1000),
        top_p=pick(1, 1, 0.0, 0.3, 0.5, 0.95),
        min_p=pick(0, 0, 0.0001, 0.1, 1),
        repetition_penalty=pick(1, 1.3, 0.8),
        presence_penalty=pick(0, 0.5),
        frequency_penalty=pick(0, 0.1, -0.1),
        seed=rng.integers(0, 2**64, s, dtype=np.uint64),
        position=rng.integers(0, 2**40, s),
        num_candidates=pick(0, 1, 4, 20, v),
        keep_tail=rng.random(s) < 0.5,
        history=[{int(t): int(rng.integers(3)) for t in rng.integers(0, v, 8)} for _ in range(s)],
        bias=[{int(t): float(rng.choice([-np.inf, 2, -1])) for t in rng.integers(0, v, 4)} for _ in range(s)],
    )
    return logits.to(dtype), rng.integers(0, b, s), arrays


seeds = st.integers(0, 2**32 - 1)


def assert_same(left: Selection, right: Selection, tolerance: float = 1e-11) -> None:
    """The same tokens; numbers equal to a tolerance (0: bit for bit)."""
    np.testing.assert_array_equal(left.finite, right.finite)
    for name in ("token_ids", "count", "tail"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)
    for name in ("log_probs", "noise", "tail_log_mass"):
        a, b = getattr(left, name), getattr(right, name)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=name)
