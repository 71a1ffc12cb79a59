"""When steps begin, how long they take, and which sequences that makes late."""

from __future__ import annotations

import time

from vas_engine.engine.sequence import Sequence

_FOLLOW = 0.1  # share of a step's news in the running mean


class Clock:
    """Times of an engine's steps, in seconds of `time.monotonic`.

    A step's tokens take the time since the step before ended, for what the caller does in between keeps them waiting
    too, unless there was nothing to go on with.

    Attributes:
        started: when the present step began.
        usual: what a step's tokens take, a running mean.
    """

    def __init__(self) -> None:
        self.started = self.usual = 0.0
        self._since = 0.0
        self._left: float | None = None  # when the last step ended, if there was more to do

    def start(self) -> None:
        """A step begins."""
        self.started = time.monotonic()
        self._since = self.started if self._left is None else self._left

    def stop(self, worked: bool, more: bool) -> None:
        """A step ends, which ran the models or not; `more`: there is something for the next one to do."""
        now = time.monotonic()
        if worked:
            self.usual += _FOLLOW * (now - self._since - self.usual)
        self._left = now if worked and more else None

    @property
    def elapsed(self) -> float:
        """What the present step's tokens have taken so far."""
        return time.monotonic() - self._since

    def is_overdue(self, sequence: Sequence) -> bool:
        """Whether its deadline had come when the step began."""
        return sequence.deadline is not None and sequence.deadline <= self.started

    def is_behind(self, sequence: Sequence) -> bool:
        """Whether it will not have all its tokens by its deadline if steps take what they took."""
        most = sequence.params.max_tokens
        if sequence.deadline is None or most is None:
            return False
        return (most - sequence.num_generated) * self.usual > sequence.deadline - self.started
