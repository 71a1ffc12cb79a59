"""TRL: rollouts as its datasets, values as its reward functions.

DPOTrainer(model, train_dataset=to_dataset(load_rollouts("runs/mood"), "preference", "mood"), ...)
GRPOTrainer(model, reward_funcs=ValueReward("path/to/model", "path/to/value"), ...)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, TrainingDataError, VASError, nearest
from vas_engine.model.lm import CausalLM
from vas_engine.tokenizer import as_prompt, load_tokenizer
from vas_engine.training.rollouts import REWARD_PREFIX, Rollout, Rollouts
from vas_engine.values.artifact import load_value

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ValueReward", "to_dataset"]

KINDS = ("prompt-only", "prompt-completion", "preference")
BATCH_TOKENS = 4096


def to_dataset(rollouts: Rollouts, kind: str, reward: str | None = None) -> Dataset:
    """Rollouts in the columns of one of TRL's dataset types, as texts.

    Args:
        kind: "prompt-only" (each prompt once, for GRPO and RLOO), "prompt-completion" (every rollout with its
            `finish_reason` and a column `reward.NAME` of each reward, for SFT) or "preference" (of each prompt its
            best and its worst rollout as `chosen` and `rejected` with `score_chosen` and `score_rejected`, for DPO and
            reward models; prompts whose rollouts are all worth the same are left out).
        reward: that "preference" goes by; not needed where there is only one.

    Raises:
        InvalidArgumentError: no such kind or reward.
        TrainingDataError: no prompt has rollouts of different reward.
    """
    arguments.choice("kind", kind, KINDS)
    try:
        from datasets import Dataset
    except ImportError as error:
        raise VASError("datasets for TRL need pip install 'vas-engine[trl]'") from error
    by_prompt: dict[int, list[Rollout]] = {}
    for group, rollout in zip(rollouts.prompt_groups, rollouts, strict=True):
        by_prompt.setdefault(group, []).append(rollout)
    if kind == "prompt-only":
        return Dataset.from_list([{"prompt": own[0].prompt} for own in by_prompt.values()])
    if kind == "preference":
        return Dataset.from_list(_pairs(list(by_prompt.values()), _reward_name(rollouts, reward)))
    return Dataset.from_list(
        [
            {
                "prompt": rollout.prompt,
                "completion": rollout.response,
                "finish_reason": rollout.finish_reason,
                **{REWARD_PREFIX + name: rollout.rewards[name] for name in rollouts.reward_names},
            }
            for rollout in rollouts
        ]
    )


def _reward_name(rollouts: Rollouts, reward: str | None) -> str:
    names = rollouts.reward_names
    if reward is None and len(names) == 1:
        return names[0]
    if reward not in names:
        fix = f"name a reward of the rollouts; {nearest(reward or '', names)}"
        raise InvalidArgumentError("reward", reward, fix)
    return reward


def _pairs(groups: Sequence[Sequence[Rollout]], reward: str) -> list[dict[str, Any]]:
    pairs = []
    for group in groups:
        worst, best = (choose(group, key=lambda rollout: rollout.rewards[reward]) for choose in (min, max))
        if best.rewards[reward] > worst.rewards[reward]:
            pairs.append(
                {
                    "prompt": best.prompt,
                    "chosen": best.response,
                    "rejected": worst.response,
                    "score_chosen": best.rewards[reward],
                    "score_rejected": worst.rewards[reward],
                }
            )
    if not pairs:
        fix = "collect several samples of each prompt (vas collect --samples)"
        raise TrainingDataError(f"no prompt has rollouts of different {reward!r}: {fix}")
    return pairs


class ValueReward:
    """A value as a reward function of TRL's online trainers (`reward_funcs`): V of the finished text.

    The value reads its own frozen base model, not the policy that is trained.

    Args:
        model: folder or hub name of the base model of the value.
        value: the value's folder.
        head: which of its heads; not needed where there is only one.
        tokenizer: the base model's is the default.
        device, dtype: as LLM takes them.

    Raises:
        InvalidArgumentError: no such head, or it cannot be told which. ValueArtifactError: as `load_value`.
    """

    def __init__(
        self,
        model: str | Path,
        value: str | Path,
        head: str | None = None,
        *,
        tokenizer: Any | None = None,
        device: str = "auto",
        dtype: Any = "auto",
    ) -> None:
        self.lm = CausalLM.load(model, device, dtype)
        self.tokenizer: Any = load_tokenizer(model, tokenizer, None, required=True)
        self.value = load_value(value, self.lm, tokenizer=self.tokenizer)
        names = self.value.heads.names
        if head is None and len(names) == 1:
            head = names[0]
        if head not in names:
            raise InvalidArgumentError("head", head, f"name a head of the value; {nearest(head or '', names)}")
        self.column = names.index(head)
        # TRL names the reward in its logs by it.
        self.__name__ = head

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """V after each completion, in units of the reward.

        Args:
            prompts: texts or conversations. completions: of each, a text or the assistant's messages.
            completion_ids: the tokens that were drawn, an ending EOS included, as TRL passes them along; without them
                the completions are tokenised and count as ended.
        """
        if completion_ids is None:
            ends = self.lm.eos_token_ids
            end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id in ends else sorted(ends)[:1]
            completion_ids = [[*self._tokens(_text(completion)), *end] for completion in completions]
        rows = [
            torch.tensor([*as_prompt(self.tokenizer, prompt).encode(self.tokenizer), *tokens])
            for prompt, tokens in zip(prompts, completion_ids, strict=True)
        ]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        values = [0.0] * len(rows)
        while order:
            count = max(1, BATCH_TOKENS // len(rows[order[0]]))
            places, order = order[:count], order[count:]
            for place, worth in zip(places, self._values([rows[place] for place in places]), strict=True):
                values[place] = worth
        return values

    @torch.inference_mode()
    def _values(self, rows: list[torch.Tensor]) -> list[float]:
        tokens = pad_sequence(rows, batch_first=True).to(self.lm.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.lm.device)
        output = self.value.train_values(self.lm, tokens, lengths)
        last = output[torch.arange(len(rows), device=output.device), lengths - 1]
        return self.value.heads.mean(last)[:, self.column].tolist()

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(turn["content"] for turn in completion)
