import math
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.rewards import ChatPrompt, FunctionReward, load_reward, load_rewards, score, score_all
from vas_engine.training.rewards.expression import Expression


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
        (lambda p, r: "1" if r else 1.0, r"gave '1' \(str\) for response 0"),
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
    with pytest.raises(TrainingDataError, match=r"raised IndexError .* for a batch"):
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


CHAT = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}"


def test_reward_model_with_a_chat_template_reads_messages(classifier, tmp_path):
    from transformers import AutoTokenizer, BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(classifier, num_labels=1, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        load_reward(f"hf:{tmp_path}#:chat")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path).eval()

    def logit(text):
        ids = {"a": 3, "b": 4, "c": 5, "d": 6}
        return model(torch.tensor([[ids.get(word, 1) for word in text.split()]])).logits.item()

    chat = ChatPrompt("unseen", [{"role": "system", "content": "d"}, {"role": "user", "content": "b"}])
    reward = load_reward(f"hf:{tmp_path}", whole_text=True)
    assert (reward.chat, reward.bounds) == (True, None)
    expected = [logit("u a a c"), logit("s d u b a c c")]
    assert score(reward, ["a", chat], ["c", "c c"]) == pytest.approx(expected, abs=1e-5)
    reward = load_reward(f"hf:{tmp_path}#:text")
    assert score(reward, ["a", chat], ["c", "c c"]) == score(reward, ["", ""], ["c", "c c"])
    assert score(load_reward(f"hf:{tmp_path}#:text:probability"), [""], ["c"])[0] == pytest.approx(
        1 / (1 + math.exp(-score(reward, [""], ["c"])[0]))
    )


def test_unknown_device_is_named(classifier):
    with pytest.raises(InvalidArgumentError, match=r"reward_device='gpu'.*use auto, cpu or cuda"):
        load_reward(f"hf:{classifier}#glad", device="gpu")


def test_batches_hold_texts_of_like_length_and_answers_keep_their_order():
    batches = []

    def lengths(prompts, responses):
        batches.append(responses)
        return [len(p) + 10 * len(r) for p, r in zip(prompts, responses, strict=True)]

    texts = ["a" * (7 * place % 10) for place in range(10)]
    prompts = ["p" * place for place in range(10)]
    found = score(FunctionReward("l", lengths, batched=True), prompts, texts, batch_size=4)
    assert found == [len(p) + 10 * len(r) for p, r in zip(prompts, texts, strict=True)]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [len(text) for batch in batches for text in batch] == list(range(10))


@pytest.mark.parametrize(
    ("formula", "expected", "bounds"),
    [
        ("1 + 2*x", 4.0, (-1, 3.0)),
        ("x - y", 1.5 - 0.5, None),
        ("(x + 1) / 5", 0.5, (0.0, 0.4)),
        ("1 / x", 1 / 1.5, None),
        ("x**2 - -x", 1.5**2 + 1.5, (-1.0, 2.0)),
        ("2 ** x", 2**1.5, (0.5, 2.0)),
        ("min(x, y, 0.25) * max(x, 0)", 0.25 * 1.5, None),
        ("clip(y, -1, 0.5) + abs(x)", 2.0, (-1.0, 1.5)),
        ("exp(x) + log(x + 2)", math.exp(1.5) + math.log(3.5), (math.exp(-1) + 0.0, math.e + math.log(3))),
        ("log(x)", math.log(1.5), None),
        ("-x", -1.5, (-1.0, 1.0)),
    ],
)
def test_formulas(formula, expected, bounds):
    expression = Expression(formula)
    names = {"x": (-1.0, 1.0), "y": None}
    known = expression.bounds({name: names[name] for name in expression.names})
    assert known == (None if bounds is None else pytest.approx(bounds))
    values = {"x": np.array([1.5]), "y": np.array([0.5])}
    assert expression.evaluate(values).tolist() == [pytest.approx(expected)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_value_leaves_the_bounds_of_its_formula(data):
    leaves = st.sampled_from(["x", "y", "0.5", "2", "3", "1.7"])
    formulas = st.recursive(
        leaves,
        lambda part: st.one_of(
            st.builds("({} {} {})".format, part, st.sampled_from(["+", "-", "*", "/", "**"]), part),
            st.builds("{}({})".format, st.sampled_from(["abs", "exp", "log", "-"]), part),
            st.builds("{}({}, {})".format, st.sampled_from(["min", "max"]), part, part),
            st.builds("clip({}, {}, {})".format, part, part, part),
        ),
        max_leaves=6,
    )
    expression = Expression(data.draw(formulas) + " + x")
    numbers = st.floats(-3, 3, width=16)
    bounds = {name: tuple(sorted([data.draw(numbers), data.draw(numbers)])) for name in ("x", "y")}
    known = expression.bounds(bounds)
    if known is None:
        return
    shares = st.lists(st.floats(0, 1), min_size=4, max_size=4).map(np.array)
    values = {name: np.clip(low + (high - low) * data.draw(shares), low, high) for name, (low, high) in bounds.items()}
    slack = 1e-9 * (1 + max(map(abs, known)))  # exp, log and ** are not rounded exactly
    results = expression.evaluate(values)
    outside = (results < known[0] - slack) | (results > known[1] + slack)
    assert not outside.any()  # what is undefined (0 log 0) is NaN and neither


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ("__import__('os').system('true') + x", "may not stand in a formula"),
        ("(lambda: 1)() + x", "may not stand in a formula"),
        ("x.real + 1", "may not stand in a formula"),
        ("x if y else 1", "may not stand in a formula"),
        ("x % 2", "may not stand in a formula"),
        ("[x][0] + 1", "may not stand in a formula"),
        ("True + x", "may not stand in a formula"),
        ("x + 'a'", "may not stand in a formula"),
        ("sum(x, 1)", "no function sum; known: abs, clip"),
        ("log(x, 2)", "log takes 1 arguments, not 2"),
        ("max(x)", "max takes 2 or more arguments, not 1"),
        ("max(*x)", "max takes 2 or more|may not stand"),
        ("1 + 2", "names no reward"),
        ("x +", "is no formula"),
        (f"x + 1{'0' * 400}", "too large"),
    ],
)
def test_what_is_no_formula(formula, message):
    with pytest.raises(InvalidArgumentError, match=message):
        Expression(formula)


def test_a_formula_of_named_rewards():
    specs = [
        "both=mood + 0.01*length - max(0, word_length - 4)",
        "mood=vader",
        "tri=clip(my_one, 0, 1)",
        "my-one=length",
    ]
    rewards = load_rewards(specs)
    texts = ["I love this wonderful happy day!", "A bad rainy afternoon"]
    found = score_all(rewards, ["", ""], texts)
    assert list(found) == ["both", "mood", "tri", "my-one"]
    for place, text in enumerate(texts):
        expected = found["mood"][place] + 0.01 * one("length", text) - max(0, one("word-length", text) - 4)
        assert found["both"][place] == pytest.approx(expected)
    assert found["my-one"] == [6.0, 4.0]
    assert [reward.bounds for reward in rewards] == [None, (-1.0, 1.0), (0.0, 1.0), None]
    assert rewards[0].spec == specs[0].removeprefix("both=")


def test_a_named_reward_is_computed_once_a_batch(tmp_path, monkeypatch):
    (tmp_path / "counted_rewards_for_test.py").write_text("calls = []\ndef f(p, r):\n    calls.append(r)\n    return 1")
    monkeypatch.chdir(tmp_path)
    rewards = load_rewards(["a=f1 + 1", "b=f1*f1", "f1=counted_rewards_for_test:f", "e=ensemble:mean(f1, length)"])
    texts = [str(place) for place in range(5)]
    found = score_all(rewards, [""] * 5, texts, batch_size=2)
    assert found["a"] == [2.0] * 5
    assert found["e"] == [1.0] * 5
    assert sorted(sys.modules["counted_rewards_for_test"].calls) == texts


def test_formulas_that_cannot_be():
    with pytest.raises(InvalidArgumentError, match=r"no reward is named 'moood'; did you mean 'mood'\?"):
        load_rewards(["mood=vader", "both=moood + 1"])
    with pytest.raises(InvalidArgumentError, match=r"defined by itself \(a -> b -> a\)"):
        load_rewards(["a=b + 1", "b=a + 1"])
    with pytest.raises(TrainingDataError, match=r"reward 'ratio' is inf for response 1 \(length 0\): keep it finite"):
        score(load_reward("ratio=1/length"), ["", ""], ["two words", ""])


def test_ensembles():
    texts = ["The good dog.", "A bad, bad cat hated it"]
    mood = score(load_reward("vader"), ["", ""], texts)
    share = score(load_reward("vader:pos-neg"), ["", ""], texts)
    table = np.array([mood, share])
    parts = "(vader, vader:pos-neg"
    assert score(load_reward(f"ensemble:mean{parts})"), ["", ""], texts) == pytest.approx(table.mean(0))
    assert score(load_reward(f"ensemble:min{parts})"), ["", ""], texts) == pytest.approx(table.min(0))
    expected = table.mean(0) - 0.5 * table.std(0)
    assert score(load_reward(f"ensemble:uncertainty{parts}, c=0.5)"), ["", ""], texts) == pytest.approx(expected)
    assert load_reward(f"ensemble:mean{parts})").bounds == (-1.0, 1.0)
    assert load_reward("ensemble:min(vader, distinct-words)").bounds == (-1.0, 1.0)
    assert load_reward("ensemble:uncertainty(vader, distinct-words, c=2)").bounds == (-0.5 - 2.0, 1.0)
    assert load_reward("ensemble:mean(vader, length)").bounds is None
    assert load_reward("safe=ensemble:min(vader, ensemble:mean(vader, uppercase))").name == "safe"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ensemble:best(vader, length)", "write one of ensemble:mean"),
        ("ensemble:mean(vader", "write one of ensemble:mean"),
        ("ensemble:mean(vader)", "two members or more"),
        ("ensemble:mean(vader, lenght)", "did you mean 'length'"),
        ("ensemble:min(vader, length, c=2)", "leave it out"),
        ("ensemble:uncertainty(vader, length, c=much)", "c is a number"),
        ("ensemble:uncertainty(vader, length, c=-1)", "at least 0"),
    ],
)
def test_ensembles_that_cannot_be(spec, message):
    with pytest.raises(InvalidArgumentError, match=message):
        load_reward(spec)


def test_an_ensemble_of_classifiers(classifier):
    reward = load_reward(f"ensemble:min(hf:{classifier}#glad, hf:{classifier}#calm)")
    texts = ["a b", "c d d"]
    glad, calm = (score(load_reward(f"hf:{classifier}#{label}"), ["", ""], texts) for label in ("glad", "calm"))
    assert score(reward, ["", ""], texts) == pytest.approx([min(pair) for pair in zip(glad, calm, strict=True)])
    assert reward.bounds == (0.0, 1.0)
