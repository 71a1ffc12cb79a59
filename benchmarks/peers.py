"""Value-guided decoding as Hugging Face logits processors, for comparison: correct, and written to be fast.

The decoder of Han et al. 2024 (arXiv 2405.06639): a second, small language model with a scalar head gives V
of the prefix followed by each of the k most probable tokens; weight * (V - baseline) is added to the raw
logits of those tokens, all other tokens keep theirs. Three forms of one function, which differ only in how
the value model is run:

    OneAtATimeValueProcessor    k forwards of one token a step on one KV cache: the cost of the released form
    AllAtOnceValueProcessor     one forward of batch * k single tokens, the KV cache repeated per candidate
    SharedCacheValueProcessor   one forward of k tokens a row under a mask that hides candidates from one
                                another (the layout of Zhou et al. 2025, Q#): nothing is repeated; the best
                                that `generate` can be given

In all of them the K/V of a candidate that was then chosen are kept, so a step needs no further forward.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from vas_engine.errors import InvalidArgumentError, UnsupportedModelError, nearest

BASELINES = ("candidate-mean", "state")

LayerKV = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of one layer, each [batch, kv heads, tokens (or candidates), head size]."""


class ValueProcessor(LogitsProcessor, ABC):
    """Adds weight * (V(prefix + token) - baseline) to the logits of each row's most probable tokens.

    One object serves one call of ``generate``. Rows that leave the prefix seen before (a beam search reorders
    them) are noticed, in any row, and computed anew.

    Args:
        backbone: language model without a head (``LlamaModel``, say) with full attention in every layer, that
            reads the same token ids as the model which generates.
        head: maps its last hidden state [..., H] to [..., 1]; computed in float32.
        attention_mask: of the prompts, [batch, prompt tokens], zeros on the left where a row is padded.
        weight: strength of the tilt per unit of value.
        num_candidates: tokens of each row that are scored.
        baseline: "candidate-mean", the unweighted mean over the candidates as in the paper's decoder, or
            "state", the value of the prefix.

    Raises:
        InvalidArgumentError: an argument that cannot work.
        UnsupportedModelError: a value model whose layers do not all attend to the whole prefix.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: nn.Module,
        attention_mask: torch.Tensor,
        *,
        weight: float = 1.0,
        num_candidates: int = 20,
        baseline: str = "candidate-mean",
    ) -> None:
        if num_candidates < 1:
            raise InvalidArgumentError("num_candidates", num_candidates, "score at least one token")
        if baseline not in BASELINES:
            raise InvalidArgumentError("baseline", baseline, nearest(str(baseline), BASELINES))
        if attention_mask.dim() != 2 or not bool((attention_mask[:, -1] == 1).all()):
            fix = "give [batch, prompt tokens] with ones at the end of every row: pad on the left"
            raise InvalidArgumentError("attention_mask", tuple(attention_mask.shape), fix)
        _check_full_attention(backbone)
        self.backbone, self.head = backbone, head
        self.weight, self.num_candidates, self.baseline = weight, num_candidates, baseline
        self.prompt_mask = attention_mask.long()
        self.values = torch.empty(0)
        """V of the candidates of the last call, [batch, candidates], float32."""
        self.candidates = torch.empty(0, dtype=torch.long)
        """Their token ids, by descending logit."""
        self._forget()

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Tilted logits.

        Args:
            input_ids: int64 [batch, tokens], prompts and what was generated.
            scores: logits [batch, vocabulary].

        Returns:
            As ``scores``, changed in the candidates' columns only.
        """
        self._catch_up(input_ids)
        count = min(self.num_candidates, scores.shape[1])
        logits, candidates = scores.topk(count, dim=1)
        self.values = self._score(candidates)
        self.candidates = candidates
        tilt = self.weight * (self.values - self._centre(torch.isfinite(logits)))
        return scores.scatter_add(1, candidates, tilt.to(scores.dtype))

    @abstractmethod
    def _score(self, candidates: torch.Tensor) -> torch.Tensor:
        """V [batch, k] of the cached prefix followed by each candidate; leaves the cache as it was."""

    def _centre(self, allowed: torch.Tensor) -> torch.Tensor:
        if self.baseline == "state":
            return self._state_values[:, None]
        # Banned tokens (logit -inf) fill the columns where fewer than k are possible: they are no candidates.
        return torch.where(allowed, self.values, 0.0).sum(1, True) / allowed.sum(1, True).clamp(min=1)

    # -- the prefix -----------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._cache = DynamicCache()
        self._seen = self.prompt_mask[:, :0]
        self._candidate_kv: list[LayerKV] | None = None
        self._state_values = torch.empty(0)

    @property
    def _length(self) -> int:
        return self._seen.shape[1]

    def _catch_up(self, input_ids: torch.Tensor) -> None:
        """Make the cache hold exactly the K/V of ``input_ids``."""
        if len(input_ids) != len(self.prompt_mask):
            fix = f"attention_mask has {len(self.prompt_mask)} rows; repeat it for several sequences a prompt"
            raise InvalidArgumentError("input_ids", tuple(input_ids.shape), fix)
        length = self._length
        if input_ids.shape[1] <= length or not torch.equal(input_ids[:, :length], self._seen):
            self._forget()
            length = 0
        if input_ids.shape[1] - length != 1 or not self._adopt(input_ids[:, -1]):
            new = input_ids[:, length:]
            hidden = self._forward(new, self._cache, self._mask(input_ids.shape[1]))
            self._state_values = self._value(hidden[:, -1])
        self._candidate_kv = None
        self._seen = input_ids.clone()

    def _adopt(self, chosen: torch.Tensor) -> bool:
        """Append the kept K/V of the chosen candidates; False if a row chose none of them."""
        if self._candidate_kv is None:
            return False
        match = self.candidates.eq(chosen[:, None])
        if not bool(match.any(1).all()):
            return False
        row, column = torch.arange(len(chosen), device=chosen.device), match.int().argmax(1)
        for layer, (keys, values) in zip(_layers(self._cache), self._candidate_kv, strict=True):
            layer.keys = torch.cat([layer.keys, keys[row, :, column].unsqueeze(2)], dim=2)
            layer.values = torch.cat([layer.values, values[row, :, column].unsqueeze(2)], dim=2)
        self._state_values = self.values[row, column]
        return True

    # -- the value model ------------------------------------------------------------------------------------

    def _mask(self, length: int) -> torch.Tensor:
        """[batch, length]: the prompts' mask and ones for every token after them."""
        added = length - self.prompt_mask.shape[1]
        return nn.functional.pad(self.prompt_mask, (0, added), value=1)

    def _forward(
        self,
        token_ids: torch.Tensor,
        cache: DynamicCache,
        mask: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states [rows, tokens, H]; positions count the unmasked tokens before each."""
        if positions is None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -token_ids.shape[1] :]
        output = self.backbone(
            input_ids=token_ids,
            attention_mask=mask if attention_mask is None else attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state

    def _value(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden.float()).squeeze(-1).float()


class OneAtATimeValueProcessor(ValueProcessor):
    """A forward of the value model for each candidate in turn; each takes its K/V back out of the cache."""

    def _score(self, candidates: torch.Tensor) -> torch.Tensor:
        length = self._length
        mask = self._mask(length + 1)
        kept: list[list[LayerKV]] = []
        values = []
        for token in candidates.T:
            hidden = self._forward(token[:, None], self._cache, mask)
            values.append(self._value(hidden[:, -1]))
            kept.append(_take_tail(self._cache, length))
        self._candidate_kv = [
            (torch.cat([keys for keys, _ in layer], 2), torch.cat([values for _, values in layer], 2))
            for layer in zip(*kept, strict=True)
        ]
        return torch.stack(values, dim=1)


class AllAtOnceValueProcessor(ValueProcessor):
    """One forward over batch * k rows, each with its own copy of its request's cache."""

    def _score(self, candidates: torch.Tensor) -> torch.Tensor:
        batch, count = candidates.shape
        length = self._length
        # Row r of the repeated batch is candidate r % k of request r // k, in inputs and cache alike.
        cache = _repeated(self._cache, count)
        mask = self._mask(length + 1).repeat_interleave(count, 0)
        hidden = self._forward(candidates.reshape(-1, 1), cache, mask)
        self._candidate_kv = [
            (_by_request(keys, batch), _by_request(values, batch)) for keys, values in _take_tail(cache, length)
        ]
        return self._value(hidden[:, -1]).reshape(batch, count)


class SharedCacheValueProcessor(ValueProcessor):
    """One forward of k tokens a row, all at the same position, each seeing the prefix and itself."""

    def _score(self, candidates: torch.Tensor) -> torch.Tensor:
        batch, count = candidates.shape
        length = self._length
        mask = self._mask(length)
        dtype = self.backbone.dtype
        hidden_from = torch.finfo(dtype).min
        prefix = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, hidden_from)
        siblings = torch.full((count, count), hidden_from, dtype=dtype, device=mask.device).fill_diagonal_(0)
        bias = torch.cat(
            [prefix[:, None, None].expand(-1, 1, count, -1), siblings.expand(batch, 1, count, count)], dim=3
        )
        positions = mask.sum(1, keepdim=True).expand(-1, count)
        hidden = self._forward(candidates, self._cache, mask, bias, positions)
        self._candidate_kv = _take_tail(self._cache, length)
        return self._value(hidden)


def _layers(cache: DynamicCache) -> list[Any]:
    """Layers of attention: with keys and values."""
    return cache.layers


def _repeated(cache: DynamicCache, count: int) -> DynamicCache:
    """A cache in which every row stands ``count`` times in a row."""
    repeated = copy.copy(cache)
    repeated.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in _layers(repeated):
        layer.keys, layer.values = (x.repeat_interleave(count, 0) for x in (layer.keys, layer.values))
    return repeated


def _by_request(part: torch.Tensor, batch: int) -> torch.Tensor:
    """[batch * k, kv heads, 1, head size] -> [batch, kv heads, k, head size]."""
    return part.reshape(batch, -1, part.shape[1], part.shape[3]).transpose(1, 2)


def _take_tail(cache: DynamicCache, length: int) -> list[LayerKV]:
    """Cut every layer back to ``length`` tokens; what lay beyond."""
    taken = []
    for layer in _layers(cache):
        taken.append((layer.keys[:, :, length:], layer.values[:, :, length:]))
        layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
    return taken


def _check_full_attention(backbone: PreTrainedModel) -> None:
    config = backbone.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (not kinds and getattr(config, "sliding_window", None)):
        raise UnsupportedModelError(
            f"value model {config.model_type!r} has layers of kind {sorted(kinds) or ['sliding_attention']}; "
            "these processors keep the whole prefix for every layer: use a model with full attention"
        )
