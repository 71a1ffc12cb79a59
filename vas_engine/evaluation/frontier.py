"""Reward against divergence from the base: guided decoding over weights, beside best-of-n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vas_engine.evaluation.best_of_n import best_of_n, best_of_n_kl_bound
from vas_engine.evaluation.estimate import Estimate
from vas_engine.evaluation.measure import measure
from vas_engine.params import SamplingParams
from vas_engine.training.rewards import Reward

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["FrontierPoint", "frontier"]


@dataclass(frozen=True)
class FrontierPoint:
    """One way to decode.

    Attributes:
        label: "base", a label of the caller's, or "best of n".
        reward: mean and interval.
        kl: nats per response: a measured mean, or for best-of-n a number that the divergence is known not to
            exceed.
        kl_is_upper_bound: which of the two.
        tokens_per_second: of responses that are kept (best-of-n discards n - 1 of n; the rewards' own time is
            left out).
        model_rows_per_token: rows of the base model per token that is kept.
    """

    label: str
    reward: Estimate
    kl: Estimate | float
    kl_is_upper_bound: bool
    tokens_per_second: float
    model_rows_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def frontier(
    llm: LLM,
    prompts: Sequence[str],
    reward: Reward,
    guided: Mapping[str, SamplingParams],
    *,
    best_of: Sequence[int] = (),
    base: SamplingParams | None = None,
    samples: int = 16,
    pool: int = 64,
    seed: int = 0,
    use_tqdm: bool = False,
) -> list[FrontierPoint]:
    """Measure the base, guided decoding in several settings, and best-of-n from a pool of the base's samples.

    Args:
        guided: label -> settings with values.
        best_of: sizes n, each at most ``pool``.
        base: settings without values; default: those of a fresh SamplingParams with the guided ones'
            max_tokens.
        samples: responses per prompt and guided setting.
        pool: responses per prompt of the base.
    """
    if base is None:
        base = SamplingParams(max_tokens=next((p.max_tokens for p in guided.values()), None))
    plain = measure(llm, prompts, base, [reward], samples=pool, seed=seed, kl=False, use_tqdm=use_tqdm)
    speed, rows = plain.tokens_per_second, plain.model_rows_per_token
    points = [FrontierPoint("base", plain.rewards[reward.name], 0.0, False, speed, rows)]
    for label, params in guided.items():
        found = measure(llm, prompts, params, [reward], samples=samples, seed=seed, use_tqdm=use_tqdm)
        assert found.kl is not None
        points.append(
            FrontierPoint(
                label,
                found.rewards[reward.name],
                found.kl,
                False,
                found.tokens_per_second,
                found.model_rows_per_token,
            )
        )
    for n in best_of:
        estimate = best_of_n(plain.pools[reward.name], n)
        bound = best_of_n_kl_bound(n)
        points.append(FrontierPoint(f"best of {n}", estimate, bound, True, speed / n, rows * n))
    return points
