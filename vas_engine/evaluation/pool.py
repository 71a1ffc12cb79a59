"""A pool of plain samples that `vas collect` made, in place of a fresh one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vas_engine.errors import InvalidArgumentError
from vas_engine.evaluation.dense import log_probs
from vas_engine.evaluation.measure import Response, Run
from vas_engine.params import SamplingParams
from vas_engine.prompts import Prompt, read_prompts
from vas_engine.training.rollouts import Rollout, Rollouts

if TYPE_CHECKING:
    from vas_engine.llm import LLM

__all__ = ["pick", "pool_of"]


def pick(
    llm: LLM, rollouts: Rollouts, prompts: Sequence[str | Prompt], base: SamplingParams
) -> list[tuple[int, Rollout]]:
    """Rollouts that are plain samples of these prompts, each with its prompt's place.

    Args:
        rollouts: of this model, unguided, as long as `base` allows, on these prompts at least.

    Returns:
        As many of every prompt as there are of the one that has fewest.

    Raises:
        InvalidArgumentError: rollouts made in another way, or of other prompts.
    """
    wanted: dict[str, Any] = {
        "weights": llm.lm.fingerprint(llm.tokenizer)["weights"],
        "max_tokens": base.max_tokens,
        "policy": {},
    }
    header = rollouts.header
    found = {
        "weights": header.fingerprint.get("weights"),
        "max_tokens": header.settings.get("max_tokens"),
        "policy": header.policy,
    }
    for name, value in wanted.items():
        if found[name] != value:
            fix = f"they have {name}={found[name]!r}, here it is {value!r}; collect plain samples with these settings"
            raise InvalidArgumentError("rollouts", name, fix)
    by_prompt: dict[tuple[int, ...], list[Rollout]] = {}
    for rollout in rollouts:
        by_prompt.setdefault(tuple(rollout.prompt_ids), []).append(rollout)
    encoded = [tuple(prompt.encode(llm.tokenizer)) for prompt in read_prompts(list(prompts))]
    for place, ids in enumerate(encoded):
        if ids not in by_prompt:
            fix = f"they have no response to prompt {place}; collect with the same prompts"
            raise InvalidArgumentError("rollouts", f"[{len(by_prompt)} prompts]", fix)
    count = min(len(by_prompt[ids]) for ids in encoded)
    return [(place, rollout) for place, ids in enumerate(encoded) for rollout in by_prompt[ids][:count]]


def pool_of(llm: LLM, picked: Sequence[tuple[int, Rollout]], sampled: Run) -> Run:
    """Picked rollouts as a run of the base, at the cost per token of one that was just made.

    Args:
        picked: of `pick`.
        sampled: plain samples of the same prompts.
    """
    likelihoods = log_probs(llm.lm, [r.prompt_ids for _, r in picked], [r.response_ids for _, r in picked])
    responses = [
        Response(place, rollout.response, rollout.response_ids, rollout.finish_reason, log_prob, 0.0)
        for (place, rollout), log_prob in zip(picked, likelihoods, strict=True)
    ]
    tokens = sum(len(response.token_ids) for response in responses)
    share = tokens / max(sampled.tokens, 1)
    return Run(
        responses,
        seconds=sampled.seconds * share,
        tokens=tokens,
        model_rows=sampled.model_rows * share,
        value_rows=0.0,
        flops=sampled.flops * share,
        kl_kind="exact",
    )
