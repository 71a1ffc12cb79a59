"""One sample of one request while it is being decoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch

from vas_engine.engine.history import History


class SequenceStatus(Enum):
    """Where the scheduler keeps a sequence. Only a running one holds blocks of the cache."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def _no_values() -> np.ndarray:
    return np.zeros(0)


@dataclass(eq=False)
class Sequence:
    """A prompt and what has been generated after it, with its place in the paged cache.

    Two sequences are equal only if they are the same object. `token_ids` may only ever be appended to.

    Attributes:
        request_id: the request it belongs to; the samples of one request share it.
        prompt_len: number of leading `token_ids` that came with the request.
        token_ids: prompt, then generated tokens.
        index: number of the sample within its request.
        params: the request's SamplingParams; what steps need of them is resolved below.
        seed: key of its noise.
        priority: smaller runs first.
        arrival: earlier runs first within one priority.
        rows_per_token: rows that deciding one token costs: 1 plain, candidates + 1 guided.
        reserve_slots: slots to hold beyond the last token whenever that token is computed (1 for a sequence
            whose networks write the winner's own K/V in the step that chooses it).
        forks: samples the engine will fork off once the prompt is computed; their rows are kept free then.
        pending: token ids of lookahead candidates that wait for a forward of the base model, or None.
        salt: whatever changes the K/V of the same tokens; sequences of different salts share no block.
        deadline: time (of `time.monotonic`) at which it ends with what it has; None is never.
        use_prefix_cache: False: the prompt is computed anew (its blocks may still serve others).
        status, order: where the scheduler keeps it, and its rank there: priority, arrival, turn.
        block_table: blocks of the cache; position p lives in block_table[p // block_size].
        num_computed: leading tokens whose K/V are in the pages.
        digests: chained hashes of the leading full blocks of `token_ids`, as far as they were needed.
        num_registered: leading blocks of the table that have been offered to the prefix cache.
        num_cached: tokens that the last admission found in the prefix cache.
        num_preemptions: how often it lost its blocks and had to be computed again.
        weights, limits: float [values] of the engine's values: w_m, and the bound on its share of the tilt.
        networks: indices of the value networks it uses; empty for plain decoding.
        reports: columns of the values whose V it reports.
        optimal: its tilt is the optimal one.
        lookahead: a network wants the base's state after each candidate, so candidates wait for a forward.
        reads_before: a network wants the state before the candidate.
        own_cache: a network keeps K/V of its own.
        all_needed: every candidate must be scored (no pruning).
        unfit: why its steps cannot be graphs from end to end; None if they can.
        num_candidates: that it asks for; 0 for plain decoding.
        knobs: numbers for the sampler (`controls.Knobs`).
        limited: it has a top_k, top_p or min_p.
        end_ids: tokens that end it.
        bias, early_bias: token ids and what to add to their logits; the latter while it may not end yet.
        history: the tokens that penalties count; None without any.
        filled: leading positions that the networks have processed.
        carry: hidden states of the last computed position, where the next rows need them.
        state_values, utilities: V(s) and U(s) of the present state, float [values]; empty while not known.
        selection: the selection its pending candidates came from.
        alternatives: most probable tokens of the present position and their log-probabilities, int64 and float64 [n],
            where it reports them.
        prompt_values: V of the prompt, float [values]; empty while not known.
        forked: its siblings have been started.
        hidden, num_hidden: final states not reported yet, and positions noted so far (on request).
        draining: why it ends, once its last token's hidden state is computed.
    """

    request_id: str
    prompt_len: int
    token_ids: list[int]
    index: int = 0
    params: Any = None
    seed: int = 0
    priority: int = 0
    arrival: float = 0
    rows_per_token: int = 1
    reserve_slots: int = 0
    forks: int = 0
    pending: np.ndarray | None = None
    salt: bytes = b""
    deadline: float | None = None
    use_prefix_cache: bool = True
    status: SequenceStatus = SequenceStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    digests: list[bytes] = field(default_factory=list, repr=False)
    num_registered: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    order: tuple[float, float, int] = (0, 0, 0)

    # What the engine resolved when the request came in (see Guide.admit and Engine._sequence).
    weights: np.ndarray = field(default_factory=_no_values, repr=False)
    limits: np.ndarray = field(default_factory=_no_values, repr=False)
    networks: tuple[int, ...] = ()
    reports: tuple[int, ...] = ()
    optimal: bool = False
    lookahead: bool = False
    reads_before: bool = False
    own_cache: bool = False
    all_needed: bool = False
    unfit: str | None = None
    num_candidates: int = 0
    knobs: tuple[float, ...] = ()
    limited: bool = False
    end_ids: frozenset[int] = frozenset()
    bias: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    early_bias: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    history: History | None = field(default=None, repr=False)

    # What the engine carries from step to step.
    filled: int = 0
    carry: dict[int, Any] | None = field(default=None, repr=False)
    state_values: np.ndarray = field(default_factory=_no_values, repr=False)
    utilities: np.ndarray = field(default_factory=_no_values, repr=False)
    prompt_values: np.ndarray = field(default_factory=_no_values, repr=False)
    selection: Any = field(default=None, repr=False)
    alternatives: tuple[np.ndarray, np.ndarray] | None = field(default=None, repr=False)
    forked: bool = False
    draining: str | None = None
    hidden: list[torch.Tensor] = field(default_factory=list, repr=False)
    num_hidden: int = 0

    def forget(self) -> None:
        """Drop what must be computed again after a preemption; tokens and controls stay."""
        self.filled = 0
        self.state_values, self.utilities = _no_values(), _no_values()
        self.carry = self.selection = self.alternatives = None

    def keep_hidden(self, states: torch.Tensor, start: int) -> None:
        """Notes final states [n, H] of the positions from `start` on; those noted before a preemption are not again."""
        new = start + len(states) - self.num_hidden
        if new > 0:
            self.hidden.append(states[-new:].clone())
            self.num_hidden += new

    def take_hidden(self) -> torch.Tensor | None:
        """The states noted since they were last taken, [n, H]; None if there are none."""
        parts, self.hidden = self.hidden, []
        return torch.cat(parts) if parts else None

    @property
    def is_running(self) -> bool:
        return self.status is SequenceStatus.RUNNING

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.prompt_len
