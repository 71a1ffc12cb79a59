"""What decoding with some settings yields: reward, divergence from the base, speed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vas_engine.evaluation.estimate import Estimate, estimate_mean
from vas_engine.params import SamplingParams
from vas_engine.sampling.noise import fork_seed
from vas_engine.training.rewards import Reward, score

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True)
class Measurement:
    """What a set of samples shows.

    Attributes:
        rewards: mean of each reward with its interval, which counts the samples of a prompt as a group.
        pools: of each reward, every prompt's own samples; what best-of-n is estimated from.
        kl: mean over samples of the summed exact KL(pi || base) of their steps, nats: an unbiased estimate of
            the divergence of whole responses. None when it was not asked for.
        tokens: generated. seconds: wall time of generating, rewards not counted.
        model_rows_per_token: rows the base model processed for each token generated, prompts included.
        value_rows_per_token: rows the value networks scored for each.
        responses: of every prompt.
    """

    rewards: dict[str, Estimate]
    pools: dict[str, list[list[float]]]
    kl: Estimate | None
    tokens: int
    seconds: float
    model_rows_per_token: float
    value_rows_per_token: float
    responses: list[list[str]]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def measure(
    llm: LLM,
    prompts: Sequence[str],
    params: SamplingParams,
    rewards: Sequence[Reward],
    *,
    samples: int = 16,
    seed: int = 0,
    kl: bool = True,
    use_tqdm: bool = False,
) -> Measurement:
    """Sample responses and measure them.

    Args:
        prompts: texts.
        params: how to decode; ``n`` and ``seed`` are set here, so that runs of one ``seed`` share their
            noise.
        samples: responses per prompt.
        kl: measure the divergence too, which keeps pruning from skipping candidates: for a speed, leave it
            out.
    """
    settings = [
        params.replace(n=samples, seed=fork_seed(seed, index + 1), report_kl=kl) for index in range(len(prompts))
    ]
    before = (llm.engine.stats.tokens, llm.engine.stats.model_rows, llm.engine.stats.value_rows)
    start = time.perf_counter()
    outputs = llm.generate(list(prompts), settings, use_tqdm=use_tqdm)
    seconds = time.perf_counter() - start
    stats = llm.engine.stats
    tokens, model_rows, value_rows = (
        now - then for now, then in zip((stats.tokens, stats.model_rows, stats.value_rows), before, strict=True)
    )
    responses = [[completion.text for completion in output.outputs] for output in outputs]
    groups = [index for index, texts in enumerate(responses) for _ in texts]
    pools = {reward.name: _score(reward, prompts, responses) for reward in rewards}
    divergences: list[Any] = [completion.kl for output in outputs for completion in output.outputs]
    return Measurement(
        rewards={name: _estimate([number for part in pool for number in part], groups) for name, pool in pools.items()},
        pools=pools,
        kl=_estimate(divergences, groups) if kl else None,
        tokens=tokens,
        seconds=seconds,
        model_rows_per_token=model_rows / max(tokens, 1),
        value_rows_per_token=value_rows / max(tokens, 1),
        responses=responses,
    )


def _score(reward: Reward, prompts: Sequence[str], responses: list[list[str]]) -> list[list[float]]:
    flat = score(
        reward,
        [prompt for prompt, texts in zip(prompts, responses, strict=True) for _ in texts],
        [text for texts in responses for text in texts],
    )
    remaining = iter(flat)
    return [[next(remaining) for _ in texts] for texts in responses]


def _estimate(samples: list[float], groups: list[int]) -> Estimate:
    """With one prompt only, its samples are all there is to tell the spread from."""
    return estimate_mean(samples, groups if len(set(groups)) > 1 else None)
