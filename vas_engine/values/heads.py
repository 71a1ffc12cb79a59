"""Heads: from a network's last row of features to values in the reward's units."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vas_engine.errors import InvalidArgumentError
from vas_engine.kernels.reference import HeadWeights
from vas_engine.values.config import HeadConfig, Support, ValueConfig

# Zero rows (the hidden state of the empty prefix) stay zero; states of ordinary size are not changed by it.
NORM_EPS = 1e-6

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
}


def rms_norm(x: Tensor) -> Tensor:
    """Divides by the root mean square over the last dimension; the gains sit in the projection that follows."""
    return F.rms_norm(x, (x.shape[-1],), None, NORM_EPS)


def initialise(linear: nn.Linear, gain: float = 1.0) -> nn.Linear:
    """Normal weights of standard deviation ``gain / sqrt(inputs)``, zero bias."""
    nn.init.normal_(linear.weight, std=gain / math.sqrt(linear.in_features))
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    """The layer in its own dtype, whatever the dtype of x; the result keeps it."""
    return linear(x.to(linear.weight.dtype))


class Heads(nn.Module):
    """All heads of one network: a norm, a hidden layer they share, one linear output.

    Args:
        config: settings of the network.
        width: features of a row.
    """

    def __init__(self, config: ValueConfig, width: int) -> None:
        super().__init__()
        self.configs: tuple[HeadConfig, ...] = config.heads
        self.norm = config.head_norm
        self.activation = ACTIVATION_FUNCTIONS[config.activation]
        self.hidden = initialise(nn.Linear(width, config.head_hidden)) if config.head_hidden else None
        # Small outputs at the start: every value begins close to its head's mean.
        self.width = width
        self.output = initialise(nn.Linear(config.head_hidden or width, config.outputs), gain=0.1)
        self._weights: tuple[tuple[int, ...], HeadWeights] | None = None
        self.slices: list[slice] = []
        start = 0
        for head in self.configs:
            self.slices.append(slice(start, start + head.outputs))
            start += head.outputs
        for index, head in enumerate(self.configs):
            if head.support is not None:
                atoms = torch.linspace(head.support.min, head.support.max, head.support.bins, dtype=torch.float64)
                self.register_buffer(f"atoms_{index}", atoms.float(), persistent=False)

    @property
    def weights(self) -> HeadWeights:
        """As kernels read them; made again when a tensor has moved (one that only changed is shared)."""
        key = tuple(p.data_ptr() for p in self.parameters())
        if self._weights is None or self._weights[0] != key:
            self._weights = key, HeadWeights.of(self)
        return self._weights[1]

    @property
    def names(self) -> list[str]:
        """Names of the heads, in the order of the columns of ``mean``."""
        return [head.name for head in self.configs]

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """Interval each head's V can never leave, ``(-inf, inf)`` where there is none. The reward's units."""
        return [head.interval for head in self.configs]

    @property
    def distributional(self) -> list[bool]:
        """Which heads know the distribution of returns (and so the optimal tilt)."""
        return [head.distributional for head in self.configs]

    def forward(self, features: Tensor) -> Tensor:
        """Raw outputs.

        Args:
            features: [..., width], any floating dtype.

        Returns:
            [..., O] float32: per head one raw number, or the logits of its atoms. ``mean`` and ``utility``
                read it.
        """
        x = features
        if self.norm:
            x = rms_norm(x)
        if self.hidden is not None:
            x = self.activation(project(self.hidden, x))
        return project(self.output, x).float()

    def atoms(self, index: int) -> Tensor:
        """Atoms of a distributional head, float32 [bins]."""
        return getattr(self, f"atoms_{index}")

    def _mean(self, index: int, raw: Tensor) -> Tensor:
        head = self.configs[index]
        if head.support is not None:
            # A convex sum can round past the last atom; bounds are promised.
            return (torch.softmax(raw, -1) @ self.atoms(index)).clamp(head.support.min, head.support.max)
        raw = raw[..., 0]
        if head.bounds is not None:
            low, high = head.bounds
            # lerp reaches both ends exactly, so the bounds hold in floating point too.
            return torch.lerp(raw.new_tensor(low), raw.new_tensor(high), torch.sigmoid(raw))
        if head.mean == 0.0 and head.std == 1.0:
            return raw
        return raw * head.std + head.mean

    def mean(self, output: Tensor) -> Tensor:
        """V of every head.

        Args:
            output: [..., O] float32 from ``forward``.

        Returns:
            [..., M] float32 in the reward's units: ``sum p z`` for a distributional head.
        """
        if len(self.configs) == 1:
            return self._mean(0, output).unsqueeze(-1)
        return torch.stack([self._mean(i, output[..., part]) for i, part in enumerate(self.slices)], -1)

    def utility(self, output: Tensor, weights: Tensor, optimal: Tensor | None, checked: bool = False) -> Tensor:
        """What the tilt adds up: the utility of each row's state under the request's weights.

        ``tilt="mean"`` gives w V. ``tilt="optimal"`` gives log E[exp(w R)] (Zhou et al., Q#, 2025), the
        exact solution of the KL-regularised problem, from a distributional head: ``logsumexp(log p + w z)``.

        Args:
            output: [R, O] float32 from ``forward``.
            weights: [R, M] float, one weight a head (0: the request does not use it).
            optimal: bool [R], rows that ask for the optimal tilt; None: no row does.
            checked: no row asks for that of a scalar head, which else is looked at, and waited for on a GPU.

        Returns:
            [R, M] float32, in nats.

        Raises:
            InvalidArgumentError: the optimal tilt of a scalar head.
        """
        weights = weights.to(output.dtype)
        utilities = self.mean(output) * weights
        if optimal is None:
            return utilities
        for index, part in enumerate(self.slices):
            head, weight = self.configs[index], weights[..., index]
            if head.distributional:
                log_p = torch.log_softmax(output[..., part], -1)
                exact = torch.logsumexp(log_p + weight.unsqueeze(-1) * self.atoms(index), -1)
                utilities[..., index] = torch.where(optimal, exact, utilities[..., index])
            elif not checked and bool((optimal & (weight != 0)).any()):
                fix = f"head {head.name!r} is scalar; use tilt='mean' or a distributional head"
                raise InvalidArgumentError("tilt", "optimal", fix)
        return utilities

    def loss(self, output: Tensor, targets: Tensor, sigma: float = 0.0) -> Tensor:
        """Training loss of every row and head, unreduced, differentiable.

        Scalar heads: half the squared error in units of the head's ``std`` (of the interval's width for a bounded one).
        Distributional heads: cross-entropy to the target spread over its neighbouring atoms.

        Args:
            output: [..., O] float32 from ``forward``.
            targets: [..., M] float, in the reward's units.
            sigma: see ``spread``.

        Returns:
            [..., M] float32.
        """
        losses = []
        for index, (head, part) in enumerate(zip(self.configs, self.slices, strict=True)):
            target = targets[..., index].to(output.dtype)
            if head.support is not None:
                log_p = torch.log_softmax(output[..., part], -1)
                losses.append(-(self.spread(index, target, sigma) * log_p).sum(-1))
                continue
            error = self._mean(index, output[..., part]) - target
            losses.append(0.5 * (error / head.scale).square())
        return torch.stack(losses, -1)

    def spread(self, index: int, target: Tensor, sigma: float = 0.0) -> Tensor:
        """A target as probabilities of the atoms: two-hot, or with ``sigma`` a Gaussian around it (HL-Gauss).

        Args:
            index: a distributional head.
            target: [...] float, the reward's units.
            sigma: of that Gaussian, in steps between atoms.

        Returns:
            [..., bins] probabilities.
        """
        return self.hl_gauss(index, target, sigma) if sigma else self.two_hot(index, target)

    def hl_gauss(self, index: int, target: Tensor, sigma: float) -> Tensor:
        """A Gaussian around each target, integrated over the atoms' bins and truncated to all of them (Imani and
        White 2018, section 3; Farebrother et al. 2024, equation 4).

        Neighbouring atoms share what one sample teaches, unlike in ``two_hot``. The mean is kept where the support
        reaches some three sigmas beyond the target; targets are clipped to the support.

        Args:
            index: a distributional head.
            target: [...] float, the reward's units.
            sigma: standard deviation in steps between atoms.

        Returns:
            [..., bins] probabilities.
        """
        support = self._support(index)
        step = (support.max - support.min) / (support.bins - 1)
        place = ((target - support.min) / step).clamp(0, support.bins - 1).unsqueeze(-1)
        edges = torch.arange(support.bins + 1, dtype=target.dtype, device=target.device) - 0.5
        below = torch.special.ndtr((edges - place) / sigma)
        return below.diff() / (below[..., -1:] - below[..., :1])

    def two_hot(self, index: int, target: Tensor) -> Tensor:
        """Splits targets over their two neighbouring atoms so that the mean is kept; clipped to the support.

        Args:
            index: a distributional head.
            target: [...] float, the reward's units.

        Returns:
            [..., bins] probabilities.
        """
        support = self._support(index)
        step = (support.max - support.min) / (support.bins - 1)
        place = ((target - support.min) / step).clamp(0, support.bins - 1)
        lower = place.floor().clamp(max=support.bins - 2)
        fraction = (place - lower).unsqueeze(-1)
        lower = lower.long().unsqueeze(-1)
        result = torch.zeros(*target.shape, support.bins, dtype=target.dtype, device=target.device)
        result.scatter_(-1, lower, 1 - fraction)
        return result.scatter_(-1, lower + 1, fraction)

    def _support(self, index: int) -> Support:
        support = self.configs[index].support
        if support is None:
            raise InvalidArgumentError("index", index, "this head is scalar and has no atoms")
        return support
