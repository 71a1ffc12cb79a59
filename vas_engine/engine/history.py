"""What penalties look at: which tokens a sequence holds, and how often each was generated."""

from __future__ import annotations

import numpy as np


class History:
    """Tokens of one sequence, in arrays that grow with it: a step takes them as they stand, however long it is.

    Args:
        prompt_len: leading tokens that were not generated.
    """

    def __init__(self, prompt_len: int) -> None:
        self._prompt_len, self._seen = prompt_len, 0
        self._place: dict[int, int] = {}
        self._ids, self._counts = np.zeros(64, np.int32), np.zeros(64, np.int32)

    def follow(self, token_ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Takes in the tokens that are new since the last call.

        Returns:
            int32 [distinct], each token once, and int32 [distinct], times it was generated (0: only in the prompt);
            good until the next call.
        """
        for token in token_ids[self._seen :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._ids, self._counts = (np.pad(array, (0, place)) for array in (self._ids, self._counts))
            self._ids[place] = token
            self._counts[place] += self._seen >= self._prompt_len
            self._seen += 1
        distinct = len(self._place)
        return self._ids[:distinct], self._counts[:distinct]
