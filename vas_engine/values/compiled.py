"""What a value network computes, through torch.compile.

As in the base model's compiled code attention is an operator that the compiler does not look into; it finds what the
rows see by the handle that comes along.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vas_engine.model.compiled import CompiledFunction
from vas_engine.model.handles import find, handle_of
from vas_engine.values.layers import PagedAttention, split_heads

if TYPE_CHECKING:
    from vas_engine.model.lm import CausalLM
    from vas_engine.values.network import ServedWeights


class CompiledWeights:
    """Weights of a network with code made for them as they are now; rows go through it as through `ServedWeights`.

    Args:
        served: the weights. lm: the base model. states: of a row, so many hidden states. width: of a row, inside.

    Raises:
        VASError: torch.compile does not work here.
    """

    def __init__(self, served: ServedWeights, lm: CausalLM, states: int, width: int) -> None:
        self.version = served.version
        self.attention: PagedAttention | None = None
        handle = handle_of(self)

        def project(given: Tensor) -> Tensor:
            return served.project(given[0])[None]

        def run(x: Tensor, positions: Tensor) -> Tensor:
            places = served.places(positions[0])
            rows = x[0] if places is None else x[0] + places
            return served.run(rows, _OperatorAttention(lm, positions[0], handle))[None]

        self._project, self._run = CompiledFunction(project), CompiledFunction(run)
        self._outputs = CompiledFunction(served.outputs)
        self._dtype, device = lm.dtype, lm.device
        row = torch.zeros(1, 1, width, device=device)
        self._project.compile(torch.zeros(1, 1, states, lm.hidden_size, dtype=self._dtype, device=device))
        self._run.compile(row, torch.zeros(1, 1, dtype=torch.int64, device=device))
        self._outputs.compile(row)

    def project(self, states: Tensor) -> Tensor:
        """See `ServedWeights`."""
        # The code reads memory as what it was compiled for, without looking.
        return self._project(states[None].to(self._dtype))[0]

    def places(self, positions: Tensor) -> None:
        """Nothing: `run` adds them."""

    def run(self, x: Tensor, attention: PagedAttention) -> Tensor:
        """See `ServedWeights`."""
        self.attention = attention
        try:
            return self._run(x[None], attention.positions[None].long())[0]
        finally:
            self.attention = None

    def outputs(self, features: Tensor) -> Tensor:
        """See `ServedWeights`."""
        return self._outputs(features[None])[0]


class _OperatorAttention(PagedAttention):
    """Rows over pages, as the compiler sees them."""

    def __init__(self, lm: CausalLM, positions: Tensor, handle: Tensor) -> None:
        self.lm, self.positions, self.handle = lm, positions, handle
        self.known: dict[Any, Any] = {}

    def attend(self, index: int, q: Tensor, v: Tensor | None = None) -> Tensor:
        return torch.ops.vas_engine.network_attention(q, v, self.handle, index)


def _operator(q: Tensor, v: Tensor | None, handle: Tensor, index: int) -> Tensor:
    """As `PagedAttention.attend`; a tensor of its own."""
    attention: PagedAttention | None = find(handle).attention
    if attention is None:  # while code is compiled
        return torch.zeros_like(_queries(q, v), memory_format=torch.contiguous_format)
    return attention.attend(index, q, v).contiguous()


def _operator_shape(q: Tensor, v: Tensor | None, handle: Tensor, index: int) -> Tensor:
    return q.new_empty(_queries(q, v).shape)


def _queries(q: Tensor, v: Tensor | None) -> Tensor:
    """Without the keys that stand behind them where there are values."""
    return q if v is None else split_heads(q, v)[0]


_library = torch.library.Library("vas_engine", "FRAGMENT")
_library.define("network_attention(Tensor q, Tensor? v, Tensor handle, int index) -> Tensor")
_library.impl("network_attention", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("vas_engine::network_attention", _operator_shape, lib=_library)
