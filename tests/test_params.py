"""SamplingParams: every bad argument is an error that names the fix; good ones arrive as plain types."""

import math

import numpy as np
import pytest

from vas_engine.arguments import names_nearest, size_in_bytes
from vas_engine.errors import InvalidArgumentError
from vas_engine.params import SamplingParams

BAD = [
    ("n", 0),
    ("n", 1025),
    ("n", 1.0),
    ("n", True),
    ("temperature", -0.5),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", -1),
    ("seed", 2**64),
    ("max_tokens", 0),
    ("min_tokens", -1),
    ("stop", ["a", ""]),
    ("stop", [3]),
    ("stop", 3),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", "12"),
    ("ignore_eos", 1),
    ("logprobs", -1),
    ("logprobs", 10**6),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0.0),
    ("logit_bias", [1, 2]),
    ("values", ["kind"]),
    ("values", {1: 2.0}),
    ("num_candidates", 0),
    ("tail", "kep"),
    ("baseline", "mean"),
    ("tilt", "best"),
    ("advantage_clip", 0.0),
    ("advantage_clip", math.nan),
    ("prune", None),
    ("report_kl", "yes"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_names_its_argument(name, value):
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.argument == name
    assert caught.value.fix
    assert name in str(caught.value)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e31, -1e39, "2", None])
def test_a_weight_that_cannot_work_names_its_value(weight):
    with pytest.raises(InvalidArgumentError, match="kind"):
        SamplingParams(values={"kind": weight})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("max_new_tokens", "max_tokens"),
        ("topk", "top_k"),
        ("beta", "values"),
        ("num_return_sequences", "n"),
        ("advantage_clp", "advantage_clip"),
    ],
)
def test_an_unknown_argument_names_the_nearest(wrong, right):
    for build in (lambda: SamplingParams(**{wrong: 1}), lambda: SamplingParams.from_dict({wrong: 1})):
        with pytest.raises(InvalidArgumentError, match=f"did you mean '{right}'"):
            build()


def test_min_tokens_above_max_tokens():
    with pytest.raises(InvalidArgumentError, match="max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_defaults_are_plain_sampling_from_the_whole_vocabulary():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.max_tokens is None
    assert not params.guided
    assert (params.num_candidates, params.tail, params.baseline, params.tilt) == (20, "keep", "state", "mean")


def test_arguments_and_defaults_are_those_of_the_design():
    wanted = {"n": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None, "max_tokens": None}
    wanted |= {"min_tokens": 0, "stop": (), "stop_token_ids": (), "ignore_eos": False, "logprobs": None}
    wanted |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": {}}
    wanted |= {"values": {}, "num_candidates": 20, "tail": "keep", "baseline": "state", "tilt": "mean"}
    wanted |= {"advantage_clip": None}
    params = SamplingParams()
    assert {name: getattr(params, name) for name in wanted} == wanted


def test_values_are_normalised_to_plain_types():
    half = np.float32(0.5)
    ids = np.array([3, 4])
    params = SamplingParams(stop="END", stop_token_ids=ids, temperature=half, top_k=-1, logit_bias={"7": 1})
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3, 4)
    assert type(params.stop_token_ids[0]) is int
    assert type(params.temperature) is float
    assert params.top_k == 0
    assert params.logit_bias == {7: 1.0}


def test_none_leaves_lists_and_maps_empty():
    params = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None, values=None)
    assert (params.stop, params.stop_token_ids, params.logit_bias, params.values) == ((), (), {}, {})


def test_a_bias_of_minus_infinity_bans_but_nan_is_refused():
    assert SamplingParams(logit_bias={1: -math.inf}).logit_bias == {1: -math.inf}
    for bad in (math.nan, math.inf):
        with pytest.raises(InvalidArgumentError, match="logit_bias"):
            SamplingParams(logit_bias={1: bad})


def test_dict_round_trip():
    lists = {"stop": ["a", "b"], "values": {"kind": -2.0}, "logit_bias": {5: -math.inf}}
    params = SamplingParams(**lists, seed=2**64 - 1, n=3)
    assert SamplingParams.from_dict(params.to_dict()) == params
    assert SamplingParams.from_dict(params.to_dict()) != params.replace(n=2)


def test_immutable_and_replace_checks_again():
    params = SamplingParams(values={"kind": 1.0})
    with pytest.raises(AttributeError):
        params.n = 2
    assert params.replace(n=2).n == 2
    assert params.replace(n=2).values == {"kind": 1.0}
    with pytest.raises(InvalidArgumentError, match="n=0"):
        params.replace(n=0)


def test_a_later_change_of_the_callers_dict_does_not_reach_the_request():
    weights = {"kind": 1.0}
    params = SamplingParams(values=weights)
    weights["kind"] = math.nan
    assert params.values == {"kind": 1.0}


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"values": {"knd": 1.0}}, "values"),
        ({"values": {"kind": 1.0}, "num_candidates": 11}, "num_candidates"),
        ({"top_k": 11}, "top_k"),
        ({"logprobs": 11}, "logprobs"),
        ({"stop_token_ids": [10]}, "stop_token_ids"),
        ({"logit_bias": {10: 1.0}}, "logit_bias"),
    ],
)
def test_what_the_model_cannot_do_is_refused(options, argument):
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**options).check(vocab_size=10, value_names=["kind"])
    assert caught.value.argument == argument


def test_what_the_model_can_do_passes():
    SamplingParams(num_candidates=11).check(vocab_size=10, value_names=[])  # plain: candidates do not matter
    options = {"values": {"kind": 0.0}, "num_candidates": 10, "top_k": 10, "logprobs": 10}
    SamplingParams(**options, logit_bias={9: 1}).check(vocab_size=10, value_names=["kind"])


def test_an_unknown_value_names_the_loaded_one_or_says_none_is():
    with pytest.raises(InvalidArgumentError, match="did you mean 'kindness'"):
        SamplingParams(values={"kindnes": 1.0}).check(vocab_size=99, value_names=["kindness", "length"])
    with pytest.raises(InvalidArgumentError, match="no value is loaded"):
        SamplingParams(values={"kind": 1.0}).check(vocab_size=99, value_names=[])


def test_what_needs_every_candidate():
    assert not SamplingParams().exact
    for options in ({"logprobs": 0}, {"report_kl": True}, {"prune": False}):
        assert SamplingParams(**options).exact


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 1024**3), ("512 MB", 512 * 10**6), ("1.5g", 15 * 10**8), (77, 77), ("64", 64)],
)
def test_sizes(text, size):
    assert size_in_bytes("kv_cache_memory", text) == size


@pytest.mark.parametrize("text", ["2 gigs", "-1GiB", "", 0, 1.5, "GiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(InvalidArgumentError, match="kv_cache_memory"):
        size_in_bytes("kv_cache_memory", text)


def test_the_decorator_keeps_signature_and_defaults():
    @names_nearest({"colour": "color"})
    class Paint:
        def __init__(self, color="red", *, size=1):
            self.color, self.size = color, size

    assert (Paint("blue").color, Paint(size=2).size) == ("blue", 2)
    with pytest.raises(InvalidArgumentError, match="did you mean 'color'"):
        Paint(colour="green")
