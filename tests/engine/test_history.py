"""Which tokens a sequence holds and how often each was generated, kept up as it grows."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np

from vas_engine.engine.history import History


class Watched(list):
    """Counts the tokens that are looked at."""

    looked = 0

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.looked += len(found) if isinstance(place, slice) else 1
        return found


def test_counts_are_those_of_the_generated_tokens() -> None:
    rng = random.Random(0)
    prompt = [rng.randrange(400) for _ in range(150)]
    history, tokens = History(len(prompt)), Watched(prompt)
    for _ in range(60):
        tokens += [rng.randrange(400) for _ in range(rng.choice([0, 1, 1, 9]))]
        ids, counts = history.follow(tokens)
        generated = Counter(tokens[len(prompt) :])
        assert dict(zip(ids.tolist(), counts.tolist(), strict=True)) == {token: generated[token] for token in tokens}
        assert ids.dtype == counts.dtype == np.int32


def test_each_token_is_looked_at_once() -> None:
    history, tokens = History(0), Watched(range(100))
    for token in range(1000):
        tokens.append(token % 7)
        history.follow(tokens)
    assert tokens.looked == len(tokens) == 1100
