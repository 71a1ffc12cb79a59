"""What runs a server's requests, as the application sees it: an engine's thread, or an endpoint behind the server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving.stream import Stream
from vas_engine.values.config import HeadConfig


class Totals(NamedTuple):
    """What a backend counts by itself: name -> (what it is, number)."""

    gauges: Mapping[str, tuple[str, float]]
    counters: Mapping[str, tuple[str, float]]


class Observer(Protocol):
    """Is told what a backend does, on whatever thread it does it."""

    def tokens(self, output: RequestOutput, new: int, seconds: float, first: bool) -> None:
        """A request got `new` tokens, `seconds` after its tokens before (or its arrival)."""

    def step(self, seconds: float) -> None:
        """A step ended."""

    def failed_step(self) -> None:
        """A step raised."""


def report_tokens(observer: Observer, stream: Stream, output: RequestOutput, new: int, now: float) -> None:
    """Tells an observer of a request's `new` tokens, if any, at a time of the monotonic clock."""
    if new:
        observer.tokens(output, new, now - stream.told, first=output.metrics.generated_tokens == new)
        stream.told = now


class Backend(Protocol):
    """Runs requests and lets their outputs grow. Called on the event loop that started it.

    Attributes:
        broken: why nothing can run any more; None while it can.
    """

    broken: BaseException | None

    @property
    def places(self) -> int:
        """Completions that run at once; more wait."""

    @property
    def open_completions(self) -> int:
        """Completions submitted and not finished, running or waiting."""

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 between steps."""

    @property
    def vocab_size(self) -> int | None:
        """Where token ids end; None where nothing knows of ids."""

    async def start(self) -> None:
        """Begins to take requests."""

    async def stop(self) -> None:
        """Ends every request, and itself."""

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        changed: asyncio.Event,
        *,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float | None = None,
    ) -> Stream:
        """Takes a request in; its errors come out of the stream.

        Args:
            prompt: its ids are there wherever there is a tokenizer.
            changed: set whenever there is news of it.
            priority: larger gives way to smaller.
            salt: only requests of the same salt share cached prefixes.
            deadline: time of the monotonic clock at which it ends with what it has.
        """

    def cancel(self, stream: Stream) -> None:
        """Ends a request soon; harmless when it has ended."""

    async def idle(self) -> None:
        """Waits until no request is open."""

    def where(self) -> str:
        """What the present step is doing: a stack."""

    def heads(self) -> Mapping[str, HeadConfig]:
        """The head behind the name of each value that is loaded."""

    def totals(self) -> Totals:
        """The present numbers, from any thread."""
