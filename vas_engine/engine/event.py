"""What the engine says after a step: one event a token, in token ids; text is made further out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class TokenLogprob(NamedTuple):
    """One alternative of a position: its log-probability under the base and under the guided policy, and its values.

    Attributes:
        values: value name -> V(s with this token); empty for a token that no value looked at.
    """

    token_id: int
    log_prob: float
    tilted_log_prob: float
    values: dict[str, float]


@dataclass(slots=True)
class TokenEvent:
    """One token of one sequence, or its end without a token (abort, error, the last hidden states).

    Attributes:
        request_id: as given to ``Engine.add_request``.
        index: which of the request's ``n`` samples.
        token_id: the token, or None when the event only ends the sequence.
        log_prob: log pi0(token), nats; pi0 is the base distribution after penalties, temperature and cuts.
        tilted_log_prob: log pi(token), nats; NaN when pruning left the normaliser unknown.
        kl: KL(pi || pi0) of this position, nats, exact; NaN under the same rule.
        values: value name -> V(s with this token), in the reward's units; empty for plain requests.
        prompt_values: value name -> V of the prompt; with a guided sequence's first token only.
        top_logprobs: the most probable tokens of the position, when the request asked for them.
        evaluations: rows the value networks scored for this token.
        limited: candidates that could have won were left out for want of time.
        finish_reason: "stop", "length", "abort" or "error" when the sequence ends here.
        stop_token: the token id that ended it, if one did.
        overdue: its deadline ended it.
        error: why it failed, with finish_reason "error".
        seed: the sequence's noise key.
        hidden: final hidden states [positions, hidden] of tokens computed since the last event, on request.
    """

    request_id: str
    index: int
    token_id: int | None = None
    log_prob: float = 0.0
    tilted_log_prob: float = 0.0
    kl: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    prompt_values: dict[str, float] | None = None
    top_logprobs: list[TokenLogprob] | None = None
    evaluations: int = 0
    limited: bool = False
    finish_reason: str | None = None
    stop_token: int | None = None
    overdue: bool = False
    error: Exception | None = None
    seed: int = 0
    hidden: torch.Tensor | None = None


@dataclass(slots=True)
class EngineStats:
    """Totals since the engine was made.

    Attributes:
        steps: calls of ``Engine.step`` that ran the model.
        tokens: tokens emitted.
        model_rows: rows the base model processed (prefill, decode and lookahead alike).
        value_rows: rows the value networks scored to choose tokens.
        pruned_rows: candidate rows that pruning spared.
        limited_tokens: tokens for which a latency bound or deadline left out candidates.
        graph_steps: steps that ran from end to end as one graph.
        obstacles: of an engine with graphs, why the other steps did not, and how many.
    """

    steps: int = 0
    tokens: int = 0
    model_rows: int = 0
    value_rows: int = 0
    pruned_rows: int = 0
    limited_tokens: int = 0
    graph_steps: int = 0
    obstacles: dict[str, int] = field(default_factory=dict)
