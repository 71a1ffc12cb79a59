"""A tiny random base model with a network of every kind, and engines over them."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from vas_engine.engine.engine import Engine
from vas_engine.engine.event import TokenEvent
from vas_engine.model import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig, Support, default_config
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel

KINDS = ("action", "reader", "side", "lookahead", "side-lookahead", "model")
VOCAB = 31
EOS = 30


def llama(layers: int = 3, hidden: int = 32, vocab: int = VOCAB, seed: int = 0) -> CausalLM:
    """Random weights, large enough that attention and logits are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=vocab - 1,
        bos_token_id=0,
    )
    lm = CausalLM.load(config, device="cpu", dtype="float32", load_format="dummy")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return lm


def network(kind: str, lm: CausalLM, heads: tuple[HeadConfig, ...] | None = None, seed: int = 1):
    """A random network of a kind whose values differ between candidates by about one unit."""
    torch.manual_seed(seed)
    heads = heads or (HeadConfig("value", "value"),)
    if kind == "model":
        backbone = llama(2, 32, lm.vocab_size, seed + 7).model
        made = ValueModel.create(backbone, lm, heads, head_hidden=16)
    else:
        made = ValueNetwork(default_config(kind, lm, heads)).bind(lm)
    with torch.no_grad():
        made.heads.output.weight.mul_(12.0)
        if isinstance(made, ValueNetwork):
            made.place_weight.normal_(std=0.2)
    return made.eval()


def distributional(low: float = -2.0, high: float = 2.0, bins: int = 9, name: str = "value") -> HeadConfig:
    return HeadConfig(name, name, support=Support(low, high, bins))


def engine(lm: CausalLM, scorers: dict | None = None, **options) -> Engine:
    options = {"num_blocks": 200, "block_size": 4, "max_num_seqs": 32, "max_num_batched_tokens": 1024, **options}
    return Engine(lm, scorers or {}, **options)


def engine_on(device: str, backend: str, kinds: dict[str, tuple], **options) -> Engine:
    """The same weights wherever they lie; networks by name, each of a (kind, heads)."""
    host = llama()
    lm = CausalLM.load(llama().model, device=device, attention_backend=backend)
    nets = {}
    for i, (name, (kind, heads)) in enumerate(kinds.items()):
        nets[name] = network(kind, lm, heads, seed=i)
        nets[name].load_state_dict(network(kind, host, heads, seed=i).state_dict())
    return engine(lm, nets, **options)


def drain(running: Engine, steps: int = 10_000) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    for _ in range(steps):
        if not running.has_unfinished:
            return events
        events += running.step()
    raise AssertionError("the engine did not finish")


def tokens(events: list[TokenEvent]) -> dict[tuple[str, int], list[int]]:
    found: dict[tuple[str, int], list[int]] = {}
    for event in events:
        assert event.error is None, event.error
        if event.token_id is not None:
            found.setdefault((event.request_id, event.index), []).append(event.token_id)
    return found


def generate(running: Engine, prompt: list[int], params: SamplingParams) -> dict[int, list[int]]:
    running.add_request("only", prompt, params)
    return {index: ids for (_, index), ids in tokens(drain(running)).items()}


@pytest.fixture(scope="session")
def lm() -> CausalLM:
    return llama()
