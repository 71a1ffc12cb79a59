"""`generate(custom_generate=vas_generate)`: the engine's tokens, generate's settings, an untouched model."""

from __future__ import annotations

import queue
import signal
from collections import Counter

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)
from transformers.generation import BaseStreamer

from tests.engine.test_distribution import EOS as WORLD_EOS
from tests.engine.test_distribution import HORIZON, PROMPT
from tests.integrations.conftest import EOS, KINDS, PAD, PROMPTS, bound, guided_llm, hf_model, padded, plain_model
from tests.oracle import chi_squared_p, enumerate_policy
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import InvalidArgumentError, SamplingParams, UnsupportedModelError
from vas_engine.engine.engine import Engine
from vas_engine.integrations.transformers import load_values, vas_generate

WEIGHTS = {"kind": 2.0}
SMALL = {"kv_cache_memory": "8MiB"}


def guided(model, prompts=PROMPTS, **options) -> list[list[int]]:
    """New tokens of each row, without what pads it."""
    inputs = padded(prompts)
    options = {"max_new_tokens": 12, "custom_generate": vas_generate, "values": WEIGHTS, **options}
    sequences = model.generate(**inputs, **options)
    assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]].unique(dim=0), inputs["input_ids"].unique(dim=0))
    return [_until_end(row) for row in sequences[:, inputs["input_ids"].shape[1] :].tolist()]


def _until_end(tokens: list[int]) -> list[int]:
    end = tokens.index(EOS) + 1 if EOS in tokens else len(tokens)
    assert set(tokens[end:]) <= {PAD}
    return tokens[:end]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_the_engines(model, kind: str) -> None:
    llm = guided_llm(model, {"kind": bound(kind, model)})
    load_values(model, {"kind": bound(kind, model)}, **SMALL)
    for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01}):
        params = SamplingParams(max_tokens=12, values=WEIGHTS, num_candidates=7, tail="drop", seed=3, **sampling)
        expected = [out.outputs[0].token_ids for out in llm.generate(PROMPTS, params, use_tqdm=False)]
        drawn = {"do_sample": True, **sampling} if sampling["temperature"] else {"do_sample": False}
        assert guided(model, num_candidates=7, tail="drop", seed=3, **drawn) == expected
        assert guided(model, values=None, seed=3, **drawn) != expected


def test_frequencies_follow_the_guided_policy(world) -> None:
    net = world.network("model")
    params = SamplingParams(values={"ones": 1.3, "ended": -1.5}, num_candidates=3)
    expected = enumerate_policy(world.lm, {"ones": (net, 0), "ended": (net, 1)}, params, PROMPT, HORIZON, {WORLD_EOS})
    model = plain_model(world.lm)
    load_values(model, {"": net}, max_num_seqs=800, kv_cache_memory="32MiB")
    set_seed(11)
    counts: Counter = Counter()
    for _ in range(3):
        sequences = model.generate(
            torch.tensor([PROMPT]), custom_generate=vas_generate, values=dict(params.values), num_candidates=3,
            do_sample=True, top_k=0, max_new_tokens=HORIZON, num_return_sequences=800, pad_token_id=WORLD_EOS,
        )  # fmt: skip
        for row in sequences[:, len(PROMPT) :].tolist():
            counts[tuple(row[: row.index(WORLD_EOS) + 1] if WORLD_EOS in row else row)] += 1
    assert chi_squared_p(counts, expected, 2400) > 1e-4
    plain = enumerate_policy(world.lm, {}, SamplingParams(), PROMPT, HORIZON, {WORLD_EOS})
    assert chi_squared_p(counts, plain, 2400) < 1e-4


class Banning(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


SETTINGS = [
    {},
    {"repetition_penalty": 1.7},
    {"suppress_tokens": [3, 8, 11, 20, 22]},
    {"sequence_bias": {(4,): 3.0, (9,): -2.5}},
    {"bad_words_ids": [[7], [13], [2], [25]]},
    {"min_new_tokens": 9, "eos_token_id": [EOS, 3, 4, 5, 6, 7, 8, 9]},
    {"min_length": 14, "eos_token_id": [EOS, 3, 4, 5, 6, 7, 8, 9]},
    {"eos_token_id": 3},
    {"max_length": 11, "max_new_tokens": None},
    {"renormalize_logits": True},
    {"sequence_bias": {(4,): 3.0}, "suppress_tokens": [4], "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "none")
def test_settings_mean_what_they_mean_in_generate(model, settings: dict) -> None:
    """Greedy and without weights the engine and transformers' own loop give the same tensor."""
    load_values(model, {"kind": bound("action", model)}, **SMALL)
    options = {"max_new_tokens": 14, "do_sample": False, **settings}
    inputs = padded(PROMPTS)
    ours = model.generate(**inputs, custom_generate=vas_generate, **options)
    assert torch.equal(ours, model.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"typical_p": 0.5, "do_sample": True}, "TypicalLogitsWarper"),
        ({"sequence_bias": {(4, 5): 3.0}}, r"sequence_bias=\(4, 5\)"),
        ({"bad_words_ids": [[4, 5]]}, r"bad_words_ids=\(4, 5\)"),
        ({"logits_processor": LogitsProcessorList([Banning()])}, "Banning"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"values": {"kin": 1.0}}, "did you mean 'kind'"),
        ({"tail": "kept"}, "tail='kept'"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "zeros on the left only"),
        ({"position_ids": torch.tensor([[3, 4, 5]])}, "position_ids"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(model, options: dict, named: str) -> None:
    load_values(model, {"kind": bound("action", model)}, **SMALL)
    with pytest.raises(InvalidArgumentError, match=named):
        model.generate(torch.tensor([PROMPTS[0]]), custom_generate=vas_generate, max_new_tokens=3, **options)


def test_a_cache_that_holds_something_and_embeddings_are_refused(model) -> None:
    load_values(model, None, **SMALL)
    cache = DynamicCache()
    ids = torch.tensor([PROMPTS[1]])
    model(ids[:, :3], past_key_values=cache)
    with pytest.raises(InvalidArgumentError, match="past_key_values"):
        model.generate(ids, custom_generate=vas_generate, past_key_values=cache, max_new_tokens=3)
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(InvalidArgumentError, match=r"inputs_embeds|input_ids"):
        model.generate(inputs_embeds=embeds, custom_generate=vas_generate, max_new_tokens=3)
    with pytest.raises(InvalidArgumentError, match="assistant_model"):
        model.generate(ids, custom_generate=vas_generate, assistant_model=hf_model(), max_new_tokens=3)


def test_the_model_is_left_as_it_was(model) -> None:
    model.train()
    inputs = padded(PROMPTS)
    implementation = model.config._attn_implementation
    before = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    load_values(model, {"kind": bound("side", model)}, **SMALL)
    guided(model)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model.generate(**inputs, do_sample=False, max_new_tokens=8), before)
    model(inputs["input_ids"], labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_is_seen_and_no_weight_is_copied(model) -> None:
    load_values(model, None, **SMALL)
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    inputs = padded([PROMPTS[1] * 8])  # several pages, whose K/V must not be kept either
    first = model.generate(**inputs, custom_generate=vas_generate, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.roll(parameter, 1, 0))
    second = model.generate(**inputs, custom_generate=vas_generate, **options)
    assert first.logprobs.item() != pytest.approx(second.logprobs.item(), abs=1e-3)
    plain = model.generate(**inputs, **options, output_logits=True)
    assert torch.equal(plain.sequences, second.sequences)
    steps = [torch.log_softmax(logits[0].double(), -1).max() for logits in plain.logits]
    assert second.logprobs.item() == pytest.approx(sum(steps).item(), abs=1e-5)


def test_a_model_that_moved_or_has_no_engine_is_named(model) -> None:
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(InvalidArgumentError, match="call load_values"):
        model.generate(ids, custom_generate=vas_generate)
    load_values(model, None, **SMALL)
    model.double()
    with pytest.raises(InvalidArgumentError, match="have moved"):
        model.generate(ids, custom_generate=vas_generate)
    with pytest.raises(InvalidArgumentError, match="merge_and_unload"):
        load_values("folder")
    model = hf_model()
    model.forward = model.forward
    with pytest.raises(UnsupportedModelError, match="was replaced"):
        load_values(model)


def test_a_seed_fixes_a_row_in_any_batch_and_set_seed_repeats_a_run(model) -> None:
    load_values(model, {"kind": bound("reader", model)}, **SMALL)
    options = {"do_sample": True, "seed": 5}
    together = guided(model, **options)
    assert [guided(model, [prompt], **options)[0] for prompt in PROMPTS] == together
    four = guided(model, [PROMPTS[0]], num_return_sequences=4, **options)
    assert four[0] == together[0]
    assert len({tuple(row) for row in four}) > 1

    def drawn() -> list[list[int]]:
        set_seed(8)
        return guided(model, do_sample=True, num_return_sequences=2)

    once = drawn()
    assert drawn() == once
    assert guided(model, do_sample=True, num_return_sequences=2) != once
    assert once[0] != once[1]


class EndsAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **options):
        return torch.tensor([len(row) >= self.length for row in input_ids])


def test_stopping_criteria_are_asked_after_every_token(model) -> None:
    load_values(model, {"kind": bound("action", model)}, **SMALL)
    whole = guided(model, do_sample=True, seed=5, num_return_sequences=2)
    rows = guided(
        model, do_sample=True, seed=5, num_return_sequences=2, stopping_criteria=StoppingCriteriaList([EndsAt(11)])
    )
    assert rows == [row[:4] for row in whole]


class Raising(StoppingCriteria):
    def __call__(self, input_ids, scores, **named):
        raise ValueError("no more")


def test_ctrl_c_while_an_error_is_cleaned_up_leaves_nothing(model, monkeypatch: pytest.MonkeyPatch) -> None:
    load_values(model, {"kind": bound("reader", model)}, **SMALL)
    cancel, engines = Engine.cancel, []

    def interrupted(self, request_id):
        cancel(self, request_id)
        if not engines:
            engines.append(self)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Engine, "cancel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        guided(model, stopping_criteria=StoppingCriteriaList([Raising()]))
    assert not engines[0].has_unfinished


def test_dictionary_with_values(model) -> None:
    llm = guided_llm(model, {"kind": bound("side", model)})
    load_values(model, {"kind": bound("side", model)}, **SMALL)
    params = SamplingParams(max_tokens=9, values=WEIGHTS, seed=2)
    expected = [out.outputs[0] for out in llm.generate(PROMPTS, params, use_tqdm=False)]
    out = model.generate(
        **padded(PROMPTS), custom_generate=vas_generate, values=WEIGHTS, seed=2, do_sample=True, top_k=0,
        max_new_tokens=9, return_dict_in_generate=True,
    )  # fmt: skip
    for row, completion in enumerate(expected):
        length = len(completion.token_ids)
        assert out.sequences[row, 7 : 7 + length].tolist() == completion.token_ids
        assert out.token_values["kind"][row, :length].tolist() == pytest.approx(completion.values["kind"], abs=1e-5)
        assert out.token_values["kind"][row, length:].isnan().all()
        assert out.logprobs[row].item() == pytest.approx(completion.cumulative_logprob, abs=1e-5)


class Ignoring(BaseStreamer):
    def put(self, value):
        pass

    end = put


def test_streamer_and_stop_text() -> None:
    model, tokenizer = tiny_llama(), byte_tokenizer()
    load_values(model, None, tokenizer, **SMALL)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=0)
    inputs = tokenizer("Once", return_tensors="pt")
    options = {"custom_generate": vas_generate, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
    whole = model.generate(**inputs, **options, streamer=streamer)[0, 4:]
    try:
        streamed = "".join(streamer)
    except queue.Empty:
        pytest.fail("the streamer was never told of the end")
    assert streamed == tokenizer.decode(whole)
    with pytest.raises(InvalidArgumentError, match="streams one row"):
        model.generate(**tokenizer(["Once", "Mara"], return_tensors="pt"), **options, streamer=Ignoring())
    character = tokenizer.decode(whole[4])
    first = whole.tolist().index(whole[4].item())
    stopped = model.generate(**inputs, **options, stop=character)[0, 4:]
    assert stopped.tolist() == whole[: first + 1].tolist()


def test_continuous_batching_has_no_place_for_a_processor(model) -> None:
    """What docs/integrations/transformers.md says; when this fails, transformers has changed and we can do more."""
    with pytest.raises(TypeError, match="logits_processor"):
        model.init_continuous_batching(logits_processor=LogitsProcessorList([Banning()]))
