"""Networks through torch.compile: what they compute is what they compute eagerly."""

from __future__ import annotations

import pytest
import torch
from value_models import (
    CONFIGS,
    KINDS,
    Driver,
    assert_paged_equals_dense,
    base_model,
    dense_outputs,
    make_network,
    sequence,
)

from vas_engine.llm import LLM
from vas_engine.params import SamplingParams
from vas_engine.values.network import ServedWeights

QUICK = [("llama", kind) for kind in ("action", "reader", "side", "model")]
ALL = [(name, kind) for name in sorted(CONFIGS) for kind in [*KINDS, "model"]]


def only_compiled(network, monkeypatch) -> None:
    """From now on eager code is an error."""
    network.compile()
    monkeypatch.setattr(ServedWeights, "run", None)
    monkeypatch.setattr(ServedWeights, "project", None)


@pytest.mark.parametrize(
    ("name", "kind"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL if pair not in QUICK)]
)
def test_compiled_pages_equal_dense(name: str, kind: str, monkeypatch) -> None:
    """Ragged prompts, candidates and commits: any number of rows and states by one compilation."""
    lm = base_model(name)
    network = make_network(kind, lm)
    only_compiled(network, monkeypatch)
    if kind == "model":
        assert network.lm_of_values.compiled
    assert_paged_equals_dense(lm, network)


def test_networks_side_by_side_and_weights_that_change() -> None:
    """Two of one shape keep to their own weights and pages; one that is trained on is run eagerly, not wrongly."""
    lm = base_model("llama")
    networks = [make_network("side", lm) for _ in range(2)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(0.7)
    for network in networks:
        network.compile()
    tokens = sequence(7, 1)
    for _ in range(2):
        for network in networks:
            output = Driver(lm, network, [tokens]).feed({0: 7})[0]
            torch.testing.assert_close(output, dense_outputs(network, lm, tokens), atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            networks[0].layers[1].output.weight.mul_(3.0)


def test_a_bfloat16_base() -> None:
    """Compiled networks are as near to float32 as eager ones: fused code rounds at other places, not more."""
    tokens, outputs = sequence(12, 6), []
    for dtype, compiled in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        lm = base_model("llama", dtype=dtype)
        network = make_network("reader", lm)
        if compiled:
            network.compile()
        outputs.append(Driver(lm, network, [tokens]).feed({0: 12})[0])
    truth, eager, fused = outputs
    assert (fused - truth).norm() < 1.3 * (eager - truth).norm()
    assert not torch.equal(fused, eager)


@pytest.mark.parametrize("enforce_eager", [True, False])
def test_an_engine_compiles_its_values(enforce_eager: bool) -> None:
    lm = base_model("llama")
    network = make_network("reader", lm)
    llm = LLM(
        lm.model, values={"v": network}, skip_tokenizer_init=True, enforce_eager=enforce_eager, kv_cache_memory="1MiB"
    )
    params = SamplingParams(max_tokens=8, seed=1, values={"v.plain": 2.0}, ignore_eos=True)
    (output,) = llm.generate([sequence(5, 1)], params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 8
    assert (network._compiled is None) is enforce_eager
