"""The front of the engine: token events in, requests with text out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from vas_engine.engine.detokenizer import REPLACEMENT, Detokenizer, StopMatcher
from vas_engine.engine.event import TokenEvent
from vas_engine.interrupt import deferred_interrupt
from vas_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from vas_engine.params import SamplingParams


class Steps(Protocol):
    """The part of the engine that is used here."""

    def add_request(
        self,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float | None = None,
    ) -> None: ...

    def cancel(self, request_id: str) -> Any: ...

    def finish(self, request_id: str, index: int) -> Any: ...

    def step(self) -> list[TokenEvent]: ...

    def recover(self, error: Exception) -> list[TokenEvent]: ...

    def is_live(self, request_id: str) -> bool: ...

    @property
    def has_unfinished(self) -> bool: ...


class OutputFront:
    """Requests in text: adds them to an engine, steps it, and keeps each request's output up to date.

    Args:
        engine: runs the requests.
        tokenizer: turns ids to text; None leaves all text empty (stop strings then cannot be honoured).
    """

    def __init__(self, engine: Steps, tokenizer: Any | None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._pieces = Pieces(tokenizer)
        self._requests: dict[str, _Request] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float | None = None,
    ) -> RequestOutput:
        """Queues a request and returns its output, which grows in place with every step.

        Raises:
            VASError: the engine refuses the request; nothing is queued.
        """
        ids = list(prompt_ids)
        request = _Request(request_id, ids, params, prompt, self._pieces)
        self.engine.add_request(request_id, ids, params, priority, salt, deadline)
        self._requests[request_id] = request
        return request.output

    def step(self) -> list[RequestOutput]:
        """One step of the engine. Returns the requests it touched; `delta_*` holds what this step added."""
        return self.process(self.engine.step())

    def process(self, events: Iterable[TokenEvent]) -> list[RequestOutput]:
        """Takes a step's events into the outputs; ends sequences whose stop string came up."""
        touched: dict[str, _Request] = {}
        for event in events:
            request = self._requests.get(event.request_id)
            if request is None:
                continue
            if event.request_id not in touched:
                touched[event.request_id] = request
                request.start_step()
            try:
                stopped = request.take(event)
            except Exception as error:  # a tokenizer's, say: no matter of other requests
                self.engine.cancel(event.request_id)
                request.fail(error)
                continue
            if stopped:
                self.engine.finish(event.request_id, event.index)
        for request_id, request in touched.items():
            if request.close_if_done():
                del self._requests[request_id]
        return [request.output for request in touched.values()]

    def recover(self, error: Exception) -> list[RequestOutput]:
        """After a step that raised: ends the requests it was about with that error and returns them.

        Raises:
            RuntimeError: the engine cannot go on.
        """
        touched = {output.request_id: output for output in self.process(self.engine.recover(error))}
        lost = [request_id for request_id in self._requests if not self.engine.is_live(request_id)]
        for request_id in lost:
            request = self._requests.pop(request_id)
            if request_id not in touched:
                request.start_step()
            request.fail(error)
            request.close_if_done()
            touched[request_id] = request.output
        return list(touched.values())

    def cancel(self, request_id: str) -> RequestOutput | None:
        """Ends a request; its unfinished completions keep their text, with finish_reason "abort"."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        self.engine.cancel(request_id)
        request.start_step()
        request.end_all("abort")
        request.close_if_done()
        return request.output

    def clear(self) -> None:
        """Ends all requests and goes on until the engine holds nothing; Ctrl-C waits for that."""
        with deferred_interrupt():
            for request_id in list(self._requests):
                self.cancel(request_id)
            while self.engine.has_unfinished:
                self.engine.step()


class Pieces:
    """Texts of single tokens, remembered; `pieces[token_id]` is None without a tokenizer, for ids that are none of
    its own, and for ids below 0, which stand for tokens whose ids are not known."""

    def __init__(self, tokenizer: Any | None) -> None:
        self.tokenizer = tokenizer
        self._known: dict[int, str | None] = {}

    def __getitem__(self, token: int) -> str | None:
        if self.tokenizer is None or token < 0:
            return None
        if token not in self._known:
            try:
                self._known[token] = _piece(self.tokenizer, token)
            except Exception:  # what a tokenizer raises on ids beyond its own is its own affair
                self._known[token] = None
        return self._known[token]


def _piece(tokenizer: Any, token: int) -> str | None:
    # Alone it would lose the space that decoders strip from the start of a text.
    once, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False) for n in (1, 2))
    text = twice[len(once) :]
    # Part of a character has no text of its own: the vocabulary's name of it stands in.
    return tokenizer.convert_ids_to_tokens(token) if REPLACEMENT in text or not text else text


class _Request:
    """A running request: its output and one `_Completion` for each of its n sequences."""

    def __init__(
        self,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        prompt: str | None,
        pieces: Pieces,
    ) -> None:
        self.completions = [_Completion(index, ids, params, pieces) for index in range(params.n)]
        metrics = RequestMetrics(arrival=time.monotonic(), prompt_tokens=len(ids))
        outputs = [completion.output for completion in self.completions]
        self.output = RequestOutput(request_id, prompt, ids, outputs, metrics=metrics)

    def start_step(self) -> None:
        for output in self.output.outputs:
            output.delta_text, output.delta_token_ids = "", []

    def take(self, event: TokenEvent) -> bool:
        """Whether a stop string ended the sequence, which the engine does not know yet."""
        completion = self.completions[event.index]
        if completion.output.finished:
            return False  # drawn before the engine was told
        metrics = self.output.metrics
        metrics.value_evaluations += event.evaluations
        metrics.limited_tokens += event.limited
        if event.token_id is not None:
            metrics.generated_tokens += 1
            metrics.first_token = metrics.first_token or time.monotonic()
        if event.error is not None:
            self.output.error = self.output.error or event.error
        return completion.take(event)

    def end_all(self, reason: str) -> None:
        for completion in self.completions:
            if completion.output.finished:
                continue
            try:
                completion.end(reason)
            except Exception as error:  # it ends without the text that was held back
                self.output.error = self.output.error or error
                completion.drop()

    def fail(self, error: Exception) -> None:
        self.output.error = self.output.error or error
        self.end_all("error")

    def close_if_done(self) -> bool:
        if not self.output.finished:
            return False
        self.output.metrics.finished = time.monotonic()
        return True


class _Completion:
    """One sequence on its way to text."""

    def __init__(self, index: int, prompt_ids: list[int], params: SamplingParams, pieces: Pieces) -> None:
        self.params, self.pieces = params, pieces
        self.output = CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs = []
        if params.report_kl:
            self.output.kl = 0.0
        self.output.values = {name: [] for name in params.values or ()}
        self.stops = StopMatcher(tuple(params.stop or ()), params.include_stop_str_in_output)
        self.detokenizer = None
        if pieces.tokenizer is not None:
            self.detokenizer = Detokenizer(pieces.tokenizer, prompt_ids, params.skip_special_tokens)
        self.hidden: list[torch.Tensor] = []

    def take(self, event: TokenEvent) -> bool:
        self.output.seed = event.seed
        if event.hidden is not None:
            self.hidden.append(event.hidden)
        told = self.stops.matched is not None
        if event.token_id is not None and not told:
            self._count(event, event.token_id)
            self._print(event, event.token_id)
        if self.stops.matched is not None:
            self.output.stop_reason = self.stops.matched
            if event.finish_reason is not None or not self.params.return_hidden_states:
                self._end("error" if event.finish_reason == "error" else "stop")
            return event.finish_reason is None and not told
        if event.finish_reason is not None:
            self.output.stop_reason = self._stop_token(event)
            self.end(event.finish_reason)
        return False

    def end(self, reason: str) -> None:
        """Ends the sequence, with the text that was still held back."""
        if self.detokenizer is not None:
            self._append(self._matched(self.detokenizer.flush()))
            if self.stops.matched is None:
                self._append(self.stops.flush())
            elif reason != "error":
                self.output.stop_reason, reason = self.stops.matched, "stop"
        self._end(reason)

    def drop(self) -> None:
        """Ends the sequence, whose text cannot be made, with the text there is."""
        self._end("error")

    def _end(self, reason: str) -> None:
        self.output.finish_reason = reason
        if self.hidden:
            self.output.hidden_states = torch.cat(self.hidden)

    def _stop_token(self, event: TokenEvent) -> int | str | None:
        if event.overdue:
            return "deadline"
        asked = event.stop_token in tuple(self.params.stop_token_ids or ())
        return event.stop_token if event.finish_reason == "stop" and asked else None

    def _count(self, event: TokenEvent, token: int) -> None:
        output = self.output
        output.token_ids.append(token)
        output.delta_token_ids.append(token)
        output.cumulative_logprob += event.log_prob
        if output.cumulative_tilted_logprob is not None:
            known = not math.isnan(event.tilted_log_prob)
            output.cumulative_tilted_logprob = (
                output.cumulative_tilted_logprob + event.tilted_log_prob if known else None
            )
        if output.kl is not None:
            output.kl += event.kl
        if event.prompt_values is not None:
            output.prompt_values = event.prompt_values
        for name, value in event.values.items():
            output.values.setdefault(name, []).append(value)
        if output.logprobs is not None:
            output.logprobs.append(self._logprobs(event, token))

    def _logprobs(self, event: TokenEvent, token: int) -> dict[int, Logprob]:
        """The drawn token first, then the most probable ones in order."""
        drawn = Logprob(event.log_prob, _known(event.tilted_log_prob), None, self.pieces[token], event.values)
        entries = {token: drawn}
        for rank, (alternative, base, tilted, values) in enumerate(event.top_logprobs or (), start=1):
            if alternative == token:
                drawn.rank = rank
            else:
                entries[alternative] = Logprob(base, _known(tilted), rank, self.pieces[alternative], values)
        return entries

    def _print(self, event: TokenEvent, token: int) -> None:
        if self.detokenizer is None:
            return
        ended = event.finish_reason == "stop" and event.stop_token == token
        if not ended or self.params.include_stop_str_in_output:
            self._append(self._matched(self.detokenizer.push(token)))

    def _matched(self, text: str) -> str:
        if len(self.output.token_ids) < self.params.min_tokens:
            return self.stops.skip(text)
        return self.stops.push(text)

    def _append(self, text: str) -> None:
        self.output.text += text
        self.output.delta_text += text


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
