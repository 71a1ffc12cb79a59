"""A request's way from what is to run to the answer: whole, or as events while it grows."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vas_engine.errors import VASError
from vas_engine.outputs import RequestOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving import protocol
from vas_engine.serving.errors import ServingError, as_serving_error, json_response, to_json
from vas_engine.serving.replies import Reply, usage
from vas_engine.serving.requests import Job
from vas_engine.serving.security import salt_of
from vas_engine.serving.state import State
from vas_engine.serving.stream import Delta

log = logging.getLogger("vas_engine.serving")


async def answer(
    request: Request,
    state: State,
    body: protocol.Sampling,
    job: Job,
    prompts: Sequence[Prompt],
    reply: Reply,
    started: float,
) -> Response:
    """Runs a job and answers with its outputs, whole or as a stream.

    Args:
        prompts: with their token ids, where there is a tokenizer.
        started: time of the monotonic clock at which the request came.

    Raises:
        ServingError: it is not taken in, it failed before the first of a stream, or its client has gone.
    """
    salt = salt_of(request.scope["state"]["key"], body.cache_salt, state.settings.salt_per_key)
    state.admit(len(prompts) * job.params.n)
    deadline = None if body.vas_deadline_ms is None else started + body.vas_deadline_ms / 1000
    options = {"priority": body.priority or 0, "salt": salt, "deadline": deadline}
    request.scope["state"]["told"] |= {"stream": bool(body.stream), "model": body.model}
    work = Work(state, prompts, job.params, options, request.scope["state"]["told"])
    streaming = False  # a stream closes its work itself
    try:
        await _unless_gone(request, work.accepted())
        if body.stream:
            wanted = body.stream_options is not None and bool(body.stream_options.include_usage)
            stream = EventStream(_chunks(work, reply, wanted), work, state.settings.write_timeout)
            streaming = True
            return stream
        return json_response(reply.response(await _unless_gone(request, work.results())))
    except Exception as error:
        raise _reported(error) from error
    finally:
        if not streaming:
            work.close()


class Work:
    """The engine's part of one HTTP request: a stream for each prompt, their time, their end.

    Args:
        options: of `OutputFront.add`.
        told: is given what there is to tell of the request when it has ended.
    """

    def __init__(
        self,
        state: State,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        options: dict[str, Any],
        told: dict[str, Any],
    ) -> None:
        self.state, self._told = state, told
        self._closed = False
        self._changed = asyncio.Event()
        self.streams = [state.worker.submit(prompt, params, self._changed, **options) for prompt in prompts]
        self._timer = asyncio.get_running_loop().call_later(state.settings.request_timeout, self._expire)

    @property
    def outputs(self) -> list[RequestOutput]:
        return [stream.output for stream in self.streams if stream.output is not None]

    async def accepted(self) -> None:
        """Waits until the engine has taken in all of it; raises the error of what it does not take."""
        while not all(stream.accepted for stream in self.streams):
            await self._news()
        self._raise()

    async def results(self) -> list[RequestOutput]:
        """The whole outputs, when they are there."""
        while not all(stream.finished for stream in self.streams):
            self._raise()
            await self._news()
        self._raise()
        return self.outputs

    async def deltas(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        """What the streams gained, with their places, whenever they did; raises the first error."""
        while True:
            finished = all(stream.finished for stream in self.streams)
            news = [(place, delta) for place, stream in enumerate(self.streams) for delta in stream.take()]
            if news:
                yield news
            self._raise()
            if finished:
                return
            await self._news()

    async def _news(self) -> None:
        await self._changed.wait()
        self._changed.clear()

    def _raise(self) -> None:
        for stream in self.streams:
            if stream.error is not None:
                raise stream.error

    def _expire(self) -> None:
        limit = self.state.settings.request_timeout
        for stream in self.streams:
            stream.fail(TimeoutError(f"the request took longer than {limit:g} s and was cancelled"))

    def close(self) -> None:
        """Cancels what has not ended, and tells what there was; again is harmless."""
        if self._closed:
            return
        self._closed = True
        self._timer.cancel()
        for stream in self.streams:
            self.state.worker.cancel(stream)
        outputs = self.outputs
        for output in outputs:
            self.state.metrics.finished(output)
        if outputs:
            metrics = [output.metrics for output in outputs]
            completions = [completion for output in outputs for completion in output.outputs]
            kl = [completion.kl for completion in completions if completion.kl is not None]
            firsts = [m.time_to_first_token for m in metrics if m.time_to_first_token is not None]
            self._told |= usage(outputs) | {
                "value_evaluations": sum(m.value_evaluations for m in metrics),
                "limited_tokens": sum(m.limited_tokens for m in metrics),
                "finish_reasons": [completion.finish_reason for completion in completions],
                "time_to_first_token": min(firsts, default=None),
                "kl": sum(kl) if kl else None,
            }


async def _chunks(work: Work, reply: Reply, with_usage: bool) -> AsyncGenerator[bytes]:
    left = sum(stream.completions for stream in work.streams)
    try:
        async for news in work.deltas():
            chunks = [reply.chunk(place, delta) for place, delta in news]
            left -= sum(delta.finished for _, delta in news)
            if not left:
                chunks[-1] |= reply.last(work.outputs)
            yield b"".join(_event(chunk) for chunk in chunks)
        if with_usage:
            yield _event(reply.usage_chunk(work.outputs))
    except Exception as error:
        # The status line is long gone: the error is an event of its own.
        yield _event(_reported(error).body())
    yield b"data: [DONE]\n\n"


class EventStream(Response):
    """Server-sent events. Ends the work when the client goes, or leaves what was sent unread for too long."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes], work: Work, write_timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._work, self._write_timeout = events, work, write_timeout
        self._writing, self._sent = False, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            done: set[asyncio.Task] = set()
            stuck = -1  # the event that was on its way at the last look
            while not done and not (self._writing and stuck == self._sent):
                stuck = self._sent
                done, _ = await asyncio.wait(
                    {sending, leaving}, timeout=self._write_timeout, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            leaving.cancel()
            sending.cancel()
            self._work.close()
            with contextlib.suppress(asyncio.CancelledError):
                await sending

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events) as events:
            async for event in events:
                self._writing = True
                await send({"type": "http.response.body", "body": event, "more_body": True})
                self._writing, self._sent = False, self._sent + 1
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _reported(error: Exception) -> ServingError:
    """The error to answer with; one that nobody raised on purpose is logged."""
    if not isinstance(error, VASError | TimeoutError):
        log.error("request failed", exc_info=error)
    return as_serving_error(error)


class ClientGone(ServingError):
    """Nobody reads the answer; the status is what logs call it."""

    def __init__(self) -> None:
        super().__init__(499, "the client has gone")


async def _unless_gone(request: Request, awaitable: Awaitable) -> Any:
    """Awaits something unless the client goes first; raises ClientGone then."""
    task = asyncio.ensure_future(awaitable)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        leaving.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(body: Any) -> bytes:
    return b"data: " + to_json(body) + b"\n\n"
