"""The guided policy of one step, where only the most probable tokens are known."""

from __future__ import annotations

import math

import numpy as np

from vas_engine.params import SamplingParams


class Policy:
    """pi over the candidates C and the tail: pi(a) = pi0(a) exp T(a) / Z, Z the sum over C plus the tail's mass.

    Args:
        log_probs: log pi0 of the candidates at temperature 1, as the endpoint says.
        tilt: T of the candidates.

    Attributes:
        scores: what Gumbel noise is added to.
        log_z: log Z. tail_log_mass: log of the mass of everything else. kl: KL(pi || pi0) in nats.
    """

    def __init__(self, log_probs: np.ndarray, tilt: np.ndarray, params: SamplingParams) -> None:
        self.tilt = tilt
        heat = params.temperature or 1.0
        base = log_probs / heat
        mass = 0.0
        if params.tail == "keep":
            mass = max(1.0 - float(np.exp(log_probs).sum()), 0.0)
        elif heat != 1.0:
            base = base - np.logaddexp.reduce(base)  # over the candidates alone: the rest at this heat is not known
        self.scores = base + tilt
        self.mass = mass
        self.tail_log_mass = math.log(mass) if mass > 0 else -math.inf
        self.log_z = float(np.logaddexp(np.logaddexp.reduce(self.scores), self.tail_log_mass))
        policy = np.exp(self.scores - self.log_z)
        self.kl = float(policy @ (tilt - self.log_z)) - mass * math.exp(-self.log_z) * self.log_z

    def tail_chance(self, outside: bool) -> float:
        """Probability of leaving this step to the tail, given whether the endpoint's own draw is outside of C.

        pi(tail) = mass / Z. Where Z >= 1 a draw that is outside is kept with probability 1 / Z; where Z < 1 it always
        is, and of the draws inside as many more are given to the tail as pi wants.
        """
        z = math.exp(self.log_z)
        if outside:
            return min(1.0, 1.0 / z)
        inside = 1.0 - self.mass
        return max(self.mass / z - self.mass, 0.0) / inside if inside > 0 else 0.0
