"""Fitting value networks to rollouts by TD(λ), and to a teacher."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.model.fingerprint import weights_hash
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import split
from vas_engine.training.checkpoint import Checkpoint, rollouts_digest
from vas_engine.training.config import FitConfig
from vas_engine.training.course import Course
from vas_engine.training.distill import Teacher
from vas_engine.training.report import FitReport
from vas_engine.training.rollouts import Rollouts
from vas_engine.training.trainee import Trainee
from vas_engine.values.config import HeadConfig, Support

__all__ = ["FitConfig", "fit", "fit_all", "head_for"]

SUPPORT_BINS = 51
# Standard deviations of an HL-Gauss target that its support holds on both sides.
SUPPORT_SIGMAS = 3.0


def head_for(
    rollouts: Rollouts,
    reward: str,
    *,
    distributional: bool = False,
    bounded: bool = False,
    bins: int = SUPPORT_BINS,
    sigma: float = 0.0,
    gamma: float = 1.0,
    name: str | None = None,
) -> HeadConfig:
    """Settings of a head for one reward, scaled to the rewards at hand.

    A plain head starts from their mean and counts in their standard deviations. A bounded head keeps to the
    reward's known bounds, and the atoms of a distributional one span them; where none are known, the rewards'
    own range. With γ < 1 either holds 0 as well, which discounted rewards tend to. With ``sigma`` (HL-Gauss, in steps
    between atoms) the atoms reach three sigmas further on both sides, so that a Gaussian around the best reward is not
    cut off and its mean pulled inwards.

    Args:
        bins: atoms of a distributional head, all in all.
        gamma: discount per token that it is to be trained with.

    Raises:
        InvalidArgumentError: settings that cannot work.
        TrainingDataError: the reward does not vary, so there is nothing to learn.
    """
    rewards = rollouts.rewards([reward])[:, 0]
    _check_varies(rewards, reward)
    low, high = rollouts.header.rewards[reward].get("bounds") or (float(rewards.min()), float(rewards.max()))
    if gamma != 1.0:
        low, high = min(low, 0.0), max(high, 0.0)
    name = name or reward
    if distributional and bounded:
        raise InvalidArgumentError("bounded", True, "a distributional head is bounded already; leave one out")
    if distributional:
        return HeadConfig(name, reward, support=_support(float(low), float(high), bins, sigma))
    if bounded:
        return HeadConfig(name, reward, bounds=(float(low), float(high)))
    return HeadConfig(name, reward, mean=float(rewards.mean()), std=float(rewards.std()))


def _support(low: float, high: float, bins: int, sigma: float) -> Support:
    margin = math.ceil(SUPPORT_SIGMAS * sigma)
    arguments.integer("bins", bins, 2 * margin + 2)
    step = (high - low) / (bins - 1 - 2 * margin)
    return Support(low - margin * step, high + margin * step, bins)


def fit(lm: Any, network: Any, rollouts: Rollouts, config: FitConfig | None = None, **options: Any) -> FitReport:
    """Train one network on rollouts; see `fit_all`, which also tells the options."""
    return fit_all(lm, [network], rollouts, config, **options)[0]


def fit_all(
    lm: Any,
    networks: Sequence[Any],
    rollouts: Rollouts,
    config: FitConfig | None = None,
    *,
    teacher: Any | None = None,
    states: Sequence[torch.Tensor] | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    use_tqdm: bool = True,
) -> list[FitReport]:
    """Train networks of any kind on rollouts of the frozen model, which is run once a batch for all of them.

    The states valued are those from the prompt alone to the whole response, its EOS included. The last of
    them has the reward itself as target, be it the one after EOS or that of a response cut at its token limit
    (whose reward is taken as given there). Each head is trained on the reward its ``reward`` names. On return
    the networks hold the weights of their best epoch.

    Args:
        lm: the model the rollouts were sampled from; it is not changed.
        networks: bound to it; changed in place.
        teacher: a value, bound to the model, whose values of all candidates they learn (see `Teacher`).
        states: final hidden states of the rollouts, as `vas_engine.training.base.read_states` gives them; used
            where they are all that the networks read.
        checkpoint: folder in which the fit is put away after each epoch, and from which with ``resume`` it goes on.
            The caller removes it by `drop_checkpoint` when the networks are safe.

    Returns:
        A report for each network.

    Raises:
        TrainingDataError: rollouts of another model, too few of them, or a reward that does not vary.
        InvalidArgumentError: a head whose reward the rollouts or the teacher do not have, one whose interval leaves
            out 0 with γ < 1, or a checkpoint of another fit.
        NonFiniteError: the loss is not finite.
    """
    config = config or FitConfig()
    _check_model(lm, rollouts)
    if config.lora_rank and not any(network.config.kind == "model" for network in networks):
        raise InvalidArgumentError("lora_rank", config.lora_rank, "only a network of kind 'model' has adapters")
    if config.gamma != 1.0 and rollouts.header.part_tokens:
        what = f"gamma={config.gamma:g} leaves the rollouts' partial rewards aside"
        warnings.warn(f"{what}: values are learnt from whole rewards", stacklevel=2)
    train, heldout, holdout_by = split(rollouts, config.holdout, config.holdout_by, config.seed)
    everyone = [*networks, teacher] if teacher is not None else list(networks)
    base = FrozenBase(lm, everyone, logits=teacher is not None)
    master = Teacher(teacher, base, config) if teacher is not None else None
    # Before adapters are put into value models.
    identity = _identity(networks, rollouts, config, teacher) if checkpoint is not None else {}
    trainees = [Trainee(base, network, rollouts, train, config, master) for network in networks]
    for trainee in trainees:
        _check_rewards(trainee, train, heldout)
    place = Checkpoint(checkpoint, identity) if checkpoint is not None else None
    course = Course(base, rollouts, config, train, heldout, trainees, master, place)
    if states is not None:
        base.use_saved(states, rollouts)
    if config.epochs > 1:
        base.keep(rollouts, config.batch_tokens, config.cache_bytes, use_tqdm)
    interrupted = kept = False
    # Dropout is drawn from torch's own generator; the caller's draws go on as if nothing had happened.
    with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
        try:
            try:
                course.run(resume, use_tqdm)
            except KeyboardInterrupt:
                if not config.keep_on_interrupt:
                    raise
                interrupted = True
            reports = course.reports(holdout_by, interrupted)
            kept = True
        finally:
            for trainee in trainees:
                trainee.end(kept)
    return reports


def _identity(networks: Sequence[Any], rollouts: Rollouts, config: FitConfig, teacher: Any | None) -> dict[str, Any]:
    """What a fit is of; the weights of networks whose all are trained follow from their settings and the seed."""
    found = {
        "settings": asdict(config),
        "rollouts": rollouts_digest(rollouts),
        "networks": [network.config.to_dict() for network in networks],
        "teacher": None if teacher is None else teacher.config.to_dict(),
    }
    backbones = [weights_hash(network.backbone) for network in networks if network.config.kind == "model"]
    if backbones:
        found["backbone_weights"] = backbones
    if teacher is not None:
        found["teacher_weights"] = weights_hash(teacher)
    return found


def _check_rewards(trainee: Trainee, train: list[int], heldout: list[int]) -> None:
    for head, column in zip(trainee.network.config.heads, trainee.rewards.unbind(1), strict=True):
        name, (low, high) = head.reward or head.name, head.interval
        _check_varies(column, name)
        _check_varies(column[train], f"{name} (training part)")
        _check_varies(column[heldout], f"{name} (held-out part)")
        if trainee.config.gamma != 1.0 and not low <= 0.0 <= high:
            fix = f"head {head.name!r} keeps V in [{low:g}, {high:g}], and discounted rewards tend to 0"
            raise InvalidArgumentError(
                "gamma", trainee.config.gamma, f"{fix}: widen it to hold 0, as head_for does with gamma"
            )


def _check_varies(rewards: torch.Tensor, name: str) -> None:
    if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
        value = f"is {float(rewards[0]):g}" if len(rewards) else "is missing"
        raise TrainingDataError(
            f"reward {name} {value} for all {len(rewards)} rollouts, so R² has no meaning and there is "
            "nothing to learn: collect more samples, or use a reward that tells responses apart"
        )


def _check_model(lm: Any, rollouts: Rollouts) -> None:
    ours, theirs = lm.fingerprint(), rollouts.header.fingerprint
    for key in ("architecture", "weights"):
        if theirs.get(key) != ours.get(key):
            raise TrainingDataError(
                f"the rollouts were sampled from another model ({key} {theirs.get(key)!r}, this one has "
                f"{ours.get(key)!r}): collect from this model, or train for that one"
            )
