"""What the engine asks of anything that values candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vas_engine.errors import InvalidArgumentError
from vas_engine.values.config import HeadConfig, ValueConfig
from vas_engine.values.heads import Heads

if TYPE_CHECKING:
    from vas_engine.model.batch import AttentionBatch
    from vas_engine.model.branches import Branches
    from vas_engine.model.cache import KVCache, LayerShape
    from vas_engine.model.lm import CausalLM
    from vas_engine.params import SamplingParams


@runtime_checkable
class Scorer(Protocol):
    """A value network or value model.

    A *row* is one token with its place: a candidate, or a token of the prompt on its way into the network's own pages.
    The row of token a behind state s stands at position len(s).
    """

    config: ValueConfig
    heads: Heads

    @property
    def input(self) -> str:
        """ "action", "lookahead" or "token"; says which hidden states ``score`` wants."""

    @property
    def states(self) -> tuple[int, ...]:
        """Hidden-state indices of the base model it reads, in the order they are concatenated."""

    @property
    def cache(self) -> KVCache | None:
        """Its own pages; None when it has none or before ``allocate``."""

    @property
    def cache_layers(self) -> list[LayerShape]:
        """What its own pages hold per token; empty when it has none."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of its own pages."""

    @property
    def max_model_len(self) -> int:
        """Positions it was made for; those of its base model where it has no limit of its own."""

    def bind(self, lm: CausalLM, tokenizer: Any | None = None) -> Any:
        """Ties it to the base model it was made for and gets it ready to score; returns itself."""

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Makes its own pages, addressed by the base model's block tables; nothing for a network without any."""

    def compile(self) -> None:
        """Has rows run code of torch.compile from now on."""

    def score(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Head output of rows: ``served_heads`` of their ``features``.

        Args:
            token_ids: int64 [R].
            hidden: [N, len(states) * H], the chosen hidden states side by side: those *before* the row's
                token for input "action" (zeros where the prefix is empty), those *after* it for "lookahead",
                None for "token".
            hidden_index: int64 [R], which line of ``hidden`` belongs to a row.
            batch: places of the rows; slotted rows leave their K/V in the network's own pages, unslotted
                ones wait for ``commit``.
            rows: int64 [n], rows whose head output is wanted; None for all.

        Returns:
            [R or n, O] float32; ``heads`` turns it into values.
        """

    def features(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the heads read of rows, [R or n, width]; arguments as ``score``'s, for kernels that have the heads in
        them.
        """

    @property
    def version(self) -> tuple:
        """Another one whenever what ``features`` reads, or ``served_heads``, lies elsewhere than before."""

    @property
    def served_heads(self) -> Heads:
        """The heads in the dtypes that rows are computed with."""

    def commit(self, rows: Tensor, slots: Tensor) -> None:
        """Own K/V of unslotted rows (int64 [n]) of the last ``score`` to slots (int64 [n]); nothing without pages."""

    def train_values(self, lm: CausalLM, tokens: Tensor, lengths: Tensor, branches: Branches | None = None) -> Tensor:
        """Head output [B, T, O] float32 with autograd; entry p values the state ``tokens[:p + 1]``.

        With branches [B, T + P K, O]: the entries behind the T value what these continue, place by place.
        """


def value_heads(scorers: Mapping[str, Scorer]) -> dict[str, dict[str, HeadConfig]]:
    """The heads of each network by what weights call them: by the network's name, those of several heads "name.head",
    those of a network under the empty name by their own.

    Raises:
        InvalidArgumentError: two values of one name.
    """
    found: dict[str, dict[str, HeadConfig]] = {}
    taken: set[str] = set()
    for name, scorer in scorers.items():
        heads = scorer.config.heads
        own = [head.name if not name else name if len(heads) == 1 else f"{name}.{head.name}" for head in heads]
        for value in own:
            if value in taken:
                raise InvalidArgumentError("values", value, "two networks give this name; load one under another")
            taken.add(value)
        found[name] = dict(zip(own, heads, strict=True))
    return found


def check_tilt(params: SamplingParams, heads: Mapping[str, HeadConfig]) -> None:
    """Raises InvalidArgumentError for the optimal tilt of a scalar head; `heads`: value name -> head, of all loaded."""
    for name, weight in (params.values or {}).items():
        if params.tilt == "optimal" and weight and not heads[name].distributional:
            fix = f"value {name!r} has a scalar head; use tilt='mean' or train it --distributional"
            raise InvalidArgumentError("tilt", params.tilt, fix)
