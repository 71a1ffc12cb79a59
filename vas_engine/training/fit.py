"""Fitting value networks to rollouts by TD(λ)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from vas_engine.errors import InvalidArgumentError, NonFiniteError, TrainingDataError
from vas_engine.training.batches import Batch, make_batch, plan_batches, split
from vas_engine.training.loss import value_loss
from vas_engine.training.report import EpochReport, FitReport, HeadReport
from vas_engine.training.returns import discounted_rewards, r_squared
from vas_engine.training.rollouts import Rollouts
from vas_engine.values.config import HeadConfig, Support

__all__ = ["FitConfig", "fit", "fit_all", "head_for"]

SUPPORT_BINS = 51


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        epochs: most passes over the rollouts.
        batch_tokens: padded tokens of a batch.
        lr: peak learning rate, after ``warmup`` (a share of all steps) and before a cosine down to 0.
        weight_decay: of matrices; biases and gains have none.
        lam: λ of TD(λ); 1 is Monte Carlo.
        gamma: discount per token.
        holdout: share of the rollouts held out.
        holdout_by: "prompt", "sample" or "auto" (see `vas_engine.training.batches.split`).
        patience: stop after this many epochs without a better held-out R²; None never stops early.
        grad_clip: largest norm of a gradient.
        keep_on_interrupt: on Ctrl-C end as if the epochs were over, with the best so far; else it is raised.
    """

    epochs: int = 4
    batch_tokens: int = 2048
    lr: float = 2e-3
    weight_decay: float = 0.01
    warmup: float = 0.05
    lam: float = 1.0
    gamma: float = 1.0
    holdout: float = 0.1
    holdout_by: str = "auto"
    seed: int = 0
    patience: int | None = None
    grad_clip: float = 1.0
    keep_on_interrupt: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens") + (("patience",) if self.patience is not None else ()):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(name, value, "use a positive integer")
        for name in ("lr", "grad_clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InvalidArgumentError(name, getattr(self, name), "use a positive number")
        for name in ("lam", "gamma", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(name, getattr(self, name), "give a number from 0 to 1")
        if not 0 < self.holdout < 1:
            raise InvalidArgumentError("holdout", self.holdout, "give a share between 0 and 1")
        if not self.weight_decay >= 0:
            raise InvalidArgumentError("weight_decay", self.weight_decay, "use 0 or more")


def head_for(
    rollouts: Rollouts,
    reward: str,
    *,
    distributional: bool = False,
    bounded: bool = False,
    name: str | None = None,
) -> HeadConfig:
    """Settings of a head for one reward, scaled to the rewards at hand.

    A plain head starts from their mean and counts in their standard deviations. A bounded head keeps to the
    reward's known bounds, and the atoms of a distributional one span them; where none are known, the rewards'
    own range.

    Raises:
        TrainingDataError: the reward does not vary, so there is nothing to learn.
    """
    rewards = rollouts.rewards([reward])[:, 0]
    _check_varies(rewards, reward)
    low, high = rollouts.header.rewards[reward].get("bounds") or (float(rewards.min()), float(rewards.max()))
    name = name or reward
    if distributional and bounded:
        raise InvalidArgumentError("bounded", True, "a distributional head is bounded already; leave one out")
    if distributional:
        return HeadConfig(name, reward, support=Support(float(low), float(high), SUPPORT_BINS))
    if bounded:
        return HeadConfig(name, reward, bounds=(float(low), float(high)))
    return HeadConfig(name, reward, mean=float(rewards.mean()), std=float(rewards.std()))


def fit(
    lm: Any, network: Any, rollouts: Rollouts, config: FitConfig | None = None, *, use_tqdm: bool = True
) -> FitReport:
    """Train one network on rollouts; see `fit_all`."""
    return fit_all(lm, [network], rollouts, config, use_tqdm=use_tqdm)[0]


def fit_all(
    lm: Any,
    networks: Sequence[Any],
    rollouts: Rollouts,
    config: FitConfig | None = None,
    *,
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

    Returns:
        A report for each network.

    Raises:
        TrainingDataError: rollouts of another model, too few of them, or a reward that does not vary.
        InvalidArgumentError: a head whose reward the rollouts do not have.
        NonFiniteError: the loss is not finite.
    """
    config = config or FitConfig()
    _check_model(lm, rollouts)
    train, heldout, holdout_by = split(rollouts, config.holdout, config.holdout_by, config.seed)
    base = _SharedBase(lm) if len(networks) > 1 else lm
    trainees = [_Trainee(base, network, rollouts, heldout) for network in networks]
    course = _Course(lm, rollouts, config, train, heldout, trainees)
    interrupted = False
    try:
        course.run(use_tqdm)
    except KeyboardInterrupt:
        if not config.keep_on_interrupt:
            raise
        interrupted = True
    return [course.report(trainee, holdout_by, interrupted) for trainee in trainees]


class _SharedBase:
    """The frozen model to several networks in training: it runs once a batch, for what any of them reads."""

    def __init__(self, lm: Any) -> None:
        self._lm = lm
        self._states: set[int] = set()
        self._layers: set[int] = set()
        self._tokens: torch.Tensor | None = None
        self._output: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def dense(
        self,
        token_ids: torch.Tensor,
        lengths: torch.Tensor | None = None,
        states: Sequence[int] = (),
        kv_layers: Sequence[int] = (),
        logits: bool = False,
    ) -> Any:
        if logits:
            return self._lm.dense(token_ids, lengths, states, kv_layers, logits)
        known = self._states.issuperset(states) and self._layers.issuperset(kv_layers)
        if self._tokens is not token_ids or not known:
            self._states.update(states)
            self._layers.update(kv_layers)
            with torch.no_grad():
                self._output = self._lm.dense(token_ids, lengths, sorted(self._states), sorted(self._layers))
            self._tokens = token_ids
        return self._output


class _Trainee:
    """One network, its rewards, and the best weights so far."""

    def __init__(self, lm: Any, network: Any, rollouts: Rollouts, heldout: list[int]) -> None:
        self.lm, self.network = lm, network
        self.heads = network.heads
        self.rewards = rollouts.rewards([head.reward or head.name for head in network.config.heads])
        for head, column in zip(network.config.heads, self.rewards.unbind(1), strict=True):
            _check_varies(column, head.reward or head.name)
            _check_varies(column[heldout], f"{head.reward or head.name} (held-out part)")
        self.epochs: list[EpochReport] = []
        self.best_epoch, self.best_score = 0, -math.inf
        self.best_weights: dict[str, torch.Tensor] | None = None

    def prepare(self, config: FitConfig, steps: int) -> None:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=config.lr)
        warmup = max(round(config.warmup * steps), 1)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, factor)
        self.parameters = parameters

    def step(self, batch: Batch, config: FitConfig) -> float:
        """One update; returns the loss, a mean over positions and heads."""
        output = self.network.train_values(self.lm, batch.token_ids, batch.lengths)
        losses = value_loss(self.heads, output, batch.rewards, batch.last, config.lam, config.gamma)
        loss = losses[batch.mask].mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}: lower lr={config.lr:g} or look for odd rewards")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        self.optimiser.step()
        self.schedule.step()
        return float(loss.detach())

    @torch.no_grad()
    def predict(self, batch: Batch) -> torch.Tensor:
        """V in the rewards' units, float32 [B, T, M]."""
        return self.heads.mean(self.network.train_values(self.lm, batch.token_ids, batch.lengths))

    def finish_epoch(self, epoch: EpochReport) -> None:
        self.epochs.append(epoch)
        score = sum(epoch.r_squared.values())
        if score > self.best_score:
            self.best_epoch, self.best_score = epoch.epoch, score
            self.best_weights = copy.deepcopy(self.network.state_dict())

    def restore_best(self) -> None:
        if self.best_weights is not None:
            self.network.load_state_dict(self.best_weights)


class _Course:
    """The epochs of a fit."""

    def __init__(
        self,
        lm: Any,
        rollouts: Rollouts,
        config: FitConfig,
        train: list[int],
        heldout: list[int],
        trainees: list[_Trainee],
    ) -> None:
        self.rollouts, self.config, self.trainees = rollouts, config, trainees
        self.train, self.heldout, self.device = train, heldout, lm.device
        self.lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
        generator = torch.Generator().manual_seed(config.seed)
        self.plans = [plan_batches(self.lengths, train, config.batch_tokens, generator) for _ in range(config.epochs)]
        self.heldout_plan = plan_batches(self.lengths, heldout, config.batch_tokens)
        self.started = time.monotonic()

    def run(self, use_tqdm: bool) -> None:
        steps = sum(map(len, self.plans))
        for trainee in self.trainees:
            trainee.prepare(self.config, steps)
        with tqdm(total=steps, desc="train", unit="batch", disable=not use_tqdm) as bar:
            for number, plan in enumerate(self.plans, 1):
                losses = self._epoch(plan, bar)
                scores = [self._finish_epoch(*pair, number) for pair in zip(self.trainees, losses, strict=True)]
                bar.set_postfix_str("R² " + ", ".join(scores))
                if self._patience_spent(number):
                    break

    def _epoch(self, plan: list[list[int]], bar: tqdm) -> list[float]:
        totals, tokens = [0.0] * len(self.trainees), 0
        for trainee in self.trainees:
            trainee.network.train()
        for indices in plan:
            batch = self._batch(indices)
            weight = int(batch.mask.sum())
            tokens += weight
            for place, trainee in enumerate(self.trainees):
                totals[place] += weight * trainee.step(self._for(trainee, batch, indices), self.config)
            bar.update()
        return [total / tokens for total in totals]

    def _finish_epoch(self, trainee: _Trainee, loss: float, number: int) -> str:
        reports = self.evaluate(trainee)
        scores = {name: report.r_squared for name, report in reports.items()}
        trainee.finish_epoch(EpochReport(number, loss, scores, time.monotonic() - self.started))
        return " ".join(f"{name} {score:.3f}" for name, score in scores.items())

    def _patience_spent(self, epoch: int) -> bool:
        patience = self.config.patience
        return patience is not None and all(epoch - trainee.best_epoch >= patience for trainee in self.trainees)

    def _batch(self, indices: list[int]) -> Batch:
        return make_batch(self.rollouts, indices, self.trainees[0].rewards, self.device)

    def _for(self, trainee: _Trainee, batch: Batch, indices: list[int]) -> Batch:
        """The same batch (the very same tokens, so the base runs once) with this network's rewards."""
        rewards = trainee.rewards[indices].float().to(self.device)
        return Batch(batch.token_ids, batch.lengths, batch.first, rewards)

    def evaluate(self, trainee: _Trainee) -> dict[str, HeadReport]:
        trainee.network.eval()
        values, received, late = [], [], []
        for indices in self.heldout_plan:
            batch = self._for(trainee, self._batch(indices), indices)
            mask = batch.mask
            returns = discounted_rewards(batch.rewards, batch.last, mask.shape[1], self.config.gamma)
            values.append(trainee.predict(batch)[mask].cpu().double())
            received.append(returns[mask].cpu().double())
            late.append(batch.last_quarter[mask].cpu())
        return _head_reports(trainee, torch.cat(values), torch.cat(received), torch.cat(late))

    def report(self, trainee: _Trainee, holdout_by: str, interrupted: bool) -> FitReport:
        trainee.restore_best()
        return FitReport(
            kind=trainee.network.config.kind,
            parameters=sum(p.numel() for p in trainee.network.parameters() if p.requires_grad),
            heads=self.evaluate(trainee),
            epochs=trainee.epochs,
            best_epoch=trainee.best_epoch,
            train_rollouts=len(self.train),
            heldout_rollouts=len(self.heldout),
            holdout_by=holdout_by,
            seconds=time.monotonic() - self.started,
            settings=asdict(self.config),
            interrupted=interrupted,
        )


def _head_reports(
    trainee: _Trainee, values: torch.Tensor, received: torch.Tensor, late: torch.Tensor
) -> dict[str, HeadReport]:
    everywhere, at_end = r_squared(values, received), r_squared(values[late], received[late])
    error = (values - received).square().mean(0)
    constant = received.var(0, correction=0)
    return {
        head.name: HeadReport(
            reward=head.reward or head.name,
            r_squared=float(everywhere[index]),
            r_squared_last_quarter=float(at_end[index]),
            error=float(error[index]),
            constant_error=float(constant[index]),
        )
        for index, head in enumerate(trainee.network.config.heads)
    }


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
