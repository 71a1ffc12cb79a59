import pytest
from chain import build_lm, solve
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

WORDS = [
    "<s>",
    "</s>",
    "<unk>",
    "good",
    "bad",
    "happy",
    "sad",
    "the",
    "dog",
    "cat",
    "ran",
    "and",
    "sat",
    "love",
    "hate",
    ".",
]


@pytest.fixture(scope="module")
def lm():
    """The model of `tests.training.chain`'s decision problem."""
    return build_lm()


@pytest.fixture(scope="module")
def solution(lm):
    """Its exact values."""
    return solve(lm)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random Llama over sixteen words, with a tokenizer, as a folder."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    folder = tmp_path_factory.mktemp("model")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    ).save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
