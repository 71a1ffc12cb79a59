"""Sampling the rollouts that values are trained on from the frozen model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.outputs import CompletionOutput
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.sampling.noise import fork_seed
from vas_engine.training.rewards import Reward, score
from vas_engine.training.rollouts import Header, Rollout, Rollouts, RolloutWriter, load_rollouts

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["CollectConfig", "collect"]


@dataclass(frozen=True)
class CollectConfig:
    """Settings of a collection; it samples the model's own distribution: temperature 1, nothing cut.

    Attributes:
        samples: responses per prompt.
        max_tokens: most tokens of a response.
        seed: of the whole collection; each response's own seed follows from it and the places of prompt and
            sample.
        shard_rows: responses per shard: what an interruption can lose.
        hidden_states: keep the final hidden states of prompt and response beside each shard.
    """

    samples: int = 64
    max_tokens: int = 128
    seed: int = 0
    shard_rows: int = 512
    hidden_states: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "shard_rows"):
            arguments.integer(name, getattr(self, name), 1)
        arguments.integer("seed", self.seed, 0, 2**64 - 1)


def collect(
    llm: LLM,
    prompts: Sequence[Any],
    rewards: Sequence[Reward],
    out: str | Path,
    config: CollectConfig | None = None,
    *,
    use_tqdm: bool = True,
) -> Rollouts:
    """Sample responses to every prompt, score them, and write them to a folder of shards.

    A folder that an earlier call with the same arguments began is finished, and ends up with the same rows as
    one that was never interrupted. A reward sees the response's text alone, unless it was loaded with
    ``whole_text``.

    Args:
        prompts: texts, token ids or conversations (lists of messages, for the model's chat template).
        rewards: of different names.
        out: the folder.

    Returns:
        All rollouts of the folder.

    Raises:
        InvalidArgumentError: a prompt that leaves no room for a response, or a folder of other rollouts.
        TrainingDataError: a reward fails; finished shards are kept.
        KeyboardInterrupt: likewise.
    """
    config = config or CollectConfig()
    job = _Job(llm, [_encode(llm, prompt, index) for index, prompt in enumerate(prompts)], list(rewards), config)
    writer = RolloutWriter(out, job.header())
    with tqdm(total=job.rows, desc="collect", unit="response", disable=not use_tqdm) as bar:
        for shard, start in enumerate(range(0, job.rows, config.shard_rows)):
            rows = range(start, min(start + config.shard_rows, job.rows))
            if not writer.has(shard):
                completions = job.sample(rows)
                rollouts = job.score(rows, completions)
                states = [c.hidden_states for c in completions] if config.hidden_states else None
                writer.write(shard, rollouts, states)
                bar.set_postfix(job.summary(rollouts), refresh=False)
            bar.update(len(rows))
    return load_rollouts(out)


class _Job:
    """Rows of a collection, prompt by prompt: row r is sample r % samples of prompt r // samples."""

    def __init__(
        self, llm: LLM, prompts: list[tuple[str, list[int]]], rewards: list[Reward], config: CollectConfig
    ) -> None:
        if not prompts:
            raise InvalidArgumentError("prompts", prompts, "give at least one")
        if not rewards:
            raise InvalidArgumentError("rewards", rewards, "give at least one")
        self.llm, self.prompts, self.rewards, self.config = llm, prompts, rewards, config
        self.rows = len(prompts) * config.samples

    def header(self) -> Header:
        digest = hashlib.sha256(json.dumps([ids for _, ids in self.prompts]).encode()).hexdigest()
        settings = asdict(self.config) | {
            "temperature": 1.0,
            "prompts": len(self.prompts),
            "prompts_sha256": digest,
        }
        rewards = {
            reward.name: {"spec": reward.spec, "bounds": list(reward.bounds) if reward.bounds else None}
            for reward in self.rewards
        }
        return Header(self.llm.lm.fingerprint(self.llm.tokenizer), settings, rewards)

    def seed(self, row: int) -> int:
        prompt, sample = divmod(row, self.config.samples)
        return fork_seed(fork_seed(self.config.seed, prompt + 1), sample + 1)

    def sample(self, rows: range) -> list[CompletionOutput]:
        prompts = [self._prompt(row)[1] for row in rows]
        params = [
            SamplingParams(
                temperature=1.0,
                max_tokens=self.config.max_tokens,
                seed=self.seed(row),
                return_hidden_states=self.config.hidden_states,
            )
            for row in rows
        ]
        return [output.outputs[0] for output in self.llm.generate(prompts, params, use_tqdm=False)]

    def score(self, rows: range, completions: list[CompletionOutput]) -> list[Rollout]:
        prompts = [self._prompt(row)[0] for row in rows]
        texts = [completion.text for completion in completions]
        try:
            columns = {reward.name: score(reward, prompts, texts) for reward in self.rewards}
        except TrainingDataError as error:
            error.add_note(f"counted within the shard of responses {rows.start} to {rows.stop - 1}")
            raise
        return [
            Rollout(
                prompt=prompts[place],
                response=completion.text,
                prompt_ids=self._prompt(row)[1],
                response_ids=list(completion.token_ids),
                finish_reason=str(completion.finish_reason),
                seed=self.seed(row),
                prompt_index=row // self.config.samples,
                rewards={name: column[place] for name, column in columns.items()},
            )
            for place, (row, completion) in enumerate(zip(rows, completions, strict=True))
        ]

    def summary(self, rollouts: list[Rollout]) -> dict[str, str]:
        means = {
            reward.name: sum(rollout.rewards[reward.name] for rollout in rollouts) / len(rollouts)
            for reward in self.rewards
        }
        return {name: f"{mean:.3f}" for name, mean in means.items()}

    def _prompt(self, row: int) -> tuple[str, list[int]]:
        return self.prompts[row // self.config.samples]


def _encode(llm: LLM, prompt: Any, index: int) -> tuple[str, list[int]]:
    """Text and ids of a prompt, checked before anything is sampled."""
    where = f"prompts[{index}]"
    chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    read: Prompt = llm.render_chat(prompt) if chat else read_prompts([prompt])[0]
    ids = read.encode(llm.tokenizer)
    if not 0 < len(ids) < llm.max_model_len:
        fix = f"give 1 to {llm.max_model_len - 1} tokens, to leave room for a response"
        raise InvalidArgumentError(where, f"[{len(ids)} tokens]", fix)
    text = read.text
    if text is None:
        text = llm.tokenizer.decode(ids, skip_special_tokens=True) if llm.tokenizer else ""
    return text, ids
