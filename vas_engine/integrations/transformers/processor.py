"""Value-guided sampling inside transformers' own loop, by value models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.value_models import Host, PrefixValues, Values, check_finite, load_value_model
from vas_engine.params import SamplingParams
from vas_engine.values.value_model import ValueModel


class ValueLogitsProcessor(LogitsProcessor):
    """Tilts each row's most probable tokens by the advantage of value models (DESIGN.md, section 2).

        guide = ValueLogitsProcessor(model, {"kind": "path/to/value"}, {"kind": 2.0}, inputs["attention_mask"])
        model.generate(**inputs, logits_processor=LogitsProcessorList([guide]), do_sample=True, top_k=0)

    One object serves one call of `generate`. All candidates of all rows are scored in one forward over pages of the
    value model's own; padding is never run, and rows that have ended cost nothing. Only values of kind "model":
    a processor sees tokens and logits, not the model's states. `vas_generate` takes every kind and is faster.

    generate applies temperature, top_k, top_p and min_p behind this processor, to what is already tilted. To tilt the
    distribution that they leave, as this engine does, give them here by `base` and switch them off there.

    Args:
        model: the causal LM that generates.
        values: {name: folder or ValueModel}.
        weights: {name: weight}.
        attention_mask: of the prompts, int64 [rows, prompt tokens], zeros on the left where a row is padded; None
            without padding.
        tokenizer: the model's, to compare its vocabulary with the values'.
        base: processors of the base distribution, such as a TemperatureLogitsWarper, before the candidates are taken.
        eos_token_id: ends a row; None takes the model's.
        num_candidates, tail, baseline, tilt, advantage_clip: as of SamplingParams.

    Raises:
        InvalidArgumentError, ValueArtifactError: an argument or a value that cannot work.
    """

    supports_continuous_batching = False  # generate_batch shows a processor neither prefixes nor whose row is whose

    def __init__(
        self,
        model: PreTrainedModel,
        values: Mapping[str, str | Path | ValueModel],
        weights: Mapping[str, float],
        attention_mask: Tensor | None = None,
        *,
        tokenizer: Any | None = None,
        base: LogitsProcessorList | None = None,
        eos_token_id: int | list[int] | None = None,
        num_candidates: int = 20,
        tail: str = "keep",
        baseline: str = "state",
        tilt: str = "mean",
        advantage_clip: float | None = None,
    ) -> None:
        if attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            raise InvalidArgumentError("attention_mask", tuple(attention_mask.shape), "pad on the left")
        vocabulary = model.get_output_embeddings().weight.shape[0]
        host = Host(vocabulary, model.dtype, model.device)
        self.params = SamplingParams(
            values=weights,
            num_candidates=num_candidates,
            tail=tail,
            baseline=baseline,
            tilt=tilt,
            advantage_clip=advantage_clip,
        )
        models = {
            n: v if isinstance(v, ValueModel) else load_value_model(v, host, tokenizer) for n, v in values.items()
        }
        self.values = Values(models)
        self.params.check(vocab_size=vocabulary, value_names=self.values.names)
        self.values.check(self.params)
        self._caches = [PrefixValues(model) for model in models.values()]
        self._base = base or LogitsProcessorList()
        self._mask = attention_mask
        ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        self._ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        self._seen: Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """log pi0 + T of every token, unnormalised, float32.

        Args:
            input_ids: int64 [rows, tokens], prompts and what was generated.
            scores: logits [rows, vocabulary].

        Raises:
            InvalidArgumentError: beams, or other rows than the attention mask is of.
            NonFiniteError: a value is not finite.
        """
        self._check_rows(input_ids)
        log_probs = torch.log_softmax(self._base(input_ids, scores).float(), dim=-1)
        count = min(self.params.num_candidates, scores.shape[1])
        best, candidates = log_probs.topk(count, dim=1)
        rows = [row for row, ended in enumerate(self._ended(input_ids)) if not ended]
        prefixes = [self._tokens(input_ids, row) for row in rows]
        # Where fewer are possible, banned tokens fill the columns: they are no candidates.
        allowed = [candidates[row][torch.isfinite(best[row])] for row in rows]
        suffixes = [[[token] for token in tokens.tolist()] for tokens in allowed]
        outputs = [cache.score(rows, prefixes, suffixes) for cache in self._caches]
        tilts = self.values.tilts(outputs, [self.params] * len(rows))
        for row, tokens, (tilt, _) in zip(rows, allowed, tilts, strict=True):
            check_finite(tilt)
            tilted = log_probs[row, tokens] + torch.from_numpy(tilt).to(log_probs)
            if self.params.tail == "drop":
                log_probs[row] = -torch.inf
            log_probs[row, tokens] = tilted
        return log_probs

    def _check_rows(self, input_ids: Tensor) -> None:
        count = len(input_ids)
        if self._mask is not None and len(self._mask) != count:
            fix = f"attention_mask has {len(self._mask)} rows; repeat it for num_return_sequences, and use no beams"
            raise InvalidArgumentError("input_ids", tuple(input_ids.shape), fix)
        if self._seen is not None and not torch.equal(input_ids[:, :-1], self._seen):
            fix = "a row is not the last call's and one token: use num_beams=1, and one processor a call of generate"
            raise InvalidArgumentError("input_ids", tuple(input_ids.shape), fix)
        if self._seen is None:
            self._prompt = input_ids.shape[1]
        self._seen = input_ids.clone()

    def _ended(self, input_ids: Tensor) -> list[bool]:
        new = input_ids[:, self._prompt :]
        return torch.isin(new, torch.tensor(self._ends, device=new.device)).any(1).tolist()

    def _tokens(self, input_ids: Tensor, row: int) -> list[int]:
        if self._mask is None:
            return input_ids[row].tolist()
        padding = int((self._mask[row] == 0).sum())
        return input_ids[row, padding:].tolist()
