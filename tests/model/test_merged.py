"""Merged products give what the layers give one by one, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.model.conftest import CONFIGS, random_model
from tests.model.test_forward import BLOCK
from vas_engine.model import AttentionBatch, CausalLM
from vas_engine.model.fingerprint import weights_hash
from vas_engine.model.merged import merge


@pytest.mark.parametrize(("name", "groups"), [("llama", 6), ("qwen3", 6), ("gemma2", 6), ("gpt_neox", 0), ("gpt2", 0)])
def test_the_same_numbers_from_fewer_products(name: str, groups: int) -> None:
    alone, lm = (CausalLM.load(random_model(CONFIGS[name]), device="cpu") for _ in range(2))
    before = weights_hash(lm.model)
    assert merge(lm.model) == groups
    assert merge(lm.model) == 0  # once is enough
    assert weights_hash(lm.model) == before
    assert lm.num_parameters == alone.num_parameters
    batch = AttentionBatch.from_sequences([[0, 1]], [list(range(7))], [True], BLOCK)
    tokens = torch.arange(7) + 3
    outs, counts = [], []
    for model in (alone, lm):
        model.allocate(2, BLOCK)
        with torch.profiler.profile() as profile:
            outs.append(model.logits(model.forward(tokens, batch).last_hidden))
        counts.append(sum(event.count for event in profile.key_averages() if event.key == "aten::linear"))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    assert counts[0] - counts[1] == 3 * groups // 2  # two fewer a layer in attention, one in the feed-forward


def test_compiled_code_has_the_merged_products() -> None:
    """On a GPU nothing merges them later, as freezing does on a CPU."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = random_model(CONFIGS["llama"])
    layer, rows = model.model.layers[0], torch.randn(1, 3, 32)
    wanted = layer.mlp(rows)
    merge(model)
    torch.testing.assert_close(torch.compile(layer.mlp, fullgraph=True, backend=keep)(rows), wanted)
    (graph,) = graphs
    assert sum("linear" in str(node.target) for node in graph.graph.nodes) == 2


def test_weights_that_change_or_train_are_seen() -> None:
    lm = CausalLM.load(random_model(CONFIGS["llama"]), device="cpu")
    merge(lm.model)
    tokens, lengths = torch.arange(6)[None], torch.tensor([6])
    before = lm.dense(tokens, lengths, logits=True).logits
    layer = lm.model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        layer.weight.mul_(-1)
    after = lm.dense(tokens, lengths, logits=True).logits
    assert (before - after).abs().max() > 0.1
    layer.weight.requires_grad_(True)
    trained = lm.dense(tokens, lengths, logits=True).logits
    torch.testing.assert_close(trained, after, rtol=1e-4, atol=1e-4)
    trained.sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_layers_called_on_other_rows_compute_for_themselves() -> None:
    lm = CausalLM.load(random_model(CONFIGS["llama"]), device="cpu")
    attention = lm.model.model.layers[0].self_attn
    rows, others = torch.randn(2, 3, 32)
    with torch.no_grad():
        wanted = [layer(others) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
        merge(lm.model)
        attention.q_proj(rows)
        found = [attention.k_proj(others), attention.v_proj(others), attention.q_proj(others)]
    for one, other in zip(found, (*wanted[1:], wanted[0]), strict=True):
        torch.testing.assert_close(one, other)
