"""`vas_generate`: this engine as the decoding loop of transformers' `generate`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.utils import ModelOutput

from vas_engine import arguments
from vas_engine.engine.output import OutputFront
from vas_engine.errors import InvalidArgumentError
from vas_engine.integrations.transformers.engines import engine_of
from vas_engine.integrations.transformers.settings import check_config, read_processors, split_criteria
from vas_engine.interrupt import deferred_interrupt
from vas_engine.llm import LLM
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import MAX_SEED, SamplingParams
from vas_engine.sampling import fork_seed

_calls = itertools.count()


@dataclass
class GuidedOutput(ModelOutput):
    """What `generate(return_dict_in_generate=True)` gives.

    Attributes:
        sequences: int64 [rows, tokens], prompts included, padded on the right.
        token_values: name -> V of the state after each new token, float32 [rows, new tokens], NaN behind a row's end.
        logprobs: log pi0 of each row's new tokens together, nats, float64 [rows].
    """

    sequences: Tensor | None = None
    token_values: dict[str, Tensor] | None = None
    logprobs: Tensor | None = None


def vas_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: Any,
    values: Mapping[str, float] | None = None,
    seed: int | None = None,
    num_candidates: int = 20,
    tail: str = "keep",
    baseline: str = "state",
    tilt: str = "mean",
    advantage_clip: float | None = None,
    stop: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> Tensor | GuidedOutput:
    """Completes a batch with this engine: `model.generate(**inputs, custom_generate=vas_generate, values=...)`.

    `load_values(model, ...)` comes first. The settings of `generate` (do_sample, temperature, top_k, top_p, min_p,
    repetition_penalty, max_new_tokens, min_new_tokens, eos_token_id, num_return_sequences, suppress_tokens, biases of
    single tokens, stopping criteria, a streamer) mean what they mean there; others are refused by name. Note that
    `generate`'s own default is top_k=50.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` prepares
            them; rows are padded on the left, which `attention_mask` says.
        values, num_candidates, tail, baseline, tilt, advantage_clip, stop: as of SamplingParams.
        seed: of every prompt, as of SamplingParams: the same seed gives the same tokens in any batch. None draws one
            a prompt from torch's generator, so that `set_seed` repeats a run.

    Returns:
        int64 [rows, tokens], prompts and completions; a GuidedOutput with return_dict_in_generate=True.

    Raises:
        InvalidArgumentError: naming what cannot be honoured. VASError: a request that failed.
    """
    llm = engine_of(model)
    streamer = _streamer_of_caller()
    # Named above, these would be taken out of what generate prepares.
    mask, positions = model_kwargs.pop("attention_mask", None), model_kwargs.pop("position_ids", None)
    check_config(generation_config, model_kwargs)
    prompts = _unpad(input_ids, mask, positions)
    samples = generation_config.num_return_sequences or 1
    padded = input_ids.shape[1]
    ends, criteria = split_criteria(stopping_criteria)
    params = SamplingParams(
        n=samples,
        temperature=1.0 if generation_config.do_sample else 0.0,
        stop_token_ids=ends,
        ignore_eos=True,  # generate's own settings say what ends a row
        max_tokens=generation_config.max_length - padded,
        stop=stop,
        values=values,
        num_candidates=num_candidates,
        tail=tail,
        baseline=baseline,
        tilt=tilt,
        advantage_clip=advantage_clip,
    ).replace(**read_processors(logits_processor, padded, llm.engine.lm.vocab_size))
    if streamer is not None and len(prompts) > 1:
        raise InvalidArgumentError("streamer", type(streamer).__name__, f"streams one row; there are {len(prompts)}")
    # Samples of one prompt share its pages, unless a criterion may have to end one of them by itself.
    together = 1 if criteria else samples
    requests = [
        (prompts[first * samples], params.replace(n=together, seed=fork_seed(own, sample)))
        for first, own in enumerate(_seeds(seed, len(prompts) // samples))
        for sample in range(samples // together)
    ]
    completions = _Run(llm, input_ids, requests, criteria, streamer).completions()
    pad = generation_config._pad_token_tensor
    new = _pad([c.token_ids for c in completions], 0 if pad is None else int(pad)).to(input_ids.device)
    sequences = torch.cat([input_ids, new], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    reported = {name: _pad([c.values[name] for c in completions], float("nan")) for name in params.values or ()}
    logprobs = torch.tensor([c.cumulative_logprob for c in completions], dtype=torch.float64)
    return GuidedOutput(sequences, reported, logprobs)


def _streamer_of_caller() -> Any:
    """The streamer that `generate` was given.

    It does not pass one on to a callable (transformers 5.17 to 5.23), though it has put the prompt into it: whoever
    reads it would wait for ever.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame and frame.f_back else None
    if caller is None or caller.f_code.co_name != "generate":
        return None
    if caller.f_locals.get("assistant_model") is not None:
        raise InvalidArgumentError("assistant_model", "given", "assisted decoding is not guided; leave it out")
    return caller.f_locals.get("streamer")


def _unpad(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """Token ids of each row."""
    if input_ids.dim() != 2 or not input_ids.shape[1]:
        raise InvalidArgumentError("input_ids", tuple(input_ids.shape), "give token ids [rows, tokens], at least one")
    if mask is None:
        mask = torch.ones_like(input_ids)
    mask = mask.to(input_ids.device).bool()
    if mask.shape != input_ids.shape or not mask[:, -1].all() or (mask.int().diff(dim=1) < 0).any():
        fix = f"needs the shape of input_ids {tuple(input_ids.shape)} and zeros on the left only: pad on the left"
        raise InvalidArgumentError("attention_mask", tuple(mask.shape), fix)
    if positions is not None:
        expected = (mask.long().cumsum(1) - 1).expand_as(mask)
        if positions.shape[-1] != mask.shape[1] or bool(((positions != expected) & mask).any()):
            raise InvalidArgumentError("position_ids", "given", "the engine counts positions itself; leave them out")
    return [row[own].tolist() for row, own in zip(input_ids, mask, strict=True)]


def _seeds(seed: int | None, count: int) -> list[int]:
    if seed is not None:
        return [arguments.integer("seed", seed, 0, MAX_SEED)] * count
    drawn = int(torch.randint(2**62, ()))
    return [fork_seed(drawn, index) for index in range(count)]


def _pad(rows: list[list[Any]], fill: Any) -> Tensor:
    tensors = [torch.tensor(row, dtype=torch.long if isinstance(fill, int) else torch.float32) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


class _Run:
    """One batch through the engine, watched by generate's stopping criteria and by its streamer."""

    def __init__(
        self,
        llm: LLM,
        input_ids: Tensor,
        requests: list[tuple[list[int], SamplingParams]],
        criteria: StoppingCriteriaList,
        streamer: Any,
    ) -> None:
        self.llm, self.input_ids, self.requests = llm, input_ids, requests
        self.criteria, self.streamer = criteria, streamer
        self.front = OutputFront(llm.engine, llm.tokenizer)

    def completions(self) -> list[CompletionOutput]:
        """One a row, in order."""
        outputs: list[RequestOutput] = []
        try:
            # Pages of another call are of no use: the weights may have changed since.
            salt = str(next(_calls)).encode()
            for index, (tokens, params) in enumerate(self.requests):
                with deferred_interrupt():
                    outputs.append(self.front.add(str(index), tokens, params, salt=salt))
            while self.front.has_unfinished:
                with deferred_interrupt():
                    touched = self.front.step()
                for output in touched:
                    self._watch(output)
        finally:
            self.front.clear()
        for output in outputs:
            if output.error is not None:
                raise output.error
        if self.streamer is not None:
            self.streamer.end()
        return [completion for output in outputs for completion in output.outputs]

    def _watch(self, output: RequestOutput) -> None:
        for completion in output.outputs:
            if not completion.delta_token_ids:
                continue
            if self.streamer is not None:
                self.streamer.put(torch.tensor(completion.delta_token_ids))
            if self.criteria and not completion.finished:
                prompt = self.input_ids[int(output.request_id)]
                ids = torch.cat([prompt, prompt.new_tensor(completion.token_ids)])[None]
                if bool(self.criteria(ids, None).all()):
                    self.front.cancel(output.request_id)
