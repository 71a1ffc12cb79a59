import pytest
import torch
from chain import PROMPT, build_lm, predict, sample, unexplained
from transformers import GPT2Config, GPT2LMHeadModel

from vas_engine.errors import InvalidArgumentError
from vas_engine.model.lm import CausalLM
from vas_engine.training.fit import FitConfig, fit, head_for
from vas_engine.training.network import make_network
from vas_engine.values.artifact import load_value, save_value


@pytest.fixture(scope="module")
def rollouts(lm, solution):
    return sample(lm, solution, 1000)


def gpt2() -> CausalLM:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=6, n_positions=16, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=0)
    return CausalLM.load(GPT2LMHeadModel(config), device="cpu", dtype="float32")


def names(network) -> list[str]:
    return list(network.state_dict())


@pytest.mark.parametrize("backbone", [build_lm, gpt2])
def test_lora_is_merged_into_a_plain_value_model(lm, solution, rollouts, tmp_path, backbone):
    network = make_network(lm, "model", [head_for(rollouts, "points")], backbone=backbone())
    plain, before = names(network), {n: t.clone() for n, t in network.state_dict().items()}
    config = FitConfig(epochs=12, batch_tokens=512, lr=5e-3, lora_rank=4)
    report = fit(lm, network, rollouts, config, use_tqdm=False)
    # Adapters and heads are all that was trained, and less than the whole.
    assert report.parameters < sum(p.numel() for p in network.parameters()) / 2
    assert names(network) == plain
    changed = {n for n, t in network.state_dict().items() if not torch.equal(t, before[n])}
    assert any("attn" in name for name in changed)
    assert not any("embed" in name or "wte" in name or "norm" in name or "ln_" in name for name in changed)
    assert all(p.requires_grad for p in network.parameters())
    # What the report says is what the merged model does, before and after it was on disk.
    missed = unexplained(lm, network, solution)
    assert missed < 0.5
    save_value(tmp_path / "value", network)
    again = load_value(tmp_path / "value", lm)
    assert unexplained(lm, again, solution) == pytest.approx(missed, abs=1e-5)
    probe = [(), (3,), (3, 4)]
    torch.testing.assert_close(predict(lm, again, probe), predict(lm, network, probe), atol=1e-5, rtol=1e-4)


def test_an_interrupted_lora_leaves_the_model_as_it_was(lm, rollouts):
    network = make_network(lm, "model", [head_for(rollouts, "points")], backbone=build_lm())
    before = {n: t.clone() for n, t in network.backbone.state_dict().items()}
    train_values, calls = network.train_values, []

    def interrupting(*args):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train_values(*args)

    network.train_values = interrupting
    with pytest.raises(KeyboardInterrupt):
        fit(lm, network, rollouts, FitConfig(lora_rank=2), use_tqdm=False)
    after = network.backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_small_steps_are_not_lost_in_bfloat16(rollouts):
    """Weights are trained in float32 and rounded once, at the end."""
    model = build_lm().model.to(torch.bfloat16)
    half = CausalLM.load(model, device="cpu", dtype="bfloat16")
    data = rollouts.__class__(
        rollouts.header.__class__(half.fingerprint(), {}, rollouts.header.rewards), rollouts.rollouts
    )
    other = CausalLM.load(build_lm().model.to(torch.bfloat16), device="cpu", dtype="bfloat16")
    network = make_network(half, "model", [head_for(data, "points")], backbone=other)
    before = [p.detach().clone() for p in network.backbone.parameters()]
    # A step of this size is far below half a rounding step of most weights.
    report = fit(half, network, data, FitConfig(epochs=6, batch_tokens=512, lr=2e-4), use_tqdm=False)
    assert all(p.dtype == torch.bfloat16 for p in network.backbone.parameters())
    moved = [float((p != b).float().mean()) for p, b in zip(network.backbone.parameters(), before, strict=True)]
    assert sum(moved) / len(moved) > 0.3
    tokens = torch.tensor([[*PROMPT]])
    assert bool(network.train_values(half, tokens, torch.tensor([2])).isfinite().all())
    assert report.heads["points"].r_squared > 0


def test_adapters_are_for_value_models(lm, rollouts):
    network = make_network(lm, "side", [head_for(rollouts, "points")])
    with pytest.raises(InvalidArgumentError, match="lora_rank"):
        fit(lm, network, rollouts, FitConfig(lora_rank=2), use_tqdm=False)
