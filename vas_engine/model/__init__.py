"""Frozen Hugging Face language models over paged keys and values."""

from vas_engine.model.batch import AttentionBatch
from vas_engine.model.cache import KVCache, LayerShape
from vas_engine.model.lm import CausalLM, DenseOutput, ForwardOutput

__all__ = ["AttentionBatch", "CausalLM", "DenseOutput", "ForwardOutput", "KVCache", "LayerShape"]
