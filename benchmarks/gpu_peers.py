"""Decoding on a GPU by transformers alone: the paper's method as a logits processor, and its continuous batching.

Both draw from the whole vocabulary at temperature 1 and take models that are loaded already. Only steps in which every
request decodes are timed, by the moments their tokens come.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from benchmarks.peers import SharedCacheValueProcessor

PEERS = ("hf-guided", "hf-batch")
"""The port (all candidates in one forward of the value model, nothing repeated), and plain `generate_batch`."""

PAGE, MOST_ROWS = 256, 2048
"""Tokens of a page of `generate_batch`'s cache (its default), and rows of its steps."""

Call = Callable[[list[list[int]], int, int], float]
"""Prompts of one length, steps to warm up, steps to time -> tokens per second."""


class Clock(LogitsProcessor):
    """When each step's logits were there, `moments`."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.moments.append(time.perf_counter())
        return scores


def guided(model: Any, backbone: PreTrainedModel, candidates: int) -> Call:
    """`generate` with the paper's method.

    Args:
        model: of transformers, with its head.
        backbone: the value model, without one.
    """
    head = nn.Linear(backbone.config.hidden_size, 1, device=model.device)

    def call(prompts: list[list[int]], warm: int, steps: int) -> float:
        ids = torch.tensor(prompts, device=model.device)
        mask, clock = torch.ones_like(ids), Clock()
        processor = SharedCacheValueProcessor(backbone, head, mask, num_candidates=candidates)
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=warm + steps + 1,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([clock, processor]),
        )
        first, last = clock.moments[warm], clock.moments[warm + steps]
        return len(prompts) * steps / (last - first)

    return call


def batched(model: Any) -> Call:
    """`generate_batch`, transformers' own continuous batching."""

    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    def call(prompts: list[list[int]], warm: int, steps: int) -> float:
        # The first requests decode while the last ones' prompts are taken in.
        entering = -(-sum(map(len, prompts)) // MOST_ROWS)
        new_tokens = entering + warm + steps + 1
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        # As many pages as this takes: by itself it would take all memory there is.
        pages = len(prompts) * (-(-(len(prompts[0]) + new_tokens) // PAGE) + 1)
        found = model.generate_batch(
            prompts,
            generation_config=settings,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=MOST_ROWS),
            record_timestamps=True,
            progress_bar=False,
        )
        moments = [output.timestamps for output in found.values()]
        return steady_rate(moments, len(prompts), warm)

    return call


def steady_rate(moments: Sequence[Sequence[float]], requests: int, warm: int) -> float:
    """Tokens per second while all requests decode, the first `warm` steps of that left out.

    Args:
        moments: when each token of each request came, seconds.

    Raises:
        RuntimeError: there is no such time, or requests are missing.
    """
    if len(moments) != requests or not all(len(own) > warm + 1 for own in moments):
        raise RuntimeError(f"tokens of {len(moments)} requests of {requests}: {[len(own) for own in moments]}")
    first, last = max(own[warm] for own in moments), min(own[-1] for own in moments)
    tokens = sum(first < moment <= last for own in moments for moment in own)
    if first >= last:
        raise RuntimeError("the first requests ended before the last ones decoded")
    return tokens / (last - first)
