"""The engine's thread, and requests as the event loop sees them.

The engine runs steps in a thread of its own. Whatever else is to happen to it (a new request, a cancelled one, a
value to load) is a function in a queue that the thread empties before every step. After a step it notes for each
request how far its output has come and wakes the event loop once.

Outputs only grow, so nothing is copied: a reader that looks at the first `tokens` tokens and `chars` characters sees
what they were when these numbers were noted. A reader that falls behind finds more at its next look; the engine never
waits for it and nothing piles up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol, TypeVar

from vas_engine.engine.engine import Engine
from vas_engine.engine.output import OutputFront
from vas_engine.errors import VASError
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import SamplingParams

T = TypeVar("T")

log = logging.getLogger("vas_engine.serving")


class Mark(NamedTuple):
    """How far a completion had come at the end of a step."""

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


class Observer(Protocol):
    """Is told what the engine does, on the engine's thread."""

    def tokens(self, output: RequestOutput, new: int, seconds: float, first: bool) -> None:
        """A step gave a request `new` tokens, `seconds` after its tokens before (or its arrival)."""

    def step(self, seconds: float) -> None:
        """A step ended."""

    def failed_step(self) -> None:
        """A step raised."""


class Stream:
    """One submitted request as the event loop sees it.

    Attributes:
        completions: how many it asked for.
        changed: set whenever there is news; several streams may share one.
        output: grows on the engine's thread; None until the engine has taken the request in.
        error: why it ended, if it was an error.
        told: when the engine's thread last had tokens for it.
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
        """Whether the engine has looked at it: it has taken it in, or there is an error."""
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

    def update(self, news: _News) -> None:
        """Takes over what the engine's thread has noted."""
        if self.finished:
            return
        self.output, self._marks, self.error, self.finished = news
        self.changed.set()

    def fail(self, error: Exception) -> None:
        """Ends it for its reader, whatever the engine still does."""
        self.update(_News(self.output, self._marks, error, True))


class _News(NamedTuple):
    output: RequestOutput | None
    marks: tuple[Mark, ...]
    error: Exception | None
    finished: bool


class EngineThread:
    """Owns an engine and runs its steps, while there is something to run.

    Args:
        engine: nobody else may touch it from `start` to `stop`.
        tokenizer: turns ids to text; None leaves text empty.
        observer: is told of every step and token.
    """

    def __init__(self, engine: Engine, tokenizer: Any | None, observer: Observer | None = None) -> None:
        self.engine = engine
        self.observer = observer
        self.broken: BaseException | None = None
        self._front = OutputFront(engine, tokenizer)
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._ids = itertools.count(1)
        self._streams: dict[str, Stream] = {}  # the engine thread's
        self._open: set[Stream] = set()  # the event loop's
        self._lock = threading.Lock()
        self._news: dict[Stream, _News] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._running = False
        self._step_started: float | None = None
        self._idle = asyncio.Event()

    # -- the event loop's side -------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; called from the event loop that will read the streams."""
        self._loop = asyncio.get_running_loop()
        self._running = True
        self._idle.set()
        self._thread.start()

    async def stop(self) -> None:
        """Ends every request and the thread; does not wait for a step that hangs."""

        def end() -> None:
            self._running = False
            for request_id in list(self._streams):
                self._cancel(request_id)

        self._commands.put(end)
        await asyncio.to_thread(self._thread.join, 5.0)

    @property
    def open_completions(self) -> int:
        """Completions submitted and not finished, running or waiting."""
        return sum(stream.completions for stream in self._open)

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def where(self) -> str:
        """What the engine's thread is doing: its stack."""
        frame = sys._current_frames().get(self._thread.ident or -1)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, changed: asyncio.Event, **options: Any
    ) -> Stream:
        """Hands a request to the engine, with the options of `OutputFront.add`; its errors come out of the stream."""
        stream = Stream(str(next(self._ids)), params.n, changed)
        if self.broken is not None:
            stream.fail(VASError(f"the engine has stopped: {self.broken!r}"))
            return stream
        self._open.add(stream)
        self._idle.clear()
        self._commands.put(lambda: self._add(stream, prompt_ids, params, options))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a request before the next step; harmless when it has ended."""
        if stream in self._open:
            self._commands.put(lambda: self._cancel(stream.request_id))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Runs a function on the engine's thread between two steps and returns its result or raises its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            try:
                result = function(self.engine)
            except Exception as error:
                loop.call_soon_threadsafe(_settle, future, None, error)
            else:
                loop.call_soon_threadsafe(_settle, future, result, None)

        self._commands.put(run)
        return await future

    async def idle(self) -> None:
        """Waits until no request is open."""
        await self._idle.wait()

    def _deliver(self) -> None:
        with self._lock:
            news, self._news = self._news, {}
        for stream, new in news.items():
            stream.update(new)
            if new.finished:
                self._open.discard(stream)
        if not self._open:
            self._idle.set()

    # -- the engine thread's side ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                if not self._running:
                    return
                self._step()
        except BaseException as error:  # nothing can run any more: say so to whoever waits
            self.broken = error
            log.critical("engine stopped", exc_info=error)
            failure = VASError(f"the engine has stopped: {error!r}")
            self._tell([(stream, _News(None, (), failure, True)) for stream in self._streams.values()])

    def _obey(self) -> None:
        """Runs the commands at hand; waits for one if there is nothing else to do."""
        while self._running and not self.engine.has_unfinished:
            self._commands.get()()
        while not self._commands.empty():
            self._commands.get()()

    def _step(self) -> None:
        self._step_started = started = time.monotonic()
        try:
            touched = self._front.step()
        except Exception as error:
            log.error("step failed", exc_info=error)
            if self.observer is not None:
                self.observer.failed_step()
            touched = self._front.recover(error)
        finally:
            self._step_started = None
        now = time.monotonic()
        if self.observer is not None:
            self.observer.step(now - started)
        self._publish(touched, now)

    def _add(self, stream: Stream, prompt_ids: Sequence[int], params: SamplingParams, options: dict[str, Any]) -> None:
        try:
            output = self._front.add(stream.request_id, prompt_ids, params, **options)
        except VASError as error:
            self._tell([(stream, _News(None, (), error, True))])
            return
        stream.told = output.metrics.arrival
        self._streams[stream.request_id] = stream
        self._tell([(stream, _News(output, (Mark(),) * params.n, None, False))])

    def _cancel(self, request_id: str) -> None:
        output = self._front.cancel(request_id)
        if output is not None:
            self._publish([output], time.monotonic())

    def _publish(self, touched: Sequence[RequestOutput], now: float) -> None:
        news = []
        for output in touched:
            stream = self._streams[output.request_id]
            marks = tuple(Mark(len(o.token_ids), len(o.text), o.finished) for o in output.outputs)
            finished = output.finished
            if self.observer is not None:
                new = sum(len(o.delta_token_ids) for o in output.outputs)
                if new:
                    first = output.metrics.generated_tokens == new
                    self.observer.tokens(output, new, now - stream.told, first)
                    stream.told = now
            if finished:
                del self._streams[output.request_id]
            news.append((stream, _News(output, marks, output.error, finished)))
        self._tell(news)

    def _tell(self, news: Sequence[tuple[Stream, _News]]) -> None:
        if not news or self._loop is None:
            return
        with self._lock:
            wake = not self._news
            self._news.update(news)
        if wake:
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._deliver)


def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # whoever asked has gone
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
