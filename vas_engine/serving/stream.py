"""Requests as the event loop sees them while somebody else lets their outputs grow.

Outputs only grow, so nothing is copied: a reader that looks at the first `tokens` tokens and `chars` characters sees
what they were when these numbers were noted. A reader that falls behind finds more at its next look; nobody waits for
it and nothing piles up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

from vas_engine.outputs import CompletionOutput, RequestOutput


class Mark(NamedTuple):
    """How far a completion has come."""

    tokens: int = 0
    chars: int = 0
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What a completion gained since the last look: its tokens [start, end) and text."""

    output: CompletionOutput
    start: int
    end: int
    text: str
    finished: bool


class News(NamedTuple):
    """What is known of a request at a time; `finished`: there will be no more."""

    output: RequestOutput | None
    marks: tuple[Mark, ...]
    error: Exception | None
    finished: bool

    @classmethod
    def of(cls, output: RequestOutput) -> News:
        """As the output stands."""
        marks = tuple(Mark(len(o.token_ids), len(o.text), o.finished) for o in output.outputs)
        return cls(output, marks, output.error, output.finished)


class Stream:
    """One submitted request.

    Attributes:
        completions: how many it asked for.
        changed: set whenever there is news; several streams may share one.
        output: grows; None until the request was taken in.
        error: why it ended, if it was an error.
        told: when there were last tokens for it, by its backend's reckoning.
    """

    def __init__(self, request_id: str, completions: int, changed: asyncio.Event) -> None:
        self.request_id, self.completions, self.changed = request_id, completions, changed
        self.output: RequestOutput | None = None
        self.error: Exception | None = None
        self.finished = False
        self.told = 0.0
        self._marks = self._seen = (Mark(),) * completions

    @property
    def accepted(self) -> bool:
        """Whether it was looked at: it was taken in, or there is an error."""
        return self.output is not None or self.error is not None

    def take(self) -> list[Delta]:
        """What is new since the last call."""
        if self.output is None or self._marks is self._seen:
            return []
        seen, self._seen = self._seen, self._marks
        return [
            Delta(output, old.tokens, new.tokens, output.text[old.chars : new.chars], new.finished)
            for output, old, new in zip(self.output.outputs, seen, self._marks, strict=True)
            if new != old
        ]

    def update(self, news: News) -> None:
        """Takes over what was noted."""
        if self.finished:
            return
        self.output, self._marks, self.error, self.finished = news
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """Ends it for its reader, whatever is still done for it."""
        self.update(News(self.output, self._marks, error, True))
