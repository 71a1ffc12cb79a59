"""TRL's own trainers on rollouts, with a value as their reward."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.integrations.test_documentation import examples
from tests.tiny import byte_tokenizer, tiny_llama
from vas_engine import LLM, SamplingParams
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.integrations.trl import ValueReward, to_dataset
from vas_engine.model import CausalLM
from vas_engine.training.rollouts import Header, Rollout, Rollouts, RolloutWriter
from vas_engine.values.artifact import save_value
from vas_engine.values.config import HeadConfig, default_config
from vas_engine.values.network import ValueNetwork
from vas_engine.values.value_model import ValueModel

PROMPTS = ["Once", "Twice upon", "A"]


def rollout(prompt: int, sample: int, rewards: dict[str, float]) -> Rollout:
    text = "abc"[sample] * (3 + sample)
    ids = [list(part.encode()) for part in (PROMPTS[prompt], text)]
    return Rollout(PROMPTS[prompt], text, *ids, "stop", sample, prompt, rewards)


@pytest.fixture(scope="module")
def rollouts() -> Rollouts:
    """Three samples of each prompt: `kind` best in the first and worst in the second, `flat` equal for one prompt."""
    header = Header({}, rewards={name: {"spec": name, "bounds": None} for name in ("kind", "flat")})
    table = [
        rollout(prompt, sample, {"kind": [2.0, -1.0, 0.5][sample], "flat": float(prompt * sample)})
        for prompt in range(3)
        for sample in range(3)
    ]
    return Rollouts(header, table)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rollouts):
    """A model, a value of two kinds, and the rollouts."""
    root = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer(pad_token="<end>")
    for part, seed in (("model", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(root / part)
        tokenizer.save_pretrained(root / part)
    lm = CausalLM.load(root / "model", device="cpu")
    heads = (HeadConfig("kind", "kind"), HeadConfig("mild", "mild"))
    torch.manual_seed(0)
    for name, value in (
        ("value", ValueModel.create(root / "other", lm, ["kind"], tokenizer)),
        ("side", ValueNetwork(default_config("side", lm, heads)).bind(lm, tokenizer)),
    ):
        with torch.no_grad():
            value.heads.output.weight.mul_(20)
        save_value(root / name, value, tokenizer)
    RolloutWriter(root / "rollouts", rollouts.header).write(0, rollouts.rollouts)
    return root


def test_datasets(rollouts) -> None:
    assert to_dataset(rollouts, "prompt-only").to_list() == [{"prompt": prompt} for prompt in PROMPTS]
    pairs = to_dataset(rollouts, "preference", "kind").to_list()
    scores = {"score_chosen": 2.0, "score_rejected": -1.0}
    assert pairs == [{"prompt": prompt, "chosen": "aaa", "rejected": "bbbb", **scores} for prompt in PROMPTS]
    # A prompt that stands twice in the list is one.
    doubled = Rollouts(rollouts.header, [replace(row, prompt_index=i) for i, row in enumerate(rollouts)])
    assert to_dataset(doubled, "preference", "kind").to_list() == pairs
    # The first prompt's samples are all worth the same.
    assert [pair["prompt"] for pair in to_dataset(rollouts, "preference", "flat")] == PROMPTS[1:]
    rows = to_dataset(rollouts, "prompt-completion")
    assert len(rows) == 9
    assert rows[4] == {
        "prompt": "Twice upon",
        "completion": "bbbb",
        "finish_reason": "stop",
        "reward.kind": -1.0,
        "reward.flat": 1.0,
    }


def test_dataset_errors(rollouts) -> None:
    with pytest.raises(InvalidArgumentError, match="preference"):
        to_dataset(rollouts, "preferences")
    for name in (None, "kindness"):
        with pytest.raises(InvalidArgumentError, match="name a reward"):
            to_dataset(rollouts, "preference", name)
    with pytest.raises(TrainingDataError, match="different 'flat'"):
        to_dataset(Rollouts(rollouts.header, rollouts.rollouts[:3]), "preference", "flat")


@pytest.mark.parametrize(("value", "head"), [("value", None), ("side", "mild")])
def test_a_value_rewards_what_the_engine_says_it_is_worth(folder, value, head) -> None:
    llm = LLM(folder / "model", {"v": folder / value}, device="cpu", kv_cache_memory="4MiB")
    name = "v" if head is None else f"v.{head}"
    params = SamplingParams(values={name: 1.0}, max_tokens=12, seed=1)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    ids = [output.outputs[0].token_ids for output in outputs]
    reward = ValueReward(folder / "model", folder / value, head, device="cpu")
    found = reward(PROMPTS, [output.outputs[0].text for output in outputs], completion_ids=ids, step=3)
    assert found == pytest.approx([output.outputs[0].values[name][-1] for output in outputs], abs=1e-4)
    assert reward.__name__ == (head or "kind")
    # Without its tokens a completion is taken as ended.
    text = outputs[0].prompt + "abc"
    ended = reward([outputs[0].prompt, outputs[0].prompt], ["abc", [{"role": "assistant", "content": "abc"}]])
    with_end = reward([text], [""], completion_ids=[[256]])
    assert ended == pytest.approx(with_end * 2, abs=1e-5)


def test_reward_errors(folder) -> None:
    with pytest.raises(InvalidArgumentError, match="name a head"):
        ValueReward(folder / "model", folder / "side", device="cpu")
    with pytest.raises(InvalidArgumentError, match="mild"):
        ValueReward(folder / "model", folder / "side", "mil", device="cpu")


@pytest.mark.slow
def test_trainers(folder) -> None:
    """The page's example: a step of DPO on the pairs and one of GRPO for the value."""
    pytest.importorskip("trl", reason="needs pip install 'vas-engine[trl]'")
    names = {"MODEL": "model", "VALUE": "value", "ROLLOUTS": "rollouts", "OUT": "out"}
    space = {name: str(folder / part) for name, part in names.items()}
    options = "max_steps=1, use_cpu=True, bf16=False, report_to='none', logging_steps=1, learning_rate=1e-3, "
    program = examples("trl.md").replace("output_dir=OUT, ", f"output_dir=OUT, {options}")
    program = program.replace("num_generations=8", "num_generations=3, per_device_train_batch_size=3")
    exec(program.replace("max_completion_length=64", "max_completion_length=10"), space)
    dpo, grpo = (space[name].state.log_history for name in ("dpo", "grpo"))
    # Policy and reference are the same before the first step.
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert dpo[0]["grad_norm"] > 0
    assert grpo[0]["rewards/kind/std"] > 0
    assert grpo[0]["grad_norm"] > 0
