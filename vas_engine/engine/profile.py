"""How much memory a step needs beside the caches, found by running the largest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from vas_engine.engine.engine import Engine
from vas_engine.model.lm import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.values.scorer import Scorer

_STEPS = 3  # prompts, the first tokens after them, tokens whose states are known


class Meter(Protocol):
    """Tells how much memory was taken between two moments."""

    def start(self) -> None:
        """What is taken now does not count."""

    def peak(self) -> int:
        """Bytes: the most that was taken at once since the start, beyond what was taken then."""


class CudaMeter:
    """By torch's own count of a GPU's memory."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._before = device, 0

    def start(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._before = torch.cuda.memory_allocated(self.device)

    def peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self._before


def activation_memory(
    lm: CausalLM,
    scorers: Mapping[str, Scorer],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    block_size: int,
    meter: Meter,
) -> int:
    """Bytes that steps need beside the weights and the caches: of as many rows, and as many sequences that use every
    value, as there may be. Candidates' scratch is part of it.

    The caches are of a single block afterwards and are to be made anew.
    """
    most = min(SamplingParams().num_candidates, lm.vocab_size)
    # With a limit scores are sorted in float64: several copies of every sequence's.
    asked = SamplingParams(num_candidates=most, top_p=0.9, max_tokens=_STEPS + 1, ignore_eos=True, seed=0)
    per_token = asked.num_candidates + 1 if scorers else 1
    seqs = max(1, min(max_num_seqs, max_num_batched_tokens // per_token))
    longest = max(1, max_model_len - _STEPS - 2)
    length = max(1, min(longest, max_num_batched_tokens // seqs - per_token))
    blocks = seqs * (-(-(length + _STEPS + 1) // block_size) + 1)
    running = Engine(
        lm,
        scorers,
        max_num_seqs=seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        num_blocks=blocks,
        block_size=block_size,
        enable_prefix_caching=False,
    )
    asked = asked.replace(values=dict.fromkeys(running.value_names, 1.0))
    for index in range(seqs):
        running.add_request(str(index), [index % lm.vocab_size] * length, asked)
    meter.start()
    for _ in range(_STEPS):
        running.step()
    peak = meter.peak()
    for index in range(seqs):
        running.cancel(str(index))
    lm.allocate(1, block_size)
    for scorer in scorers.values():
        scorer.allocate(1, block_size)
    return peak
