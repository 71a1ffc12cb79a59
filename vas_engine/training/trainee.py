"""A network in training: its optimiser, its average, the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch

from vas_engine.errors import NonFiniteError
from vas_engine.training.average import Average
from vas_engine.training.base import FrozenBase
from vas_engine.training.batches import Batch
from vas_engine.training.config import FitConfig
from vas_engine.training.critic import Critic, features_of
from vas_engine.training.distill import Lesson, Teacher
from vas_engine.training.lora import Adapters
from vas_engine.training.loss import consistency_loss, value_loss
from vas_engine.training.report import EpochReport
from vas_engine.training.rollouts import Rollouts
from vas_engine.values.value_model import ValueModel

__all__ = ["Trainee"]

# A value model's falls with its width, as that of matrices must (Yang et al. 2022, table 8).
LR, VALUE_MODEL_LR, LORA_LR = 2e-3, 0.128, 1e-3
# Of the loss on the reward so far, which helps the features only.
GUESS_SHARE = 0.5
# Share of all steps.
CRITIC_WARMUP = 0.3


class Trainee:
    """One network, its rewards and how far it has come.

    Weights in half precision are trained in float32: steps would be lost in their rounding.
    """

    def __init__(
        self,
        base: FrozenBase,
        network: Any,
        rollouts: Rollouts,
        train: Sequence[int],
        config: FitConfig,
        teacher: Teacher | None,
    ) -> None:
        self.base, self.network, self.teacher = base, network, teacher
        self.heads = network.heads
        names = [head.reward or head.name for head in network.config.heads]
        self.rewards = rollouts.rewards(names)
        # What W says is a mean; a distribution that this does not tell is learnt from whole rewards, as is what γ makes
        # of them.
        means = all(head.support is None or head.support.bins == 2 for head in network.config.heads)
        partial = bool(rollouts.header.part_tokens) and means and config.gamma == 1.0
        self.config = config.for_rollouts(partial)
        assert self.config.lam is not None
        self.lam = self.config.lam
        if teacher is not None:
            teacher.columns(self.heads)
        self.shares = [self._teacher_share(index) for index in range(len(names))]
        self.critic: Critic | None = None
        if self._learns_returns and partial and self.lam < 1:
            self.critic = Critic(network, rollouts, train, names, config.seed)
        # Of the returns' errors.
        scales = torch.tensor([head.scale for head in network.config.heads], device=base.device)
        self.unit = scales if self.critic is None else self.critic.std
        self.weights: dict[str, torch.nn.Parameter] = {}
        self.adapters: Adapters | None = None
        self.average: Average | None = None
        self.epochs: list[EpochReport] = []
        self.best_epoch, self.best_score = 0, -math.inf
        self.best: dict[str, torch.Tensor] = {}

    def begin(self, steps: int) -> None:
        """Get ready for that many steps."""
        is_model, rank = isinstance(self.network, ValueModel), self.config.lora_rank
        if rank and is_model:
            self.adapters = Adapters(self.network, rank)
        self.weights = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.parameters = sum(parameter.numel() for parameter in self.weights.values())
        if self.critic is not None:
            self.weights |= {f"critic.{name}": parameter for name, parameter in self.critic.named_parameters()}
        self.dtypes = {name: p.dtype for name, p in self.weights.items()}
        for parameter in self.weights.values():
            parameter.data = parameter.data.float()
        parameters = list(self.weights.values())
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": self.config.weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        default = (LORA_LR if rank else min(VALUE_MODEL_LR / self.heads.width, LR)) if is_model else LR
        self.lr = self.config.lr or default
        self.optimiser = torch.optim.AdamW(groups, lr=self.lr)
        self.total, self.steps = steps, 0
        if self.config.ema:
            self.average = Average(parameters, self.config.ema)

    def _rate(self) -> float:
        """The learning rate of the step to come: up in a line, then down in half a cosine."""
        warmup = max(round(self.config.warmup * self.total), 1)
        if self.steps < warmup:
            return self.lr * (self.steps + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (self.steps - warmup) / max(self.total - warmup, 1)))

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The network as it is validated and kept: the average of its weights where there is one."""
        with self.average.standing_in() if self.average else nullcontext():
            yield

    def step(self, batch: Batch, lesson: Lesson | None) -> float:
        """One update; returns the loss, a mean over positions and heads."""
        branches = lesson.branches if lesson else None
        bootstrap = self._bootstrap(batch)
        with features_of(self.heads) as seen:
            output = self.network.train_values(self.base, batch.token_ids, batch.lengths, branches)
        losses = output.new_zeros(len(self.shares))
        if self._learns_returns:
            states = branches.split(output)[0] if branches else output
            losses = self._returns_loss(batch, states, seen[-1][:, : states.shape[1]].float(), bootstrap)
        if lesson is not None and self.teacher is not None:
            share = losses.new_tensor(self.shares)
            taught = self.teacher.loss(self.heads, output, lesson, batch)
            losses = (1 - share) * losses + self.config.teacher_share * taught
        loss = losses.mean()
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(f"the loss is {float(loss)}: lower lr={self.lr:g} or look for odd rewards")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.config.grad_clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate()
        self.optimiser.step()
        self.steps += 1
        if self.average:
            self.average.update()
        return float(loss.detach())

    def _returns_loss(
        self, batch: Batch, states: torch.Tensor, features: torch.Tensor, bootstrap: torch.Tensor | None
    ) -> torch.Tensor:
        """What the returns say of the output [B, T, O] made of features [B, T, width], one number for each head."""
        heads, config = self.heads, self.config
        if self.critic is None:
            losses = batch.mean(
                value_loss(heads, states, batch.rewards, batch.last, self.lam, config.gamma, bootstrap, config.spread)
            )
        else:
            found = self.critic.losses(heads, states, features, batch, self._critic_lam())
            losses = found.values + found.critic + GUESS_SHARE * found.guesses
        if strength := self._consistency():
            values = heads.mean(states) / self.unit
            losses = losses + strength * batch.mean(consistency_loss(values, batch.last, config.gamma))
        return losses

    def _consistency(self) -> float:
        """Weight of the consistency loss in the step to come: what the learning rate has fallen by since its peak."""
        fallen = self.steps >= self.config.warmup * self.total
        assert self.config.consistency is not None
        return self.config.consistency * (1 - self._rate() / self.lr) if fallen else 0.0

    def _critic_lam(self) -> float:
        """λ in the step to come: down from 1 in a line, as the critic becomes worth bootstrapping from."""
        return 1 - (1 - self.lam) * min(self.steps / (CRITIC_WARMUP * self.total), 1.0)

    def _teacher_share(self, index: int) -> float:
        """Of a head: a distribution that the teacher does not know is learnt from the returns all the same."""
        if self.teacher is None:
            return 0.0
        returns = self.heads.distributional[index] and not self.teacher.knows_distribution(self.heads, index)
        return 0.0 if returns else self.config.teacher_share

    @property
    def _learns_returns(self) -> bool:
        return min(self.shares) < 1.0

    @torch.no_grad()
    def _bootstrap(self, batch: Batch) -> torch.Tensor | None:
        """The target network's output; None for the network's own, or where nothing is bootstrapped from it."""
        if self.average is None or self.lam == 1.0 or self.critic is not None or not self._learns_returns:
            return None
        with self.average.standing_in():
            return self.network.train_values(self.base, batch.token_ids, batch.lengths)

    @torch.no_grad()
    def predict(self, batch: Batch, lesson: Lesson | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """V in the rewards' units, float32: of all states [B, T, M] and of a lesson's candidates [B, P, K, M]."""
        branches = lesson.branches if lesson else None
        values = self.heads.mean(self.network.train_values(self.base, batch.token_ids, batch.lengths, branches))
        return (values, None) if branches is None else branches.split(values)

    def finish_epoch(self, epoch: EpochReport) -> None:
        """Note how the epoch went, and keep the weights if it was the best."""
        self.epochs.append(epoch)
        scores = epoch.agreement or epoch.efficiency or epoch.r_squared
        if sum(scores.values()) > self.best_score:
            self.best_epoch, self.best_score = epoch.epoch, sum(scores.values())
            with self.judged():
                self.best = {name: p.detach().clone() for name, p in self.weights.items()}

    def restore_best(self) -> None:
        """The best epoch's weights, for good."""
        for name, tensor in self.best.items():
            self.weights[name].data.copy_(tensor)
        self.average = None

    def end(self, keep: bool) -> None:
        """The network in its own dtype and with its own modules again; adapters leave a trace only if ``keep``."""
        for name, parameter in self.weights.items():
            parameter.data = parameter.data.to(self.dtypes[name])
        if self.adapters is not None:
            self.adapters.remove(merge=keep)

    # -- to be put away and taken up again

    def progress(self) -> dict[str, Any]:
        """Plain JSON values: all but the tensors."""
        return {
            "best_epoch": self.best_epoch,
            "best_score": self.best_score,
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "average_steps": self.average.steps if self.average else 0,
            "steps": self.steps,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, their average, the best ones, and the optimiser's state."""
        tensors = {f"weights.{name}": p.detach() for name, p in self.weights.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        if self.average:
            pairs = zip(self.weights, self.average.tensors, strict=True)
            tensors |= {f"average.{name}": tensor for name, tensor in pairs}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{key}": value for key, value in state.items()}
        return tensors

    def resume(self, progress: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `progress` and `tensors` gave, after `begin`."""
        self.best_epoch, self.best_score = progress["best_epoch"], progress["best_score"]
        self.epochs = [EpochReport(**epoch) for epoch in progress["epochs"]]
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "best": {}, "average": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        for name, parameter in self.weights.items():
            parameter.data.copy_(parts["weights"][name])
        device = next(iter(self.weights.values())).device
        self.best = {name: tensor.to(device) for name, tensor in parts["best"].items()}
        if self.average:
            self.average.steps = progress["average_steps"]
            for name, tensor in zip(self.weights, self.average.tensors, strict=True):
                tensor.copy_(parts["average"][name])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.steps = progress["steps"]
