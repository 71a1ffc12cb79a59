"""Sampling the rollouts that values are trained on: from the frozen model, or from a policy that values guide."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from vas_engine import arguments
from vas_engine.engine.detokenizer import Detokenizer, Tokenizer
from vas_engine.engine.output import OutputFront
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.interrupt import deferred_interrupt
from vas_engine.model.fingerprint import weights_hash
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import GUIDANCE, SamplingParams
from vas_engine.sampling.noise import fork_seed
from vas_engine.tokenizer import as_prompt
from vas_engine.training.rewards import Reward, RewardError, score_all
from vas_engine.training.rewards.score import BATCH_SIZE
from vas_engine.training.rollouts import Header, Rollout, Rollouts, RolloutWriter, load_rollouts

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["CollectConfig", "Job", "Shard", "collect", "encode_prompt", "sample_shards"]

REQUEST_SAMPLES = 16
"""Responses of one request, which share the prompt's pages and its one forward; the others find them cached."""
SHARDS_WAITING = 2
"""Shards that may wait for their rewards before sampling waits for them."""


_numbers = count()


@dataclass(frozen=True)
class CollectConfig:
    """Settings of a collection; it samples at temperature 1 with nothing cut.

    Attributes:
        samples: responses per prompt.
        max_tokens: most tokens of a response.
        seed: of the whole collection; each response's own seed follows from it and the places of prompt and
            sample.
        shard_rows: responses per shard, what an interruption can lose; rounded up to whole requests of up to
            16 responses to one prompt.
        hidden_states: keep the final hidden states of prompt and response beside each shard.
        partial_rewards: score the text of each response's first N, 2 N, ... tokens as well, so that training knows
            when a reward was earned; 0 scores whole responses alone.
        values: {name of a value of the LLM: weight} to sample from the guided policy; empty samples the frozen
            model's own distribution.
        num_candidates, tail, baseline, tilt, advantage_clip: of the guided policy, as in SamplingParams.
    """

    samples: int = 64
    max_tokens: int = 128
    seed: int = 0
    shard_rows: int = 512
    hidden_states: bool = False
    partial_rewards: int = 0
    values: Mapping[str, float] = field(default_factory=dict)
    num_candidates: int = 20
    tail: str = "keep"
    baseline: str = "state"
    tilt: str = "mean"
    advantage_clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "shard_rows"):
            arguments.integer(name, getattr(self, name), 1)
        arguments.integer("seed", self.seed, 0, 2**64 - 1)
        arguments.integer("partial_rewards", self.partial_rewards, 0)
        arguments.boolean("hidden_states", self.hidden_states)
        self.params()

    def params(self) -> SamplingParams:
        """How every response is drawn, the number of samples and the seed left open."""
        return SamplingParams(
            temperature=1.0,
            max_tokens=self.max_tokens,
            return_hidden_states=self.hidden_states,
            logprobs=0 if self.values else None,
            **self._guidance(),
        )

    def settings(self) -> dict[str, Any]:
        """What a header says of the sampling, the policy left out."""
        return {name: value for name, value in asdict(self).items() if name not in self._guidance()}

    def policy(self, llm: LLM) -> dict[str, Any]:
        """What a header says of the guided policy; empty without one."""
        if not self.values:
            return {}
        networks = {name: weights_hash(scorer) for name, scorer in sorted(llm.values.items())}  # type: ignore[arg-type]
        return self._guidance() | {"networks": networks}

    def _guidance(self) -> dict[str, Any]:
        return {"values": dict(self.values)} | {name: getattr(self, name) for name in GUIDANCE}


def collect(
    llm: LLM,
    prompts: Sequence[Any],
    rewards: Sequence[Reward],
    out: str | Path,
    config: CollectConfig | None = None,
    *,
    reward_batch_size: int = BATCH_SIZE,
    use_tqdm: bool = True,
) -> Rollouts:
    """Sample responses to every prompt, score them, and write them to a folder of shards.

    A folder that an earlier call with the same arguments began is finished, and ends up with the same rows as
    one that was never interrupted. A reward sees the response's text alone, unless it was loaded with
    ``whole_text``; where the token limit cut it, the text as it was cut.

    The engine's batch stays full from the first shard to the last. A shard whose responses are all there is
    scored and written on another thread meanwhile.

    Args:
        prompts: texts, token ids or conversations (lists of messages, for the model's chat template: an
            assistant's turn is opened, or the last one continued if it is the assistant's).
        rewards: of different names.
        out: the folder.
        reward_batch_size: most responses of one call of a reward.

    Returns:
        All rollouts of the folder.

    Raises:
        InvalidArgumentError: a prompt that leaves no room for a response, or a folder of other rollouts.
        TrainingDataError: a reward fails; finished shards are kept.
        KeyboardInterrupt: likewise.
    """
    config = config or CollectConfig()
    job = Job(llm, [encode_prompt(llm, prompt, index) for index, prompt in enumerate(prompts)], list(rewards), config)
    writer = RolloutWriter(out, job.header())
    missing = [shard for shard in job.shards() if not writer.has(shard.number)]
    left = sum(shard.rows for shard in missing)
    finisher = _Finisher(job, writer, reward_batch_size)
    try:
        with (
            _Progress(llm, job.rows, job.rows - left, not use_tqdm) as progress,
            closing(sample_shards(llm, job, missing)) as steps,
        ):
            for responses, shards in steps:
                progress.show(responses, finisher.means)
                for shard, outputs in shards:
                    finisher.add(shard, outputs)
                finisher.wait(SHARDS_WAITING)
            finisher.wait()
    finally:
        finisher.stop()
    return load_rollouts(out)


@dataclass(frozen=True)
class _Request:
    """Responses that are sampled together: ``count`` of one prompt, from ``first`` on."""

    prompt: int
    first: int
    count: int


@dataclass(frozen=True)
class Shard:
    """The requests whose responses make one file."""

    number: int
    requests: list[_Request]

    @property
    def rows(self) -> int:
        return sum(request.count for request in self.requests)


class Job:
    """What is to be sampled and how it becomes rollouts."""

    def __init__(
        self, llm: LLM, prompts: list[tuple[str, list[int]]], rewards: list[Reward], config: CollectConfig
    ) -> None:
        if not prompts:
            raise InvalidArgumentError("prompts", prompts, "give at least one")
        if not rewards:
            raise InvalidArgumentError("rewards", rewards, "give at least one")
        if config.partial_rewards and llm.tokenizer is None:
            fix = "rewards read text: load the model with its tokenizer, or leave this out"
            raise InvalidArgumentError("partial_rewards", config.partial_rewards, fix)
        self.llm, self.prompts, self.rewards, self.config = llm, prompts, rewards, config
        self.params = config.params()
        self.params.check(vocab_size=llm.lm.vocab_size, value_names=llm.value_names)
        self.rows = len(prompts) * config.samples

    def header(self) -> Header:
        digest = hashlib.sha256(json.dumps([ids for _, ids in self.prompts]).encode()).hexdigest()
        settings = self.config.settings() | {
            "temperature": 1.0,
            "prompts": len(self.prompts),
            "prompts_sha256": digest,
            "request_samples": REQUEST_SAMPLES,
        }
        rewards = {
            reward.name: {"spec": reward.spec, "bounds": list(reward.bounds) if reward.bounds else None}
            for reward in self.rewards
        }
        fingerprint = self.llm.lm.fingerprint(self.llm.tokenizer)
        return Header(fingerprint, settings, rewards, self.config.policy(self.llm))

    def shards(self) -> Iterator[Shard]:
        """All of them, prompt by prompt."""
        number, requests, rows = 0, [], 0
        for prompt in range(len(self.prompts)):
            for first in range(0, self.config.samples, REQUEST_SAMPLES):
                samples = min(REQUEST_SAMPLES, self.config.samples - first)
                requests.append(_Request(prompt, first, samples))
                rows += samples
                if rows >= self.config.shard_rows:
                    yield Shard(number, requests)
                    number, requests, rows = number + 1, [], 0
        if requests:
            yield Shard(number, requests)

    def sampling(self, request: _Request) -> SamplingParams:
        """Its responses depend on the collection's seed and their places alone."""
        seed = fork_seed(fork_seed(self.config.seed, request.prompt + 1), request.first // REQUEST_SAMPLES + 1)
        return self.params.replace(n=request.count, seed=seed)

    def finish(self, shard: Shard, outputs: list[RequestOutput], batch_size: int, before_batch: Any) -> list[Rollout]:
        """Score the shard's responses."""
        rows = [
            (request.prompt, request.first + completion.index, completion)
            for request, output in zip(shard.requests, outputs, strict=True)
            for completion in output.outputs
        ]
        texts = [completion.text for _, _, completion in rows]
        owners = list(range(len(rows)))
        for place, (prompt, _, completion) in enumerate(rows):
            parts = self._parts(self.prompts[prompt][1], completion.token_ids)
            texts += parts
            owners += [place] * len(parts)
        prompts = [self.prompts[rows[place][0]][0] for place in owners]
        try:
            columns = score_all(self.rewards, prompts, texts, batch_size=batch_size, before_batch=before_batch)
        except TrainingDataError as error:
            where = f"shard {shard.number} is not written, finished ones are kept"
            if isinstance(error, RewardError) and error.place is not None:
                prompt, sample, _ = rows[owners[error.place]]
                part = "" if error.place < len(rows) else "the beginning of "
                where = (
                    f"response {owners[error.place]} of its shard is {part}sample {sample} of prompt {prompt}; {where}"
                )
            error.add_note(where)
            raise
        partial: list[dict[str, list[float]]] = [{name: [] for name in columns} for _ in rows]
        for text, owner in enumerate(owners[len(rows) :], len(rows)):
            for name, column in columns.items():
                partial[owner][name].append(column[text])
        return [
            Rollout(
                prompt=prompts[place],
                response=completion.text,
                prompt_ids=self.prompts[prompt][1],
                response_ids=list(completion.token_ids),
                finish_reason=str(completion.finish_reason),
                seed=int(completion.seed or 0),
                prompt_index=prompt,
                rewards={name: column[place] for name, column in columns.items()},
                partial_rewards=partial[place] if self.config.partial_rewards else None,
                **_log_ratios(completion),
            )
            for place, (prompt, _, completion) in enumerate(rows)
        ]

    def _parts(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
        """The texts whose rewards are partial ones."""
        every = self.config.partial_rewards
        if not every:
            return []
        detokenizer, text, found = Detokenizer(cast(Tokenizer, self.llm.tokenizer), prompt_ids), "", []
        for tokens, token in enumerate(token_ids[:-1], 1):
            text += detokenizer.push(token)
            if tokens % every == 0:
                found.append(text)
        return found


def _log_ratios(completion: CompletionOutput) -> dict[str, Any]:
    """log π - log π0 of the whole response and of its tokens; nothing where no values guided it."""
    if completion.logprobs is None:
        return {}
    entries = [position[token] for token, position in zip(completion.token_ids, completion.logprobs, strict=True)]
    ratios = [entry.tilted_logprob - entry.logprob for entry in entries if entry.tilted_logprob is not None]
    return {"log_ratio": math.fsum(ratios), "log_ratios": ratios}


def sample_shards(
    llm: LLM, job: Job, shards: Sequence[Shard]
) -> Generator[tuple[int, list[tuple[Shard, list[RequestOutput]]]], None, None]:
    """Run shards through the engine, one flowing into the next.

    Yields:
        After each step, how many responses it finished and the shards whose responses are now all there.
    """
    front = OutputFront(llm.engine, llm.tokenizer)
    coming = ((shard, request) for shard in shards for request in shard.requests)
    outputs: dict[int, list[RequestOutput]] = {shard.number: [] for shard in shards}
    open_requests = {shard.number: len(shard.requests) for shard in shards}
    running: dict[str, tuple[Shard, int]] = {}  # and how many of its responses are finished
    unfinished = 0
    try:
        while True:
            # As many again as there are seats: one that falls free is taken in the next step.
            while unfinished < 2 * llm.engine.scheduler.max_num_seqs and (entry := next(coming, None)):
                shard, request = entry
                name = f"collect-{next(_numbers)}"
                with deferred_interrupt():
                    output = front.add(name, job.prompts[request.prompt][1], job.sampling(request))
                outputs[shard.number].append(output)
                running[name] = shard, 0
                unfinished += request.count
            if not running:
                return
            with deferred_interrupt():
                touched = front.step()
            before = unfinished
            whole = []
            for output in touched:
                if output.error is not None:
                    raise output.error
                shard, counted = running[output.request_id]
                finished = sum(completion.finished for completion in output.outputs)
                unfinished -= finished - counted
                running[output.request_id] = shard, finished
                if finished == len(output.outputs):
                    del running[output.request_id]
                    open_requests[shard.number] -= 1
                    if open_requests[shard.number] == 0:
                        whole.append((shard, outputs.pop(shard.number)))
            yield before - unfinished, whole
    finally:
        front.clear()


class _Finisher:
    """Scores shards and writes them, on a thread of its own."""

    def __init__(self, job: Job, writer: RolloutWriter, batch_size: int) -> None:
        self._job, self._writer, self._batch_size = job, writer, batch_size
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rewards")
        self._pending: deque[Future[None]] = deque()
        self._writing = threading.Lock()
        self._stopped = False
        self.means: dict[str, float] = {}

    def add(self, shard: Shard, outputs: list[RequestOutput]) -> None:
        """Take a shard whose responses are all there."""
        self._pending.append(self._pool.submit(self._finish, shard, outputs))

    def wait(self, most: int = 0) -> None:
        """Wait until at most so many shards are left.

        Raises:
            Exception: what scoring or writing one of the others raised.
        """
        while self._pending and (len(self._pending) > most or self._pending[0].done()):
            self._pending.popleft().result()

    def stop(self) -> None:
        """Nothing is written any more; a write at work is waited for, a reward at work is left behind."""
        with self._writing:
            self._stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _finish(self, shard: Shard, outputs: list[RequestOutput]) -> None:
        rollouts = self._job.finish(shard, outputs, self._batch_size, self._go_on)
        hidden = self._job.config.hidden_states
        states = [completion.hidden_states for output in outputs for completion in output.outputs] if hidden else None
        with self._writing:
            self._go_on()
            self._writer.write(shard.number, rollouts, states)
        names = self._writer.header.rewards
        self.means = {name: sum(row.rewards[name] for row in rollouts) / len(rollouts) for name in names}

    def _go_on(self) -> None:
        if self._stopped:
            raise _Stopped


class _Stopped(Exception):
    """Ends the thread's work; nobody sees it."""


class _Progress:
    """A bar that moves with every finished response."""

    def __init__(self, llm: LLM, rows: int, done: int, disable: bool) -> None:
        self._stats, self._tokens_before = llm.engine.stats, llm.engine.stats.tokens
        self._bar = tqdm(total=rows, initial=done, desc="collect", unit="response", disable=disable)

    def show(self, responses: int, means: Mapping[str, float]) -> None:
        if self._bar.disable:
            return
        tokens, seconds = self._stats.tokens - self._tokens_before, max(self._bar.format_dict["elapsed"], 1e-9)
        numbers = {"tokens/s": f"{tokens / seconds:.0f}"} | {name: f"{mean:.3f}" for name, mean in means.items()}
        self._bar.set_postfix(numbers, refresh=False)
        self._bar.update(responses)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def encode_prompt(llm: LLM, prompt: Any, index: int) -> tuple[str, list[int]]:
    """Text and ids of a prompt, checked before anything is sampled."""
    where = f"prompts[{index}]"
    read = as_prompt(llm.tokenizer, prompt, where)
    ids = read.encode(llm.tokenizer)
    if not 0 < len(ids) < llm.max_model_len:
        fix = f"give 1 to {llm.max_model_len - 1} tokens, to leave room for a response"
        raise InvalidArgumentError(where, f"[{len(ids)} tokens]", fix)
    text = read.text
    if text is None:
        text = llm.tokenizer.decode(ids, skip_special_tokens=True) if llm.tokenizer else ""
    return text, ids
