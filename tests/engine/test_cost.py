"""The cost model: by hand on a toy, against real models' parameters, and in which direction it moves."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from vas_engine.engine import cost
from vas_engine.engine.cost import DEVICES, SHAPES, Device, Network, Shape, network_config, predict, step_work
from vas_engine.errors import InvalidArgumentError
from vas_engine.values import HeadConfig, ValueConfig, ValueNetwork

TOY = Shape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=10)
SLOW = Device("slow", 100.0, {"bfloat16": 1000.0}, launch=0.0, step=2.0)
HEADS = (HeadConfig("value"),)
READER = Network(
    ValueConfig("reader", HEADS, 8, 10, states=(2,), width=4, layers=(1,), queries=2, head_dim=4, mlp=8, head_hidden=4)
)
SIDE = Network(
    ValueConfig("side", HEADS, 8, 10, states=(2,), width=4, depth=1, num_heads=2, kv_heads=1, head_dim=2, mlp=8)
)
MODEL = Network(ValueConfig("model", HEADS, 8, 10), backbone=TOY)
KINDS = ("action", "reader", "side", "lookahead", "side-lookahead")


def totals(networks: tuple[Network, ...] = (), **changes: int) -> dict[str, tuple[float, float]]:
    """Bytes and FLOPs of each part for 3 requests behind 5 tokens with 2 candidates."""
    setting = {"batch": 3, "context": 5, "networks": networks, "candidates": 2} | changes
    moved: Counter[str] = Counter()
    done: Counter[str] = Counter()
    for work in step_work(TOY, **setting):
        moved[work.part] += work.bytes
        done[work.part] += work.flops
    return {part: (moved[part], done[part]) for part in moved}


def test_a_plain_step_by_hand() -> None:
    # A layer: q and o 8 x 8 each, k and v 8 x 4 each, three MLP matrices of 8 x 16, two norms of 8.
    assert (TOY.layer_matrices, TOY.layer_vectors) == (64 * 2 + 32 * 2 + 3 * 128, 16)
    assert TOY.stack == 2 * (576 + 16) + 8
    assert TOY.kv_bytes == 2 * (4 + 4) * 2
    assert totals() == {
        "weights": ((1192 + 3 * 8) * 2, 2 * 3 * 2 * 576),  # the layers once, three embeddings
        "kv": ((3 * 5 + 3) * 2 * 8 * 2, 2 * 2 * 2 * 4 * 3 * 6 * 2),  # prefixes read, three tokens written
        "head": (80 * 2 + 3 * 10 * 2, 2 * 3 * 80),
        "sampler": (3 * 10 * 2, 0),
    }


def test_networks_by_hand() -> None:
    # Nine rows: two candidates and the best of the other tokens, for each of three requests.
    # Reader: states (8 x 4 and 3 x 8 numbers; nine table rows in float32), one layer (q and o 4 x 8 each, MLP
    # 2 x 32) over the pages of one base layer, hidden layer 4 x 4 and output 4 x 1.
    moved = (32 + 24) * 2 + 9 * 4 * 4 + 128 * 2 + 3 * 5 * 8 * 2 + 20 * 2 + 9 * 4
    done = 2 * 3 * 32 + 2 * 9 * 128 + 4 * 2 * 4 * 9 * 5 + 2 * 9 * 20
    assert totals((READER,)) == {**totals(), "network": (moved, done)}
    # Side network: one layer (q and o 4 x 4 each, k and v 4 x 2 each, MLP 2 x 32) over pages of its own, which the
    # nine rows' K/V (4 numbers each) wait beside until the winners' are copied; a linear output.
    moved = (32 + 24) * 2 + 9 * 4 * 4 + 112 * 2 + (3 * 5 + 9 + 2 * 3) * 4 * 2 + 4 * 2 + 9 * 4
    done = 2 * 3 * 32 + 2 * 9 * 112 + 4 * 2 * 2 * 9 * 5 + 2 * 9 * 4
    assert totals((SIDE,)) == {**totals(), "network": (moved, done)}
    # A value model of the base's own shape: the base's lookahead over nine rows, and a linear output.
    stack = (1192 + 9 * 8) * 2 + (3 * 5 * 2 + 2 * (9 + 6)) * 8 * 2
    assert totals((MODEL,))["network"][0] == stack + 8 * 2 + 9 * 4


def test_a_lookahead_multiplies_more_and_reads_no_prefix_twice() -> None:
    plain, guided = totals(), totals((Network(network_config(TOY, "lookahead")),))
    assert guided["weights"] == (plain["weights"][0] + 6 * 8 * 2, 3 * plain["weights"][1])
    assert guided["kv"] == (plain["kv"][0] + (6 + 2 * 3) * 2 * 8 * 2, 3 * plain["kv"][1])
    assert (guided["head"], guided["sampler"]) == (plain["head"], plain["sampler"])


def test_a_part_takes_the_longer_of_moving_and_computing() -> None:
    found = predict(TOY, SLOW, 3, 5)
    assert found.parts["weights"].seconds == 2 * 1216 / 100
    assert found.parts["head"].seconds == 220 / 100
    busy = predict(TOY, SLOW, 3000, 5)
    assert busy.parts["weights"].seconds == 2 * 3000 * 2 * 576 / 1000
    assert found.seconds == pytest.approx(2 + sum(part.seconds for part in found.parts.values()))
    assert found.tokens_per_second == pytest.approx(3 / found.seconds)
    assert found.ratio == 1.0
    kernels = dataclasses.replace(SLOW, launch=1.0)
    assert predict(TOY, kernels, 3, 5).seconds == found.seconds + sum(work.kernels for work in step_work(TOY, 3, 5))


def test_the_knee_is_where_reading_and_multiplying_take_equally_long() -> None:
    knee = cost.knee(TOY, SLOW)
    assert 2 * knee * 2 * 576 / 1000 == pytest.approx(1192 * 2 / 100)
    # The figure of the design: some 200 rows of bf16 on a Hopper.
    assert 200 < cost.knee(SHAPES["llama-8b"], DEVICES["H200"]) < 210


SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        LlamaConfig(**SMALL, tie_word_embeddings=False),
        MistralConfig(**SMALL),
        Qwen2Config(**SMALL),
        Qwen3Config(**SMALL, head_dim=24),
        Gemma2Config(**SMALL, head_dim=24),
        Gemma3TextConfig(**SMALL, head_dim=24),
    ],
    ids=lambda config: f"{config.model_type}{'-tied' * config.tie_word_embeddings}",
)
def test_parameters_are_those_of_the_real_model(config) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shape = Shape.of(model.half())  # whatever its config says
    assert shape.dtype == "float16"
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert shape.parameters * shape.size == size
    key = next(parameter for name, parameter in model.named_parameters() if name.endswith("k_proj.weight"))
    assert shape.kv_width == 2 * key.shape[0]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_have_the_parameters_they_are_made_with(kind: str) -> None:
    network = Network(network_config(SHAPES["llama-135m"], kind))
    with torch.device("meta"):
        assert network.parameters == ValueNetwork(network.config).num_parameters
    assert 0.75 < 100 * network.parameters / SHAPES["llama-135m"].parameters < 1.2


def test_windows_bound_what_is_read() -> None:
    shape = dataclasses.replace(TOY, window=4, windowed=1)
    assert [shape.seen(context) for context in (3, 4, 10)] == [6, 8, 14]
    config = Gemma2Config(num_hidden_layers=6, sliding_window=32)
    assert (Shape.of(config).window, Shape.of(config).windowed) == (32, 3)
    assert Shape.of(MistralConfig(num_hidden_layers=6, sliding_window=None)).windowed == 0


@pytest.mark.parametrize("kind", ["plain", "model", *KINDS])
def test_more_work_takes_longer(kind: str) -> None:
    base, h200 = SHAPES["llama-8b"], DEVICES["H200"]
    if kind == "model":
        small = SHAPES["llama-1b"]
        networks = [Network(ValueConfig("model", HEADS, small.hidden, small.vocab), small)]
    else:
        networks = [] if kind == "plain" else [Network(network_config(base, kind))]

    def seconds(batch=4, context=1000, candidates=20, networks=networks, prefill=0, machine=h200) -> float:
        return predict(base, machine, batch, context, networks, candidates, prefill).seconds

    assert seconds() < seconds(batch=8) < seconds(batch=64)
    assert seconds() < seconds(context=8000)
    assert seconds() < seconds(prefill=512) < seconds(prefill=2048)
    assert seconds() < seconds(machine=DEVICES["A100"]) < seconds(machine=DEVICES["L40S"])
    if networks:
        assert seconds(networks=[]) < seconds(candidates=1) < seconds() < seconds(candidates=200)
        assert seconds() < seconds(networks=networks * 4)
        assert predict(base, h200, 4, 1000, networks).ratio < 1


def test_what_does_not_fit_is_said() -> None:
    base = SHAPES["llama-8b"]
    assert predict(base, DEVICES["H200"], 64, 8192).memory == 8030261248 * 2 + 64 * 8192 * 131072
    assert predict(base, DEVICES["H200"], 64, 8192).fits
    assert not predict(base, DEVICES["L40S"], 64, 8192).fits


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.device("H20"), "did you mean 'H200'"),
        (lambda: cost.device("h200", bandwidth=0.0), "bandwidth=0.0"),
        (lambda: Shape.of(GPT2Config()), "the cost model knows llama"),
        (lambda: Shape.of(LlamaConfig(attention_bias=True)), "attention_bias"),
        (lambda: dataclasses.replace(TOY, dtype="bf16"), "dtype='bf16'"),
        (lambda: predict(TOY, SLOW, 0, 5), "batch=0"),
        (lambda: predict(dataclasses.replace(TOY, dtype="float32"), SLOW, 1, 5), "dtype='float32'"),
        (lambda: Network(MODEL.config), "backbone"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_a_device_takes_measured_rates() -> None:
    found = cost.device("h200", bandwidth=4e12, flops={"bfloat16": 700e12}, step=None)
    assert (found.name, found.bandwidth, found.rate("bfloat16"), found.step) == ("H200", 4e12, 700e12, 30e-6)
