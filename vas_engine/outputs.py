"""What a request gives back: RequestOutput, its completions and its metrics."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
        logprob: under the base distribution (after bias, penalties, temperature and cuts), in nats.
        tilted_logprob: under the distribution the token was drawn from; equal to `logprob` without values.
        rank: 1 for the most probable token of the base distribution; None where it is beyond those looked at.
        decoded_token: the token's text by itself.
        values: {name: value of the state after this token}; empty where no value looked at it.
    """

    logprob: float
    tilted_logprob: float | None
    rank: int | None
    decoded_token: str | None = None
    values: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: 0 to n-1.
        text: the completion; empty where the model came without a tokenizer.
        token_ids: every generated token, also an ending EOS and those of a stop string.
        finish_reason: "stop", "length", "error", "abort", or None while it grows.
        stop_reason: the stop string or the stop token id that ended it, or "deadline"; None for EOS.
        cumulative_logprob: sum over the tokens of their base log-probability, in nats.
        cumulative_tilted_logprob: the same under the tilted distribution; None where pruning skipped
            candidates (ask for `logprobs`, `report_kl` or `prune=False`).
        logprobs: one {token id: Logprob} per token, on request.
        values: {name: [value of the state after each token]}, in units of the reward.
        prompt_values: {name: value of the prompt}, known with the first token.
        kl: sum of the steps' exact KL(tilted || base) in nats, on request.
        seed: repeats this very completion as a request of its own.
        hidden_states: final hidden states [positions, hidden size] of prompt and completion, on request.
        delta_text, delta_token_ids: what the last step added; for streaming.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float = 0.0
    cumulative_tilted_logprob: float | None = 0.0
    logprobs: list[dict[int, Logprob]] | None = None
    values: dict[str, list[float]] = field(default_factory=dict)
    prompt_values: dict[str, float] = field(default_factory=dict)
    kl: float | None = None
    seed: int | None = None
    hidden_states: torch.Tensor | None = None
    delta_text: str = ""
    delta_token_ids: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def snapshot(self) -> CompletionOutput:
        """A copy that later steps do not change."""
        other = copy.copy(self)
        other.token_ids, other.delta_token_ids = self.token_ids.copy(), self.delta_token_ids.copy()
        other.logprobs = None if self.logprobs is None else self.logprobs.copy()
        other.values = {name: list(series) for name, series in self.values.items()}
        return other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without hidden states; a number that is not finite becomes None."""
        record: dict[str, Any] = {
            "index": self.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "cumulative_logprob": _number(self.cumulative_logprob),
            "cumulative_tilted_logprob": _number(self.cumulative_tilted_logprob),
            "values": {name: [_number(v) for v in series] for name, series in self.values.items()},
            "prompt_values": {name: _number(v) for name, v in self.prompt_values.items()},
            "kl": _number(self.kl),
            "seed": self.seed,
        }
        if self.logprobs is not None:
            record["logprobs"] = [_logprob_records(position) for position in self.logprobs]
        return record


@dataclass(slots=True)
class RequestMetrics:
    """Times (seconds of one monotonic clock) and counts of a request.

    Attributes:
        value_evaluations: rows that value networks scored for this request's tokens, over all completions.
        limited_tokens: tokens for which a latency bound or deadline left out candidates that could have won.
    """

    arrival: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    prompt_tokens: int = 0
    generated_tokens: int = 0
    value_evaluations: int = 0
    limited_tokens: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the last token."""
        return None if self.finished is None else self.finished - self.arrival

    def to_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            "value_evaluations": self.value_evaluations,
            "limited_tokens": self.limited_tokens,
            "time_to_first_token": self.time_to_first_token,
            "latency": self.latency,
        }


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its completions.

    Attributes:
        request_id: unique within its LLM.
        prompt: the text, or None when ids were given.
        prompt_token_ids: what the model read.
        outputs: `n` completions, by index; on an error those finished before it may hold text.
        error: why the request failed (its completions then have finish_reason "error"), else None.
        metrics: times and counts.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    error: Exception | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)

    def snapshot(self) -> RequestOutput:
        """A copy that later steps do not change."""
        other = copy.copy(self)
        other.outputs = [output.snapshot() for output in self.outputs]
        other.metrics = copy.copy(self.metrics)
        return other

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        error = self.error
        return {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": self.prompt_token_ids,
            "outputs": [output.to_dict() for output in self.outputs],
            "error": None if error is None else {"type": type(error).__name__, "message": str(error)},
            "metrics": self.metrics.to_dict(),
        }


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _logprob_records(position: dict[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {
            "token_id": token,
            "token": entry.decoded_token,
            "logprob": _number(entry.logprob),
            "tilted_logprob": _number(entry.tilted_logprob),
            "rank": entry.rank,
            "values": {name: _number(value) for name, value in entry.values.items()},
        }
        for token, entry in position.items()
    ]
