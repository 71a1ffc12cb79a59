"""Calling rewards: in batches, with their answers checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.training.rewards.reward import Reward, RewardError

__all__ = ["BATCH_SIZE", "apply", "score", "score_all"]

BATCH_SIZE = 32


def score(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], *, batch_size: int = BATCH_SIZE
) -> list[float]:
    """Apply one reward; see `score_all`.

    Returns:
        One finite float per response.
    """
    return score_all([reward], prompts, responses, batch_size=batch_size)[reward.name]


def score_all(
    rewards: Sequence[Reward],
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    batch_size: int = BATCH_SIZE,
    before_batch: Callable[[], None] | None = None,
) -> dict[str, list[float]]:
    """Apply rewards, batch by batch, and check their answers.

    Responses of similar length share a batch, so that a reward model has little to pad. Each batch goes through
    all rewards before the next one does, so that those computed from others find them done.

    Args:
        batch_size: most responses of one call of a reward.
        before_batch: called before every batch; what it raises ends the work.

    Returns:
        By the reward's name, one finite float per response.

    Raises:
        RewardError: a reward raised, or gave a wrong number of rewards, or one that is no finite number. The
            message names the reward, the response's index and what to change.
    """
    if len(prompts) != len(responses):
        raise InvalidArgumentError("responses", len(responses), f"give one per prompt ({len(prompts)})")
    arguments.integer("batch_size", batch_size, 1)
    order = sorted(range(len(responses)), key=lambda place: len(responses[place]))
    columns = {reward.name: [0.0] * len(responses) for reward in rewards}
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        if before_batch is not None:
            before_batch()
        asked = [prompts[place] for place in places], [responses[place] for place in places]
        for reward in rewards:
            try:
                answers = apply(reward, *asked)
            except RewardError as error:
                if error.place is None:
                    raise
                raise RewardError(error.reward, error.what, places[error.place]) from error.__cause__
            column = columns[reward.name]
            for place, answer in zip(places, answers, strict=True):
                column[place] = answer
    return columns


def apply(reward: Reward, prompts: list[str], responses: list[str]) -> list[float]:
    """Call a reward on one batch and check its answers; raises RewardError as `score_all` does."""
    try:
        answers: Any = reward(prompts, responses)
    except VASError:
        raise
    except Exception as error:
        raise RewardError.raised(reward.name, error) from error
    if isinstance(answers, str | bytes) or not hasattr(answers, "__iter__"):
        fix = "return a list of numbers, or leave its attribute `batched` unset to be called per response"
        raise RewardError(reward.name, f"returned {type(answers).__name__} for {{where}}: {fix}")
    answers = list(answers)
    if len(answers) != len(responses):
        said = f"returned {len(answers)} rewards for {len(responses)} responses"
        raise RewardError(reward.name, f"{said}: return one per response, in order")
    return [_finite(reward.name, place, answer) for place, answer in enumerate(answers)]


def _finite(name: str, place: int, answer: Any) -> float:
    # Zero-dimensional arrays and tensors count as numbers; truth values do too, as 0 and 1.
    answer = answer.item() if hasattr(answer, "item") and getattr(answer, "ndim", 1) == 0 else answer
    if not isinstance(answer, Real):
        raise RewardError(name, f"gave {answer!r} ({type(answer).__name__}) for {{where}}: return a number", place)
    if not math.isfinite(answer):
        fix = "return a finite number (give an empty or odd text a value of its own)"
        raise RewardError(name, f"gave {float(answer)} for {{where}}: {fix}", place)
    return float(answer)
