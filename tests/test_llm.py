"""LLM end to end: batches, streams, chats, bad requests among good ones, Ctrl-C, memory."""

import inspect
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import vas_engine
from tests.conftest import shared_model
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.errors import InvalidArgumentError, KVCacheError, NonFiniteError, ValueArtifactError, VASError
from vas_engine.interrupt import deferred_interrupt
from vas_engine.outputs import RequestOutput
from vas_engine.prompts import read_prompts
from vas_engine.values.artifact import save_value
from vas_engine.values.config import default_config
from vas_engine.values.network import ValueNetwork

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}[bot]{% endif %}"


def make_llm(**options) -> LLM:
    settings = {"device": "cpu", "kv_cache_memory": "4MiB", "tokenizer": byte_tokenizer()} | options
    return LLM(tiny_llama(), **settings)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return make_llm()


@pytest.fixture(scope="module")
def guided() -> LLM:
    """Two random values, "kind" (a reader) and "long" (a side network)."""
    model = make_llm()
    networks = {}
    for name, kind in (("kind", "reader"), ("long", "side")):
        torch.manual_seed(1)
        networks[name] = ValueNetwork(default_config(kind, model.lm, [name]))
    return make_llm(values=networks)


@pytest.fixture(autouse=True)
def clean(request):
    """After every test: no request, no block in use."""
    yield
    for name in ("llm", "guided"):
        if name in request.fixturenames:
            engine = request.getfixturevalue(name).engine
            assert not engine.has_unfinished
            assert not engine.scheduler.has_work
            engine.scheduler.check()


def texts(outputs):
    return [completion.text for output in outputs for completion in output.outputs]


def tokens(outputs):
    return [completion.token_ids for output in outputs for completion in output.outputs]


# -- what comes out ------------------------------------------------------------------------------------------


def test_greedy_equals_transformers(llm):
    ids = [72, 105, 33]
    model = tiny_llama().eval()
    expected = []
    with torch.no_grad():
        while len(expected) < 12:
            logits = model(torch.tensor([ids + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
            if expected[-1] == 256:
                break
    output = llm.generate("Hi!", GREEDY, use_tqdm=False)[0]
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == expected
    assert output.outputs[0].text == llm.tokenizer.decode(expected, skip_special_tokens=True)


def test_outputs_come_in_the_order_of_the_prompts(llm):
    prompts = [chr(65 + i) * (1 + 7 * (i % 3)) for i in range(9)]
    params = [SamplingParams(seed=i, max_tokens=3 + 5 * ((i * 7) % 4), ignore_eos=True) for i in range(9)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == [p.max_tokens for p in params]
    alone = [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(prompts, params, strict=True)]
    assert tokens(outputs) == tokens(alone)


def test_a_step_does_not_look_at_all_that_waits(monkeypatch):
    """Else a long list of prompts costs the square of its length."""
    looked = 0

    def finished(output) -> bool:
        nonlocal looked
        looked += 1
        return all(completion.finished for completion in output.outputs)

    monkeypatch.setattr(RequestOutput, "finished", property(finished))
    few = make_llm(max_num_seqs=2)
    monkeypatch.setattr(few.engine, "_sequences", None)  # a list of all of them
    outputs = few.generate(["a"] * 100, SamplingParams(max_tokens=2, ignore_eos=True))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2] * 100
    assert looked < 2000


def test_threads_take_turns(llm):
    prompts, params = ["Once", "Lily"], SamplingParams(seed=3, max_tokens=10, ignore_eos=True)
    expected = tokens(llm.generate(prompts, params, use_tqdm=False))
    shared = make_llm()
    inside, together, step = [], threading.Event(), shared.engine.step

    def slow_step():
        inside.append(None)
        if len(inside) > 1:
            together.set()
        together.wait(0.02)  # for another thread, that must not come
        try:
            return step()
        finally:
            inside.pop()

    shared.engine.step = slow_step
    start = threading.Barrier(3)

    def generate():
        start.wait()
        return tokens(shared.generate(prompts, params, use_tqdm=False))

    def stream():
        start.wait()
        *_, last = shared.stream("Once", params)
        return last.outputs[0].token_ids

    with ThreadPoolExecutor(3) as pool:
        *whole, streamed = [future.result() for future in [pool.submit(f) for f in (generate, generate, stream)]]
    assert not together.is_set()
    assert whole == [expected, expected]
    assert streamed == expected[0]


def test_every_form_of_a_prompt(llm):
    ids = [72, 105]
    forms = ["Hi", ids, {"prompt": "Hi"}, {"prompt_token_ids": ids}, np.array(ids), torch.tensor(ids)]
    for form in forms:
        assert tokens(llm.generate(form, GREEDY, use_tqdm=False)) == tokens(
            llm.generate(["Hi"], GREEDY, use_tqdm=False)
        )
    assert len(llm.generate(forms, GREEDY, use_tqdm=False)) == 6
    assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_n_completions_each_repeat_by_their_own_seed(llm):
    output = llm.generate("Hi", SamplingParams(n=4, seed=5, max_tokens=8, ignore_eos=True), use_tqdm=False)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    for completion in output.outputs:
        params = SamplingParams(seed=completion.seed, max_tokens=8, ignore_eos=True)
        assert llm.generate("Hi", params, use_tqdm=False)[0].outputs[0].token_ids == completion.token_ids
    assert output.metrics.generated_tokens == 32


def test_a_drawn_seed_is_reported_and_differs(llm):
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    first, second = (llm.generate("Hi", params, use_tqdm=False)[0].outputs[0] for _ in range(2))
    assert first.seed != second.seed
    again = llm.generate("Hi", params.replace(seed=first.seed), use_tqdm=False)[0].outputs[0]
    assert again.token_ids == first.token_ids


def test_a_seeded_llm_repeats_its_requests():
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    runs = [make_llm(seed=3).generate(["a", "a"], params, use_tqdm=False) for _ in range(2)]
    assert tokens(runs[0]) == tokens(runs[1])
    assert runs[0][0].outputs[0].seed != runs[0][1].outputs[0].seed


def test_logprobs_are_those_of_the_model(llm):
    output = llm.generate("Hi", GREEDY.replace(logprobs=3), use_tqdm=False)[0].outputs[0]
    ids = [72, 105]
    with torch.no_grad():
        logits = tiny_llama().eval()(torch.tensor([ids + output.token_ids])).logits[0]
    expected = logits.double().log_softmax(-1)[len(ids) - 1 : -1]
    for row, entries, token in zip(expected, output.logprobs, output.token_ids, strict=True):
        best = row.topk(3)
        assert set(best.indices.tolist()) <= set(entries)
        assert entries[token].rank == 1
        for other, entry in entries.items():
            assert entry.logprob == pytest.approx(row[other].item(), abs=1e-4)
            assert entry.tilted_logprob == entry.logprob
    total = sum(entries[token].logprob for entries, token in zip(output.logprobs, output.token_ids, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


def test_stop_strings_end_the_text_and_free_the_engine(llm):
    free = SamplingParams(seed=1, max_tokens=40, ignore_eos=True)
    whole = llm.generate("Hi", free, use_tqdm=False)[0].outputs[0]
    printable = [i for i in range(3, len(whole.text) - 2) if whole.text[i : i + 2].isprintable()]
    stop = whole.text[printable[0] : printable[0] + 2]
    cut = llm.generate("Hi", free.replace(stop=[stop]), use_tqdm=False)[0].outputs[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < 40


def test_values_are_reported_and_steer(guided):
    assert guided.value_names == ["kind", "long"]
    plain = SamplingParams(seed=2, max_tokens=10, ignore_eos=True)
    watched = plain.replace(values={"kind": 0.0, "long": 0.0})
    steered = plain.replace(values={"kind": 50.0}, report_kl=True, logprobs=0)
    outputs = guided.generate(["Hi"] * 3, [plain, watched, steered], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert outputs[0].outputs[0].values == {}
    assert outputs[0].metrics.value_evaluations == 0
    assert {name: len(series) for name, series in outputs[1].outputs[0].values.items()} == {
        "kind": 10,
        "long": 10,
    }
    completion = outputs[2].outputs[0]
    assert completion.token_ids != outputs[0].outputs[0].token_ids
    assert outputs[2].metrics.value_evaluations == 10 * 21
    assert completion.kl > 0
    entries = [entry[token] for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert any(abs(entry.logprob - entry.tilted_logprob) > 1e-3 for entry in entries)
    total = sum(entry.tilted_logprob for entry in entries)
    assert completion.cumulative_tilted_logprob == pytest.approx(total)


def test_return_hidden_states(llm):
    output = llm.generate("Hi", GREEDY.replace(return_hidden_states=True), use_tqdm=False)[0].outputs[0]
    ids = [72, 105, *output.token_ids]
    with torch.no_grad():
        expected = tiny_llama().eval()(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
    torch.testing.assert_close(output.hidden_states, expected, rtol=1e-4, atol=1e-4)


def test_hidden_states_are_whole_where_the_prefix_is_cached(llm):
    prompt = "A prompt that fills more than two pages of the cache"
    plain = llm.generate(prompt, GREEDY, use_tqdm=False)[0]
    asked = GREEDY.replace(return_hidden_states=True)
    first, second = (llm.generate(prompt, asked, use_tqdm=False)[0].outputs[0] for _ in range(2))
    assert first.token_ids == second.token_ids == plain.outputs[0].token_ids
    assert len(first.hidden_states) == len(plain.prompt_token_ids) + len(first.token_ids)
    torch.testing.assert_close(second.hidden_states, first.hidden_states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [None, "reader", "lookahead"])
def test_hidden_states_end_with_the_last_token_where_a_stop_string_ends_the_text(kind):
    bare = make_llm()
    llm = make_llm(values={"v": ValueNetwork(default_config(kind, bare.lm, ["v"]))}) if kind else bare
    values = {"v": 1.0} if kind else {}
    params = SamplingParams(n=2, max_tokens=30, seed=4, ignore_eos=True, values=values, num_candidates=4)
    whole = llm.generate("Hi", params, use_tqdm=False)[0].outputs[0]
    stop = next(character for character in whole.text[3:] if character.isascii())
    stopped = params.replace(stop=stop, return_hidden_states=True)
    outputs = llm.generate(["Hi", "Yo"], stopped, use_tqdm=False)
    model = tiny_llama().eval()
    assert outputs[0].outputs[0].finish_reason == "stop"
    for output in outputs:
        for completion in output.outputs:
            ids = torch.tensor([[*output.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                expected = model(ids, output_hidden_states=True).hidden_states[-1][0]
            torch.testing.assert_close(completion.hidden_states, expected, rtol=1e-4, atol=1e-4)
    assert outputs[0].metrics.generated_tokens == sum(len(o.token_ids) for o in outputs[0].outputs)
    assert not llm.engine.has_unfinished


# -- streams and chats ---------------------------------------------------------------------------------------


def test_stream_yields_deltas_that_join(llm):
    params = SamplingParams(n=2, seed=3, max_tokens=9, ignore_eos=True)
    seen = list(llm.stream("Hi", params))
    assert len(seen) >= 9
    whole = llm.generate("Hi", params, use_tqdm=False)[0]
    for index, completion in enumerate(whole.outputs):
        assert "".join(output.outputs[index].delta_text for output in seen) == completion.text
        assert [token for o in seen for token in o.outputs[index].delta_token_ids] == completion.token_ids
    assert seen[-1].finished
    assert len(seen[0].outputs[0].token_ids) == 1  # what was yielded does not change afterwards


def test_leaving_a_stream_cancels_it(llm):
    for output in llm.stream("Hi", SamplingParams(ignore_eos=True)):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert not llm.engine.has_unfinished


def test_a_stream_that_is_never_started_costs_nothing(llm):
    llm.stream("Hi", GREEDY)
    assert not llm.engine.has_unfinished


def test_generate_inside_a_stream(llm):
    params = SamplingParams(seed=3, max_tokens=9, ignore_eos=True)
    expected = llm.generate(["Hi", "Yo"], params, use_tqdm=False)
    stream = llm.stream("Hi", params)
    first = next(stream)
    inner = llm.generate("Yo", params, use_tqdm=False)
    *_, last = stream
    assert first.outputs[0].text == expected[0].outputs[0].text[: len(first.outputs[0].text)]
    assert [last.outputs[0].token_ids, *tokens(inner)] == tokens(expected)


def test_stream_raises_the_requests_error(llm):
    with pytest.raises(InvalidArgumentError, match="max_model_len"):
        list(llm.stream("x" * 500))
    with pytest.raises(InvalidArgumentError, match="one prompt"):
        llm.stream(["a", "b"])


def test_chat_renders_the_template():
    llm = make_llm(tokenizer=byte_tokenizer(chat_template=TEMPLATE))
    messages = [{"role": "user", "content": "Hi"}]
    output = llm.chat(messages, GREEDY, use_tqdm=False)[0]
    assert output.prompt == "[user]Hi[bot]"
    assert tokens([output]) == tokens(llm.generate("[user]Hi[bot]", GREEDY, use_tqdm=False))
    assert len(llm.chat([messages, messages], GREEDY, use_tqdm=False)) == 2
    for bad in ([], "Hi", [{"content": "Hi"}]):
        with pytest.raises(InvalidArgumentError, match="messages"):
            llm.chat(bad, GREEDY)
    with pytest.raises(InvalidArgumentError, match="cannot be encoded"):
        llm.chat([{"role": "user", "content": "a\ud800"}], GREEDY)
    with pytest.raises(InvalidArgumentError, match="refuses"):
        llm.chat(messages, GREEDY, chat_template="{{ raise_exception('no') }}")


def test_chat_without_a_template_says_so(llm):
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}])


# -- bad requests --------------------------------------------------------------------------------------------

BAD = {
    "empty": ("", GREEDY, "is empty"),
    "no ids": ([], GREEDY, "empty"),
    "too long": ("x" * 128, GREEDY, "max_model_len=128"),
    "other vocabulary": ([257], GREEDY, "ids run from 0 to 256"),
    "negative id": ([-1], GREEDY, "ids run from 0 to 256"),
    "unknown value": ("Hi", GREEDY.replace(values={"knd": 1.0}), "did you mean 'kind'"),
    "k": ("Hi", GREEDY.replace(values={"kind": 1.0}, num_candidates=258), "vocabulary of 257"),
    "bias": ("Hi", GREEDY.replace(logit_bias={999: 1.0}), "end at 256"),
    "tilt": ("Hi", GREEDY.replace(values={"kind": 1.0}, tilt="optimal"), "tilt='mean'"),
    "surrogate": ("\ud800", GREEDY, "cannot be encoded"),
}


def test_bad_requests_fail_alone_and_say_why(guided):
    good = SamplingParams(seed=4, max_tokens=20, ignore_eos=True, values={"kind": 3.0, "long": -2.0})
    expected = tokens(guided.generate(["one", "two"], good, use_tqdm=False))
    prompts = ["one", *(prompt for prompt, _, _ in BAD.values()), "two"]
    params = [good, *(options for _, options, _ in BAD.values()), good]
    outputs = guided.generate(prompts, params, use_tqdm=False, on_error="return")
    assert tokens([outputs[0], outputs[-1]]) == expected
    for output, (_, _, message) in zip(outputs[1:-1], BAD.values(), strict=True):
        assert isinstance(output.error, InvalidArgumentError)
        assert message in str(output.error)
        assert [completion.finish_reason for completion in output.outputs] == ["error"]
    with pytest.raises(InvalidArgumentError, match="is empty") as caught:
        guided.generate(prompts, params, use_tqdm=False)
    assert tokens([caught.value.outputs[0], caught.value.outputs[-1]]) == expected
    assert len(caught.value.__notes__) == len(BAD)


@pytest.mark.parametrize(
    ("prompts", "options", "argument"),
    [
        (5, {}, "prompts"),
        (["a", 5], {}, "prompts[1]"),
        ([["a"]], {}, "prompts[0]"),
        ({"promt": "a"}, {}, "prompts['promt']"),
        ({"prompt": 5}, {}, "prompts['prompt']"),
        ({"prompt_token_ids": 5}, {}, "prompts['prompt_token_ids']"),
        (["a", "b"], {"sampling_params": []}, "sampling_params"),
        ("a", {"sampling_params": {"n": 2}}, "sampling_params"),
        (["a", "b"], {"sampling_params": [GREEDY]}, "sampling_params"),
        (["a", "b"], {"priority": [1]}, "priority"),
        ("a", {"priority": "high"}, "priority"),
        ("a", {"on_error": "ignore"}, "on_error"),
    ],
)
def test_what_is_no_request_at_all_is_refused_before_any_work(llm, prompts, options, argument):
    steps = llm.engine.stats.steps
    with pytest.raises(InvalidArgumentError) as caught:
        llm.generate(prompts, **options)
    assert argument in caught.value.argument
    assert llm.engine.stats.steps == steps


@pytest.mark.parametrize(
    ("call", "wrong", "right"),
    [
        ("generate", "sampling_parms", "sampling_params"),
        ("generate", "params", "sampling_params"),
        ("chat", "add_generation_promt", "add_generation_prompt"),
        ("stream", "prority", "priority"),
    ],
)
def test_an_unknown_argument_of_a_call_names_the_nearest(llm, call, wrong, right):
    with pytest.raises(InvalidArgumentError, match=f"did you mean '{right}'"):
        getattr(llm, call)("Hi", **{wrong: 1})


def test_values_that_are_not_finite_end_their_request_only():
    base = make_llm()
    torch.manual_seed(1)
    sick, sound = (ValueNetwork(default_config("reader", base.lm, ["v"])) for _ in range(2))
    with torch.no_grad():
        next(sick.parameters()).fill_(float("nan"))
    llm = make_llm(values={"sick": sick, "sound": sound})
    params = SamplingParams(seed=4, max_tokens=12, ignore_eos=True)
    mix = [params, params.replace(values={"sick": 1.0}), params.replace(values={"sound": 1.0})]
    alone = [llm.generate("Hi", mix[i], use_tqdm=False)[0] for i in (0, 2)]
    outputs = llm.generate(["Hi"] * 3, mix, use_tqdm=False, on_error="return")
    assert isinstance(outputs[1].error, NonFiniteError)
    assert tokens([outputs[0], outputs[2]]) == tokens(alone)
    llm.engine.scheduler.check()


def test_a_weight_that_overflows_ends_its_request_only():
    """The value itself is finite, its product with the weight is not."""
    base = make_llm()
    torch.manual_seed(1)
    value = ValueNetwork(default_config("reader", base.lm, ["v"]))
    with torch.no_grad():
        value.heads.output.bias.fill_(1e9)
    llm = make_llm(values={"v": value})
    params = SamplingParams(seed=4, max_tokens=12, ignore_eos=True)
    mix = [params, params.replace(values={"v": 1e30}), params.replace(values={"v": 0.0})]
    alone = [llm.generate("Hi", mix[i], use_tqdm=False)[0] for i in (0, 2)]
    outputs = llm.generate(["Hi"] * 3, mix, use_tqdm=False, on_error="return")
    assert isinstance(outputs[1].error, NonFiniteError)
    assert tokens([outputs[0], outputs[2]]) == tokens(alone)
    llm.engine.scheduler.check()


def test_a_temperature_of_next_to_nothing_is_greedy(llm):
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=1)
    cold = [params.replace(temperature=t) for t in (0.0, 5e-324, 9e-9)]
    first, *others = tokens(llm.generate(["Hi"] * 3, cold, use_tqdm=False))
    assert others == [first, first]


def test_an_end_of_sequence_beyond_the_vocabulary_is_none():
    """As where a config names the end that a longer vocabulary would have."""
    llm = LLM(tiny_llama(vocab_size=200), skip_tokenizer_init=True, device="cpu", kv_cache_memory="4MiB")
    assert llm.lm.eos_token_ids == set()
    params = SamplingParams(max_tokens=4, min_tokens=2, seed=1)
    assert llm.generate([[1, 2]], params, use_tqdm=False)[0].outputs[0].finish_reason == "length"


def test_a_stop_string_needs_a_tokenizer():
    llm = make_llm(tokenizer=None, skip_tokenizer_init=True)
    assert llm.tokenizer is None
    with pytest.raises(InvalidArgumentError, match="stop_token_ids"):
        llm.generate([[72]], GREEDY.replace(stop="a"), use_tqdm=False)
    with pytest.raises(InvalidArgumentError, match="no tokenizer"):
        llm.generate("Hi", GREEDY, use_tqdm=False)
    assert llm.generate([[72]], GREEDY, use_tqdm=False)[0].outputs[0].text == ""


# -- Ctrl-C --------------------------------------------------------------------------------------------------


def interrupt_in_step(monkeypatch, llm, number):
    """Ctrl-C in the middle of the n-th step; returns a list that grows with every step that was completed."""
    step, done = llm.engine.step, []

    def interrupted():
        if len(done) == number:
            signal.raise_signal(signal.SIGINT)
        events = step()
        done.append(len(events))
        return events

    monkeypatch.setattr(llm.engine, "step", interrupted)
    return done


def test_ctrl_c_ends_all_requests_between_steps(guided, monkeypatch):
    params = SamplingParams(seed=4, max_tokens=30, ignore_eos=True, values={"long": 1.0})
    expected = guided.generate(["Hi", "Yo"], params, use_tqdm=False)
    with monkeypatch.context() as patch:
        done = interrupt_in_step(patch, guided, 3)
        with pytest.raises(KeyboardInterrupt):
            guided.generate(["Hi"] * 8, params, use_tqdm=False)
        assert len(done) >= 4  # the step that was under way was completed
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not guided.engine.has_unfinished
    guided.engine.scheduler.check()
    assert tokens(guided.generate(["Hi", "Yo"], params, use_tqdm=False)) == tokens(expected)


def test_ctrl_c_in_a_stream(llm, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, llm, 2)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("Hi", SamplingParams(ignore_eos=True)))
    assert not llm.engine.has_unfinished


def test_a_second_ctrl_c_waits_until_all_is_cancelled(llm, monkeypatch):
    cancel = llm.engine.cancel

    def interrupted(request_id):
        cancel(request_id)
        monkeypatch.setattr(llm.engine, "cancel", cancel)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        interrupt_in_step(patch, llm, 2)
        patch.setattr(llm.engine, "cancel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["Hi", "Yo"], SamplingParams(ignore_eos=True), use_tqdm=False)
    assert not llm.engine.has_unfinished
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_in_a_step_ends_its_requests(llm, monkeypatch):
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
    expected = llm.generate("Hi", params, use_tqdm=False)
    stream = llm.stream("Hi", params)
    next(stream)
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, llm, 0)
        patch.setattr(llm.engine, "_choose", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            llm.generate("Yo", params, use_tqdm=False)
    with pytest.raises(VASError, match="interrupted"):
        list(stream)
    assert tokens(llm.generate("Hi", params, use_tqdm=False)) == tokens(expected)


def test_ctrl_c_is_not_lost_to_an_error():
    def interrupted():
        with deferred_interrupt():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("also")

    with pytest.raises(KeyboardInterrupt) as caught:
        interrupted()
    assert isinstance(caught.value.__cause__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_while_a_request_is_admitted(llm, monkeypatch, call):
    """The scheduler has it and the rest of the engine does not know it yet."""
    add = llm.engine.scheduler.add

    def interrupted(sequence):
        add(sequence)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream("Hi", GREEDY) if call == "stream" else llm.generate(["Hi"] * 2, GREEDY, use_tqdm=False))
    assert not llm.engine.has_unfinished
    llm.engine.scheduler.check()


def test_a_failing_step_leaves_nothing_behind(llm, monkeypatch):
    step, calls = llm.engine.step, []

    def failing():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("the device is gone")
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", failing)
        with pytest.raises(RuntimeError, match="gone"):
            llm.generate(["Hi", "Yo"], SamplingParams(ignore_eos=True), use_tqdm=False)
    assert not llm.engine.has_unfinished


def fail_in_step(monkeypatch, llm):
    """The next step raises in its middle, where sequences have been changed already."""
    whole = llm.engine._choose

    def failing(*arguments):
        whole(*arguments)
        monkeypatch.setattr(llm.engine, "_choose", whole)
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(llm.engine, "_choose", failing)


def test_a_failing_step_ends_other_streams_too_and_later_calls_work(llm, monkeypatch):
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
    expected = llm.generate("Hi", params, use_tqdm=False)
    stream = llm.stream("Hi", params)
    next(stream)
    fail_in_step(monkeypatch, llm)
    with pytest.raises(RuntimeError, match="gone"):
        llm.generate("Yo", params, use_tqdm=False)
    assert not llm.engine.has_unfinished
    with pytest.raises(RuntimeError, match="gone"):
        list(stream)
    assert tokens(llm.generate("Hi", params, use_tqdm=False)) == tokens(expected)


def test_a_failing_step_is_the_error_of_its_requests(monkeypatch):
    llm = make_llm(max_num_seqs=2)
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
    expected = llm.generate("Hi", params, use_tqdm=False)
    fail_in_step(monkeypatch, llm)
    outputs = llm.generate(["Hi"] * 3, params, use_tqdm=False, on_error="return")
    assert [str(output.error) for output in outputs] == ["the device is gone"] * 2 + ["None"]
    assert tokens(outputs[2:]) == tokens(expected)

    def failing():
        raise RuntimeError("nothing works")

    monkeypatch.setattr(llm.engine, "step", failing)  # and ends nothing by that: there is no use in going on
    llm.engine.recover = lambda error: []
    with pytest.raises(RuntimeError, match="nothing works"):
        llm.generate("Hi", params, use_tqdm=False, on_error="return")


# -- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value": "x"}, "did you mean 'values'"),
        ({"max_seqs": 3}, "did you mean 'max_num_seqs'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"block_size": 1.5}, "block_size"),
        ({"max_model_len": 129}, "128 positions"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory"),
        ({"values": 5}, "values"),
        ({"values": {"kind": 5}}, "values"),
        ({"seed": -1}, "seed"),
        ({"tokenizer": 5}, "tokenizer"),
        ({"tokenizer": "/no/such/folder"}, "skip_tokenizer_init"),
        ({"attention_backend": "fast"}, "attention_backend"),
        ({"device": "abacus"}, "device"),
        ({"enforce_eager": "yes"}, "enforce_eager"),
    ],
)
def test_arguments_that_cannot_work(options, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make_llm(**options)


def test_values_from_folders(guided, tmp_path):
    for name, network in guided.values.items():
        save_value(tmp_path / name, network, guided.tokenizer)
    params = SamplingParams(seed=1, max_tokens=8, ignore_eos=True, values={"kind": 9.0})
    expected = tokens(guided.generate("Hi", params, use_tqdm=False))
    named = make_llm(values={"kind": tmp_path / "kind", "other": str(tmp_path / "long")})
    assert named.value_names == ["kind", "other"]
    assert tokens(named.generate("Hi", params, use_tqdm=False)) == expected
    assert make_llm(values=tmp_path / "long").value_names == ["long"]  # its head's own name


def test_values_that_do_not_fit_are_refused(guided, tmp_path):
    folder = save_value(tmp_path / "kind", guided.values["kind"], guided.tokenizer)
    with pytest.raises(ValueArtifactError, match="weights"):
        LLM(tiny_llama(seed=1), values=folder, device="cpu")
    with pytest.raises(ValueArtifactError, match="vocab"):
        LLM(tiny_llama(vocab_size=300), values=folder, device="cpu")
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    with pytest.raises(ValueArtifactError, match="tokenizer"):
        make_llm(values=folder, tokenizer=other)
    weights = folder / "value.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ValueArtifactError, match=r"value\.safetensors"):
        make_llm(values={"kind": folder})
    with pytest.raises(ValueArtifactError, match="nothing"):
        make_llm(values={"kind": tmp_path / "nothing"})


def test_a_model_that_is_not_there():
    with pytest.raises(InvalidArgumentError, match="model"):
        LLM("/no/such/folder")


def test_kv_memory_limits_the_length_or_says_what_it_needs():
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values x layers x heads x size x float32
    small = make_llm(kv_cache_memory=4 * 16 * per_token)
    assert small.max_model_len == 64
    out = small.generate("Hi", SamplingParams(ignore_eos=True, seed=0), use_tqdm=False)[0].outputs[0]
    assert (len(out.token_ids), out.finish_reason) == (62, "length")
    with pytest.raises(KVCacheError, match=f"{8 * 16 * per_token:,}"):
        make_llm(kv_cache_memory=4 * 16 * per_token, max_model_len=128)
    assert make_llm(kv_cache_memory=8 * 16 * per_token, max_model_len=128).max_model_len == 128
    with pytest.raises(KVCacheError, match="no block"):
        make_llm(kv_cache_memory=100)


def test_the_default_memory_is_no_more_than_can_be_used():
    llm = make_llm(kv_cache_memory=None, max_num_seqs=2)
    assert llm.engine.blocks.num_blocks == 2 * (128 // 16 + 1)


def test_many_requests_in_a_small_cache_all_finish():
    per_token = 2 * 2 * 2 * 8 * 4
    small = make_llm(kv_cache_memory=10 * 16 * per_token)
    params = SamplingParams(seed=0, max_tokens=40, ignore_eos=True)
    prompts = [chr(65 + i) * 20 for i in range(6)]
    expected = tokens(make_llm().generate(prompts, params, use_tqdm=False))
    assert tokens(small.generate(prompts, params, use_tqdm=False)) == expected
    assert small.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("model", ["stories3M", "stories260K"])
def test_real_model(model):
    llm = LLM(shared_model(model), device="cpu", max_num_seqs=4)
    outputs = llm.generate(["Once upon a time", "One day"], SamplingParams(temperature=0.0, max_tokens=40))
    for output in outputs:
        ids = output.prompt_token_ids + output.outputs[0].token_ids
        whole = llm.tokenizer.decode(ids, skip_special_tokens=True)
        assert output.prompt + output.outputs[0].text == whole


# -- the package ---------------------------------------------------------------------------------------------


def test_importing_the_package_is_light():
    code = "import sys, vas_engine; vas_engine.SamplingParams(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "transformers", "fastapi", "uvicorn", "ray", "vllm", "pyarrow", "matplotlib", "plotext"}
    assert not heavy & set(loaded)
    assert "vas_engine.params" in loaded


def test_the_package_names_what_it_exports():
    for name in vas_engine.__all__:
        assert getattr(vas_engine, name) is not None
        assert name in dir(vas_engine)
    with pytest.raises(AttributeError, match="nothing"):
        vas_engine.nothing  # noqa: B018


def test_arguments_and_defaults_are_those_of_the_design():
    loading = {name: parameter.default for name, parameter in inspect.signature(LLM).parameters.items()}
    assert list(loading)[:2] == ["model", "values"]
    wanted = {
        "values": None,
        "device": "auto",
        "dtype": "auto",
        "load_format": "auto",
        "max_num_seqs": None,
        "max_num_batched_tokens": None,
        "max_model_len": None,
        "kv_cache_memory": None,
        "block_size": 16,
        "attention_backend": "auto",
        "enforce_eager": None,  # False on a GPU, where it costs little; not on a CPU
        "enable_prefix_caching": True,
    }
    assert {name: loading[name] for name in wanted} == wanted
    for call in (LLM.generate, LLM.chat):
        assert list(inspect.signature(call).parameters)[2] == "sampling_params"
        assert inspect.signature(call).parameters["use_tqdm"].default is True


def test_read_prompts_tells_one_from_many():
    assert [prompt.token_ids for prompt in read_prompts([1, 2])] == [[1, 2]]
    assert [prompt.token_ids for prompt in read_prompts([[1, 2], [3]])] == [[1, 2], [3]]
    assert [prompt.text for prompt in read_prompts(["a", "b"])] == ["a", "b"]
