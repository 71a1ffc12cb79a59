import json

import pytest
import torch
from chain import ExactValue, build_lm, sample

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.model.lm import CausalLM
from vas_engine.training import checkpoint as module
from vas_engine.training.checkpoint import CHECKPOINT_FILE, drop_checkpoint
from vas_engine.training.fit import FitConfig, fit_all, head_for
from vas_engine.training.network import make_network

SETTINGS = {"epochs": 4, "batch_tokens": 512, "lam": 0.8, "ema": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def rollouts(lm, solution):
    return sample(lm, solution, 300)


def backbone() -> CausalLM:
    """The chain's model again, with dropout, which draws random numbers while training."""
    model = build_lm().model
    model.config.attention_dropout = 0.2
    for module_ in model.modules():
        if hasattr(module_, "attention_dropout"):
            module_.attention_dropout = 0.2
    return CausalLM.load(model, device="cpu", dtype="float32")


def networks(lm, rollouts):
    heads = [head_for(rollouts, "points")]
    return [make_network(lm, "side", heads), make_network(lm, "model", heads, backbone=backbone())]


def interrupt(network, folder, epoch: int) -> None:
    """Ctrl-C in the middle of the epoch after this one."""
    train_values, calls = network.train_values, []

    def interrupting(*args):
        if (folder / f"checkpoint-{epoch}.safetensors").exists():
            calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_values(*args)

    network.train_values = interrupting


@pytest.mark.parametrize(
    ("taught", "options", "every"),
    [
        (False, {}, 0),
        (False, {}, 1),  # with a critic
        (False, {"cache_memory": 0}, 0),
        (True, {}, 0),
        (True, {"cache_memory": 0}, 0),
    ],
)
def test_goes_on_exactly(lm, solution, tmp_path, taught, options, every):
    rollouts = sample(lm, solution, 300, every=every)
    config = FitConfig(**SETTINGS, **options, teacher_share=0.5, lora_rank=2 if taught else None)
    given = {"teacher": ExactValue(solution) if taught else None, "use_tqdm": False}
    whole = networks(lm, rollouts)
    wanted = fit_all(lm, whole, rollouts, config, **given)
    parts = networks(lm, rollouts)
    interrupt(parts[1], tmp_path, epoch=2)
    with pytest.raises(KeyboardInterrupt):
        fit_all(lm, parts, rollouts, config, checkpoint=tmp_path, **given)
    progress = json.loads((tmp_path / CHECKPOINT_FILE).read_text())
    assert progress["epoch"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {CHECKPOINT_FILE, progress["tensors"]}
    again = networks(lm, rollouts)
    found = fit_all(lm, again, rollouts, config, checkpoint=tmp_path, resume=True, **given)
    for one, other in zip(whole, again, strict=True):
        for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            assert torch.equal(a, b), name
    for one, other in zip(wanted, found, strict=True):
        assert one.heads == other.heads
        assert [e.r_squared for e in one.epochs] == [e.r_squared for e in other.epochs]
    drop_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_finished_fit_is_only_judged_again(lm, rollouts, tmp_path):
    config = FitConfig(epochs=2, batch_tokens=512)
    one, other = networks(lm, rollouts)[0], networks(lm, rollouts)[0]
    wanted = fit_all(lm, [one], rollouts, config, checkpoint=tmp_path, use_tqdm=False)
    found = fit_all(lm, [other], rollouts, config, checkpoint=tmp_path, resume=True, use_tqdm=False)
    assert found[0].heads == wanted[0].heads
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_of_another_fit_is_refused(lm, rollouts, tmp_path):
    config = FitConfig(epochs=1, batch_tokens=512)
    make = lambda: networks(lm, rollouts)[:1]  # noqa: E731
    fit_all(lm, make(), rollouts, config, checkpoint=tmp_path, use_tqdm=False)
    options = {"checkpoint": tmp_path, "resume": True, "use_tqdm": False}
    with pytest.raises(InvalidArgumentError, match=r"epochs 1, not 2"):
        fit_all(lm, make(), rollouts, FitConfig(epochs=2, batch_tokens=512), **options)
    with pytest.raises(InvalidArgumentError, match="rollouts"):
        fit_all(lm, make(), rollouts.__class__(rollouts.header, rollouts.rollouts[:200]), config, **options)
    with pytest.raises(InvalidArgumentError, match="networks"):
        fit_all(lm, networks(lm, rollouts), rollouts, config, **options)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"nothing")
    with pytest.raises(TrainingDataError, match="no checkpoint of this fit"):
        fit_all(lm, make(), rollouts, config, **options)


def test_a_checkpoint_of_other_weights_is_refused(lm, solution, rollouts, tmp_path):
    """Of the teacher, or of the backbone that adapters are put into: nothing else tells them apart."""
    config = FitConfig(epochs=1, batch_tokens=512, lora_rank=2)

    def start(teacher, seed: int = 0):
        network = networks(lm, rollouts)[1]
        with torch.no_grad():
            next(network.backbone.parameters()).add_(seed)
        options = {"checkpoint": tmp_path, "resume": True, "use_tqdm": False}
        return fit_all(lm, [network], rollouts, config, teacher=teacher, **options)

    teacher, other = ExactValue(solution), ExactValue(solution)
    with torch.no_grad():
        other.heads.output.weight.add_(1.0)
    start(teacher)
    start(teacher)
    with pytest.raises(InvalidArgumentError, match="teacher_weights"):
        start(other)
    with pytest.raises(InvalidArgumentError, match="backbone_weights"):
        start(teacher, seed=1)


def test_a_run_killed_while_saving_leaves_the_checkpoint_before(lm, rollouts, tmp_path, monkeypatch):
    config = FitConfig(epochs=3, batch_tokens=512)
    save_file, calls = module.save_file, []

    def killed(tensors, path):
        calls.append(1)
        save_file(tensors, path)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        fit_all(lm, networks(lm, rollouts)[:1], rollouts, config, checkpoint=tmp_path, use_tqdm=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1.safetensors", CHECKPOINT_FILE]
    reports = fit_all(
        lm, networks(lm, rollouts)[:1], rollouts, config, checkpoint=tmp_path, resume=True, use_tqdm=False
    )
    assert [epoch.epoch for epoch in reports[0].epochs] == [1, 2, 3]
