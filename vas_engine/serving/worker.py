"""The engine's thread.

The engine runs steps in a thread of its own. Whatever else is to happen to it (a new request, a cancelled one, a
value to load) is a function in a queue that the thread empties before every step. After a step it notes for each
request how far its output has come and wakes the event loop once.
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
from queue import SimpleQueue
from typing import Any, TypeVar

from vas_engine.engine.engine import Engine
from vas_engine.engine.output import OutputFront
from vas_engine.errors import VASError
from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving.backend import Observer, Totals, report_tokens
from vas_engine.serving.stream import Mark, News, Stream
from vas_engine.values.config import HeadConfig

T = TypeVar("T")

log = logging.getLogger("vas_engine.serving")


class EngineThread:
    """A Backend that owns an engine and runs its steps, while there is something to run.

    Args:
        engine: nobody else may touch it from `start` to `stop`.
        tokenizer: turns ids to text; None leaves text empty.
        observer: is told of every step and token.
    """

    def __init__(self, engine: Engine, tokenizer: Any | None, observer: Observer) -> None:
        engine.capture_graphs()
        self.engine = engine
        self._observer = observer
        self.broken: BaseException | None = None
        self._front = OutputFront(engine, tokenizer)
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._ids = itertools.count(1)
        self._streams: dict[str, Stream] = {}  # the engine thread's
        self._open: set[Stream] = set()  # the event loop's
        self._calls: set[asyncio.Future] = set()  # the event loop's
        self._lock = threading.Lock()
        self._news: dict[Stream, News] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._running = False
        self._step_started: float | None = None
        self._idle = asyncio.Event()

    # -- the event loop's side -------------------------------------------------------------------------------

    async def start(self) -> None:
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
    def places(self) -> int:
        return self.engine.scheduler.max_num_seqs

    @property
    def vocab_size(self) -> int:
        return self.engine.lm.vocab_size

    @property
    def open_completions(self) -> int:
        """Completions submitted and not finished, running or waiting."""
        return sum(stream.completions for stream in tuple(self._open))  # at once: other threads may look, too

    @property
    def step_seconds(self) -> float:
        """How long the present step has taken so far; 0 between steps."""
        started = self._step_started
        return 0.0 if started is None else time.monotonic() - started

    def where(self) -> str:
        """What the engine's thread is doing: its stack."""
        frame = sys._current_frames().get(self._thread.ident or -1)
        return "".join(traceback.format_stack(frame)) if frame else ""

    def heads(self) -> dict[str, HeadConfig]:
        return self.engine.guide.heads

    def totals(self) -> Totals:
        """The engine's own counts. They are single numbers, so no lock is needed."""
        scheduler, blocks, stats = self.engine.scheduler, self.engine.blocks, self.engine.stats
        scored = stats.value_rows + stats.pruned_rows
        gauges = {
            "vllm:num_requests_running": ("Completions that run", scheduler.num_running),
            "vllm:num_requests_waiting": ("Completions that wait", scheduler.num_waiting),
            "vllm:kv_cache_usage_perc": ("Share of the KV cache in use", blocks.num_used / blocks.num_blocks),
            "vas:value_evaluations_per_token": ("Value evaluations per token", stats.value_rows / max(stats.tokens, 1)),
            "vas:pruned_share": ("Share of candidates that pruning spared", stats.pruned_rows / max(scored, 1)),
            "vas:rows_per_step": ("Rows of the base model per step", stats.model_rows / max(stats.steps, 1)),
        }
        counters = {
            "vllm:num_preemptions": ("Completions pushed out of the KV cache", scheduler.num_preemptions),
            "vllm:generation_tokens": ("Tokens generated", stats.tokens),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", blocks.prefix_queried_tokens),
            "vllm:prefix_cache_hits": ("Prompt tokens found there", blocks.prefix_hit_tokens),
            "vas:steps": ("Engine steps", stats.steps),
            "vas:value_evaluations": ("Rows that value networks scored to choose tokens", stats.value_rows),
            "vas:limited_tokens": ("Tokens for which the latency bound left out candidates", stats.limited_tokens),
            "vas:pruned_evaluations": ("Candidate rows that pruning spared", stats.pruned_rows),
        }
        return Totals(gauges, counters)

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
        """Hands a request to the engine."""
        options = {"priority": priority, "salt": salt, "deadline": deadline}
        stream = Stream(str(next(self._ids)), params.n, changed)
        if self.broken is not None:
            stream.fail(_stopped(self.broken))
            return stream
        self._open.add(stream)
        self._idle.clear()
        self._commands.put(lambda: self._add(stream, prompt, params, options))
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a request before the next step; harmless when it has ended."""
        if stream in self._open:
            self._commands.put(lambda: self._cancel(stream.request_id))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Runs a function on the engine's thread between two steps and returns its result or raises its error.

        Raises:
            VASError: the engine has stopped.
        """
        if self.broken is not None:
            raise _stopped(self.broken)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)

        def run() -> None:
            try:
                result = function(self.engine)
            except Exception as error:
                _call_soon(loop, _settle, future, None, error)
            else:
                _call_soon(loop, _settle, future, result, None)

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

    def _give_up(self) -> None:
        """Tells everybody who waits for the engine that it has stopped; afterwards nobody can begin to."""
        assert self.broken is not None
        failure = _stopped(self.broken)
        self._deliver()
        for stream in self._open:
            stream.fail(failure)
        self._open.clear()
        for future in list(self._calls):
            _settle(future, None, failure)
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
            if self._loop is not None:
                _call_soon(self._loop, self._give_up)

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
            self._observer.failed_step()
            touched = self._front.recover(error)
        finally:
            self._step_started = None
        now = time.monotonic()
        self._observer.step(now - started)
        self._publish(touched, now)

    def _add(self, stream: Stream, prompt: Prompt, params: SamplingParams, options: dict[str, Any]) -> None:
        try:
            # The ids are there, or it is an error: texts were encoded elsewhere, off this thread.
            output = self._front.add(stream.request_id, prompt.encode(None), params, **options)
        except Exception as error:
            self._tell([(stream, News(None, (), error, True))])
            return
        stream.told = output.metrics.arrival
        self._streams[stream.request_id] = stream
        self._tell([(stream, News(output, (Mark(),) * params.n, None, False))])

    def _cancel(self, request_id: str) -> None:
        output = self._front.cancel(request_id)
        if output is not None:
            self._publish([output], time.monotonic())

    def _publish(self, touched: Sequence[RequestOutput], now: float) -> None:
        news = []
        for output in touched:
            stream = self._streams[output.request_id]
            latest = News.of(output)
            new = sum(len(o.delta_token_ids) for o in output.outputs)
            report_tokens(self._observer, stream, output, new, now)
            if latest.finished:
                del self._streams[output.request_id]
            news.append((stream, latest))
        self._tell(news)

    def _tell(self, news: Sequence[tuple[Stream, News]]) -> None:
        if not news or self._loop is None:
            return
        with self._lock:
            wake = not self._news
            self._news.update(news)
        if wake:
            _call_soon(self._loop, self._deliver)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *arguments: object) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
        loop.call_soon_threadsafe(function, *arguments)


def _stopped(error: BaseException) -> VASError:
    return VASError(f"the engine has stopped: {error!r}")


def _settle(future: asyncio.Future, result: Any, error: Exception | None) -> None:
    if future.done():  # whoever asked has gone
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
