"""The guided policy by definition: full, uncached recomputation in float64, one sequence at a time.

Slow and plain on purpose. It shares no code with the engine beyond the networks' dense forward, which the tests of
the networks compare with naive attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vas_engine import SamplingParams


def pad(prefixes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(p) for p in prefixes])
    tokens = torch.zeros(len(prefixes), int(lengths.max()), dtype=torch.long)
    for row, prefix in zip(tokens, prefixes, strict=True):
        row[: len(prefix)] = torch.tensor(prefix)
    return tokens, lengths


def next_logits(lm, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [N, V] after each prefix, by one uncached forward."""
    tokens, lengths = pad(prefixes)
    with torch.no_grad():
        logits = lm.dense(tokens, lengths, logits=True).logits
    return logits[torch.arange(len(prefixes)), lengths - 1].double()


def head_outputs(lm, network, prefixes: Sequence[Sequence[int]]) -> torch.Tensor:
    """Head output [N, O] at the last token of each prefix."""
    tokens, lengths = pad(prefixes)
    with torch.no_grad():
        output = network.train_values(lm, tokens, lengths)
    return output[torch.arange(len(prefixes)), lengths - 1]


def base_log_probs(
    logits: torch.Tensor, params: SamplingParams, prefix: Sequence[int], prompt_len: int | None = None
) -> torch.Tensor:
    """log pi0 [V] with Hugging Face's own warpers behind bias and penalties; temperature 0 reads as 1.

    What stands behind the first ``prompt_len`` tokens was generated; None: nothing was.
    """
    logits = logits.clone()
    for token, bias in (params.logit_bias or {}).items():
        logits[token] += bias
    if params.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
        logits = penalty(torch.tensor([list(prefix)]), logits[None])[0]
    generated = list(prefix[prompt_len:]) if prompt_len is not None else []
    for token in set(generated):
        logits[token] -= params.frequency_penalty * generated.count(token) + params.presence_penalty
    warpers = LogitsProcessorList()
    if params.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores = warpers(torch.tensor([list(prefix)]), logits[None].clone())[0]
    return torch.log_softmax(scores, -1)


def guided_policy(
    lm, networks: dict, params: SamplingParams, prefix: Sequence[int], prompt_len: int | None = None
) -> torch.Tensor:
    """pi(. | prefix), float64 [V], straight from the definition.

    Args:
        networks: value name -> (network, index of the head).
        prompt_len: see `base_log_probs`.
    """
    log_pi0 = base_log_probs(next_logits(lm, [prefix])[0], params, prefix, prompt_len)
    support = torch.isfinite(log_pi0).nonzero()[:, 0]
    order = sorted(support.tolist(), key=lambda a: (-log_pi0[a].item(), a))
    candidates = order[: params.num_candidates]
    tilt = torch.zeros(len(log_pi0), dtype=torch.float64)
    for name, weight in params.values.items():
        if not weight:
            continue
        network, head = networks[name]
        outputs = head_outputs(lm, network, [list(prefix), *([*prefix, a] for a in candidates)])
        utility = _utility(network, outputs, head, weight, params.tilt)
        state = utility[1:].mean() if params.baseline == "candidate-mean" else utility[0]
        limit = float("inf") if params.advantage_clip is None else abs(weight) * params.advantage_clip
        tilt[candidates] += (utility[1:] - state).clamp(-limit, limit)
    scores = log_pi0 + tilt
    if params.tail == "drop":
        outside = torch.ones(len(scores), dtype=torch.bool)
        outside[candidates] = False
        scores[outside] = -float("inf")
    return torch.softmax(scores, -1)


def _utility(network, outputs: torch.Tensor, head: int, weight: float, tilt: str) -> torch.Tensor:
    values = network.heads.mean(outputs)[:, head].double()
    if tilt == "mean":
        return weight * values
    support = network.heads.configs[head].support
    atoms = torch.linspace(support.min, support.max, support.bins, dtype=torch.float64)
    log_p = outputs[:, network.heads.slices[head]].double().log_softmax(-1)
    return torch.logsumexp(log_p + weight * atoms, -1)


def enumerate_policy(
    lm, networks: dict, params: SamplingParams, prompt: Sequence[int], horizon: int, ends: Iterable[int]
) -> dict[tuple[int, ...], float]:
    """Probability of every completion of at most ``horizon`` tokens."""
    ends = set(ends)
    open_, closed = {(): 1.0}, {}
    for _ in range(horizon):
        grown: dict[tuple[int, ...], float] = {}
        for done, probability in open_.items():
            policy = guided_policy(lm, networks, params, [*prompt, *done]).tolist()
            for token, p in enumerate(policy):
                if p > 0:
                    target = closed if token in ends else grown
                    target[(*done, token)] = probability * p
        open_ = grown
    return {**closed, **open_}


def chi_squared_p(counts: dict, expected: dict[tuple[int, ...], float], total: int) -> float:
    """p-value of the observed counts; cells expected under five times are pooled. An impossible outcome gives 0."""
    from scipy import stats

    if any(outcome not in expected for outcome in counts):
        return 0.0
    cells = sorted(expected, key=expected.get, reverse=True)
    large = list(itertools.takewhile(lambda c: expected[c] * total >= 5, cells))
    observed = [counts.get(c, 0) for c in large]
    wanted = [expected[c] * total for c in large]
    rest = total - sum(wanted)
    if rest > 1:
        observed.append(total - sum(observed))
        wanted.append(rest)
    observed_array, wanted_array = np.array(observed, float), np.array(wanted)
    wanted_array *= observed_array.sum() / wanted_array.sum()
    return float(stats.chisquare(observed_array, wanted_array).pvalue)
