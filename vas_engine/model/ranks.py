"""The processes that hold one model together: torchrun starts them, transformers shards the weights among them.

Every rank runs the same script and makes the same calls. States, logits and noise are the same numbers on all of them,
so they choose the same tokens without telling one another; what could differ is agreed on here.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from torch import distributed

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, VASError


def check_launch(size: int) -> None:
    """Raises InvalidArgumentError where this process is not one of that many."""
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and there != size:
        fix = f"this script runs in {there} process(es); start it by torchrun --nproc-per-node {size} SCRIPT"
        raise InvalidArgumentError("tensor_parallel_size", size, fix)


def is_first() -> bool:
    """Whether this rank speaks for all, for a progress bar."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def sharding(config: Any, size: int) -> dict[str, Any]:
    """What `from_pretrained` is told, to shard a model of this config by the plan that transformers ships.

    Raises:
        UnsupportedModelError: no plan, or heads that do not divide.
    """
    if size == 1:
        return {}
    text = config.get_text_config()
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    if not getattr(text, "base_model_tp_plan", None):
        raise UnsupportedModelError(f"{name}: transformers ships no tensor-parallel plan for it; load it on one rank")
    heads = text.num_attention_heads
    for kind, count in (("query", heads), ("key", getattr(text, "num_key_value_heads", None) or heads)):
        if count % size:
            fix = f"use a tensor_parallel_size that divides its {count} {kind} heads"
            raise UnsupportedModelError(f"{name} cannot be shared by {size} ranks: {fix}")
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_size=size)}


def unshard(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter with the shards of all ranks."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def own_heads(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """This rank's part of heads that go round the ranks in order."""
    return tensor if size == 1 else tensor.chunk(size, dim)[distributed.get_rank()]


def all_heads(tensor: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """The heads of all ranks, from each one's part."""
    if size == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
    distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def first_says(number: int, device: torch.device) -> int:
    """The first rank's number, on all of them; up to 2**63 - 1."""
    told = torch.tensor(number, device=device)
    distributed.broadcast(told, 0)
    return int(told)


def check_same(given: object, device: torch.device) -> None:
    """Raises VASError, on every rank, unless all of them were given the same (by its `repr`)."""
    digest = int.from_bytes(hashlib.sha256(repr(given).encode()).digest()[:7], "little")
    if least(digest, device) != -least(-digest, device):
        fix = "run one script that makes the same calls, and draws no prompts or seeds at random"
        raise VASError(f"ranks were given different requests: {fix}")


def least(number: int, device: torch.device) -> int:
    """The smallest of all ranks' numbers."""
    found = torch.tensor(number, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MIN)
    return int(found)
