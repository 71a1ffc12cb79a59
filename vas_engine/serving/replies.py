"""From outputs to OpenAI's answers: whole ones and the chunks of a stream."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

from vas_engine.outputs import CompletionOutput, Logprob, RequestOutput
from vas_engine.serving.requests import Job
from vas_engine.serving.stream import Delta

LOWEST = -9999.0  # what OpenAI writes for the log-probability of the impossible


class Reply:
    """Answers to one request, in the form of one endpoint.

    Args:
        job: what was asked.
        model: the name to answer under.
        prompts: texts to begin with, for `echo`.
    """

    prefix, whole, part = "", "", ""

    def __init__(self, job: Job, model: str, prompts: Sequence[str | None] = ()) -> None:
        self.job, self.model, self.prompts = job, model, prompts
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def response(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The whole answer; `outputs` are those of the request's prompts."""
        choices = []
        for place, output in enumerate(outputs):
            for rank, completion in enumerate(self._best(output.outputs)):
                whole = Delta(completion, 0, len(completion.token_ids), completion.text, True)
                choices.append(self._choice(place * self.job.n + rank, place, whole))
        return {**self._head(self.whole), "choices": choices, "usage": usage(outputs), "vas": self._guidance(outputs)}

    def chunk(self, place: int, delta: Delta) -> dict[str, Any]:
        """A chunk of the stream: what one completion of the prompt at `place` gained."""
        choice = self._delta(place * self.job.n + delta.output.index, place, delta)
        return {**self._head(self.part), "choices": [choice]}

    def last(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """What the chunk that ends the stream tells beside its own."""
        return {"vas": self._guidance(outputs)}

    def usage_chunk(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {**self._head(self.part), "choices": [], "usage": usage(outputs)}

    def _best(self, completions: list[CompletionOutput]) -> list[CompletionOutput]:
        if len(completions) == self.job.n:
            return completions
        return sorted(completions, key=self._merit, reverse=True)[: self.job.n]

    def _merit(self, completion: CompletionOutput) -> float:
        if self.job.rank_by is None:
            return completion.cumulative_logprob / max(len(completion.token_ids), 1)
        series = completion.values[self.job.rank_by]
        return series[-1] if series else -math.inf  # its deadline came before its first token

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _guidance(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        return {
            "weights": self.job.weights,
            "profile": self.job.profile,
            "value_evaluations": sum(output.metrics.value_evaluations for output in outputs),
            "limited_tokens": sum(output.metrics.limited_tokens for output in outputs),
        }

    def _end(self, delta: Delta) -> dict[str, Any]:
        output = delta.output
        if not delta.finished:
            return {"finish_reason": None, "stop_reason": None}
        return {"finish_reason": output.finish_reason, "stop_reason": output.stop_reason}

    def _choice_guidance(self, delta: Delta) -> dict[str, Any]:
        output, job = delta.output, self.job
        told: dict[str, Any] = {"seed": output.seed}
        if job.return_values or job.candidates is not None:
            told["token_ids"] = [known_id(token) for token in output.token_ids[delta.start : delta.end]]
        if job.return_values:
            if delta.start == 0:
                told["prompt_values"] = numbers(output.prompt_values)
            told["values"] = {
                name: [number(v) for v in series[delta.start : delta.end]] for name, series in output.values.items()
            }
        if job.candidates is not None:
            positions = (output.logprobs or [])[delta.start : delta.end]
            told["candidates"] = [candidates(position, job.candidates) for position in positions]
        if job.return_kl:
            told["kl"] = number(output.kl)
        if delta.finished:
            told["cumulative_logprob"] = number(output.cumulative_logprob)
            told["cumulative_tilted_logprob"] = number(output.cumulative_tilted_logprob)
        return told

    def _choice(self, index: int, place: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, index: int, place: int, delta: Delta) -> dict[str, Any]:
        raise NotImplementedError


class CompletionReply(Reply):
    """Of /v1/completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job, model: str, prompts: Sequence[str | None] = ()) -> None:
        super().__init__(job, model, prompts)
        self._chars: dict[int, int] = {}  # characters of the tokens told so far, by choice

    def _choice(self, index: int, place: int, delta: Delta) -> dict[str, Any]:
        echoed = (self.prompts[place] or "") if self.job.echo and delta.start == 0 else ""
        return {
            "index": index,
            "text": echoed + delta.text,
            **self._end(delta),
            "logprobs": self._logprobs(index, delta),
            "vas": self._choice_guidance(delta),
        }

    _delta = _choice

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        count, output = self.job.logprobs, delta.output
        if count is None:
            return None
        told: dict[str, list] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
        told |= {"vas_tilted_token_logprobs": [], "vas_tilted_top_logprobs": []}
        offset = self._chars.get(index, 0)
        for position, entries in enumerate((output.logprobs or [])[delta.start : delta.end], start=delta.start):
            drawn = output.token_ids[position]
            text = token_text(drawn, entries[drawn])
            tops = top(entries, count)
            told["tokens"].append(text)
            told["token_logprobs"].append(logprob(entries[drawn].logprob))
            told["vas_tilted_token_logprobs"].append(logprob(entries[drawn].tilted_logprob))
            told["top_logprobs"].append({token_text(t, e): logprob(e.logprob) for t, e in tops})
            told["vas_tilted_top_logprobs"].append({token_text(t, e): logprob(e.tilted_logprob) for t, e in tops})
            told["text_offset"].append(offset)
            offset += len(text)
        self._chars[index] = offset
        return told


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, index: int, place: int, delta: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(delta)}

    def _delta(self, index: int, place: int, delta: Delta) -> dict[str, Any]:
        opening = {"role": "assistant"} if delta.start == 0 else {}
        return {"index": index, "delta": {**opening, "content": delta.text}, **self._rest(delta)}

    def _rest(self, delta: Delta) -> dict[str, Any]:
        return {**self._end(delta), "logprobs": self._logprobs(delta), "vas": self._choice_guidance(delta)}

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        count, output = self.job.logprobs, delta.output
        if count is None:
            return None
        content = []
        for position, entries in enumerate((output.logprobs or [])[delta.start : delta.end], start=delta.start):
            drawn = output.token_ids[position]
            tops = [_alternative(token, entry) for token, entry in top(entries, count)] if count else []
            content.append({**_alternative(drawn, entries[drawn]), "top_logprobs": tops})
        return {"content": content, "refusal": None}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    """Tokens of a request, by OpenAI's names."""
    prompt = sum(output.metrics.prompt_tokens for output in outputs)
    completion = sum(output.metrics.generated_tokens for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def top(entries: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most probable tokens of a position."""
    ranked = [(token, entry) for token, entry in entries.items() if entry.rank is not None and entry.rank <= count]
    return sorted(ranked, key=lambda pair: pair[1].rank or 0)


def candidates(entries: dict[int, Logprob], count: int) -> list[dict[str, Any]]:
    """The drawn token, then the others of the `count` most probable, with their values."""
    drawn = next(iter(entries))
    tokens = [(drawn, entries[drawn]), *((t, e) for t, e in top(entries, count) if t != drawn)]
    return [
        {
            "id": known_id(token),
            "token": entry.decoded_token,
            "logprob": logprob(entry.logprob),
            "tilted_logprob": logprob(entry.tilted_logprob),
            "values": numbers(entry.values),
        }
        for token, entry in tokens
    ]


def known_id(token: int) -> int | None:
    """Endpoints that tell no token ids leave negative numbers in their place."""
    return token if token >= 0 else None


def _alternative(token: int, entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token
    return {
        "token": token_text(token, entry),
        "logprob": logprob(entry.logprob),
        "bytes": None if text is None else list(text.encode()),
        "vas_tilted_logprob": logprob(entry.tilted_logprob),
    }


def token_text(token: int, entry: Logprob) -> str:
    return f"token_id:{token}" if entry.decoded_token is None else entry.decoded_token


def logprob(value: float | None) -> float | None:
    """JSON has no infinity."""
    return None if value is None or math.isnan(value) else max(value, LOWEST)


def number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def numbers(values: dict[str, float]) -> dict[str, float | None]:
    return {name: number(value) for name, value in values.items()}
