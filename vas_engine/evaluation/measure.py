"""What decoding with some settings yields: responses, their rewards and divergence from the base, what they cost."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from vas_engine.engine.detokenizer import Detokenizer
from vas_engine.evaluation.dense import log_probs
from vas_engine.evaluation.estimate import Estimate, estimate_mean
from vas_engine.evaluation.flops import decoding_flops
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import MAX_COMPLETIONS, SamplingParams
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.sampling.noise import fork_seed
from vas_engine.training.rewards import Reward, score
from vas_engine.values.scorer import Scorer

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = [
    "Measurement",
    "Meter",
    "Response",
    "Run",
    "by_prompt",
    "distinct",
    "measure",
    "networks_of",
    "run",
    "spelled",
    "summarise",
]

T = TypeVar("T")

REQUEST_SAMPLES = 128
"""Most samples of one request; larger pools are several requests, whose prompt the prefix cache holds."""


PLAIN = SamplingParams()
SHIFTS = (
    "top_p", "top_k", "min_p", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
)  # fmt: skip
"""Settings that leave the model's own distribution alone as long as they are PLAIN's."""


@dataclass(frozen=True)
class Response:
    """One response.

    Attributes:
        prompt: its prompt's place in the list.
        token_ids: those that were drawn, an ending EOS included.
        log_prob: of all of them under the base model, nats.
        kl: a number whose mean over responses is KL(policy || base) of whole responses, nats, or is known not to be
            below it; None where it was not asked for.
    """

    prompt: int
    text: str
    token_ids: list[int]
    finish_reason: str
    log_prob: float
    kl: float | None = None


@dataclass
class Run:
    """Responses of one method, as many to every prompt, and what they cost.

    Attributes:
        responses: prompt by prompt.
        seconds: wall time of generating, rewards not counted.
        tokens: drawn, those of responses that were thrown away included.
        model_rows: rows the base model processed, prompts included. value_rows: rows the value networks scored.
        flops: of base model and networks, see `flops`.
        kl_kind: "exact" (sums of exact divergences of the steps), "log-ratio" (unbiased, noisier) or "bound".
    """

    responses: list[Response]
    seconds: float
    tokens: int
    model_rows: float
    value_rows: float
    flops: float
    kl_kind: str | None = None

    @property
    def delivered(self) -> int:
        """Tokens of the responses."""
        return sum(len(response.token_ids) for response in self.responses)


@dataclass(frozen=True)
class Measurement:
    """What a run shows.

    Attributes:
        rewards: mean of each reward with its interval, which counts the samples of a prompt as a group.
        pools: of each reward, every prompt's own samples; what best-of-n is estimated from.
        kl: mean over samples; of kind "exact" or "log-ratio" an unbiased estimate of the divergence of whole
            responses, nats. None when it was not asked for.
        perplexity: of the responses under the base model: exp of the mean of -log p over all tokens.
        distinct: mean share of different ones among a response's 1-, 2- and 3-grams of tokens.
        tokens: of the responses. seconds: wall time of generating, rewards not counted.
        model_rows_per_token, value_rows_per_token, flops_per_token: for each of these tokens, prompts included.
        responses: of every prompt.
    """

    rewards: dict[str, Estimate]
    pools: dict[str, list[list[float]]]
    kl: Estimate | None
    kl_kind: str | None
    perplexity: float
    distinct: tuple[float, ...]
    tokens: int
    seconds: float
    model_rows_per_token: float
    value_rows_per_token: float
    flops_per_token: float
    responses: list[list[str]] = field(repr=False)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def measure(
    llm: LLM,
    prompts: Sequence[str | Prompt],
    params: SamplingParams,
    rewards: Sequence[Reward],
    *,
    samples: int = 16,
    seed: int = 0,
    kl: bool = True,
    use_tqdm: bool = False,
) -> Measurement:
    """Sample responses by one setting and measure them; arguments as for `run`."""
    [found] = run(llm, prompts, [params], samples=samples, seed=seed, kl=kl, use_tqdm=use_tqdm)
    return summarise(found, prompts, rewards)


# -- sampling ------------------------------------------------------------------------------------------------------


def run(
    llm: LLM,
    prompts: Sequence[str | Prompt],
    settings: Sequence[SamplingParams],
    *,
    samples: int = 16,
    seed: int = 0,
    kl: bool = True,
    use_tqdm: bool = False,
) -> list[Run]:
    """Sample responses by several settings in one mixed batch.

    Time and rows of the base model are the batch's, split by tokens: for the speed of one setting run it alone.

    Args:
        prompts: texts, or prompts as `LLM.render_chat` and `as_prompt` give them.
        settings: how to decode; ``n`` and ``seed`` are set here, so that runs of one ``seed`` share their noise.
        samples: responses per prompt and setting.
        kl: measure the divergence too, which keeps pruning from skipping candidates: for a speed, leave it out.
    """
    sizes = [min(REQUEST_SAMPLES, samples - start) for start in range(0, samples, REQUEST_SAMPLES)]
    requests: list[str | Prompt] = []
    params: list[SamplingParams] = []
    for setting in settings:
        for index, prompt in enumerate(prompts):
            own = fork_seed(seed, index + 1)
            # Numbers below are those that a request's own samples are forked with.
            for part, size in enumerate(sizes):
                requests.append(prompt)
                asked = {"report_kl": kl} if setting.guided else {}
                forked = fork_seed(own, MAX_COMPLETIONS + part) if part else own
                params.append(setting.replace(n=size, seed=forked, **asked))
    meter = Meter(llm)
    outputs = llm.generate(requests, params, use_tqdm=use_tqdm)
    seconds, rows, tokens = meter.seconds, meter.model_rows, meter.tokens
    runs = []
    each = len(prompts) * len(sizes)
    for place, setting in enumerate(settings):
        own_outputs = outputs[place * each : (place + 1) * each]
        share = sum(output.metrics.generated_tokens for output in own_outputs) / max(tokens, 1)
        runs.append(_run(llm, setting, own_outputs, len(sizes), kl, seconds * share, rows * share))
    return runs


def _run(
    llm: LLM, params: SamplingParams, outputs: list[RequestOutput], parts: int, kl: bool, seconds: float, rows: float
) -> Run:
    tokens = sum(output.metrics.generated_tokens for output in outputs)
    value_rows = sum(output.metrics.value_evaluations for output in outputs)
    flops = decoding_flops(
        llm.lm,
        networks_of(llm, params.values or ()),
        model_rows=rows,
        tokens=tokens,
        value_rows=value_rows,
        prompt_rows=sum(len(output.prompt_token_ids) for output in outputs),
    )
    completions = [
        (place // parts, completion) for place, output in enumerate(outputs) for completion in output.outputs
    ]
    # What the engine calls base is after temperature, penalties and cuts; temperature 0 reads as 1 (see `choose`).
    raw = params.temperature in (0.0, 1.0) and all(getattr(params, name) == getattr(PLAIN, name) for name in SHIFTS)
    if raw:
        base = [completion.cumulative_logprob for _, completion in completions]
    else:
        ids = [outputs[place * parts].prompt_token_ids for place, _ in completions]
        base = log_probs(llm.lm, ids, [completion.token_ids for _, completion in completions])
    responses = [
        Response(
            place,
            completion.text,
            list(completion.token_ids),
            str(completion.finish_reason),
            log_prob,
            _divergence(params, completion, log_prob, raw) if kl else None,
        )
        for (place, completion), log_prob in zip(completions, base, strict=True)
    ]
    kind = ("exact" if raw else "log-ratio") if kl else None
    return Run(responses, seconds, tokens, rows, value_rows, flops, kind)


class Meter:
    """What an engine has spent since the meter was made."""

    def __init__(self, llm: LLM) -> None:
        self._stats = llm.engine.stats
        self._before = replace(self._stats)
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def tokens(self) -> int:
        return self._stats.tokens - self._before.tokens

    @property
    def model_rows(self) -> int:
        return self._stats.model_rows - self._before.model_rows

    @property
    def value_rows(self) -> int:
        return self._stats.value_rows - self._before.value_rows


def spelled(llm: LLM, prompt_ids: Sequence[int], token_ids: Sequence[int], finish_reason: str) -> str:
    """Text of a response that was put together from several requests, as the engine would have written it."""
    assert llm.tokenizer is not None
    detokenizer = Detokenizer(llm.tokenizer, prompt_ids)
    shown = token_ids[:-1] if finish_reason == "stop" else token_ids
    return "".join([*map(detokenizer.push, shown), detokenizer.flush()])


def _divergence(params: SamplingParams, completion: CompletionOutput, log_prob: float, raw: bool) -> float:
    """KL of one response: the sum of its steps' where the engine knows them, else its log-ratio."""
    if params.temperature == 0:
        return -log_prob  # a single response has all the probability
    if raw:
        return completion.kl if completion.kl is not None else 0.0
    tilted = completion.cumulative_tilted_logprob
    return (completion.cumulative_logprob if tilted is None else tilted) - log_prob


def networks_of(llm: LLM, names: Iterable[str]) -> list[Scorer]:
    """The loaded networks that give the values named."""
    asked = {llm.value_names.index(name) for name in names}
    return [n.scorer for n in llm.engine.guide.networks if asked & set(range(n.columns.start, n.columns.stop))]


# -- measuring -----------------------------------------------------------------------------------------------------


def summarise(run: Run, prompts: Sequence[str | Prompt], rewards: Sequence[Reward]) -> Measurement:
    """Score the responses of a run and average.

    Raises:
        TrainingDataError: a reward fails.
    """
    responses = run.responses
    asked = [prompt.text or "" for prompt in read_prompts(list(prompts))]
    owners = [asked[response.prompt] for response in responses]
    texts = [response.text for response in responses]
    groups = [response.prompt for response in responses]
    scores = {reward.name: score(reward, owners, texts) for reward in rewards}
    divergences = [response.kl for response in responses if response.kl is not None]
    grams = [distinct(response.token_ids) for response in responses]
    tokens = max(run.delivered, 1)
    return Measurement(
        rewards={name: _estimate(column, groups) for name, column in scores.items()},
        pools={name: by_prompt(column, groups) for name, column in scores.items()},
        kl=_estimate(divergences, groups) if run.kl_kind else None,
        kl_kind=run.kl_kind,
        perplexity=math.exp(-sum(response.log_prob for response in responses) / tokens),
        distinct=tuple(sum(column) / len(column) for column in zip(*grams, strict=True)),
        tokens=run.delivered,
        seconds=run.seconds,
        model_rows_per_token=run.model_rows / tokens,
        value_rows_per_token=run.value_rows / tokens,
        flops_per_token=run.flops / tokens,
        responses=by_prompt(texts, groups),
    )


def by_prompt(column: Sequence[T], groups: Sequence[int]) -> list[list[T]]:
    """A column of all responses as a list for each prompt."""
    found: dict[int, list[T]] = {}
    for group, entry in zip(groups, column, strict=True):
        found.setdefault(group, []).append(entry)
    return [found[group] for group in sorted(found)]


def distinct(token_ids: Sequence[int]) -> tuple[float, ...]:
    """Share of different ones among a response's 1-, 2- and 3-grams (after Li et al. 2016); 1 where it has none."""
    shares = []
    for n in (1, 2, 3):
        grams = list(zip(*(token_ids[i:] for i in range(n)), strict=False))
        shares.append(len(set(grams)) / len(grams) if grams else 1.0)
    return tuple(shares)


def _estimate(samples: list[float], groups: list[int]) -> Estimate:
    """With one prompt only, its samples are all there is to tell the spread from."""
    return estimate_mean(samples, groups if len(set(groups)) > 1 else None)
