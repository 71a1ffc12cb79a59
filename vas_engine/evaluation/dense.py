"""Teacher-forced forwards over finished responses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM

__all__ = ["log_probs", "sequence_kl"]

BATCH_LOGITS = 1 << 24
"""Logits of one forward at most."""


@torch.inference_mode()
def log_probs(lm: CausalLM, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every response's tokens under a model, at temperature 1 with nothing cut; nats."""
    found = [0.0] * len(responses)
    for places, tokens, mask in _batches(lm, prompts, responses):
        scores = _next_log_probs(lm, tokens).float()
        taken = scores.gather(-1, tokens[:, 1:, None])[..., 0].double()
        for place, total in zip(places, (taken * mask).sum(1).tolist(), strict=True):
            found[place] = total
    return found


@torch.inference_mode()
def sequence_kl(
    policy: CausalLM, base: CausalLM, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> list[float]:
    """Sum over each response's steps of the exact KL(policy || base) of the next token, nats.

    Its mean over samples of the policy is an unbiased estimate of the divergence of whole responses.
    """
    found = [0.0] * len(responses)
    for places, tokens, mask in _batches(base, prompts, responses):
        ours, theirs = (_next_log_probs(lm, tokens) for lm in (policy, base))
        steps = (ours.exp() * (ours - theirs)).sum(-1)
        for place, total in zip(places, (steps * mask).sum(1).tolist(), strict=True):
            found[place] = total
    return found


def _next_log_probs(lm: CausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens 1 to T - 1, float64 [B, T - 1, vocabulary]."""
    logits = lm.dense(tokens, logits=True).logits
    assert logits is not None
    return F.log_softmax(logits[:, :-1].double(), -1)


def _batches(
    lm: CausalLM, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Places, padded tokens int64 [B, T] and which of the T - 1 predictions are of responses, longest first."""
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while order:
        longest = lengths[order[0]]
        count = max(1, BATCH_LOGITS // (longest * lm.vocab_size))
        places, order = order[:count], order[count:]
        tokens = torch.zeros(len(places), longest, dtype=torch.int64)
        mask = torch.zeros(len(places), longest - 1)
        for row, place in enumerate(places):
            tokens[row, : lengths[place]] = torch.tensor([*prompts[place], *responses[place]])
            mask[row, len(prompts[place]) - 1 : lengths[place] - 1] = 1
        yield places, tokens.to(lm.device), mask.to(lm.device)
