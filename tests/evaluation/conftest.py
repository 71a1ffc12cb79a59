"""A language model of six words, and values that are tables: small enough to work everything out."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vas_engine.llm import LLM
from vas_engine.training.rewards import FunctionReward
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork

WORDS = ["<s>", "</s>", "a", "b", "c", "d"]
PROMPTS = ["a", "b c", "d d a", "c"]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A word a token, nothing added."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def word_model(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama over the six words."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=6,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


class TableValue(ValueNetwork):
    """An action head whose value of a token is looked up: by the token's position behind the prompt, and the token.

    Args:
        table: [positions, vocabulary]; `first` is the position of its first row.
    """

    def __init__(self, lm, table: list[list[float]], first: int = 0, **head) -> None:
        super().__init__(default_config("action", lm, [HeadConfig("v", "a", **head)]))
        self.values, self.first = torch.tensor(table), first

    def score(self, token_ids, hidden, hidden_index, batch, rows=None):
        place = (batch.positions.flatten() - self.first).clamp(0, len(self.values) - 1)
        found = self.values[place, token_ids][:, None]
        return found if rows is None else found[rows]


@pytest.fixture(scope="session")
def base() -> LLM:
    return LLM(word_model(), tokenizer=word_tokenizer(), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def llm(base) -> LLM:
    """With a side network of random weights, "v", about the reward "a"."""
    torch.manual_seed(0)
    value = ValueNetwork(default_config("side", base.lm, [HeadConfig("v", "a", std=5.0)]))
    return LLM(word_model(), values={"v": value}, tokenizer=base.tokenizer, device="cpu", dtype="float32")


@pytest.fixture
def reward() -> FunctionReward:
    """How often the response has "a"."""
    return FunctionReward("a", lambda _, response: float(response.count("a")))
