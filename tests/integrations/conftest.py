"""Loaded models of transformers, networks of every kind for them, and the engine's own answers to compare with."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.conftest import EOS, KINDS, llama, network
from tests.engine.test_distribution import World
from vas_engine import LLM
from vas_engine.model import CausalLM

__all__ = ["EOS", "KINDS", "PAD", "PROMPTS", "guided_llm", "hf_model", "padded", "plain_model"]

PAD = 0
PROMPTS = [[1, 5, 9], [2, 7, 3, 8, 11, 4, 6], [12]]


def plain_model(lm: CausalLM):
    """An ordinary model of transformers with the weights of a paged one."""
    model = type(lm.model)(copy.deepcopy(lm.model.config)).eval()
    model.load_state_dict(lm.model.state_dict())
    model.set_attn_implementation("sdpa")
    model.generation_config.pad_token_id = PAD
    return model


def hf_model(seed: int = 0):
    return plain_model(llama(seed=seed))


def bound(kind: str, model, heads=None):
    """The random network of a kind for a model's weights."""
    return network(kind, CausalLM.load(copy.deepcopy(model)), heads)


def guided_llm(model, values: dict) -> LLM:
    return LLM(copy.deepcopy(model), values, skip_tokenizer_init=True, kv_cache_memory="8MiB")


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded input ids and their attention mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture
def model():
    return hf_model()
