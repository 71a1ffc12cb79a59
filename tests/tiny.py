"""Tiny random models and a tokenizer, for tests of whole requests."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed


def byte_alphabet() -> list[str]:
    """The 256 characters by which byte-level BPE writes bytes (GPT-2's table)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(extra)) for byte in range(256)]


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Token i < 256 is byte i; then <end>."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())} | {"<end>": 256}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", **options)


def tiny_llama(vocab_size: int = 257, max_positions: int = 128, seed: int = 0) -> LlamaForCausalLM:
    """Two layers of width 32, random weights; its end of sequence is token 256."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)
