"""Heads of other projects: real tiny Hugging Face models are saved, loaded and compared at every prefix, uncached."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from value_models import CONFIGS, Driver, base_model, dense_outputs, random_model

from vas_engine.errors import InvalidArgumentError, ValueArtifactError
from vas_engine.values import ValueModel, ValueNetwork, load_value, save_value

TOKENS = [5, 9, 23, 40, 8, 51, 3]


def classifier(cls: type, name: str, labels: int, like_base: bool) -> PreTrainedModel:
    """A tiny classifier; its backbone is the base model's or another random one."""
    torch.manual_seed(11)
    config = copy.deepcopy(CONFIGS[name])
    config.num_labels = labels
    model = cls.from_config(config, attn_implementation="eager").eval()
    source = random_model(name, seed=3 if like_base else 8)
    model.base_model.load_state_dict(source.base_model.state_dict())
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.startswith(("score", "classifier")):
                parameter.normal_()
    return model.requires_grad_(False)


def write(folder: Path, model: PreTrainedModel, extra: dict[str, torch.Tensor], **config) -> None:
    """A checkpoint of a model with tensors and settings of some other project added."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors") | extra
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(values))


def load(folder: Path, lm, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return load_value(folder, lm, **options)


def paged_values(lm, network, tokens: list[int]) -> torch.Tensor:
    """V at every prefix, from a paged prefill and, for the last token, as a candidate."""
    driver = Driver(lm, network, [tokens[:-1]])
    rows = [driver.feed({0: 2})[0], driver.feed({0: len(tokens) - 3})[0], driver.score({0: [tokens[-1]]})[0]]
    return network.heads.mean(torch.cat(rows))[:, 0]


def check(lm, network, expected: torch.Tensor) -> None:
    torch.testing.assert_close(paged_values(lm, network, TOKENS), expected, atol=1e-4, rtol=1e-4)
    dense = network.heads.mean(dense_outputs(network, lm, TOKENS))[:, 0]
    torch.testing.assert_close(dense, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.05


def final_states(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states[-1][0]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("like_base", [True, False])
def test_sequence_classification(name: str, like_base: bool, tmp_path: Path) -> None:
    model = classifier(AutoModelForSequenceClassification, name, 1, like_base)
    model.save_pretrained(tmp_path)
    lm = base_model(name)
    network = load(tmp_path, lm)
    assert isinstance(network, ValueNetwork if like_base else ValueModel)
    with torch.no_grad():
        prefixes = [torch.tensor([TOKENS[: n + 1]]) for n in range(len(TOKENS))]
        expected = torch.cat([model(prefix).logits[0] for prefix in prefixes])
    check(lm, network, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("like_base", [True, False])
def test_token_classification(name: str, like_base: bool, tmp_path: Path) -> None:
    model = classifier(AutoModelForTokenClassification, name, 3, like_base)
    model.save_pretrained(tmp_path)
    lm = base_model(name)
    network = load(tmp_path, lm, label=2)
    assert isinstance(network, ValueNetwork if like_base else ValueModel)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0, :, 2]
    check(lm, network, expected)


@pytest.mark.parametrize("like_base", [True, False])
@pytest.mark.parametrize("wrapper", ["", "pretrained_model."])
def test_trl_value_head(like_base: bool, wrapper: str, tmp_path: Path) -> None:
    base = random_model("llama", seed=3 if like_base else 8)
    torch.manual_seed(2)
    head = nn.Linear(32, 1).requires_grad_(False)
    write(tmp_path, base, {"v_head.summary.weight": head.weight, "v_head.summary.bias": head.bias})
    if wrapper:
        tensors = load_file(tmp_path / "model.safetensors")
        renamed = {(n if n.startswith("v_head") else wrapper + n): t for n, t in tensors.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm = base_model("llama")
    if wrapper and not like_base:
        with pytest.raises(ValueArtifactError, match="missing"):
            load(tmp_path, lm)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        network = load_value(tmp_path, lm)
    assert isinstance(network, ValueNetwork if like_base else ValueModel)
    check(lm, network, head(final_states(base))[:, 0])


def test_head_alone_in_a_file(tmp_path: Path) -> None:
    """LLaMA-Factory writes the head into a file of its own, PEFT saves of TRL hold nothing else."""
    head = nn.Linear(32, 1).requires_grad_(False)
    save_file(
        {"v_head.summary.weight": head.weight, "v_head.summary.bias": head.bias},
        tmp_path / "value_head.safetensors",
    )
    lm = base_model("llama")
    network = load_value(tmp_path, lm)
    assert network.config.kind == "lookahead"
    check(lm, network, head(final_states(random_model("llama")))[:, 0])
    with pytest.raises(ValueArtifactError, match="as_='head'"):
        load_value(tmp_path, lm, as_="model")


def test_two_layer_reward_head(tmp_path: Path) -> None:
    base = random_model("qwen3", seed=8)
    torch.manual_seed(2)
    head = nn.Sequential(nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 1)).requires_grad_(False)
    write(tmp_path, base, {f"score.{name}": tensor for name, tensor in head.state_dict().items()})
    lm = base_model("qwen3")
    network = load(tmp_path, lm)
    assert isinstance(network, ValueModel)
    check(lm, network, head(final_states(base))[:, 0])


def test_internlm2_head(tmp_path: Path) -> None:
    base = random_model("llama", seed=3)
    head = nn.Linear(32, 1, bias=False).requires_grad_(False)
    write(tmp_path, base, {"v_head.weight": head.weight})
    lm = base_model("llama")
    check(lm, load(tmp_path, lm), head(final_states(base))[:, 0])


@pytest.mark.parametrize("prefix", [None, "reward_head"])
def test_openrlhf_head_is_normalised(prefix: str | None, tmp_path: Path) -> None:
    base = random_model("llama", seed=8)
    head = nn.Linear(32, 1, bias=False).requires_grad_(False)
    settings = {"normalize_reward": True, "mean": 1.5, "std": 0.25}
    if prefix:
        settings["value_head_prefix"] = prefix
    write(tmp_path, base, {f"{prefix or 'value_head'}.weight": head.weight}, **settings)
    lm = base_model("llama")
    check(lm, load(tmp_path, lm), (head(final_states(base))[:, 0] - 1.5) / 0.25)


def test_loaded_heads_save_as_value_folders(tmp_path: Path) -> None:
    lm = base_model("llama")
    for like_base in (True, False):
        folder = tmp_path / str(like_base)
        classifier(AutoModelForSequenceClassification, "llama", 1, like_base).save_pretrained(folder)
        network = load(folder, lm)
        save_value(folder / "saved", network)
        again = load_value(folder / "saved", lm)
        assert torch.equal(dense_outputs(network, lm, TOKENS), dense_outputs(again, lm, TOKENS))


# ------------------------------------------------------------------------ choices
# and refusals


def test_several_labels_must_be_chosen(tmp_path: Path) -> None:
    model = classifier(AutoModelForSequenceClassification, "llama", 3, True)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.save_pretrained(tmp_path)
    lm = base_model("llama")
    with pytest.raises(InvalidArgumentError, match=r"label.*2 \(good\)"):
        load(tmp_path, lm)
    with pytest.raises(InvalidArgumentError, match="did you mean 'good'"):
        load(tmp_path, lm, label="goof")
    for wrong in (3, -1, True):
        with pytest.raises(InvalidArgumentError, match="0 to 2"):
            load(tmp_path, lm, label=wrong)
    by_name, by_index = load(tmp_path, lm, label="good"), load(tmp_path, lm, label=2)
    assert torch.equal(by_name.heads.output.weight, by_index.heads.output.weight)
    assert torch.equal(by_name.heads.output.weight[0], model.score.weight[2])
    assert by_name.config.heads[0].reward == "good"


def test_reward_models_come_with_a_warning(tmp_path: Path) -> None:
    classifier(AutoModelForSequenceClassification, "llama", 1, True).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="last tokens"):
        load_value(tmp_path, base_model("llama"))


def test_head_of_another_backbone_is_refused_as_head(tmp_path: Path) -> None:
    classifier(AutoModelForSequenceClassification, "llama", 1, False).save_pretrained(tmp_path)
    with pytest.raises(ValueArtifactError, match="as_='model'"):
        load(tmp_path, base_model("llama"), as_="head")


def test_same_backbone_as_a_model_on_request(tmp_path: Path) -> None:
    classifier(AutoModelForSequenceClassification, "llama", 1, True).save_pretrained(tmp_path)
    assert isinstance(load(tmp_path, base_model("llama"), as_="model"), ValueModel)


def test_a_single_changed_weight_makes_another_backbone(tmp_path: Path) -> None:
    model = classifier(AutoModelForSequenceClassification, "llama", 1, True)
    model.model.layers[1].mlp.up_proj.weight[3, 3] += 0.5
    model.save_pretrained(tmp_path)
    assert isinstance(load(tmp_path, base_model("llama")), ValueModel)


def test_another_vocabulary(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size, config.num_labels = 70, 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueArtifactError, match="vocab_size=70"):
        load(tmp_path, base_model("llama"))


def test_head_of_another_width(tmp_path: Path) -> None:
    save_file({"v_head.summary.weight": torch.zeros(1, 16)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueArtifactError, match="states of 16"):
        load(tmp_path, base_model("llama"))


def test_no_head_and_several_heads(tmp_path: Path) -> None:
    lm = base_model("llama")
    random_model("llama").save_pretrained(tmp_path / "none")
    with pytest.raises(ValueArtifactError, match="no value head found"):
        load(tmp_path / "none", lm)
    weight = torch.zeros(1, 32)
    write(tmp_path / "two", random_model("llama"), {"score.weight": weight, "value_head.weight": weight.clone()})
    with pytest.raises(ValueArtifactError, match="several heads"):
        load(tmp_path / "two", lm)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "value_head.bin", "model.pt"])
def test_pickled_weights_are_not_read(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(ValueArtifactError, match=f"{file}.*save_pretrained"):
        load(tmp_path, base_model("llama"))


def test_adapters_must_be_merged(tmp_path: Path) -> None:
    tensors = {"v_head.summary.weight": torch.zeros(1, 32)}
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueArtifactError, match="merge"):
        load(tmp_path, base_model("llama"))


def test_not_finite_and_corrupt(tmp_path: Path) -> None:
    save_file({"v_head.summary.weight": torch.full((1, 32), torch.nan)}, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueArtifactError, match="not finite"):
        load(tmp_path, base_model("llama"))
    (tmp_path / "value_head.safetensors").write_bytes(b"no")
    with pytest.raises(ValueArtifactError, match="not readable"):
        load(tmp_path, base_model("llama"))


def test_weights_missing_in_a_backbone(tmp_path: Path) -> None:
    model = classifier(AutoModelForSequenceClassification, "llama", 1, True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueArtifactError, match="missing"):
        load(tmp_path, base_model("llama"))


def test_a_base_with_tied_embeddings_is_recognised(tmp_path: Path) -> None:
    """The checkpoint of a classifier has no output embeddings; that is no difference."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).eval()
    config = copy.deepcopy(config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    model.base_model.load_state_dict(base.base_model.state_dict())
    model.save_pretrained(tmp_path)
    from vas_engine.model import CausalLM

    assert isinstance(load(tmp_path, CausalLM.load(base, device="cpu")), ValueNetwork)
