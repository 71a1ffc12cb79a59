"""The vLLM plugin and a prompt of embeddings, over stand-ins for what it takes from vLLM."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine.model import CausalLM
from vas_engine.values.artifact import save_value
from vas_engine.values.value_model import ValueModel

PLUGIN = ("vas_engine.integrations.vllm", "vas_engine.integrations.vllm_states")
LAYER = type("LogitsProcessor", (), {"register_oot": classmethod(lambda cls, layer: None)})


def update(requests: dict, added: list, make) -> None:
    requests.update({row: made for row, *what in added if (made := make(*what)) is not None})


@pytest.fixture
def plugin(monkeypatch) -> ModuleType:
    parts = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": lambda: None},
        "vllm.model_executor": {},
        "vllm.model_executor.custom_op": {"op_registry_oot": {}},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.logits_processor": {"LogitsProcessor": LAYER},
        "vllm.v1": {},
        "vllm.v1.sample": {},
        "vllm.v1.sample.logits_processor": {"LogitsProcessor": type("Processor", (), {})},
        "vllm.v1.sample.logits_processor.builtin": {"process_dict_updates": update},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name in PLUGIN:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(PLUGIN[0])
    for name in PLUGIN:
        sys.modules.pop(name, None)


def request(**options) -> SimpleNamespace:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "seed": 1, "extra_args": None}
    return SimpleNamespace(**neutral | options)


def test_a_prompt_without_tokens_ends_its_own_request_alone(plugin, tmp_path) -> None:
    """An error of the processor would be the end of vLLM's engine."""
    tokenizer = byte_tokenizer()
    for name, seed in (("base", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lm = CausalLM.load(tmp_path / "base", "cpu")
    folder = save_value(tmp_path / "value", ValueModel.create(tmp_path / "other", lm, ["kind"], tokenizer), tokenizer)
    end = 2
    model = SimpleNamespace(
        model=str(tmp_path / "base"),
        tokenizer=str(tmp_path / "base"),
        revision=None,
        dtype=torch.float32,
        hf_config=SimpleNamespace(eos_token_id=end),
        get_vocab_size=lambda: lm.vocab_size,
    )
    settings = {"vas_values": {"kind": str(folder)}}
    config = SimpleNamespace(additional_config=settings, model_config=model, speculative_config=None)
    processor = plugin.ValueLogitsProcessor(config, torch.device("cpu"), False)
    guided = request(extra_args={"vas_weights": {"kind": 2.0}})
    processor.update_state([(0, guided, [1, 5], []), (1, guided, None, []), (2, request(), [3], [])])
    logits = torch.randn(3, lm.vocab_size)
    rows = processor.apply(logits.clone())
    assert [int(row.isfinite().sum()) for row in rows] == [1, 1, lm.vocab_size]
    assert int(rows[1].argmax()) == end
    assert torch.equal(rows[2], logits[2])
