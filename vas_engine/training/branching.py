"""Validation by branching: values against the mean reward of several completions from the same state.

The reward of one response says little about the value of a state half way: most of its variance is the luck of the
rest. Means of several completions have less of it, and how much is left can be told from their own spread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError
from vas_engine.params import SamplingParams
from vas_engine.sampling.noise import fork_seed
from vas_engine.training.batches import split
from vas_engine.training.config import FitConfig
from vas_engine.training.heldout import position_bins
from vas_engine.training.report import BranchReport, FitReport, PositionBin
from vas_engine.training.rewards import Reward, load_rewards, score
from vas_engine.training.rewards.reward import WHOLE_TEXT
from vas_engine.training.rollouts import Rollouts

if TYPE_CHECKING:
    from vas_engine.llm import LLM
    from vas_engine.model.lm import CausalLM

__all__ = [
    "SampledBranches",
    "check_branches",
    "explainable",
    "judge_branches",
    "load_rollout_rewards",
    "sample_branches",
]

POSITION_BINS = 4


@dataclass(frozen=True)
class SampledBranches:
    """Completions from N states, M from each.

    Attributes:
        token_ids: of each state, prompt and response so far.
        positions: int64 [N], tokens of the response in it.
        lengths: int64 [N, M], tokens of the completions.
        rewards: by name, of the whole responses, float64 [N, M].
    """

    token_ids: list[list[int]]
    positions: torch.Tensor
    lengths: torch.Tensor
    rewards: dict[str, torch.Tensor]


def load_rollout_rewards(rollouts: Rollouts, names: Sequence[str] | None = None) -> list[Reward]:
    """The rewards that rollouts were scored by, made again from their descriptions; all, or those named.

    Raises:
        InvalidArgumentError: a description that no longer works, or a reward the rollouts do not have.
    """
    described = rollouts.header.rewards
    specs = {name: str(entry["spec"]) for name, entry in described.items()}
    whole = any(spec.endswith(WHOLE_TEXT) for spec in specs.values())
    # All of them: one may be a formula of others.
    loaded = load_rewards([f"{n}={spec.removesuffix(WHOLE_TEXT)}" for n, spec in specs.items()], whole_text=whole)
    rollouts.rewards(list(names or ()))
    return [reward for reward in loaded if not names or reward.name in names]


def check_branches(rollouts: Rollouts, points: int, samples: int, config: FitConfig) -> list[int]:
    """Whether so many branches can be sampled; arguments as of `sample_branches`.

    Returns:
        Places of the held-out responses that they can begin in.

    Raises:
        InvalidArgumentError: more points than these, or fewer than 2 of either.
        TrainingDataError: too few rollouts to hold some out.
    """
    _, heldout, _ = split(rollouts, config.holdout, config.holdout_by, config.seed)
    heldout = [index for index in heldout if rollouts.rollouts[index].response_ids]
    arguments.integer("branch_samples", samples, 2)
    arguments.integer("branch_points", points, 2, len(heldout))
    return heldout


def sample_branches(
    llm: LLM,
    rollouts: Rollouts,
    rewards: Sequence[Reward],
    points: int,
    samples: int,
    config: FitConfig | None = None,
    *,
    use_tqdm: bool = True,
) -> SampledBranches:
    """Draw states from held-out responses and complete each several times by the frozen model.

    Args:
        llm: with the model and tokenizer that the rollouts were sampled by.
        rewards: by which completions are scored.
        points: states; each from another response, after a number of its tokens drawn evenly.
        samples: completions of each, at least 2.
        config: of the fit whose held-out part is meant.

    Raises:
        InvalidArgumentError: more points than held-out responses, fewer than 2 samples, or no tokenizer.
    """
    config = config or FitConfig()
    heldout = check_branches(rollouts, points, samples, config)
    if llm.tokenizer is None:
        raise InvalidArgumentError("tokenizer", None, "rewards are given to texts: load the model with its tokenizer")
    generator = torch.Generator().manual_seed(config.seed)
    chosen = [heldout[place] for place in torch.randperm(len(heldout), generator=generator)[:points].tolist()]
    limit = rollouts.header.settings.get("max_tokens") or max(len(row.response_ids) for row in rollouts)
    states, positions, params = [], [], []
    for index in chosen:
        row = rollouts.rollouts[index]
        cut = int(torch.randint(len(row.response_ids), (1,), generator=generator))
        states.append([*row.prompt_ids, *row.response_ids[:cut]])
        positions.append(cut)
        seed = fork_seed(config.seed, index + 1)
        params.append(SamplingParams(n=samples, temperature=1.0, max_tokens=limit - cut, seed=seed))
    outputs = llm.generate(states, params, use_tqdm=use_tqdm)
    prompts, texts = [], []
    for index, state, output in zip(chosen, states, outputs, strict=True):
        row = rollouts.rollouts[index]
        begun = _text(llm, state).removeprefix(_text(llm, row.prompt_ids))
        prompts += [row.prompt] * samples
        texts += [begun + completion.text for completion in output.outputs]
    found = {reward.name: score(reward, prompts, texts) for reward in rewards}
    return SampledBranches(
        states,
        torch.tensor(positions),
        torch.tensor([[len(c.token_ids) for c in output.outputs] for output in outputs]),
        {name: torch.tensor(column, dtype=torch.float64).view(points, samples) for name, column in found.items()},
    )


@torch.no_grad()
def judge_branches(
    lm: CausalLM, network: Any, report: FitReport, branches: SampledBranches, gamma: float = 1.0
) -> FitReport:
    """The report of a network with what branches say of each head that has a reward among theirs."""
    values = []
    network.eval()
    for ids in branches.token_ids:
        tokens = torch.tensor([ids], device=lm.device)
        output = network.train_values(lm, tokens, torch.tensor([len(ids)], device=lm.device))
        values.append(network.heads.mean(output)[0, -1].cpu().double())
    found = torch.stack(values)
    heads = dict(report.heads)
    for index, (name, head) in enumerate(heads.items()):
        if head.reward in branches.rewards:
            returns = branches.rewards[head.reward] * gamma**branches.lengths
            heads[name] = dataclasses.replace(head, branching=_branch_report(found[:, index], returns, branches))
    return dataclasses.replace(report, heads=heads)


def explainable(values: torch.Tensor, returns: torch.Tensor) -> tuple[float, float | None]:
    """How much of the returns' variance lies between states, and what share of that the values explain.

    With m the mean of a state's M returns and s² their variance, m is the state's true value plus noise of variance
    s² / M. So the mean of s² / M is taken off the variance of m, and off the mean square of V − m: what is left are
    the variance of true values and the values' true error (both unbiased; a small sample may overshoot 1).

    Args:
        values: float [N].
        returns: float [N, M].

    Returns:
        The explainable share of the variance of single returns, and R² of it; None where it is nothing.
    """
    means, noise = returns.mean(1), float((returns.var(1) / returns.shape[1]).mean())
    between = float(means.var()) - noise
    total = between + noise * returns.shape[1]
    if between <= 0:
        return 0.0, None
    error = float((values - means).square().mean()) - noise
    return between / total, 1 - error / between


def _branch_report(values: torch.Tensor, returns: torch.Tensor, branches: SampledBranches) -> BranchReport:
    share, score = explainable(values, returns)
    bins = [
        PositionBin(low, high, int(inside.sum()), explainable(values[inside], returns[inside])[1])
        for low, high, inside in position_bins(branches.positions, POSITION_BINS)
        if int(inside.sum()) > 1
    ]
    return BranchReport(len(values), returns.shape[1], share, score, bins)


def _text(llm: LLM, token_ids: Sequence[int]) -> str:
    assert llm.tokenizer is not None
    return llm.tokenizer.decode(list(token_ids), skip_special_tokens=True)
