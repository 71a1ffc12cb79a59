"""A value network: input projection, layers, heads."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vas_engine.errors import InvalidArgumentError, VASError
from vas_engine.kernels import function
from vas_engine.model.branches import Branches, positions_of
from vas_engine.model.cache import KVCache, LayerShape
from vas_engine.model.compiled import MAX_ROWS
from vas_engine.values.base import base_fingerprint, check_base
from vas_engine.values.compiled import CompiledWeights
from vas_engine.values.config import PLACE_FEATURES, ValueConfig
from vas_engine.values.heads import Heads, rms_norm
from vas_engine.values.layers import Attention, DenseAttention, PagedAttention, ReaderLayer, Rotary, SideLayer

if TYPE_CHECKING:
    from vas_engine.model.batch import AttentionBatch
    from vas_engine.model.lm import CausalLM

TABLE_CHUNK = 8192


@dataclass(frozen=True)
class ServedWeights:
    """Weights in the dtype of inference, and what rows go through. Not a module: they must show in no state dict."""

    network: ValueNetwork
    version: tuple
    layers: nn.ModuleList
    heads: Heads
    state_weight: Tensor | None

    def project(self, states: Tensor) -> Tensor:
        """[N, S, H] -> [N, width] float32."""
        return self.network._project(states, self.state_weight)

    def places(self, positions: Tensor) -> Tensor | None:
        """int64 [R] -> what their places add to rows, [R, width] float32; None: nothing."""
        weight = self.network.place_weight
        return None if weight is None else F.linear(place_features(positions), weight)

    def run(self, x: Tensor, attention: Attention) -> Tensor:
        """Through the layers: [R, width] -> [R, width] float32."""
        return self.network._run(x, attention, self.layers)

    def outputs(self, features: Tensor) -> Tensor:
        """[..., width] -> [..., O] float32."""
        return self.heads(features)


class ValueNetwork(nn.Module):
    """A small network over the hidden states of a frozen base model; the kinds are presets of its settings.

    Row of token a behind state s: ``W_h concat(norm(h_j)) + W_e norm(emb(a))``, the h_j being hidden states of s (input
    "action"), or ``W_h concat(norm(h_j))`` with those of s and a (input "lookahead"); what its place adds; then the
    layers; then the heads. Parameters are float32 whatever the base model's dtype.

    Args:
        config: its settings.
    """

    def __init__(self, config: ValueConfig) -> None:
        super().__init__()
        if config.kind == "model":
            raise InvalidArgumentError("kind", "model", "a value model has an LM of its own: use ValueModel")
        self.config = config
        features = len(config.states) * config.hidden_size
        width = config.width or features
        # The two sources are equally strong at the start, and their sum has unit variance.
        share = 0.5**0.5 if config.input == "action" else 1.0
        self.state_weight = _matrix(width, features, share) if config.width else None
        self.embed_weight = _matrix(width, config.hidden_size, share) if config.input == "action" else None
        self.place_weight = _matrix(width, PLACE_FEATURES, share) if config.width else None
        layers: list[nn.Module] = [ReaderLayer(config, index) for index in range(len(config.layers))]
        layers += [SideLayer(config, index) for index in range(config.depth)]
        self.layers = nn.ModuleList(layers)
        self.heads = Heads(config, width)
        self.lm: CausalLM | None = None
        self._gather: Callable[..., Tensor] = function("candidate_input", "reference")
        self.cache: KVCache | None = None
        self._table: Tensor | None = None
        self._table_of: tuple[int, int] | None = None
        self._served: ServedWeights | None = None
        self._compiled: CompiledWeights | None = None
        self._scratch: list[tuple[Tensor, Tensor]] = []

    # -- what it is

    @property
    def input(self) -> str:
        """ "action" or "lookahead"."""
        return self.config.input

    @property
    def states(self) -> tuple[int, ...]:
        """Hidden-state indices of the base model it reads."""
        return self.config.states

    @property
    def cache_layers(self) -> list[LayerShape]:
        """What its own pages hold per token; empty for a network without K/V of its own."""
        return [LayerShape(self.config.kv_heads, self.config.head_dim)] * self.config.depth

    @property
    def cache_dtype(self) -> torch.dtype:
        """Dtype of its own pages: the base model's."""
        return self._bound().dtype

    @property
    def max_model_len(self) -> int:
        """Positions that the base model was made for."""
        return self._bound().max_model_len

    @property
    def num_parameters(self) -> int:
        """Trained numbers; the table made for inference is not counted."""
        return sum(parameter.numel() for parameter in self.parameters())

    # -- life

    def bind(self, lm: CausalLM, tokenizer: Any | None = None) -> ValueNetwork:
        """Ties the network to its base model, moves it there and makes the table of projected embeddings.

        Raises:
            ValueArtifactError: made for another base model, or for one of other sizes.
        """
        check_base(self.config, lm, tokenizer)
        if not self.config.base:
            self.config = self.config.replace(base=base_fingerprint(lm, tokenizer))
        self.lm = lm
        self._gather = function("candidate_input", lm.attention_backend)
        self.to(lm.device)
        self._table = self._compiled = None
        if self.embed_weight is not None:
            self._embeddings()
        return self

    def allocate(self, num_blocks: int, block_size: int) -> None:
        """Makes the network's own pages, in the base model's dtype; nothing without layers of its own."""
        if not self.config.depth:
            return
        lm = self._bound()
        self.cache = KVCache(
            self.cache_layers,
            num_blocks,
            block_size,
            self.cache_dtype,
            lm.device,
            backend=lm.attention_backend,
        )
        self._scratch = []

    def _bound(self) -> CausalLM:
        if self.lm is None:
            raise VASError("this value network is not bound to a base model: call bind(lm) first")
        return self.lm

    # -- inference

    @torch.inference_mode()
    def score(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Head output of rows; see ``Scorer.score``."""
        weights = self._through(token_ids, hidden)
        return weights.outputs(self._features(weights, token_ids, hidden, hidden_index, batch, rows))

    @torch.inference_mode()
    def features(
        self,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What the heads read of rows; see ``Scorer.features``."""
        weights = self._through(token_ids, hidden)
        return self._features(weights, token_ids, hidden, hidden_index, batch, rows)

    def _features(
        self,
        weights: ServedWeights | CompiledWeights,
        token_ids: Tensor,
        hidden: Tensor | None,
        hidden_index: Tensor | None,
        batch: AttentionBatch,
        rows: Tensor | None,
    ) -> Tensor:
        if hidden is None or hidden_index is None:
            raise InvalidArgumentError("hidden", hidden, f"a network of input {self.input!r} needs hidden states")
        # Projected once per distinct state; the rows only gather.
        states = weights.project(hidden.unflatten(-1, (-1, self.config.hidden_size)))
        embedded = (None, None) if self.embed_weight is None else (self._embeddings(), token_ids)
        x = self._gather(states, hidden_index, *embedded, weights.places(batch.positions))
        attention = PagedAttention(self._bound(), self._own_pages(), batch)
        x = weights.run(x, attention)
        self._scratch = attention.scratch
        return x if rows is None else x.index_select(0, rows)

    @torch.inference_mode()
    def compile(self) -> None:
        """Has rows run code of torch.compile from now on, as long as the weights stay as they are.

        Changed weights run eagerly. The code serves any number of rows and any pages, so this may come before
        `allocate`. Results differ from the eager ones by rounding.

        Raises:
            VASError: torch.compile does not work here.
        """
        served = dataclasses.replace(self._serving(), version=self.version)
        width = self.config.width or len(self.states) * self.config.hidden_size
        self._compiled = CompiledWeights(served, self._bound(), len(self.states), width)

    def _through(self, token_ids: Tensor, hidden: Tensor | None) -> ServedWeights | CompiledWeights:
        """What so many rows and states go through."""
        compiled, sizes = self._compiled, (len(token_ids), 0 if hidden is None else len(hidden))
        if compiled is None or not 0 < min(sizes) <= max(sizes) <= MAX_ROWS or compiled.version != self.version:
            return self._serving()
        return compiled

    @property
    def version(self) -> tuple:
        """Another one once a weight has changed."""
        return tuple((p.data_ptr(), p._version) for p in self.parameters())

    @property
    def served_heads(self) -> Heads:
        """The heads as rows are computed with."""
        return self._serving().heads

    def commit(self, rows: Tensor, slots: Tensor) -> None:
        """Own K/V of unslotted rows (int64 [n]) of the last ``score`` to slots (int64 [n])."""
        if not self.config.depth:
            return
        cache = self._own_pages()
        if cache is None or not self._scratch:
            raise VASError("nothing to commit: score rows first")
        keys, values = zip(*self._scratch, strict=True)
        cache.commit(keys, values, rows, slots)

    def _own_pages(self) -> KVCache | None:
        if self.config.depth and self.cache is None:
            raise VASError("this side network has no pages yet: call allocate(num_blocks, block_size) first")
        return self.cache

    def _embeddings(self) -> Tensor:
        """[V, width] projected embeddings of the whole vocabulary; made again when the weight has changed."""
        weight = self.embed_weight
        assert weight is not None
        version = (weight.data_ptr(), weight._version)
        if self._table is None or self._table_of != version:
            lm = self._bound()
            ids = torch.arange(lm.vocab_size, device=lm.device)
            with torch.no_grad():
                parts = [F.linear(self._embed(lm, chunk), weight) for chunk in ids.split(TABLE_CHUNK)]
                self._table = torch.cat(parts)
            self._table_of = version
        return self._table

    def _serving(self) -> ServedWeights:
        """The weights that rows are computed with: in the base model's dtype, made again when they have changed.

        With a bfloat16 base the states read have eight bits of precision, and products in float32 would cost about
        four times as much for nothing. What adds up stays float32: the stream between layers and the outputs.
        """
        dtype = self._bound().dtype
        if dtype == torch.float32:
            return ServedWeights(self, (), self.layers, self.heads, self.state_weight)
        version = self.version
        if self._served is None or self._served.version != version:
            heads = copy.deepcopy(self.heads)
            if heads.hidden is not None:
                heads.hidden.to(dtype)
            weight = None if self.state_weight is None else self.state_weight.to(dtype)
            self._served = ServedWeights(self, version, copy.deepcopy(self.layers).to(dtype), heads, weight)
        return self._served

    # -- what inference and training share

    def _embed(self, lm: CausalLM, token_ids: Tensor) -> Tensor:
        embedded = lm.embed(token_ids).float()
        return rms_norm(embedded) if self.config.state_norm else embedded

    def _project(self, states: Tensor, weight: Tensor | None) -> Tensor:
        """[..., S, H] -> [..., width] float32; zeros stay zeros."""
        states = states.float()
        if self.config.state_norm:
            states = rms_norm(states)
        states = states.flatten(-2)
        return states if weight is None else F.linear(states.to(weight.dtype), weight).float()

    def _run(self, x: Tensor, attention: Attention, layers: nn.ModuleList) -> Tensor:
        rotary = Rotary(attention.positions, self.config.head_dim) if self.config.depth else None
        for layer in layers:
            x = layer(x, attention, rotary)
        return x

    # -- training

    def train_values(self, lm: CausalLM, tokens: Tensor, lengths: Tensor, branches: Branches | None = None) -> Tensor:
        """Values of all prefixes at once, uncached, with autograd through the network and none through the base.

        Args:
            lm: the base model.
            tokens: int64 [B, T], padded on the right with any valid token.
            lengths: int64 [B].
            branches: candidates to value in the same pass.

        Returns:
            [B, T, O] float32; entry p values ``tokens[:p + 1]``. Entries from ``lengths`` on mean nothing. With
            branches [B, T + P K, O].
        """
        self._table = None
        batch, length = tokens.shape
        lookahead = self.config.input == "lookahead"
        positions = positions_of(tokens, branches)
        with torch.no_grad():
            # Only a network that reads the states after a token needs the base to run the branches.
            looked = branches if lookahead else None
            dense = lm.dense(tokens, lengths, states=self.states, kv_layers=self.config.layers, branches=looked)
            states = torch.stack([dense.hidden[index] for index in self.states], 2)
            states = states[:, : positions.shape[1] if lookahead else length]
            rows = tokens if branches is None else branches.join(tokens)
            embedded = self._embed(lm, rows) if self.embed_weight is not None else None
        x = self._project(states, self.state_weight)
        if embedded is not None:
            # The state before the first token is the empty prefix: zeros, which the projection keeps.
            assert self.embed_weight is not None
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            if branches is not None:
                after = branches.after[..., None].expand(-1, -1, x.shape[-1])
                before = torch.cat([before, x.gather(1, after)], 1)
            x = before + F.linear(embedded, self.embed_weight)
        if self.place_weight is not None:
            x = x + F.linear(place_features(positions), self.place_weight)
        if self.layers:
            attention = DenseAttention(lm, dense, positions, length, branches)
            x = self._run(x.flatten(0, 1), attention, self.layers).unflatten(0, (batch, -1))
        return self.heads(x)


def place_features(positions: Tensor) -> Tensor:
    """What a network sees of a row's place: int64 [R] -> float32 [R, PLACE_FEATURES].

    Sines and cosines of periods from 16 to 8192 tokens and the logarithm of the place. Layers with rotary positions
    tell distances only, and a return often depends on how much of the text has been written.
    """
    place = positions.unsqueeze(-1).float()
    angles = place * (2 * math.pi / 16 * 0.5 ** torch.arange(10, device=positions.device))
    return torch.cat([angles.sin(), angles.cos(), place.log1p() / 8], -1)


def _matrix(outputs: int, inputs: int, gain: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * (gain / math.sqrt(inputs)))
