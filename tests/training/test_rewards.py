import math
import re

import pytest
import torch

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.rewards import FunctionReward, load_reward, load_rewards, score


def one(spec: str, text: str, prompt: str = "", **options) -> float:
    return score(load_reward(spec, **options), [prompt], [text])[0]


@pytest.mark.parametrize(
    ("spec", "text", "expected"),
    [
        ("length", "The cat sat; the dog didn't.", 6),
        ("characters", "a b\n", 4),
        ("sentences", 'He ran. "Stop!" she said. And then', 4),
        ("sentences", "It cost 3.50 today", 1),
        ("word-length", "ab abcd", 3.0),
        ("sentence-length", "One two. Three four five six!", 3.0),
        ("distinct-words", "The the cat THE", 0.5),
        ("uppercase", "ABcd 12", 0.5),
        # Three words of one syllable in one sentence.
        ("readability", "The cat sat.", 206.835 - 1.015 * 3 - 84.6),
        ("readability", "Make a little table.", 206.835 - 1.015 * 4 - 84.6 * 6 / 4),
    ],
)
def test_text_statistics_on_known_texts(spec, text, expected):
    assert one(spec, text) == pytest.approx(expected)


@pytest.mark.parametrize("spec", ["length", "sentence-length", "word-length", "distinct-words", "readability", "vader"])
def test_empty_text_has_a_value(spec):
    assert one(spec, "") == 0.0


def test_vader_readings():
    assert one("vader", "I love this wonderful happy day!") > 0.8
    assert one("vader", "I hate this terrible, horrible day.") < -0.7
    # "good" is one of two words that carry a share: the positive share is known from VADER's own output.
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    text = "The good dog hated the bad rain and loved the sun."
    polarity = SentimentIntensityAnalyzer().polarity_scores(text)
    assert one("vader:pos-neg", text) == pytest.approx(polarity["pos"] - polarity["neg"])
    assert load_reward("vader").bounds == (-1.0, 1.0)


def test_prompt_counts_only_when_asked():
    assert one("length", "two words", prompt="and three more ") == 2
    assert one("length", "two words", prompt="and three more ", whole_text=True) == 5


def test_names():
    assert load_reward("vader:pos-neg").name == "vader-pos-neg"
    assert load_reward("mood=vader").name == "mood"
    with pytest.raises(InvalidArgumentError, match="second reward named 'vader'"):
        load_rewards(["vader", "vader"])
    assert [reward.name for reward in load_rewards(["vader", "b=vader"])] == ["vader", "b"]


def test_imported_callables(tmp_path, monkeypatch):
    code = """
def count_a(prompt, response):
    return response.count("a")

def lengths(prompts, responses):
    return [len(p) + len(r) for p, r in zip(prompts, responses)]
lengths.batched = True
constant = 3
"""
    (tmp_path / "my_rewards_for_test.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert score(load_reward("my_rewards_for_test:count_a"), ["", ""], ["banana", "b"]) == [3.0, 0.0]
    assert score(load_reward("my_rewards_for_test:lengths"), ["p", ""], ["abc", "b"]) == [4.0, 1.0]
    with pytest.raises(InvalidArgumentError, match="did you mean 'count_a'"):
        load_reward("my_rewards_for_test:count_b")
    with pytest.raises(InvalidArgumentError, match="not callable"):
        load_reward("my_rewards_for_test:constant")
    with pytest.raises(InvalidArgumentError, match="cannot import 'no_such_module'"):
        load_reward("no_such_module:f")


@pytest.mark.parametrize(("spec", "hint"), [("lenght", "length"), ("vadr", "vader"), ("vader:pos", "pos-neg")])
def test_unknown_reward_names_the_nearest(spec, hint):
    with pytest.raises(InvalidArgumentError, match=re.escape(hint)):
        load_reward(spec)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda p, r: 1 / len(r), "raised ZeroDivisionError .* for response 1"),
        (lambda p, r: math.nan if not r else 1.0, "gave nan for response 1"),
        (lambda p, r: math.inf if not r else 1.0, "gave inf for response 1"),
        (lambda p, r: None if not r else 1.0, r"gave None \(NoneType\) for response 1"),
        (lambda p, r: "1", r"gave '1' \(str\) for response 0"),
    ],
)
def test_bad_rewards_name_reward_and_response(function, message):
    with pytest.raises(TrainingDataError, match=f"reward 'mine' {message}"):
        score(FunctionReward("mine", function), ["", ""], ["a", ""])


def test_batched_rewards_are_checked():
    with pytest.raises(TrainingDataError, match="1 rewards for 2 responses"):
        score(FunctionReward("mine", lambda p, r: [1.0], batched=True), ["", ""], ["a", "b"])
    with pytest.raises(TrainingDataError, match="returned float for a batch"):
        score(FunctionReward("mine", lambda p, r: 1.0, batched=True), ["", ""], ["a", "b"])
    with pytest.raises(TrainingDataError, match="responses 0 to 1"):
        score(FunctionReward("mine", lambda p, r: [][0], batched=True), ["", ""], ["a", "b"])
    assert score(FunctionReward("mine", lambda p, r: torch.tensor([1, 2]), batched=True), ["", ""], ["a", "b"]) == [
        1,
        2,
    ]


def test_missing_package_names_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InvalidArgumentError, match=r"vas-engine\[train\]"):
        load_reward("vader")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A random BERT of three labels over words of one letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "a", "b", "c", "d"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    folder = tmp_path_factory.mktemp("classifier")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(0)
    labels = {0: "sad", 1: "calm", 2: "glad"}
    config = BertConfig(
        vocab_size=7,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_classifier_equals_one_text_at_a_time(classifier):
    from transformers import BertForSequenceClassification

    texts = ["a b c", "d", "a a a a b", "", "a b c d a b c d"]
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    ids = {"a": 3, "b": 4, "c": 5, "d": 6}
    expected = []
    for text in texts:
        kept = [ids[word] for word in text.split()][-7:]  # eight positions, one of them [CLS]
        expected.append(model(torch.tensor([[2, *kept]])).logits[0].detach())
    glad = [float(logits.softmax(-1)[2]) for logits in expected]
    assert score(load_reward(f"hf:{classifier}#glad"), [""] * 5, texts) == pytest.approx(glad, abs=1e-5)
    sad = [float(logits[0]) for logits in expected]
    reward = load_reward(f"mood=hf:{classifier}#0:logit")
    assert (reward.name, reward.bounds) == ("mood", None)
    assert score(reward, [""] * 5, texts) == pytest.approx(sad, abs=1e-5)


def test_classifier_wants_a_label(classifier):
    with pytest.raises(InvalidArgumentError, match=r"several labels; .*sad, calm, glad"):
        load_reward(f"hf:{classifier}")
    with pytest.raises(InvalidArgumentError, match="did you mean 'glad'"):
        load_reward(f"hf:{classifier}#gald")
    with pytest.raises(InvalidArgumentError, match="cannot load a sequence classifier"):
        load_reward(f"hf:{classifier}/nothing")
