"""Loading: what is found out about a model, what is refused, fingerprints, real checkpoints."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaConfig,
    PretrainedConfig,
    T5Config,
)

from tests.model.conftest import CONFIGS, Pair, random_model
from tests.tiny import tiny_llama
from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, ValueArtifactError
from vas_engine.model import AttentionBatch, CausalLM
from vas_engine.values.value_model import load_backbone

SHARED = Path(os.environ.get("VAS_SHARED", Path(__file__).resolve().parents[3] / "shared"))
MODELS = ["stories260K", "stories3M", "tinystories-656k"]
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

GPT2_TINY = {"vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def checkpoint(name: str) -> Path:
    folder = SHARED / "models" / name
    if not folder.exists():
        pytest.skip(f"no checkpoint at {folder}")
    return folder


def dummy(config: PretrainedConfig) -> CausalLM:
    return CausalLM.load(config, device="cpu", dtype="float32", load_format="dummy")


def test_layers_are_what_the_configs_say():
    specs = {name: dummy(copy.deepcopy(config)).layers for name, config in CONFIGS.items()}
    assert {name: [spec.window for spec in found] for name, found in specs.items()} == {
        "llama": [0, 0, 0],
        "qwen3": [0, 0, 0],
        "mistral": [7, 7, 7],
        "gemma2": [6, 0, 6],
        "gpt_neox": [0, 0, 0],
        "gpt2": [0, 0, 0],
    }
    assert {spec.softcap for spec in specs["gemma2"]} == {2.0}
    assert [spec.scale for spec in specs["gemma2"]] == [5**-0.5] * 3
    assert [spec.scale for spec in specs["gpt2"]] == pytest.approx([8**-0.5 / (layer + 1) for layer in range(3)])
    assert [(spec.num_heads, spec.kv_heads, spec.head_dim) for spec in specs["qwen3"]] == [(4, 2, 12)] * 3


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (GptOssConfig(**TINY, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
        (GPT2Config(**GPT2_TINY, reorder_and_upcast_attn=True), "reorder_and_upcast_attn"),
        (GPT2Config(**GPT2_TINY, add_cross_attention=True), "cross attention"),
        (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
        (BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "Bloom.*0 of 2 layers"),
        (LlamaConfig(**TINY, rope_parameters=DYNAMIC_ROPE), "dynamic"),
        (T5Config(vocab_size=64, d_model=32, num_layers=1), "T5"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PretrainedConfig) else None,
)  # fmt: skip
def test_features_that_are_not_honoured_are_refused_by_name(config, feature):
    with pytest.raises(UnsupportedModelError, match=feature):
        dummy(config)


class TokenShift(torch.nn.Module):
    """A feed-forward layer that also looks one token back, as some architectures do."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden + torch.nn.functional.pad(hidden, (0, 0, 1, 0))[:, :-1])


def test_tokens_that_mix_outside_of_attention_are_refused():
    """Every layer calls the attention function, so only the packed probe can tell."""
    model = random_model(LlamaConfig(**TINY))
    CausalLM.load(copy.deepcopy(model), device="cpu")
    model.model.layers[0].mlp = TokenShift(model.model.layers[0].mlp)
    with pytest.raises(UnsupportedModelError, match="outside of the attention"):
        CausalLM.load(model, device="cpu")


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_rotate_is_what_the_layers_do(name, monkeypatch):
    """The queries that reach the attention function are the projections, rotated."""
    pair = Pair(name)
    lm, seen = pair.lm, {}
    lm.allocate(8, 4)
    for layer, pages in enumerate(lm.cache.pages):
        original = pages.attend

        def spy(q, *rest, layer=layer, original=original):
            seen.setdefault(layer, []).append(q.clone())
            return original(q, *rest)

        monkeypatch.setattr(pages, "attend", spy)

    def queries(offset: int) -> list[torch.Tensor]:
        """Queries per layer of one token alone in its sequence, at position `offset` (it sees itself only)."""
        seen.clear()
        batch = AttentionBatch.build([[0]], [0, 1], [offset], [-1], prefix_lens=[0])
        lm.forward(torch.tensor([9]), batch)
        return [seen[layer][0] for layer in range(lm.num_layers)]

    at_zero, later = queries(0), queries(29)
    for layer in range(lm.num_layers):
        turned = lm.rotate(at_zero[layer], torch.tensor([29]), layer)
        if name == "gpt2":
            assert torch.equal(turned, at_zero[layer])
        else:
            torch.testing.assert_close(turned, later[layer], rtol=1e-4, atol=1e-4)
            assert not torch.allclose(turned, at_zero[layer], atol=1e-2)


def test_dummy_weights_are_the_same_every_time_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = dummy(LlamaConfig(**TINY))
    assert torch.equal(torch.rand(1), expected)
    second = dummy(LlamaConfig(**TINY))
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dtype", "float23"),
        ("dtype", torch.float64),
        ("device", "gpu0"),
        ("load_format", "pickle"),
        ("attention_backend", "flash"),
    ],
)
def test_bad_arguments_are_named(argument, value):
    options = {"device": "cpu", "load_format": "dummy", argument: value}
    with pytest.raises(InvalidArgumentError, match=argument):
        CausalLM.load(LlamaConfig(**TINY), **options)


def test_a_config_without_weights_and_a_missing_folder_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="load_format='auto'"):
        CausalLM.load(LlamaConfig(**TINY), device="cpu")
    with pytest.raises(InvalidArgumentError, match="model="):
        CausalLM.load(tmp_path / "nothing", device="cpu")


def test_pickled_weights_are_not_read(tmp_path):
    model = random_model(LlamaConfig(**TINY))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidArgumentError, match="safetensors"):
        CausalLM.load(tmp_path, device="cpu")


def damaged(folder: Path, damage: str) -> None:
    """A checkpoint of a tiny Llama that something is wrong with."""
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    name = "model.layers.1.mlp.up_proj.weight"
    if damage == "not finite":
        torch.nn.init.constant_(model.get_parameter(name), float("nan"))
    model.save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    if damage in ("missing", "shape"):
        tensors = load_file(weights)
        tensors[name] = tensors[name][:5].contiguous()
        if damage == "missing":
            del tensors[name]
        save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "config":
        config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": "many"}))


@pytest.mark.parametrize(
    ("damage", "error", "told"),
    [
        ("cut", InvalidArgumentError, "no readable .*safetensors"),
        ("missing", UnsupportedModelError, "missing: .*layers.1.mlp.up_proj.weight"),
        ("shape", UnsupportedModelError, "other shapes"),
        ("not finite", UnsupportedModelError, "not finite"),
        ("config", InvalidArgumentError, "hidden_size"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage, error, told):
    """transformers makes up missing weights at random."""
    damaged(tmp_path, damage)
    with pytest.raises(error, match=told):
        CausalLM.load(tmp_path, device="cpu")
    if damage != "not finite":
        with pytest.raises(ValueArtifactError, match=told):
            load_backbone(tmp_path, dummy(LlamaConfig(**TINY)))


def test_a_quantised_checkpoint_names_the_package_it_needs(tmp_path):
    config = LlamaConfig(**TINY, quantization_config={"quant_method": "aqlm"})
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="aqlm"):
        CausalLM.load(tmp_path, device="cpu")


def test_a_model_without_a_head_runs_and_has_no_logits():
    model = random_model(LlamaConfig(**TINY))
    headed, bare = (
        CausalLM.load(copy.deepcopy(model), device="cpu"),
        CausalLM.load(copy.deepcopy(model).model, device="cpu"),
    )
    ids = torch.tensor([[1, 2, 3]])
    assert not bare.head
    torch.testing.assert_close(bare.dense(ids).last_hidden, headed.dense(ids).last_hidden)
    with pytest.raises(UnsupportedModelError, match="head"):
        bare.dense(ids, logits=True)


def test_a_classifiers_head_is_not_taken_for_a_language_model_head():
    lm = CausalLM.load(LlamaForSequenceClassification(LlamaConfig(**TINY)), device="cpu")
    assert not lm.head
    assert lm.dense(torch.tensor([[1, 2]])).last_hidden.shape == (1, 2, 32)


def test_fingerprint_tells_weights_and_vocabularies_apart():
    model = random_model(LlamaConfig(**TINY))
    prints = [
        CausalLM.load(copy.deepcopy(model), device="cpu", dtype=kind).fingerprint() for kind in ("float32", "bfloat16")
    ]
    assert prints[0] == prints[1]
    changed = copy.deepcopy(model)
    changed.model.layers[1].mlp.up_proj.weight[3, 3] += 1.0
    assert CausalLM.load(changed, device="cpu").fingerprint()["weights"] != prints[0]["weights"]
    lm = CausalLM.load(model, device="cpu")
    hashes = [lm.fingerprint(AutoTokenizer.from_pretrained(checkpoint(name)))["vocabulary"] for name in MODELS]
    assert len({*hashes} - {None}) == 3
    assert lm.fingerprint()["vocabulary"] is None


def test_large_models_are_sampled_from_end_to_end(monkeypatch):
    from vas_engine.model import fingerprint

    monkeypatch.setattr(fingerprint, "FULL_BYTES", 16)
    monkeypatch.setattr(fingerprint, "SAMPLE_NUMBERS", 4)
    layer = torch.nn.Linear(64, 64, bias=False)
    before = fingerprint.weights_hash(layer)
    for change, seen in ((0, True), (64 * 64 - 1, True), (5, False)):
        with torch.no_grad():
            layer.weight.view(-1)[change] += 1
        assert (fingerprint.weights_hash(layer) != before) is seen
        with torch.no_grad():
            layer.weight.view(-1)[change] -= 1


def test_the_size_of_the_vocabulary_is_looked_up_once(monkeypatch):
    lm = CausalLM.load(tiny_llama(), device="cpu")
    assert lm.vocab_size == 257
    monkeypatch.setattr(lm.model, "get_output_embeddings", None)  # slow, and every step asks
    assert lm.vocab_size == 257


@pytest.mark.parametrize("name", MODELS)
def test_real_checkpoints_continue_as_in_transformers(name):
    folder = checkpoint(name)
    lm = CausalLM.load(folder, device="cpu")
    eager = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert lm.vocab_size == eager.config.vocab_size
    assert lm.eos_token_ids
    assert lm.eos_token_ids == {*(e if isinstance(e := eager.generation_config.eos_token_id, list) else [e])} | {
        *(e if isinstance(e := eager.config.eos_token_id, list) else [e])
    }
    lm.allocate(40, 4)
    prompts = [
        tokenizer("Once upon a time")["input_ids"],
        tokenizer("The dog was happy because")["input_ids"],
    ]
    tables = [list(range(20)), list(range(39, 19, -1))]
    sequences, done = [list(prompt) for prompt in prompts], [0, 0]
    for _ in range(40):
        positions = [list(range(done[i], len(sequences[i]))) for i in range(2)]
        batch = AttentionBatch.from_sequences(tables, positions, [True, True], 4)
        ids = torch.tensor([sequences[i][p] for i in range(2) for p in positions[i]])
        ends = torch.tensor([len(positions[0]) - 1, len(ids) - 1])
        logits = lm.logits(lm.forward(ids, batch).last_hidden[ends])
        for i in range(2):
            done[i] = len(sequences[i])
            sequences[i].append(int(logits[i].argmax()))
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with torch.no_grad():
            wanted = eager.generate(
                torch.tensor([prompt]),
                max_new_tokens=40,
                min_new_tokens=40,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert sequence == wanted[0].tolist()[: len(sequence)]
