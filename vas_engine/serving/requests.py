"""From a request's body to prompts and sampling parameters: limits first, then what the engine checks itself."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from vas_engine.errors import InvalidArgumentError
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.serving.errors import NAMES, ServingError, as_serving_error, bad_request
from vas_engine.serving.protocol import ChatCompletionRequest, CompletionRequest, Message, Sampling
from vas_engine.serving.settings import Limits

DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's

_SAME = {field.name for field in fields(SamplingParams)} & Sampling.model_fields.keys() - {"n", "max_tokens"}
_GUIDED = {argument: name for argument, name in NAMES.items() if name.startswith("vas_") and argument != "values"}


@dataclass(frozen=True)
class Job:
    """What to run for a request, and what of it to answer with.

    Attributes:
        params: of every prompt; its `n` is what is generated.
        n: completions of a prompt that are returned.
        rank_by: value whose last V ranks them; None ranks by log-probability per token.
        logprobs: alternatives in OpenAI's form; None is none at all.
        candidates: alternatives with their values; None is none at all.
        weights: in force.
    """

    params: SamplingParams
    n: int
    weights: dict[str, float]
    profile: str | None = None
    rank_by: str | None = None
    logprobs: int | None = None
    candidates: int | None = None
    return_values: bool = False
    return_kl: bool = False
    echo: bool = False


def completion_job(request: CompletionRequest, limits: Limits, profile: dict[str, float]) -> Job:
    """A /v1/completions request as a job; `profile` holds the weights of the profile it names.

    Raises:
        ServingError: what cannot be done, by the field's name.
    """
    n = request.n or 1
    best_of = request.best_of or n
    if best_of < n:
        raise bad_request("best_of", f"best_of={best_of}: must be at least n={n}")
    if best_of > n and request.stream:
        raise bad_request("best_of", f"best_of={best_of}: its results cannot be streamed; drop stream or best_of")
    if request.echo and request.logprobs is not None:
        raise bad_request("echo", "echo=True: the prompt's log-probabilities are not computed; drop logprobs")
    within("best_of" if request.best_of else "n", best_of, limits.n)
    weights = {**profile, **(request.vas_weights or {})}
    if request.vas_best_of is not None:
        weights.setdefault(request.vas_best_of, 0.0)
    params = _params(request, limits, weights, best_of, request.logprobs, request.max_tokens or DEFAULT_MAX_TOKENS)
    return _job(request, params, n, weights, request.logprobs, request.vas_best_of, bool(request.echo))


def chat_job(request: ChatCompletionRequest, limits: Limits, profile: dict[str, float]) -> Job:
    """A /v1/chat/completions request as a job; otherwise as `completion_job`."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs", f"top_logprobs={request.top_logprobs}: set logprobs to true as well")
    within("messages", len(request.messages), limits.messages)
    weights = {**profile, **(request.vas_weights or {})}
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    n = request.n or 1
    params = _params(request, limits, weights, n, logprobs, request.max_completion_tokens or request.max_tokens)
    return _job(request, params, n, weights, logprobs)


def _job(
    request: Sampling,
    params: SamplingParams,
    n: int,
    weights: dict[str, float],
    logprobs: int | None,
    rank_by: str | None = None,
    echo: bool = False,
) -> Job:
    return Job(
        params,
        n,
        weights,
        request.vas_profile,
        rank_by,
        logprobs,
        request.vas_return_candidates,
        bool(request.vas_return_values),
        bool(request.vas_return_kl),
        echo,
    )


def _params(
    request: Sampling,
    limits: Limits,
    weights: dict[str, float],
    n: int,
    logprobs: int | None,
    max_tokens: int | None,
) -> SamplingParams:
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    within("n", request.n or 1, limits.n)
    within("stop", len(stops), limits.stop, "stop strings")
    for stop in stops:
        within("stop", len(stop), limits.stop_chars, "characters of a stop string")
    within("stop_token_ids", len(request.stop_token_ids or ()), limits.stop, "ids")
    within("logit_bias", len(request.logit_bias or ()), limits.logit_bias, "entries")
    within("logprobs", logprobs or 0, limits.logprobs)
    within("vas_return_candidates", request.vas_return_candidates or 0, limits.logprobs)
    within("vas_candidates", request.vas_candidates or 0, limits.candidates)
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME}
    given |= {argument: getattr(request, name) for argument, name in _GUIDED.items()}
    given = {name: value for name, value in given.items() if value is not None}
    alternatives = [count for count in (logprobs, request.vas_return_candidates) if count is not None]
    try:
        return SamplingParams(
            **given,
            n=n,
            max_tokens=max_tokens,
            logprobs=max(alternatives, default=None),
            values=weights,
        )
    except InvalidArgumentError as error:
        raise as_serving_error(error) from error


def read_prompts(request: CompletionRequest, limits: Limits, max_chars: int) -> list[Prompt]:
    """The prompts of a request; a text too long for the model in any tokens is refused before it is tokenised."""
    prompt = request.prompt
    if isinstance(prompt, str):
        prompts = [Prompt(text=prompt)]
    elif not prompt:
        raise bad_request("prompt", "prompt=[]: is empty; give at least one token or text")
    elif isinstance(prompt[0], int):
        prompts = [Prompt(token_ids=prompt)]
    else:
        within("prompt", len(prompt), limits.prompts, "prompts")
        prompts = [Prompt(text=p) if isinstance(p, str) else Prompt(token_ids=p) for p in prompt]
    for given in prompts:
        within("prompt", len(given.text or ""), max_chars, "characters, the model's context")
        within("prompt", len(given.token_ids or ()), max_chars, "tokens, the model's context")
    return prompts


def read_messages(messages: list[Message]) -> list[dict[str, str]]:
    """Messages for a chat template; parts of text are joined."""
    read = []
    for message in messages:
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        named = {"name": message.name} if message.name else {}
        read.append({"role": message.role, "content": text, **named})
    return read


def within(param: str, size: int, most: int, what: str = "") -> None:
    """Raises a ServingError for a size above a limit of the server."""
    if size > most:
        unit = f" {what}" if what else ""
        raise ServingError(
            400, f"{param}: {size} is above this server's limit of {most}{unit}", param=param, code="limit"
        )
