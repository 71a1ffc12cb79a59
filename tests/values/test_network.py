"""Networks of every kind on every architecture: paged rows, dense training and a naive loop agree."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import DynamicCache
from value_models import (
    CONFIGS,
    KINDS,
    TOLERANCE,
    Driver,
    assert_paged_equals_dense,
    base_model,
    dense_outputs,
    make_network,
    network_config,
    random_model,
    sequence,
)

from vas_engine.errors import InvalidArgumentError, ValueArtifactError, VASError
from vas_engine.model import AttentionBatch
from vas_engine.values import ValueNetwork


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def lm(name: str):
    return base_model(name)


# ------------------------------------------------------------------------ the definition, naively


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """q [H, D], keys and values [n, KVH, D] -> [H * D], one head at a time."""
    if not len(keys):
        return torch.zeros(q.numel())
    share = q.shape[0] // keys.shape[1]
    out = []
    for h, query in enumerate(q):
        weights = torch.softmax(keys[:, h // share] @ query / math.sqrt(q.shape[1]), 0)
        out.append(weights @ values[:, h // share])
    return torch.cat(out)


def turn(x: torch.Tensor, position: int) -> torch.Tensor:
    """Rotary, theta 10000, as complex numbers; x [heads, D]."""
    half = x.shape[-1] // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
    turned = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat([turned.real, turned.imag], -1).float()


def feed_forward(layer, x: torch.Tensor) -> torch.Tensor:
    return x + layer.mlp.down.weight @ torch.nn.functional.gelu(layer.mlp.up.weight @ norm(x))


def naive_outputs(network, lm, eager, tokens: list[int]) -> torch.Tensor:
    """Head output [T, O], one position and one head at a time, from Hugging Face's own states and K/V."""
    config = network.config
    with torch.no_grad():
        out = eager(torch.tensor([tokens]), past_key_values=DynamicCache(), output_hidden_states=True)
        embedded = eager.get_input_embeddings()(torch.tensor(tokens))
    rows = []
    for p in range(len(tokens)):
        place = p - 1 if config.input == "action" else p
        states = [out.hidden_states[j][0, place] if place >= 0 else torch.zeros(lm.hidden_size) for j in config.states]
        x = network.state_weight @ torch.cat([norm(s) for s in states])
        if config.input == "action":
            x = x + network.embed_weight @ norm(embedded[p])
        turns = [2 * math.pi * p / 2**k for k in range(4, 14)]
        place = [*map(math.sin, turns), *map(math.cos, turns), math.log1p(p) / 8]
        rows.append(x + network.place_weight @ torch.tensor(place))
    for layer in network.layers:
        rows = (naive_reader if config.kind == "reader" else naive_side)(config, layer, lm, out.past_key_values, rows)
    heads = network.heads
    hidden = torch.nn.functional.gelu(norm(torch.stack(rows)) @ heads.hidden.weight.T + heads.hidden.bias)
    return (hidden @ heads.output.weight.T + heads.output.bias).detach()


def naive_reader(config, layer, lm, cache, rows):
    keys = cache.layers[layer.layer].keys[0].transpose(0, 1)
    values = cache.layers[layer.layer].values[0].transpose(0, 1)
    window = lm.layers[layer.layer].window
    result = []
    for p, x in enumerate(rows):
        q = (layer.query.weight @ norm(x)).view(1, config.queries, config.head_dim)
        q = lm.rotate(q, torch.tensor([p]), layer.layer)[0]
        first = max(0, p - window + 1) if window else 0
        x = x + layer.output.weight @ attention(q, keys[first:p], values[first:p])
        result.append(feed_forward(layer, x))
    return result


def naive_side(config, layer, lm, cache, rows):
    heads, kv, size = config.num_heads, config.kv_heads, config.head_dim
    qs, ks, vs = [], [], []
    for p, x in enumerate(rows):
        q, k, v = (layer.qkv.weight @ norm(x)).split([heads * size, kv * size, kv * size])
        qs.append(turn(q.view(heads, size), p))
        ks.append(turn(k.view(kv, size), p))
        vs.append(v.view(kv, size))
    result = []
    for p, x in enumerate(rows):
        x = x + layer.output.weight @ attention(qs[p], torch.stack(ks[: p + 1]), torch.stack(vs[: p + 1]))
        result.append(feed_forward(layer, x))
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_dense_equals_the_definition(name: str, lm, kind: str) -> None:
    network = make_network(kind, lm)
    tokens = sequence(11, 1)
    expected = naive_outputs(network, lm, random_model(name), tokens)
    torch.testing.assert_close(dense_outputs(network, lm, tokens), expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert expected.std(0).min() > 0.05, "values that do not depend on the prefix prove nothing"


# ------------------------------------------------------------------------ paged = dense


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_paged_equals_dense(lm, kind: str) -> None:
    assert_paged_equals_dense(lm, make_network(kind, lm))


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_first_token_of_an_empty_prefix(lm, kind: str) -> None:
    network = make_network(kind, lm)
    driver = Driver(lm, network, [[]])
    output = driver.score({0: [7, 8]})[0]
    assert bool(torch.isfinite(output).all())
    for row, token in enumerate([7, 8]):
        expected = dense_outputs(network, lm, [token])[0]
        torch.testing.assert_close(output[row], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_candidate_never_sees_its_siblings(lm, kind: str) -> None:
    network = make_network(kind, lm)
    driver = Driver(lm, network, [sequence(6, 5)])
    driver.feed({0: 6})
    one = driver.score({0: [9, 10, 11]})[0][0]
    other = driver.score({0: [9, 40, 41]})[0][0]
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "model"])
def test_padding_does_not_reach_values(lm, kind: str) -> None:
    network = make_network(kind, lm)
    tokens = torch.tensor([sequence(8, 6), sequence(8, 7)])
    padded = tokens.clone()
    padded[0, 5:] = 0
    lengths = torch.tensor([5, 8])
    with torch.no_grad():
        a, b = network.train_values(lm, tokens, lengths), network.train_values(lm, padded, lengths)
    torch.testing.assert_close(a[0, :5], b[0, :5], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(a[1], b[1], atol=1e-6, rtol=1e-6)
    if kind != "action":
        alone = dense_outputs(network, lm, sequence(8, 7))
        torch.testing.assert_close(a[1], alone, atol=TOLERANCE, rtol=TOLERANCE)


def test_rows_select_head_outputs() -> None:
    lm = base_model("llama")
    network = make_network("side", lm)
    network.allocate(8, 4)
    batch = AttentionBatch.from_sequences([[0, 1]], [[0, 1, 2]], [True], 4)
    hidden, index = torch.randn(3, 64), torch.arange(3)
    every = network.score(torch.tensor([4, 5, 6]), hidden, index, batch)
    some = network.score(torch.tensor([4, 5, 6]), hidden, index, batch, rows=torch.tensor([2]))
    torch.testing.assert_close(some, every[2:])


def test_bfloat16_base_is_near_float32() -> None:
    for kind in KINDS:
        outputs = []
        for dtype in ("float32", "bfloat16"):
            lm = base_model("llama", dtype=dtype)
            network = make_network(kind, lm)
            driver = Driver(lm, network, [sequence(7, 5)])
            driver.carry = [c.to(lm.dtype) for c in driver.carry]
            driver.feed({0: 7})
            outputs.append(driver.score({0: [9, 10, 11]})[0])
        assert outputs[1].dtype == torch.float32
        assert (outputs[0] - outputs[1]).norm() / outputs[0].norm() < 5e-2, kind


# ------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_not_the_base(kind: str) -> None:
    lm = base_model("llama")
    network = make_network(kind, lm)
    output = network.train_values(lm, torch.tensor([sequence(6, 1)]), torch.tensor([6]))
    output.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_gradients_reach_the_backbone_of_a_value_model() -> None:
    lm = base_model("llama")
    network = make_network("model", lm)
    network.train_values(lm, torch.tensor([sequence(6, 1)]), torch.tensor([6])).square().sum().backward()
    layers = [p for n, p in network.backbone.named_parameters() if "layers" in n]
    assert layers
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in layers)


def test_scores_follow_an_update_of_the_weights() -> None:
    """The table of projected embeddings is made anew when training has changed its weight."""
    lm = base_model("llama")
    network = make_network("action", lm)
    driver = Driver(lm, network, [sequence(5, 1)])
    driver.feed({0: 5})
    before = driver.score({0: [4, 5]})[0]
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    network.train_values(lm, torch.tensor([sequence(5, 1)]), torch.tensor([5])).sum().backward()
    driver.score({0: [4, 5]})
    optimiser.step()
    after = driver.score({0: [4, 5]})[0]
    expected = torch.stack([dense_outputs(network, lm, [*sequence(5, 1), token])[-1] for token in (4, 5)])
    torch.testing.assert_close(after, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert (after - before).abs().max() > 0.1


# ------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("action", {"states": (4,)}, "hidden states 0 to 3"),
        ("reader", {"layers": (3,)}, "layers 0 to 2"),
        ("reader", {"queries": 3}, "multiple of the 2 K/V heads"),
        ("reader", {"head_dim": 16}, "heads of 8"),
        ("action", {"hidden_size": 48}, "hidden states of 32"),
        ("action", {"vocab_size": 62}, "61 tokens"),
    ],
)
def test_bind_refuses_another_shape(kind: str, changes: dict, said: str) -> None:
    lm = base_model("llama")
    network = ValueNetwork(network_config(kind, lm).replace(**changes))
    with pytest.raises(ValueArtifactError, match=said):
        network.bind(lm)


def test_bind_refuses_other_weights() -> None:
    lm = base_model("llama")
    config = make_network("action", lm).config
    with pytest.raises(ValueArtifactError, match="weights"):
        ValueNetwork(config).bind(base_model("llama", seed=4))


def test_use_before_bind_and_allocate() -> None:
    lm = base_model("llama")
    batch = AttentionBatch.from_sequences([[0]], [[0]], [False], 4)
    row = (torch.tensor([3]), torch.zeros(1, 64), torch.tensor([0]), batch)
    network = ValueNetwork(network_config("side", lm))
    with pytest.raises(VASError, match="bind"):
        network.score(*row)
    network.bind(lm)
    with pytest.raises(VASError, match="allocate"):
        network.score(*row)
    network.allocate(4, 4)
    with pytest.raises(VASError, match="nothing to commit"):
        network.commit(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(InvalidArgumentError, match="hidden"):
        network.score(row[0], None, None, batch)
