"""One-token continuations of whole sequences, run beside them: how candidates are seen while training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, eq=False)
class Branches:
    """Tokens that could follow some places of B sequences, K at each of P places.

    The row of a branch stands one position behind its place; it sees the sequence up to that place and itself,
    never a sibling. Rows of branches come after the T of the sequences, place by place: row T + p K + k.

    Attributes:
        places: int64 [B, P], the last position of the prefix that a branch continues.
        token_ids: int64 [B, P, K].
    """

    places: torch.Tensor
    token_ids: torch.Tensor

    @property
    def after(self) -> torch.Tensor:
        """int64 [B, P K], the place that each branch continues."""
        return self.places.repeat_interleave(self.token_ids.shape[2], 1)

    def join(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> [B, T + P K], the branches behind the sequences."""
        return torch.cat([token_ids, self.token_ids.flatten(1)], 1)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T + P K, ...] -> [B, T, ...] and [B, P, K, ...]."""
        size = self.token_ids.shape[1:]
        length = rows.shape[1] - size.numel()
        return rows[:, :length], rows[:, length:].unflatten(1, size)


def positions_of(token_ids: torch.Tensor, branches: Branches | None = None) -> torch.Tensor:
    """int64 [B, T] -> the positions of all rows, [B, T] or with branches [B, T + P K]."""
    places = torch.arange(token_ids.shape[1], device=token_ids.device).expand(token_ids.shape)
    return places if branches is None else torch.cat([places, branches.after + 1], 1)


def branch_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    after: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor] | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> torch.Tensor:
    """Attention of branches: each sees the keys up to its place, and its own key where it brings one.

    All branches share one product with the prefix, whose keys are not copied.

    Args:
        query: [B, H, R, D].
        keys, values: of the sequences, [B, KVH, T, D], H a multiple of KVH.
        after: int64 [B, R], the place of each branch.
        own: keys and values of the branches themselves, [B, KVH, R, D] each; None where they bring none.
        window: a branch sees positions above its own less ``window`` only; 0: all.

    Returns:
        [B, H, R, D], with autograd; zeros where nothing is seen.
    """
    groups, rows = query.shape[1] // keys.shape[1], query.shape[2]
    # [B, KVH, G * R, D]: query heads that share a key head are rows of one matrix.
    packed = query.unflatten(1, (-1, groups)).flatten(2, 3)
    scores = (packed @ keys.transpose(-1, -2)).unflatten(2, (groups, rows))
    place, at = torch.arange(keys.shape[2], device=keys.device), after[..., None]
    seen = place <= at
    if window > 0:
        seen &= place > at + 1 - window
    if own is not None:
        mine = (query.unflatten(1, (-1, groups)) * own[0].unsqueeze(2)).sum(-1, keepdim=True)
        scores = torch.cat([scores, mine], -1)
        seen = F.pad(seen, (0, 1), value=True)
    scores = scores.float() * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # A finite floor instead of -inf, so that rows which see nothing are zeros and not NaN.
    seen = seen[:, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1)
    weights = (weights * seen).to(values.dtype)
    length = keys.shape[2]
    result = (weights[..., :length].flatten(2, 3) @ values).unflatten(2, (groups, rows))
    if own is not None:
        result = result + weights[..., length:] * own[1].unsqueeze(2)
    return result.flatten(1, 2)
