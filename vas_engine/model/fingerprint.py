"""What tells one base model from another: architecture, weights, vocabulary."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

from vas_engine.model.ranks import unshard

FULL_BYTES = 256 * 2**20
"""Models up to this size (as bfloat16) are hashed whole."""
SAMPLE_PIECES = 16
SAMPLE_NUMBERS = 32 * 1024


def weights_hash(model: nn.Module) -> str:
    """sha256 over the parameters, by name; the same for a checkpoint loaded in float32 and in bfloat16.

    Every number is taken as bfloat16. Models above :data:`FULL_BYTES` are sampled: of each tensor larger than
    ``SAMPLE_PIECES * SAMPLE_NUMBERS`` numbers that many pieces, evenly spread from its first number to its
    last.
    """
    parameters = sorted(model.named_parameters())
    whole = 2 * sum(parameter.numel() for _, parameter in parameters) <= FULL_BYTES
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        numbers = unshard(parameter.detach()).reshape(-1)
        if not whole and numbers.numel() > SAMPLE_PIECES * SAMPLE_NUMBERS:
            numbers = _sample(numbers)
        raw = numbers.to(torch.bfloat16).contiguous().cpu().view(torch.int16)
        digest.update(raw.numpy().data.cast("B"))
    return digest.hexdigest()


def _sample(numbers: torch.Tensor) -> torch.Tensor:
    last = numbers.numel() - SAMPLE_NUMBERS
    starts = [piece * last // (SAMPLE_PIECES - 1) for piece in range(SAMPLE_PIECES)]
    return torch.cat([numbers[start : start + SAMPLE_NUMBERS] for start in starts])


def vocabulary_hash(tokenizer: Any) -> str:
    """sha256 over the tokenizer's vocabulary, token and id, added tokens included."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(entries, ensure_ascii=True).encode()).hexdigest()
