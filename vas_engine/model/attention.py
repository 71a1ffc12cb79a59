"""The attention function that Hugging Face's modules call, and what it keeps on them.

One function is registered with transformers under :data:`IMPLEMENTATION`. No mask is built for it: a name
that the mask interface does not know skips that work, and the rows' batch says what each row sees. Its
state hangs on the attention modules, so any number of models can be loaded side by side.

Compiled code calls the same paged attention as an operator, ``vas_engine::paged_attention``, that the compiler
does not look into. It finds the state by the handle that comes along, so models of one shape share what is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from vas_engine.errors import UnsupportedModelError, VASError
from vas_engine.model.backend import PagedLayer
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.branches import Branches, branch_attention
from vas_engine.model.handles import find, handle_of

IMPLEMENTATION = "vas_engine"
_STATE = "_vas_layer"

# Arguments that carry nothing this function would have to honour, or that are honoured by their own name.
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)


@dataclass(frozen=True)
class LayerSpec:
    """Attention of one layer, as its module calls it."""

    num_heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    """0: none."""
    window: int
    """A row at position p sees keys at positions above p - window; 0: all of them."""


@dataclass(eq=False)
class Probed:
    """What a recording call saw."""

    module: nn.Module
    spec: LayerSpec
    query: torch.Tensor
    """[R, H, D], rotated."""


class AttentionState:
    """State of one loaded model, shared by its attention modules.

    Attributes:
        mode: "off", "probe" (records), "paged" (rows of a batch over pages), "compiled" (the same, by the
            operator) or "dense" (whole sequences, causal).
        batch: the rows of the running forward, modes "paged" and "compiled"; None while code is compiled.
        branches: rows behind those of the sequences, mode "dense"; None without any.
        layers: index -> what that attention module knows, once the probe has found them.
        scratch: keys and values [R, KVH, D] per layer of the last forward that had unslotted rows.
        kept: layer -> (keys, values) [B, KVH, T, D] of a dense forward, for the layers in ``keep``.
    """

    def __init__(self) -> None:
        self.mode = "off"
        self.batch: AttentionBatch | None = None
        self.branches: Branches | None = None
        self.pages: list[PagedLayer] = []
        self.scratch: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.keep: frozenset[int] = frozenset()
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.probed: list[Probed] = []
        self.layers: list[LayerState] = []
        self.handle = handle_of(self)

    @contextmanager
    def running(
        self, mode: str, batch: AttentionBatch | None = None, branches: Branches | None = None
    ) -> Iterator[None]:
        self.mode, self.batch, self.branches = mode, batch, branches
        try:
            yield
        finally:
            self.mode, self.batch, self.branches = "off", None, None


class LayerState:
    """What one attention module knows: its model's state, its place in the stack, its spec (after the probe)."""

    __slots__ = ("index", "spec", "state")

    def __init__(self, state: AttentionState) -> None:
        self.state = state
        self.index = -1
        self.spec: LayerSpec | None = None


def attach(model: nn.Module, state: AttentionState) -> None:
    """Hangs the state on every module of the model that could be an attention module; the probe tells which are."""
    for module in model.modules():
        object.__setattr__(module, _STATE, LayerState(state))


def detach(module: nn.Module) -> None:
    """Takes the state off a module that is none."""
    module.__dict__.pop(_STATE, None)


def layer_state(module: nn.Module) -> LayerState:
    found = getattr(module, _STATE, None)
    if found is None:
        raise VASError(
            f"{type(module).__name__} uses attn_implementation={IMPLEMENTATION!r} but was not loaded by CausalLM.load"
        )
    return found


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query [B, H, S, D], key and value [B, KVH, S, D] -> ([B, S, H, D], None)."""
    layer = layer_state(module)
    state = layer.state
    if state.mode == "paged":
        return _paged(layer, state, query[0], key[0], value[0]), None
    if state.mode == "compiled":
        return torch.ops.vas_engine.paged_attention(query, key, value, state.handle, layer.index), None
    if state.mode == "dense":
        return _dense(layer, state, query, key, value, dropout), None
    if state.mode == "probe":
        return _record(module, state, query, key, value, attention_mask, scaling, dropout, kwargs), None
    raise VASError("a model loaded by CausalLM.load is run by its forward() or dense(), not by calling the module")


def _paged(
    layer: LayerState, state: AttentionState, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    batch, spec = state.batch, layer.spec
    assert batch is not None
    assert spec is not None
    key, value = key.transpose(0, 1), value.transpose(0, 1)
    if batch.has_unslotted:
        state.scratch[layer.index] = (key, value)
    out = state.pages[layer.index].attend(
        query.transpose(0, 1), key, value, batch, spec.scale, spec.softcap, spec.window
    )
    return out.unsqueeze(0)


def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, handle: torch.Tensor, layer: int
) -> torch.Tensor:
    """query [1, H, R, D], key and value [1, KVH, R, D] -> a tensor of its own, [1, R, H, D]."""
    state: AttentionState = find(handle)
    if state.batch is None:
        return torch.zeros_like(query).transpose(1, 2).contiguous()
    return _paged(state.layers[layer], state, query[0], key[0], value[0]).contiguous()


def _operator_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, handle: torch.Tensor, layer: int
) -> torch.Tensor:
    batch, heads, rows, dim = query.shape
    return query.new_empty((batch, rows, heads, dim))


def _dense(
    layer: LayerState,
    state: AttentionState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
) -> torch.Tensor:
    if layer.index in state.keep:
        state.kept[layer.index] = (key, value)
    spec, branches = layer.spec, state.branches
    assert spec is not None
    if branches is None:
        return dense_attention(query, key, value, spec, dropout).transpose(1, 2)
    # Dropout on the weights of branches is left out: they are scored, hardly ever trained through.
    sizes = [query.shape[2] - branches.after.shape[1], branches.after.shape[1]]
    (q, b_q), (k, b_k), (v, b_v) = (x.split(sizes, 2) for x in (query, key, value))
    there = branch_attention(b_q, k, v, branches.after, (b_k, b_v), spec.scale, spec.softcap, spec.window)
    return torch.cat([dense_attention(q, k, v, spec, dropout), there], 2).transpose(1, 2)


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: LayerSpec, dropout: float = 0.0
) -> torch.Tensor:
    """Causal attention of whole sequences, [B, H, T, D] -> [B, H, T, D], with autograd."""
    share = query.shape[1] // key.shape[1]
    length = query.shape[2]
    windowed = 0 < spec.window < length
    if not windowed and not spec.softcap:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=spec.scale, enable_gqa=share > 1
        )
    place = torch.arange(length, device=query.device)
    seen = place[None, :] <= place[:, None]
    if windowed:
        seen &= place[None, :] > place[:, None] - spec.window
    if not spec.softcap:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, dropout_p=dropout, scale=spec.scale, enable_gqa=share > 1
        )
    key, value = key.repeat_interleave(share, dim=1), value.repeat_interleave(share, dim=1)
    scores = query @ key.transpose(-1, -2) * spec.scale
    scores = (spec.softcap * torch.tanh(scores / spec.softcap)).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return F.dropout(weights, p=dropout) @ value


def _refuse(module: nn.Module, feature: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__}: {feature} is an attention feature that this engine does not honour; "
        "use a model without it"
    )


def _record(
    module: nn.Module,
    state: AttentionState,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Notes what the module asks for; every row sees itself alone, so the answer is its value."""
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None and given is not False:
            raise _refuse(module, f"{name!r}")
    if attention_mask is not None:
        raise _refuse(module, "an attention mask of its own")
    if dropout:
        raise _refuse(module, f"dropout={dropout} outside of training")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise _refuse(module, "attention that is not causal")
    if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        sizes = f"queries of {query.shape[-1]}, keys of {key.shape[-1]}, values of {value.shape[-1]} numbers"
        raise _refuse(module, f"heads of unequal size ({sizes})")
    if key.shape[2] != query.shape[2]:
        raise _refuse(module, "keys of other tokens than the queries' (cross attention)")
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[-1]
    spec = LayerSpec(
        num_heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        scale=float(scaling) if scaling is not None else dim**-0.5,
        softcap=float(kwargs.get("softcap") or 0.0),
        window=int(kwargs.get("sliding_window") or 0),
    )
    state.probed.append(Probed(module, spec, query[0].transpose(0, 1)))
    return value.repeat_interleave(heads // kv_heads, dim=1).transpose(1, 2)


# Defined directly rather than by torch.library.custom_op, whose wrapper costs more than a small attention.
# Pages are written behind the compiler's back: it neither drops nor moves a call whose output is used.
_library = torch.library.Library("vas_engine", "DEF")
_library.define("paged_attention(Tensor query, Tensor key, Tensor value, Tensor handle, int layer) -> Tensor")
_library.impl("paged_attention", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("vas_engine::paged_attention", _operator_shape, lib=_library)

AttentionInterface.register(IMPLEMENTATION, attention_forward)
