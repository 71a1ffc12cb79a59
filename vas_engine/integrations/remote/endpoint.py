"""One OpenAI-compatible completions endpoint: the next token and its most probable alternatives, whatever happens."""

from __future__ import annotations

import asyncio
import email.utils
import json
import math
import random
from asyncio import sleep
from collections.abc import Mapping
from dataclasses import dataclass
from time import monotonic, time
from types import ModuleType
from typing import Any

from vas_engine import arguments
from vas_engine.errors import VASError
from vas_engine.integrations.remote.errors import (
    EndpointAnswerError,
    EndpointError,
    EndpointTimeoutError,
    EndpointUnavailableError,
    SpendLimitError,
)

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_BACKOFF = 60.0
LONGEST_RETRY_AFTER = 1e9  # seconds; more is a mistake, as are infinity and NaN
TOKEN_ID = "token_id:"
LLAMA_CPP = "me"  # what llama-cpp-python's server calls the owner of its models


def _httpx() -> ModuleType:
    try:
        import httpx
    except ImportError as error:
        raise VASError("models behind an API need httpx: pip install 'vas-engine[remote]'") from error
    return httpx


@arguments.names_nearest({"max_tokens": "max_spent_tokens", "retries": "max_retries"})
@dataclass(frozen=True, kw_only=True)
class Limits:
    """How an endpoint may be used. What cannot work raises InvalidArgumentError.

    Attributes:
        timeout: seconds for one answer.
        max_retries: further tries of a request after an answer that may be better next time.
        backoff: seconds before the first of them, doubled every time, with jitter; a Retry-After comes before it.
        max_wait: longest Retry-After, in seconds, that is waited for; a longer one ends the request.
        concurrency: requests on their way at once, over one pool of connections.
        requests_per_second: a rate that is never exceeded; None is none.
        max_requests: ceiling of requests sent, further tries included; None is none.
        max_spent_tokens: ceiling of tokens that the endpoint says it used, prompts included; None is none. Requests
            that were on their way when it was reached still count.
    """

    timeout: float = 60.0
    max_retries: int = 6
    backoff: float = 0.5
    max_wait: float = 600.0
    concurrency: int = 8
    requests_per_second: float | None = None
    max_requests: int | None = None
    max_spent_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("timeout", "backoff", "max_wait"):
            arguments.real(name, getattr(self, name), 0.0, above_low=name == "timeout")
        for name, least in (("max_retries", 0), ("concurrency", 1)):
            arguments.integer(name, getattr(self, name), least)
        if self.requests_per_second is not None:
            arguments.real("requests_per_second", self.requests_per_second, 0.0, above_low=True)
        for name in ("max_requests", "max_spent_tokens"):
            if getattr(self, name) is not None:
                arguments.integer(name, getattr(self, name), 1)


@dataclass
class Spent:
    """What was used so far."""

    requests: int = 0
    tokens: int = 0
    retries: int = 0


@dataclass(frozen=True)
class Alternative:
    """A token that may come next.

    Attributes:
        text: as the endpoint writes it. id: where the endpoint tells.
        logprob: in nats.
    """

    text: str
    logprob: float
    id: int | None = None


@dataclass(frozen=True)
class NextToken:
    """What one request tells about the next token.

    Attributes:
        drawn: the token that the endpoint drew at temperature 1.
        ended: that token ends the text.
        top: the most probable tokens, best first.
        text: what the drawn token adds to the text.
        read: tokens that the endpoint read for it, where it tells.
    """

    drawn: Alternative
    ended: bool
    top: list[Alternative]
    text: str = ""
    read: int | None = None


@dataclass(frozen=True)
class Card:
    """What an endpoint says of itself.

    Attributes:
        id_fields: fields by which it is asked for token ids; None where it is not known to tell any.
        silent_end: the end of a text is written as an alternative without text.
        max_model_len: tokens that prompt and completion may have together; None is not known.
    """

    id_fields: dict[str, Any] | None = None
    max_model_len: int | None = None
    silent_end: bool = False


class Endpoint:
    """`POST {base_url}/completions`, one token at a time; a context manager, of one event loop.

    Args:
        base_url: as clients of OpenAI write it, with /v1.
        model: as the endpoint calls it.
        api_key: sent as a bearer token.
        limits: see Limits.
        extra_body: fields for every request, such as those that switch a server's own defaults of top_k off.
        spent: goes on counting there.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        limits: Limits | None = None,
        extra_body: Mapping[str, Any] | None = None,
        spent: Spent | None = None,
    ) -> None:
        self.base_url, self.model, self._api_key = base_url.rstrip("/"), model, api_key
        self.limits, self.spent = limits or Limits(), spent or Spent()
        self._extra = dict(extra_body or {})
        self._jitter = random.Random()
        self._next_start = 0.0

    async def __aenter__(self) -> Endpoint:
        httpx = _httpx()
        headers = {"Authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        pool = httpx.Limits(max_connections=self.limits.concurrency, max_keepalive_connections=self.limits.concurrency)
        self._client = httpx.AsyncClient(headers=headers, timeout=self.limits.timeout, limits=pool)
        self._slots = asyncio.Semaphore(self.limits.concurrency)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._client.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """Cards of the models that are served.

        Raises:
            EndpointError: no answer, or no such list.
        """
        cards = (await self._send("GET", f"{self.base_url}/models")).get("data")
        if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
            raise EndpointAnswerError(f"{self.base_url}/models: the answer is no list of models")
        return cards

    async def card(self) -> Card:
        """What is known of the model; an endpoint without a list of models says nothing.

        Raises:
            EndpointUnavailableError: no answer.
        """
        try:
            cards = await self.models()
        except EndpointUnavailableError:
            raise
        except EndpointError:
            return Card()
        owners = {card.get("owned_by") for card in cards}
        named = next((card for card in cards if card.get("id") == self.model), {})
        fields: dict[str, Any] | None = None
        if "vas_engine" in owners and named.get("vas_token_ids", True):
            fields = {"vas_return_candidates": 0}
        elif "vllm" in owners:
            fields = {"return_tokens_as_token_ids": True}
        length = named.get("max_model_len")
        return Card(fields, length if isinstance(length, int) else None, LLAMA_CPP in owners)

    async def next_token(
        self, prompt: str | list[int], count: int, seed: int, fields: Mapping[str, Any] | None = None
    ) -> NextToken:
        """The `count` most probable next tokens, and one drawn from all of them.

        Args:
            prompt: text or token ids.
            seed: of the endpoint's draw, below 2**31.
            fields: see `Card`.

        Raises:
            EndpointError: the endpoint refuses, does not answer, or answers without log-probabilities.
            SpendLimitError: a ceiling is reached; nothing was sent.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 1.0,
            "top_p": 1.0,
            "logprobs": count,
            "seed": seed,
            **({name: count if name == "vas_return_candidates" else v for name, v in (fields or {}).items()}),
            **self._extra,
        }
        answer = await self._send("POST", f"{self.base_url}/completions", body)
        try:
            return _read(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise EndpointAnswerError(
                f"{self.base_url}: the answer has no log-probabilities of a token ({error!r}); the endpoint must offer "
                f"`logprobs` on /completions. It begins {json.dumps(answer)[:200]}"
            ) from error

    async def _send(self, method: str, url: str, body: Any = None) -> dict[str, Any]:
        """One JSON object, tried until it comes."""
        httpx = _httpx()
        for attempt in range(self.limits.max_retries + 1):
            async with self._slots:
                self._check_ceilings(method)
                await self._wait_for_turn()
                wait, error = None, EndpointError(url)
                try:
                    response = await self._client.request(method, url, json=body)
                    if response.status_code < 300:
                        return self._count(_parse(response))
                    error = _refused(url, response)
                    wait = error.retry_after
                except EndpointAnswerError as broken:
                    error = broken
                except httpx.TimeoutException:
                    error = EndpointTimeoutError(f"{url}: no answer within {self.limits.timeout:g} s")
                except httpx.TransportError as gone:
                    name = type(gone).__name__
                    error = EndpointUnavailableError(f"{url}: no answer ({name}: {gone}); is it running there?")
                except httpx.HTTPError as wrong:
                    raise EndpointError(f"{url}: {wrong}") from wrong
            final = type(error) is EndpointError or attempt == self.limits.max_retries
            if final or (wait is not None and wait > self.limits.max_wait):
                error.add_note(f"tries: {attempt + 1}" + (f"; it asks to wait {wait:.0f} s" if wait else ""))
                raise error
            self.spent.retries += 1
            pause = min(self.limits.backoff * 2**attempt, LONGEST_BACKOFF) * (1 + self._jitter.random()) / 2
            await sleep(pause if wait is None else wait)
        raise AssertionError("the last try returns or raises")

    def _check_ceilings(self, method: str) -> None:
        if method == "GET":
            return
        for name, ceiling, used in (
            ("max_requests", self.limits.max_requests, self.spent.requests),
            ("max_spent_tokens", self.limits.max_spent_tokens, self.spent.tokens),
        ):
            if ceiling is not None and used >= ceiling:
                raise SpendLimitError(f"{name}={ceiling} is reached ({used} used); raise it to go on")
        self.spent.requests += 1

    def _count(self, answer: dict[str, Any]) -> dict[str, Any]:
        usage = answer.get("usage")
        if isinstance(usage, dict) and isinstance(usage.get("total_tokens"), int):
            self.spent.tokens += usage["total_tokens"]
        return answer

    async def _wait_for_turn(self) -> None:
        if self.limits.requests_per_second is None:
            return
        now = monotonic()
        start = max(now, self._next_start)
        self._next_start = start + 1 / self.limits.requests_per_second
        await sleep(start - now)


def _parse(response: Any) -> dict[str, Any]:
    try:
        answer = response.json()
    except (ValueError, RecursionError) as error:  # cut off in the middle, no JSON at all, or nested without end
        raise EndpointAnswerError(
            f"{response.url}: the answer is no JSON ({error}); it begins {response.text[:100]!r}", response.status_code
        ) from error
    if not isinstance(answer, dict):
        raise EndpointAnswerError(f"{response.url}: the answer is no JSON object", response.status_code)
    return answer


def _refused(url: str, response: Any) -> EndpointError:
    try:
        told = response.json()["error"]
        told = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError, RecursionError):
        told = response.text[:200]
    message = f"{url}: {response.status_code} {response.reason_phrase}: {told}"
    kind = EndpointUnavailableError if response.status_code in RETRIED else EndpointError
    return kind(message, response.status_code, str(told), _retry_after(response))


def _retry_after(response: Any) -> float | None:
    """Seconds, from either form of the header (RFC 9110, section 10.2.3); None for what no clock can count."""
    header = response.headers.get("Retry-After")
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header).timestamp() - time()
        except (ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if abs(seconds) < LONGEST_RETRY_AFTER else None


def _read(answer: Mapping[str, Any]) -> NextToken:
    choice = answer["choices"][0]
    ended = choice.get("finish_reason") == "stop"
    logprobs = choice["logprobs"]
    read = answer["usage"].get("prompt_tokens") if isinstance(answer.get("usage"), dict) else None
    told = (choice.get("vas") or {}).get("candidates")
    if told:
        # This engine's own: the drawn token first, then the most probable others.
        tokens = [Alternative(_text(t["token"] or ""), _logprob(t["logprob"]), _id(t["id"])) for t in told[0]]
        return NextToken(tokens[0], ended, _best(tokens), _text(choice["text"]), read)
    if not logprobs["tokens"] and ended:  # the end of the text goes without a token of its own
        top = logprobs["top_logprobs"] or [{}]
        best = _best([_alternative(*pair) for pair in top[0].items()])
        return NextToken(Alternative("", -math.inf), True, best, read=read)
    drawn = _alternative(logprobs["tokens"][0], logprobs["token_logprobs"][0])
    top = {_alternative(*pair) for pair in logprobs["top_logprobs"][0].items()}
    return NextToken(drawn, ended, _best([*top]), _text(choice["text"]), read)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _id(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError(f"{value!r} is no token id")
    return value


def _alternative(text: str, logprob: Any) -> Alternative:
    known = int(text[len(TOKEN_ID) :]) if text.startswith(TOKEN_ID) else None
    return Alternative(text, _logprob(logprob), known)


def _logprob(value: Any) -> float:
    number = float(value)
    if math.isnan(number) or number > 1e-3:
        raise ValueError(f"{number} is no log-probability")
    return min(number, 0.0)


def _best(tokens: list[Alternative]) -> list[Alternative]:
    return sorted(tokens, key=lambda token: (-token.logprob, token.text))
