"""Settings of a fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError

__all__ = ["LOSSES", "FitConfig"]

LOSSES = ("two-hot", "hl-gauss")
CRITIC_LAM, CRITIC_CONSISTENCY = 0.8, 50.0


@dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        epochs: most passes over the rollouts.
        batch_tokens: padded tokens of a batch.
        lr: peak learning rate, after ``warmup`` (a share of all steps) and before a cosine down to 0. None: 2e-3; for
            a value model 0.128 / its width and at most 2e-3 (a whole language model wants smaller steps the wider it
            is), 1e-3 for its LoRA.
        weight_decay: of matrices; biases and gains have none.
        lam: λ of TD(λ); 1 is Monte Carlo. With partial rewards in the rollouts the returns bootstrap from a critic
            that knows them (see `vas_engine.training.critic`), from part to part. None: 0.8 there, else 1.
        gamma: discount per token; below 1 partial rewards are left aside.
        consistency: weight of the one-step consistency of V beside the returns (see
            `vas_engine.training.loss.consistency_loss`), reached as the learning rate falls: large steps and a strong
            bootstrap lead astray. None: 50 with a critic, else 0.
        loss: of distributional heads: "two-hot", or "hl-gauss" with ``sigma`` in steps between atoms (Farebrother
            et al. 2024 found 0.75 to do well).
        ema: decay per step of a moving average of the weights. The average gives the predictions that TD(λ < 1)
            bootstraps from (the target network; with partial rewards the critic is it), and is what is validated and
            kept. 0: none, None: 0.99 where λ < 1, else none.
        lora_rank: train value models by low-rank adapters of this rank, merged at the end; None: whole.
        teacher_share: share of the loss that comes from the teacher, where there is one; the rest is TD(λ).
        teacher_positions: states of each response at which the teacher scores candidates, drawn anew each time.
        teacher_candidates: how many of the base model's most probable tokens it scores there.
        teacher_temperature: of the base model's probabilities that weigh candidates. Guided policies take tokens
            that the base finds less likely, hence above 1.
        holdout: share of the rollouts held out.
        holdout_by: "prompt", "sample" or "auto" (see `vas_engine.training.batches.split`).
        patience: stop after this many epochs without a better held-out score; None never stops early.
        grad_clip: largest norm of a gradient.
        ratio_clip: largest importance weight of a state whose rollout carries log-ratios (see
            `vas_engine.training.returns.importance_weights`).
        cache_memory: bytes, or a text such as "1GiB", that what is read of the base model may take; it is then run
            once for all epochs instead of in each. 0: never kept.
        keep_on_interrupt: on Ctrl-C end as if the epochs were over, with the best so far; else it is raised.
    """

    epochs: int = 4
    batch_tokens: int = 2048
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.05
    lam: float | None = None
    gamma: float = 1.0
    consistency: float | None = None
    loss: str = "two-hot"
    sigma: float = 0.75
    ema: float | None = None
    lora_rank: int | None = None
    teacher_share: float = 1.0
    teacher_positions: int = 8
    teacher_candidates: int = 20
    teacher_temperature: float = 2.0
    holdout: float = 0.1
    holdout_by: str = "auto"
    seed: int = 0
    patience: int | None = None
    grad_clip: float = 1.0
    ratio_clip: float = 10.0
    cache_memory: int | str = "1GiB"
    keep_on_interrupt: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "patience", "lora_rank", "teacher_positions", "teacher_candidates"):
            if getattr(self, name) is not None:
                arguments.integer(name, getattr(self, name), 1)
        for name in ("lr", "grad_clip", "sigma", "teacher_temperature", "ratio_clip"):
            if getattr(self, name) is not None:
                arguments.real(name, getattr(self, name), 0, above_low=True)
        for name in ("lam", "gamma", "warmup", "teacher_share"):
            if getattr(self, name) is not None:
                arguments.real(name, getattr(self, name), 0, 1)
        for name in ("weight_decay", "consistency"):
            if getattr(self, name) is not None:
                arguments.real(name, getattr(self, name), 0)
        arguments.choice("loss", self.loss, LOSSES)
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InvalidArgumentError("ema", self.ema, "give a decay from 0 (none) to below 1, such as 0.99")
        if not 0 < self.holdout < 1:
            raise InvalidArgumentError("holdout", self.holdout, "give a share between 0 and 1")
        arguments.size_in_bytes("cache_memory", self.cache_memory, least=0)

    @property
    def spread(self) -> float:
        """The ``sigma`` of `Heads.loss`: 0 for two-hot."""
        return self.sigma if self.loss == "hl-gauss" else 0.0

    def for_rollouts(self, partial: bool) -> FitConfig:
        """With the defaults that depend on whether rollouts have partial rewards worked out: `lam`, `ema` and
        `consistency`."""
        lam = self.lam if self.lam is not None else (CRITIC_LAM if partial else 1.0)
        ema = self.ema if self.ema is not None else (0.99 if lam < 1 else 0.0)
        default = CRITIC_CONSISTENCY if partial and lam < 1 else 0.0
        consistency = self.consistency if self.consistency is not None else default
        return replace(self, lam=lam, ema=ema, consistency=consistency)

    @property
    def cache_bytes(self) -> int:
        return arguments.size_in_bytes("cache_memory", self.cache_memory, least=0)
