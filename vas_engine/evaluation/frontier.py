"""A contest of ways to decode: reward against divergence from the base, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, nearest
from vas_engine.evaluation.best_of_n import best_of_n_kl_bound, selection_weights
from vas_engine.evaluation.estimate import Estimate, estimate_mean
from vas_engine.evaluation.measure import Measurement, Run, by_prompt, distinct, run, summarise
from vas_engine.evaluation.optimum import Optimum
from vas_engine.evaluation.pool import pick, pool_of
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt
from vas_engine.training.rewards import Reward
from vas_engine.training.rollouts import Rollouts

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["Contest", "Point", "Setting", "plain_json"]

Objective = Mapping[str, float]
"""Reward -> its weight in what a method is after: the sum over rewards is to be high."""


@dataclass(frozen=True)
class Setting:
    """A way to decode that is a setting of the engine.

    Attributes:
        label: what tables show. method: settings of one method and value are one curve.
        params: with the weights of values, per unit of reward.
        objective: the rewards it is after.
        strength: nats per standard deviation of the objective's reward; what a curve is swept along.
    """

    label: str
    method: str
    params: SamplingParams
    objective: Objective
    strength: float | None = None


@dataclass(frozen=True)
class Point:
    """One way to decode, measured.

    Attributes:
        label, method, strength, objective: see `Setting`.
        rewards: mean of each reward and its interval.
        score: the same of the objective's weighted sum.
        kl: nats per response, with interval where it was measured.
        kl_kind: "exact", "log-ratio" (see `Response`) or "bound" (at most this).
        optimum_kl: nats the exact optimum spends for the same score; NaN beyond what the pool shows.
        efficiency: that over `kl`.
        perplexity: of the responses under the base model. distinct: share of different 1-, 2-, 3-grams of tokens.
        response_tokens: mean length.
        flops_per_token: model FLOPs for each delivered token. tokens_per_second: delivered tokens.
        model_rows_per_token, value_rows_per_token: rows of base model and value networks per delivered token.
        training: what was spent before the first token: seconds, rollouts.
        settings: what tells it from plain sampling.
        responses: how many it was measured on, for each prompt.
    """

    label: str
    method: str
    strength: float | None
    objective: dict[str, float]
    rewards: dict[str, Estimate]
    score: Estimate
    kl: Estimate
    kl_kind: str
    optimum_kl: float
    efficiency: Estimate
    perplexity: float
    distinct: tuple[float, ...]
    response_tokens: float
    flops_per_token: float
    tokens_per_second: float
    model_rows_per_token: float
    value_rows_per_token: float
    responses: float
    training: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_token(self) -> float:
        return 1.0 / self.tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; a number that is not known is None."""
        return plain_json(asdict(self))


class Contest:
    """Ways to decode, on the same prompts and the same noise, beside a pool of plain samples.

    The pool is what best-of-n, the optimum and the rewards' scales are estimated from.

    Args:
        llm: with the values that settings name.
        prompts: texts, or prompts as `LLM.render_chat` and `as_prompt` give them.
        rewards: of different names.
        base: plain decoding: max_tokens and whatever all methods share.
        samples: responses per prompt of every method but the base.
        pool: plain responses per prompt.
        rollouts: of these prompts, to be the pool; then ``pool`` fresh responses tell what plain sampling costs.
        seed: methods measured with one seed share their noise.
        use_tqdm: progress bars on stderr.
    """

    def __init__(
        self,
        llm: LLM,
        prompts: Sequence[str | Prompt],
        rewards: Sequence[Reward],
        base: SamplingParams,
        *,
        samples: int = 16,
        pool: int = 128,
        rollouts: Rollouts | None = None,
        seed: int = 0,
        use_tqdm: bool = False,
    ) -> None:
        if not prompts:
            raise InvalidArgumentError("prompts", [], "give at least one")
        if not rewards:
            raise InvalidArgumentError("rewards", [], "give at least one")
        for name, count in (("samples", samples), ("pool", pool)):
            arguments.integer(name, count, 1)
        self.llm, self.prompts, self.rewards, self.params = llm, list(prompts), list(rewards), base
        self.samples, self.seed, self.use_tqdm = samples, seed, use_tqdm
        self.runs: dict[str, Run] = {}
        # Whether rollouts can be the pool is known before anything is sampled.
        picked = None if rollouts is None else pick(llm, rollouts, prompts, base)
        [plain] = run(llm, prompts, [base], samples=pool, seed=seed, use_tqdm=use_tqdm)
        if picked is not None:
            plain = pool_of(llm, picked, plain)
        self.runs["base"] = plain
        self.plain: Measurement = summarise(plain, prompts, rewards)
        self.found = {"base": self.plain}
        self.scales = {name: _deviation(pools) for name, pools in self.plain.pools.items()}
        self._optima: dict[tuple, Optimum] = {}

    @property
    def reward_names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    def optimum(self, objective: Objective) -> Optimum:
        """The exact optimum of an objective, from the pool."""
        key = tuple(sorted(objective.items()))
        if key not in self._optima:
            self._optima[key] = Optimum(self._combine(self.plain.pools, objective))
        return self._optima[key]

    def base(self, objective: Objective) -> Point:
        """Plain sampling."""
        return self._point(Setting("base", "base", self.params, objective), self.plain)

    def measure(self, settings: Sequence[Setting], together: bool = False) -> list[Point]:
        """Measure settings of the engine.

        Args:
            together: all of them in one mixed batch; else one after the other, each at its own speed.
        """
        batches = [list(settings)] if together else [[setting] for setting in settings]
        points = []
        with tqdm(total=len(settings), desc="evaluate", unit="setting", disable=not self.use_tqdm) as bar:
            for batch in batches:
                bar.set_postfix_str(batch[0].label if len(batch) == 1 else "one mixed batch")
                runs = run(self.llm, self.prompts, [s.params for s in batch], samples=self.samples, seed=self.seed)
                points += [self.add(setting, found) for setting, found in zip(batch, runs, strict=True)]
                bar.update(len(batch))
        return points

    def add(self, setting: Setting, found: Run) -> Point:
        """A point from a run that was made elsewhere; its label must be new."""
        if setting.label in self.runs:
            raise InvalidArgumentError("label", setting.label, "a method of this name is measured already")
        self.runs[setting.label] = found
        self.found[setting.label] = summarise(found, self.prompts, self.rewards)
        return self._point(setting, self.found[setting.label])

    def view(self, setting: Setting) -> Point:
        """The run of this label once more, by another objective."""
        return self._point(setting, self.found[setting.label])

    def best_of_n(self, sizes: Sequence[int], objective: Objective, name: str = "") -> list[Point]:
        """Best-of-n by an objective, expected from the pool; its speed is the pool's, divided by n.

        Args:
            sizes: each n at most the pool.
            name: of the objective, in labels.
        """
        scores = self._combine(self.plain.pools, objective)
        by = f" by {name}" if name else ""
        points = []
        for n in sizes:
            setting = Setting(f"best of {n}{by}", f"best-of-n{by}", self.params, objective, float(n))
            weights = [selection_weights(pool, n) for pool in scores]
            points.append(self._selected(setting, n, weights))
        return points

    # -- inner workings ------------------------------------------------------------------------------------------

    def _selected(self, setting: Setting, n: int, weights: list[torch.Tensor]) -> Point:
        """The pool under selection weights [N] of each prompt."""
        plain = self.plain

        def mean(columns: Sequence[Sequence[float]]) -> list[float]:
            pairs = zip(columns, weights, strict=True)
            return [float(torch.tensor(column, dtype=torch.float64) @ own) for column, own in pairs]

        rewards = {name: mean(pools) for name, pools in plain.pools.items()}
        lengths, log_probs, *grams = (mean(column) for column in self._columns)
        count, tokens = len(self.runs["base"].responses), sum(lengths) / len(lengths)
        # n responses of the pool's mean length are drawn for each that is kept.
        spent = n * plain.tokens / count / tokens
        measured = replace(
            plain,
            rewards={name: estimate_mean(means) for name, means in rewards.items()},
            pools={name: [[own] for own in means] for name, means in rewards.items()},
            kl=_known(best_of_n_kl_bound(n)),
            kl_kind="bound",
            perplexity=math.exp(-sum(log_probs) / sum(lengths)),
            distinct=tuple(sum(column) / len(column) for column in grams),
            seconds=plain.seconds * spent,
            model_rows_per_token=plain.model_rows_per_token * spent,
            flops_per_token=plain.flops_per_token * spent,
        )
        point = self._point(setting, measured)
        return replace(point, response_tokens=tokens, responses=count / len(self.prompts) / n)

    @cached_property
    def _columns(self) -> list[list[list[float]]]:
        """Of every plain response, by prompt: length, log-probability, distinct 1-, 2- and 3-grams."""
        responses = self.runs["base"].responses
        groups = [response.prompt for response in responses]
        grams = zip(*(distinct(response.token_ids) for response in responses), strict=True)
        columns = [[float(len(r.token_ids)) for r in responses], [r.log_prob for r in responses], *map(list, grams)]
        return [by_prompt(column, groups) for column in columns]

    def _point(self, setting: Setting, found: Measurement) -> Point:
        objective = dict(setting.objective)
        scores = self._combine(found.pools, objective)
        flat = [number for part in scores for number in part]
        groups = [place for place, part in enumerate(scores) for _ in part]
        kl = found.kl or _known(math.nan)
        optimum = self.optimum(objective)
        score = estimate_mean(flat, groups if len(scores) > 1 else None)
        means = [sum(part) / len(part) for part in scores]
        spent = self._kl_by_prompt(setting.label, kl)
        count = sum(len(part) for part in found.responses)
        return Point(
            label=setting.label,
            method=setting.method,
            strength=setting.strength,
            objective=objective,
            rewards=found.rewards,
            score=score,
            kl=kl,
            kl_kind=found.kl_kind or "none",
            optimum_kl=optimum.kl_at(score.mean),
            efficiency=optimum.efficiency(means, spent),
            perplexity=found.perplexity,
            distinct=found.distinct,
            response_tokens=found.tokens / count,
            flops_per_token=found.flops_per_token,
            tokens_per_second=found.tokens_per_second,
            model_rows_per_token=found.model_rows_per_token,
            value_rows_per_token=found.value_rows_per_token,
            responses=count / len(self.prompts),
            settings=_difference(setting.params, self.params),
        )

    def _kl_by_prompt(self, label: str, kl: Estimate) -> list[float]:
        """Mean divergence of each prompt's responses; a bound is the same for all."""
        found = self.runs.get(label)
        if found is None or found.kl_kind is None:
            return [kl.mean] * len(self.prompts)
        groups = [response.prompt for response in found.responses]
        return [
            sum(part) / len(part) for part in by_prompt([response.kl or 0.0 for response in found.responses], groups)
        ]

    def _combine(self, pools: Mapping[str, list[list[float]]], objective: Objective) -> list[list[float]]:
        """The objective of every response."""
        for name in objective:
            if name not in pools:
                raise InvalidArgumentError("objective", name, f"no reward of this name; {nearest(name, pools)}")
        parts = [[[weight * r for r in pool] for pool in pools[name]] for name, weight in objective.items()]
        return [[sum(terms) for terms in zip(*prompt, strict=True)] for prompt in zip(*parts, strict=True)]


def _deviation(pools: list[list[float]]) -> float:
    """Standard deviation of a reward over all plain responses; 1 for a reward that never differs."""
    return float(torch.tensor([r for pool in pools for r in pool], dtype=torch.float64).std(correction=0)) or 1.0


def _known(number: float) -> Estimate:
    """A number that is not estimated."""
    return Estimate(number, math.nan, math.nan, 0)


def _difference(params: SamplingParams, base: SamplingParams) -> dict[str, Any]:
    plain = base.to_dict()
    return {name: value for name, value in params.to_dict().items() if value != plain[name]}


def plain_json(value: Any) -> Any:
    """Plain JSON types; a number that is not finite becomes None."""
    if isinstance(value, dict):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
