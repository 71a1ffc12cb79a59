"""The shipped model: it loads offline, fits its stories, and ends them."""

import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from vas_engine.demo import model_path
from vas_engine.demo.corpus import OPENINGS, generate_texts
from vas_engine.demo.train_lm import build_model, encode_batch, heldout_loss

# Nats per token. The shipped model reaches 1.07; an untrained one starts at log(1536) = 7.3.
LOSS_BOUND = 1.15


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_path(), local_files_only=True).eval()


@pytest.fixture(scope="module")
def fresh_texts() -> list[str]:
    return list(generate_texts(100, seed=987_654))


def test_the_folder_is_small_and_whole() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    assert sum(path.stat().st_size for path in model_path().iterdir()) < 6_000_000


def test_the_model_is_a_small_llama_with_grouped_queries(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.head_dim == 32
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings == 256
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert 800_000 < model.num_parameters() < 1_500_000
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert config.bos_token_id == model.generation_config.bos_token_id == tokenizer.bos_token_id


def test_encoding_adds_bos_and_is_lossless(tokenizer: PreTrainedTokenizerBase, fresh_texts: list[str]) -> None:
    for text in [*fresh_texts, *OPENINGS, "Žofie’s  naïve café\n\t✓ 東京"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in ids[1:]
        assert tokenizer.eos_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_stories_have_a_fitting_number_of_tokens(tokenizer: PreTrainedTokenizerBase, fresh_texts: list[str]) -> None:
    counts = [len(ids) for ids in tokenizer(fresh_texts)["input_ids"]]
    assert 30 < statistics.mean(counts) < 70
    assert max(counts) < 200


def test_openings_are_a_few_tokens_each(tokenizer: PreTrainedTokenizerBase) -> None:
    for opening in OPENINGS:
        assert 2 <= len(tokenizer(opening)["input_ids"]) <= 16, opening


def test_heldout_loss_is_that_of_a_trained_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fresh_texts: list[str]
) -> None:
    assert heldout_loss(model, tokenizer, fresh_texts) < LOSS_BOUND
    torch.manual_seed(0)
    assert heldout_loss(build_model(tokenizer), tokenizer, fresh_texts[:20]) > 6


def test_batches_end_with_eos_and_padding_bears_no_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    short, long = "Tom ran.", "Tom ran to the lake with Anna."
    ids, labels = encode_batch(tokenizer, [short, long])
    length = len(tokenizer(short)["input_ids"]) + 1
    assert ids.shape == labels.shape == (2, len(tokenizer(long)["input_ids"]) + 1)
    assert labels[0, length - 1] == labels[1, -1] == tokenizer.eos_token_id
    assert (labels[0, length:] == -100).all()
    assert torch.equal(labels[1], ids[1])


def test_sampled_stories_end_at_varied_lengths(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Lengths in tokens, of 24 samples of one opening."""
    torch.manual_seed(0)
    prompt = tokenizer(OPENINGS[0], return_tensors="pt")
    samples = model.generate(**prompt, max_new_tokens=120, num_return_sequences=24).tolist()
    ended = [sample.index(tokenizer.eos_token_id) for sample in samples if tokenizer.eos_token_id in sample]
    assert len(ended) >= 22
    assert statistics.stdev(ended) > 12
    assert len({tuple(sample) for sample in samples}) > 12
