"""What `generate` was asked for, as settings of this engine; what it cannot honour is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from vas_engine.errors import InvalidArgumentError
from vas_engine.params import MAX_BIAS

_REST = "vas_generate does not honour it; leave it out, or use ValueLogitsProcessor in generate's own loop"

# What makes `generate` choose another loop than greedy search and sampling.
_OTHER_LOOPS = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None,
    "constraints": None,
    "force_words_ids": None,
    "use_mtp": False,
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_WITHOUT_EFFECT = ("use_cache", "logits_to_keep", "cache_position")


def check_config(config: Any, model_kwargs: Mapping[str, Any]) -> None:
    """Refuses beams and other loops, outputs that the engine does not keep, and inputs besides token ids.

    Raises:
        InvalidArgumentError: naming the setting.
    """
    for name, off in _OTHER_LOOPS.items():
        given = getattr(config, name, None)
        if given is not None and given != off:
            raise InvalidArgumentError(name, given, "guided decoding draws one token after another; leave it out")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise InvalidArgumentError("generation_config", mode.value, "only greedy search and sampling are guided")
    for name in _OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, None):
            raise InvalidArgumentError(name, True, _REST)
    for name, given in model_kwargs.items():
        if given is None or name in _WITHOUT_EFFECT:
            continue
        # generate makes an empty one for its own loop.
        if name != "past_key_values" or given.get_seq_length():
            raise InvalidArgumentError(name, type(given).__name__, "the engine reads token ids only; leave it out")


def read_processors(processors: LogitsProcessorList, prompt_length: int, vocab_size: int) -> dict[str, Any]:
    """Fields of SamplingParams for the logits processors that `generate` made of its settings, or was given.

    Args:
        prompt_length: of the padded prompts.
        vocab_size: a larger top_k means all of it to generate.

    Raises:
        InvalidArgumentError: a processor that the engine has no counterpart of, or two of one kind.
    """
    fields: dict[str, Any] = {}
    for processor in processors:
        name = type(processor).__name__
        if name not in _READERS:
            raise InvalidArgumentError("logits_processor", name, _REST)
        for field, value in _READERS[name](processor, prompt_length).items():
            if field == "logit_bias":
                fields[field] = _add_bias(fields.get(field, {}), value)
            elif field == "min_tokens":
                fields[field] = max(fields.get(field, 0), value)
            elif field in fields:
                raise InvalidArgumentError("logits_processor", name, f"sets {field} a second time; give it once")
            else:
                fields[field] = min(value, vocab_size) if field == "top_k" else value
    return fields


def split_criteria(criteria: StoppingCriteriaList) -> tuple[list[int], StoppingCriteriaList]:
    """Token ids that end a row, and the criteria that remain to be asked after every token.

    The longest length is the caller's to read from the config.
    """
    ends: list[int] = []
    rest = StoppingCriteriaList()
    for criterion in criteria:
        if isinstance(criterion, transformers.EosTokenCriteria):
            ends += criterion.eos_token_id.tolist()
        elif not isinstance(criterion, transformers.MaxLengthCriteria):
            rest.append(criterion)
    return ends, rest


def _penalty(processor: Any, prompt_length: int) -> dict[str, Any]:
    if isinstance(processor.prompt_ignore_length, int):
        raise InvalidArgumentError("prompt_ignore_length", processor.prompt_ignore_length, _REST)
    return {"repetition_penalty": processor.penalty}


def _bias(processor: Any, prompt_length: int) -> dict[str, Any]:
    longer = [sequence for sequence in processor.sequence_bias if len(sequence) > 1]
    if longer:
        name = "bad_words_ids" if type(processor).__name__.startswith("NoBad") else "sequence_bias"
        raise InvalidArgumentError(name, longer[0], "single tokens can be biased, sequences cannot")
    return {"logit_bias": {sequence[0]: bias for sequence, bias in processor.sequence_bias.items()}}


def _add_bias(known: dict[int, float], more: Mapping[int, float]) -> dict[int, float]:
    sums = {token: known.get(token, 0.0) + bias for token, bias in more.items()}
    return known | {token: bias if bias == float("-inf") else max(bias, -MAX_BIAS) for token, bias in sums.items()}


_READERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "TemperatureLogitsWarper": lambda p, _: {"temperature": float(p.temperature)},
    "TopKLogitsWarper": lambda p, _: {"top_k": p.top_k},
    "TopPLogitsWarper": lambda p, _: {"top_p": float(p.top_p)},
    "MinPLogitsWarper": lambda p, _: {"min_p": float(p.min_p)},
    "RepetitionPenaltyLogitsProcessor": _penalty,
    "MinLengthLogitsProcessor": lambda p, length: {"min_tokens": max(p.min_length - length, 0)},
    "MinNewTokensLengthLogitsProcessor": lambda p, _: {"min_tokens": p.min_new_tokens},
    "SequenceBiasLogitsProcessor": _bias,
    "NoBadWordsLogitsProcessor": _bias,
    "SuppressTokensLogitsProcessor": lambda p, _: {
        "logit_bias": dict.fromkeys(p.suppress_tokens.tolist(), float("-inf"))
    },
    "LogitNormalization": lambda p, _: {},
}
