"""The front: events in, text and bookkeeping out; stop strings end sequences the engine knows nothing of."""

import json
import math

import pytest
import torch

from tests.tiny import byte_tokenizer
from vas_engine.engine.event import TokenEvent, TokenLogprob
from vas_engine.engine.output import OutputFront, Pieces
from vas_engine.errors import InvalidArgumentError, NonFiniteError
from vas_engine.params import SamplingParams

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id


class Script:
    """Plays events to the front and notes what the front asks for."""

    has_unfinished = True

    def __init__(self):
        self.added, self.finished, self.cancelled = [], [], []

    def add_request(self, request_id, prompt_ids, params, priority=0, salt=b"", deadline=None):
        if not prompt_ids:
            raise InvalidArgumentError("prompt", prompt_ids, "is empty")
        self.added.append((request_id, prompt_ids, params, priority))

    def finish(self, request_id, index):
        self.finished.append((request_id, index))

    def cancel(self, request_id):
        self.cancelled.append(request_id)


def front_with(tokenizer=TOKENIZER, n_ids=(65,), **params):
    front = OutputFront(Script(), tokenizer)
    output = front.add("r", list(n_ids), SamplingParams(**params), prompt="A")
    return front, output


def play(front, text, index=0, **last):
    """One event a byte; `last` are fields of the last event."""
    data = text.encode()
    for place, byte in enumerate(data):
        extra = last if place == len(data) - 1 else {}
        front.process([TokenEvent("r", index, byte, log_prob=-1.0, tilted_log_prob=-2.0, **extra)])


def test_text_grows_and_ends_with_the_engines_reason():
    front, output = front_with()
    play(front, "hé", finish_reason="length")
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hé", "length", None)
    assert completion.token_ids == list("hé".encode())
    assert completion.cumulative_logprob == -3.0
    assert completion.cumulative_tilted_logprob == -6.0
    assert output.finished
    assert not front.has_unfinished
    assert output.metrics.generated_tokens == 3
    assert 0 <= output.metrics.time_to_first_token <= output.metrics.latency


def test_deltas_join_to_the_text_and_hold_no_half_character():
    front, output = front_with()
    deltas, tokens = [], []
    for byte in "a€b".encode():
        touched = front.process([TokenEvent("r", 0, byte)])
        assert touched == [output]
        deltas.append(output.outputs[0].delta_text)
        tokens += output.outputs[0].delta_token_ids
    assert deltas == ["a", "", "", "€", "b"]
    assert tokens == list("a€b".encode())


def test_a_stop_string_across_tokens_ends_the_sequence_and_tells_the_engine():
    front, output = front_with(stop=["END", "\n\n"])
    play(front, "one EN two END more")
    completion = output.outputs[0]
    assert completion.text == "one EN two "
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "END")
    assert bytes(completion.token_ids) == b"one EN two END"
    assert front.engine.finished == [("r", 0)]
    assert output.finished


def test_the_stop_string_is_kept_on_request():
    front, output = front_with(stop="END", include_stop_str_in_output=True)
    play(front, "one END more")
    assert output.outputs[0].text == "one END"


def test_a_stop_string_in_the_last_token_wins_over_length_without_a_call():
    front, output = front_with(stop="END")
    play(front, "one END", finish_reason="length")
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "END")
    assert front.engine.finished == []


def test_what_looked_like_a_stop_is_shown_at_the_end():
    front, output = front_with(stop="END")
    play(front, "one EN")
    assert output.outputs[0].text == "one "
    front.process([TokenEvent("r", 0, EOS, finish_reason="stop", stop_token=EOS)])
    assert output.outputs[0].text == "one EN"
    assert output.outputs[0].token_ids[-1] == EOS
    assert output.outputs[0].stop_reason is None


def test_stop_strings_wait_for_min_tokens():
    front, output = front_with(stop="x", min_tokens=3)
    play(front, "xaxa")
    assert output.outputs[0].text == "xa"
    assert output.outputs[0].token_ids == [*b"xax"]


def test_a_stop_token_is_the_reason_and_not_text():
    for include, text in ((False, "ab"), (True, "ab!")):
        front, output = front_with(stop_token_ids=[33], include_stop_str_in_output=include)
        play(front, "ab!", finish_reason="stop", stop_token=33)
        assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, 33)


def test_incomplete_bytes_are_flushed_at_the_end():
    front, output = front_with()
    front.process([TokenEvent("r", 0, 0xE2)])
    assert output.outputs[0].text == ""
    front.process([TokenEvent("r", 0, 0x82, finish_reason="length")])
    assert output.outputs[0].text == "\ufffd"


def test_completions_end_one_by_one():
    front, output = front_with(n=2, stop="!")
    play(front, "a!", index=1)
    assert output.outputs[1].finished
    assert not output.finished
    assert front.has_unfinished
    front.process([TokenEvent("r", 1, 65), TokenEvent("r", 0, 66, finish_reason="length")])
    assert [completion.text for completion in output.outputs] == ["B", "a"]
    assert output.finished


def test_values_kl_and_evaluations_are_collected():
    front, output = front_with(values={"kind": 1.0}, report_kl=True)
    for value in (0.25, 0.5):
        front.process([TokenEvent("r", 0, 65, values={"kind": value}, kl=0.125, evaluations=7)])
    assert output.outputs[0].values == {"kind": [0.25, 0.5]}
    assert output.outputs[0].kl == 0.25
    assert output.metrics.value_evaluations == 14


def test_an_unknown_tilted_logprob_leaves_no_sum():
    front, output = front_with(values={"kind": 1.0})
    for tilted in (-1.0, math.nan, -1.0):
        front.process([TokenEvent("r", 0, 65, log_prob=-1.0, tilted_log_prob=tilted)])
    assert output.outputs[0].cumulative_logprob == -3.0
    assert output.outputs[0].cumulative_tilted_logprob is None
    assert output.outputs[0].kl is None


def test_logprobs_hold_the_drawn_token_and_the_best():
    front, output = front_with(logprobs=2)
    best = [TokenLogprob(66, -0.5, -0.25, {}), TokenLogprob(65, -1.5, -2.5, {})]
    front.process([TokenEvent("r", 0, 65, log_prob=-1.5, tilted_log_prob=-2.5, top_logprobs=best)])
    front.process([TokenEvent("r", 0, 67, log_prob=-9.0, tilted_log_prob=-8.0, top_logprobs=best)])
    first, second = output.outputs[0].logprobs
    assert [(e.logprob, e.tilted_logprob, e.rank, e.decoded_token) for e in first.values()] == [
        (-1.5, -2.5, 2, "A"),
        (-0.5, -0.25, 1, "B"),
    ]
    assert list(second) == [67, 66, 65]
    assert second[67].rank is None


def test_hidden_states_are_joined():
    front, output = front_with(return_hidden_states=True)
    front.process([TokenEvent("r", 0, 65, hidden=torch.zeros(2, 3))])
    front.process([TokenEvent("r", 0, None, hidden=torch.ones(1, 3), finish_reason="length")])
    assert output.outputs[0].hidden_states.tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert output.outputs[0].token_ids == [65]


def test_an_error_ends_the_request_alone():
    front, output = front_with()
    other = front.add("s", [65], SamplingParams())
    error = NonFiniteError("values")
    front.process([TokenEvent("r", 0, error=error, finish_reason="error"), TokenEvent("s", 0, 66)])
    assert output.error is error
    assert output.outputs[0].finish_reason == "error"
    assert (other.outputs[0].text, other.error) == ("B", None)


def test_a_refused_request_leaves_nothing():
    front = OutputFront(Script(), TOKENIZER)
    with pytest.raises(InvalidArgumentError):
        front.add("r", [], SamplingParams())
    assert not front.has_unfinished


def test_cancel_keeps_the_text_and_ignores_late_events():
    front, output = front_with(stop="abc")
    play(front, "xab")
    assert front.cancel("r") is output
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("xab", "abort")
    assert front.engine.cancelled == ["r"]
    assert front.process([TokenEvent("r", 0, 65), TokenEvent("r", 0, finish_reason="abort")]) == []
    assert output.outputs[0].text == "xab"
    assert front.cancel("r") is None


def test_without_a_tokenizer_there_are_tokens_but_no_text():
    front, output = front_with(tokenizer=None, logprobs=0)
    play(front, "ab", finish_reason="length")
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [*b"ab"])


def test_pieces_of_single_tokens():
    pieces = Pieces(TOKENIZER)
    assert (pieces[97], pieces[32]) == ("a", " ")
    assert pieces[0xE2] == TOKENIZER.convert_ids_to_tokens(0xE2)
    assert Pieces(None)[97] is None
    assert pieces[-1] is None


def test_json_is_plain():
    front, output = front_with(logprobs=1, values={"kind": 1.0})
    best = [TokenLogprob(66, -0.5, math.nan, {})]
    front.process([TokenEvent("r", 0, 65, values={"kind": math.nan}, top_logprobs=best, finish_reason="length")])
    record = json.loads(json.dumps(output.to_dict(), allow_nan=False))
    assert record["outputs"][0]["values"] == {"kind": [None]}
    assert record["outputs"][0]["logprobs"][0][1]["tilted_logprob"] is None
    assert record["error"] is None


class Strict:
    """A tokenizer that raises on ids that are not its own."""

    all_special_ids = ()

    def decode(self, ids, clean_up_tokenization_spaces):
        return bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token):
        return bytes([token]).decode("latin-1")


def test_ids_beyond_the_tokenizer_are_replacement_marks():
    front, output = front_with(tokenizer=Strict(), n_ids=(500, 65), logprobs=1)
    alternatives = [TokenLogprob(300, -1.0, -1.0, {})]
    for token in (66, 500, 700, 67):
        front.process([TokenEvent("r", 0, token, top_logprobs=alternatives)])
    front.process([TokenEvent("r", 0, 300, finish_reason="length")])
    assert output.outputs[0].text == "B\ufffd\ufffdC\ufffd"
    assert [{t: e.decoded_token for t, e in position.items()} for position in output.outputs[0].logprobs[:2]] == [
        {66: "B", 300: None},
        {500: None, 300: None},
    ]


@pytest.mark.parametrize("way", ["take", "cancel"])
def test_a_text_that_cannot_be_made_is_the_error_of_its_request(way):
    front, output = front_with(n=2)
    other = front.add("s", [65], SamplingParams())

    def broken(*_):
        raise TypeError("no text")

    detokenizer = front._requests["r"].completions[0].detokenizer
    detokenizer.flush = broken
    if way == "take":
        detokenizer.push = broken
        front.process([TokenEvent("r", 0, 66), TokenEvent("r", 1, 66), TokenEvent("s", 0, 66)])
        assert other.outputs[0].text == "B"
    else:
        front.process([TokenEvent("r", 0, 66)])
        front.cancel("r")
    assert isinstance(output.error, TypeError)
    assert [o.finish_reason for o in output.outputs] == ["error", "error" if way == "take" else "abort"]
    assert front.engine.cancelled == ["r"]
    assert list(front._requests) == ["s"]


def test_a_token_drawn_after_the_end_is_not_counted():
    front, output = front_with(n=2, stop="b")
    front.process([TokenEvent("r", 0, 97, evaluations=3), TokenEvent("r", 0, 98, evaluations=3)])
    front.process([TokenEvent("r", 0, 99, evaluations=3), TokenEvent("r", 1, 99, evaluations=3)])
    assert (output.metrics.generated_tokens, output.metrics.value_evaluations) == (3, 9)
    assert [len(o.token_ids) for o in output.outputs] == [2, 1]
