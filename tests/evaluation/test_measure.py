import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vas_engine.evaluation.frontier import frontier
from vas_engine.evaluation.measure import measure
from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.training.rewards import FunctionReward
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork

WORDS = ["<s>", "</s>", "a", "b", "c", "d"]
PROMPTS = ["a", "b c", "d d a", "c"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
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
    llm = LLM(
        LlamaForCausalLM(config),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"),
        device="cpu",
        dtype="float32",
    )
    value = ValueNetwork(default_config("side", llm.lm, [HeadConfig("v", "a", std=5.0)]))
    return LLM(llm.lm.model, values={"v": value}, tokenizer=llm.tokenizer, device="cpu", dtype="float32")


@pytest.fixture
def reward():
    return FunctionReward("a", lambda _, response: response.count("a"))


def test_zero_weight_is_the_base(llm, reward):
    params = SamplingParams(max_tokens=6, num_candidates=6)
    base = measure(llm, PROMPTS, params, [reward], samples=5, kl=False)
    zero = measure(llm, PROMPTS, params.replace(values={"v": 0.0}), [reward], samples=5)
    assert base.responses == zero.responses
    assert base.kl is None
    assert zero.kl.mean == pytest.approx(0.0, abs=1e-9)
    assert base.pools["a"] == [[text.count("a") for text in texts] for texts in base.responses]
    assert base.rewards["a"].count == 20
    assert base.value_rows_per_token == 0.0
    assert zero.value_rows_per_token > 0.0


def test_kl_is_that_of_the_tokens_drawn(llm, reward):
    """The mean of summed exact step divergences agrees with the mean log-ratio of the same responses."""
    params = SamplingParams(max_tokens=6, values={"v": 1.0}, num_candidates=4)
    found = measure(llm, PROMPTS, params, [reward], samples=200)
    outputs = llm.generate(PROMPTS, params.replace(n=200, seed=5, prune=False), use_tqdm=False)
    ratios = [c.cumulative_tilted_logprob - c.cumulative_logprob for o in outputs for c in o.outputs]
    assert found.kl.mean > 0.01
    error = torch.tensor(ratios).std() / math.sqrt(len(ratios))
    assert abs(found.kl.mean - sum(ratios) / len(ratios)) < 4 * error + (found.kl.high - found.kl.low)


def test_frontier(llm, reward):
    guided = {"w=1": SamplingParams(max_tokens=6, values={"v": 1.0}, num_candidates=4)}
    points = frontier(llm, PROMPTS, reward, guided, best_of=[1, 4], samples=4, pool=8)
    assert [point.label for point in points] == ["base", "w=1", "best of 1", "best of 4"]
    base, tilted, one, four = points
    assert one.reward.mean == pytest.approx(base.reward.mean)
    assert four.reward.mean > one.reward.mean
    assert (one.kl, four.kl) == (0.0, pytest.approx(math.log(4) - 0.75))
    assert four.kl_is_upper_bound
    assert not tilted.kl_is_upper_bound
    assert tilted.kl.mean > 0
    # A prompt is processed once for its samples, and a response's last token not at all: about one row a
    # token.
    assert 0.7 < base.model_rows_per_token < 1.3
    assert four.model_rows_per_token == pytest.approx(4 * base.model_rows_per_token)
    assert four.to_dict()["label"] == "best of 4"
