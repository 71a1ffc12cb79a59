"""Decoding on a GPU by transformers alone: the paper's method as a logits processor, and its continuous batching.

Both draw from the whole vocabulary at temperature 1 and take models that are loaded already. A call's time less that
of a shorter one leaves the steps between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from benchmarks.peers import SharedCacheValueProcessor

PEERS = ("hf-guided", "hf-batch")
"""The port (all candidates in one forward of the value model, nothing repeated), and plain `generate_batch`."""

PAGE, MOST_ROWS = 256, 2048
"""Tokens of a page of `generate_batch`'s cache (its default), and rows of its steps."""

Call = Callable[[list[list[int]], int], int]
"""Prompts of one length and a number of new tokens -> tokens made."""


def guided(model: Any, backbone: PreTrainedModel, candidates: int) -> Call:
    """`generate` with the paper's method.

    Args:
        model: of transformers, with its head.
        backbone: the value model, without one.
    """
    head = nn.Linear(backbone.config.hidden_size, 1, device=model.device)

    def call(prompts: list[list[int]], new_tokens: int) -> int:
        ids = torch.tensor(prompts, device=model.device)
        mask = torch.ones_like(ids)
        processor = SharedCacheValueProcessor(backbone, head, mask, num_candidates=candidates)
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([processor]),
        )
        return output[:, ids.shape[1] :].numel()

    return call


def batched(model: Any) -> Call:
    """`generate_batch`, transformers' own continuous batching."""

    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    def call(prompts: list[list[int]], new_tokens: int) -> int:
        settings = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=-1, pad_token_id=0
        )
        # As many pages as this takes: by itself it would take all memory there is.
        pages = len(prompts) * (-(-(len(prompts[0]) + new_tokens) // PAGE) + 1)
        cache = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=MOST_ROWS)
        found = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=cache, progress_bar=False
        )
        return sum(len(output.generated_tokens) for output in found.values())

    return call


def rate(call: Call, prompts: list[list[int]], steps: int, warm: int) -> float:
    """Tokens per second of `steps` steps behind the first `warm`.

    Raises:
        RuntimeError: it made another number of tokens.
    """
    seconds = []
    for new_tokens in (warm, warm + steps):
        start = time.perf_counter()
        made = call(prompts, new_tokens)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if made != len(prompts) * new_tokens:
            raise RuntimeError(f"{made} tokens, not {len(prompts)} x {new_tokens}")
    return len(prompts) * steps / max(seconds[1] - seconds[0], 1e-9)
