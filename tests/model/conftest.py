"""Tiny random models of every architecture, and an uncached eager copy of each."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from vas_engine.model import CausalLM

VOCAB = 97
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES, head_dim=12),
    "mistral": MistralConfig(**_SIZES, sliding_window=7),
    "gemma2": Gemma2Config(
        **_SIZES,
        head_dim=8,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=5,
        final_logit_softcapping=3.0,
    ),
    "gpt_neox": GPTNeoXConfig(
        **{name: size for name, size in _SIZES.items() if name != "num_key_value_heads"},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        scale_attn_by_inverse_layer_idx=True,
    ),
}


def random_model(config: PretrainedConfig, scale: float = 4.0) -> PreTrainedModel:
    """Eager model with weights large enough that attention is far from uniform."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


class Pair:
    """A model under test with the eager copy it must agree with."""

    def __init__(self, name: str, backend: str = "auto", dtype: torch.dtype = torch.float32) -> None:
        self.name = name
        self.eager = random_model(CONFIGS[name]).to(dtype)
        self.lm = CausalLM.load(copy.deepcopy(self.eager), device="cpu", attention_backend=backend)

    def full(self, token_ids: list[int]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Logits [T, V] and hidden states [T, H] of a whole sequence, by the eager copy."""
        with torch.no_grad():
            out = self.eager(torch.tensor([token_ids]), use_cache=False, output_hidden_states=True)
        return out.logits[0], tuple(state[0] for state in out.hidden_states)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)
