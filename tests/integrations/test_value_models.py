"""Value models alone: outputs of growing sequences equal those of whole, uncached forwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.conftest import VOCAB, distributional, llama, network
from tests.integrations.conftest import bound, hf_model
from tests.oracle import head_outputs
from vas_engine import InvalidArgumentError, NonFiniteError, SamplingParams, ValueArtifactError
from vas_engine.integrations import value_models
from vas_engine.integrations.value_models import Host, PrefixValues, Values, check_finite, load_value_model
from vas_engine.values.artifact import save_value


@pytest.fixture(scope="module")
def lm():
    return llama()


def check(lm, value, cache, keys, prefixes, suffixes) -> None:
    outputs = cache.score(keys, prefixes, suffixes)
    for prefix, ends, output in zip(prefixes, suffixes, outputs, strict=True):
        expected = head_outputs(lm, value, [list(prefix), *([*prefix, *end] for end in ends)])
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_outputs_equal_uncached_forwards_whatever_a_sequence_does(lm, block_size: int, monkeypatch) -> None:
    monkeypatch.setattr(value_models, "BLOCKS_AT_FIRST", 1)  # so that the pages grow many times
    value = network("model", lm)
    cache = PrefixValues(value, block_size)
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(VOCAB, (count,), generator=generator).tolist()

    prefixes = {key: some(length) for key, length in (("a", 3), ("b", 9), ("c", 1))}
    for step in range(14):
        keys = [key for index, key in enumerate(prefixes) if (step + index) % 4]  # not all of them every time
        ends = {key: [some(1 + (step + place) % 3 if step % 2 else 1) for place in range(3)] for key in keys}
        check(lm, value, cache, keys, [prefixes[key] for key in keys], [ends[key] for key in keys])
        for key in keys:
            if step % 5 == 4:
                prefixes[key] = prefixes[key][: 1 + len(prefixes[key]) // 2] + some(step % 3)  # back, and elsewhere
            else:
                prefixes[key] = prefixes[key] + (ends[key][step % 3] if step % 3 else some(2))
    check(lm, value, cache, ["b"], [prefixes["b"]], [[]])
    for key in prefixes:
        cache.forget(key)
    assert sorted(cache._free) == list(range(cache._blocks))


def test_a_chosen_continuation_is_not_run_again(lm, monkeypatch) -> None:
    value = network("model", lm)
    cache = PrefixValues(value)
    rows: list[int] = []
    score = value.score

    def counted(tokens, *rest):
        rows.append(len(tokens))
        return score(tokens, *rest)

    monkeypatch.setattr(value, "score", counted)
    cache.score([0, 1], [[1, 2, 3], [4, 5]], [[[6], [7]], [[8], [9]]])
    cache.score([0, 1], [[1, 2, 3, 7], [4, 5, 8]], [[[6], [7]], [[8], [9]]])
    cache.score([0, 1], [[1, 2, 3, 7, 20], [4, 5, 8, 9]], [[[6], [7]], [[8], [9]]])
    assert rows == [3 + 2 + 2 + 2, 2 + 2, 1 + 2 + 2]


def test_after_an_error_the_pages_are_as_good_as_before(lm, monkeypatch) -> None:
    value = network("model", lm)
    cache = PrefixValues(value, 4)
    cache.score([0], [[1, 2, 3]], [[[6], [7, 8]]])
    score = value.score

    def interrupted(*arguments):
        score(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(value, "score", interrupted)
        for prefix in ([1, 2, 3, 6, 5], [1, 9, 9]):
            with pytest.raises(KeyboardInterrupt):
                cache.score([0], [prefix], [[[6], [7, 8]]])
    check(lm, value, cache, [0], [[1, 2, 3]], [[[6], [7, 8]]])
    cache.forget(0)
    assert sorted(cache._free) == list(range(cache._blocks))


def test_too_long_or_empty_is_named(lm) -> None:
    cache = PrefixValues(network("model", lm))
    with pytest.raises(InvalidArgumentError, match="at least one token"):
        cache.score([0], [[]], [[[1]]])
    with pytest.raises(InvalidArgumentError, match="128 positions"):
        cache.score([0], [[1] * 128], [[[1]]])


def test_only_value_models_can_do_without_the_base_model(tmp_path) -> None:
    model = hf_model()
    save_value(tmp_path / "reader", bound("reader", model))
    save_value(tmp_path / "model", bound("model", model))
    with pytest.raises(InvalidArgumentError, match=r"kind 'reader'.*--kind model"):
        load_value_model(tmp_path / "reader", Host(VOCAB))
    loaded = load_value_model(tmp_path / "model", Host(VOCAB))
    assert loaded.num_parameters == bound("model", model).num_parameters
    assert load_value_model(tmp_path / "model").config == loaded.config
    with pytest.raises(ValueArtifactError, match="vocab_size"):
        load_value_model(tmp_path / "model", Host(VOCAB + 1))


def test_tilts_of_many_are_those_of_each(lm) -> None:
    """Different weights, baselines, clips and numbers of candidates at once; what is not finite stays one's own."""
    models = {"a": network("model", lm, (distributional(),)), "b": network("model", lm)}
    values = Values(models)
    prefixes, ends = [[1, 2], [5], [7, 8, 9]], [[[3], [4]], [[6]], [[1], [2], [3]]]
    outputs = [PrefixValues(model).score([0, 1, 2], prefixes, ends) for model in models.values()]
    params = [
        SamplingParams(values={"a": 0.5}, tilt="optimal", advantage_clip=0.01),
        SamplingParams(values={"a": -1.0, "b": 2.0}),
        SamplingParams(values={"b": 3.0}, baseline="candidate-mean"),
    ]
    together = values.tilts(outputs, params)
    for index, (tilt, value) in enumerate(together):
        [(own_tilt, own_value)] = values.tilts([[output[index]] for output in outputs], [params[index]])
        assert len(tilt) == len(ends[index])
        assert tilt == pytest.approx(own_tilt, abs=1e-6)
        assert value == pytest.approx(own_value, abs=1e-6)
    assert abs(together[0][0]).max() == pytest.approx(0.005)
    assert together[2][0].mean() == pytest.approx(0.0, abs=1e-5)
    outputs[1][1][0, 0] = torch.nan
    broken = [tilt for tilt, _ in values.tilts(outputs, params)]
    assert [bool(np.isfinite(tilt).all()) for tilt in broken] == [True, False, True]
    assert broken[2] == pytest.approx(together[2][0])
    with pytest.raises(NonFiniteError, match="value is not finite"):
        check_finite(broken[1])


def test_names_and_optimal_tilts(lm) -> None:
    one, two = network("model", lm, (distributional(),)), network("model", lm)
    with pytest.raises(InvalidArgumentError, match="two networks give this name"):
        Values({"": one, "value": two})
    values = Values({"a": one, "b": two})
    outputs = [PrefixValues(m).score([0], [[1, 2]], [[[3], [4]]])[0] for m in (one, two)]
    with pytest.raises(InvalidArgumentError, match="'b' has a scalar head"):
        values.check(SamplingParams(values={"b": 1.0}, tilt="optimal"))
    values.check(SamplingParams(values={"a": 1.0, "b": 0.0}, tilt="optimal"))
    params = SamplingParams(values={"a": 0.5, "b": 2.0}, advantage_clip=0.1)
    [(tilt, value)] = values.tilts([[output] for output in outputs], [params])
    advantage = (value[1:] - value[0]).clip(-0.1, 0.1)
    assert tilt == pytest.approx(advantage @ [0.5, 2.0], abs=1e-6)
