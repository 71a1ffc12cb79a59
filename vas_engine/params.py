"""SamplingParams: how the tokens of one request are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vas_engine import arguments
from vas_engine.errors import InvalidArgumentError, nearest

MAX_COMPLETIONS = 1024
MAX_LOGPROBS = 1024
MAX_SEED = 2**64 - 1
MAX_BIAS = 1e4
MAX_WEIGHT = 1e30  # times a value it stays a float32

GUIDANCE = ("num_candidates", "tail", "baseline", "tilt", "advantage_clip")
"""Fields of SamplingParams that say how values guide, beside their weights."""

# Names that users of other libraries bring along.
_ALIASES = {
    "best_of": "n",
    "beta": "values",
    "do_sample": "temperature",
    "k": "num_candidates",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "num_return_sequences": "n",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
    "weights": "values",
}


@arguments.names_nearest(_ALIASES)
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn. Immutable; `replace` makes a changed copy.

    Names and meanings are vLLM's where vLLM has them. Every bad value raises InvalidArgumentError.

    Attributes:
        n: completions of the prompt, 1 to 1024; they share its KV cache.
        temperature: logits are divided by it; 0 (and less than 1e-8) takes the best token.
        top_p: keeps the smallest set of tokens with at least this much probability; 1 is off.
        top_k: keeps this many most probable tokens; 0 or -1 is off.
        min_p: drops tokens less probable than this times the most probable one; 0 is off.
        seed: 0 to 2**64-1. The same seed gives the same tokens in any batch. None draws one, which the
            output reports.
        max_tokens: most tokens to generate; None goes on until the model's context is full.
        min_tokens: neither EOS, a stop token nor a stop string ends a completion shorter than this.
        stop: one string or several; the text ends before the first of them to appear.
        stop_token_ids: token ids that end the completion.
        ignore_eos: goes on after the end-of-sequence token.
        include_stop_str_in_output: keeps the stop string, or stop token's text, at the end of the text.
        skip_special_tokens: leaves special tokens out of the text.
        logprobs: with an int N, each token comes with the log-probability of itself and of the N most
            probable tokens; with values, before and after the tilt. This needs every candidate's value (no
            pruning).
        presence_penalty, frequency_penalty: -2 to 2, subtracted from the logits of generated tokens, once or
            for each use.
        repetition_penalty: above 0; divides positive and multiplies negative logits of tokens that the prompt
            or the completion holds.
        logit_bias: {token id: number added to its logit}; -inf (or -100 as customary) bans a token.
        values: {name of a value: weight}, the tilt's strength per unit of reward, of either sign; empty is
            plain sampling.
        num_candidates: how many of the most probable tokens the values look at in each step.
        min_candidates: how many of them a server's latency bound leaves in any case; without a bound all are there.
        tail: "keep" leaves the other tokens their base probability, "drop" removes them.
        baseline: the tilt is relative to the value of the state ("state") or to the mean over the candidates
            ("candidate-mean", the paper's code).
        tilt: "mean" (weight times expected reward) or "optimal" (log-mean-exp; needs distributional heads;
            with several values their sum is an approximation).
        advantage_clip: bounds each value's advantage, in units of reward, which lets pruning skip candidates.
            None is off.
        prune: skips candidates that provably cannot win; never changes the tokens.
        report_kl: sums the exact KL divergence from the base distribution over the steps (no pruning).
        return_hidden_states: returns the model's final hidden states of prompt and completion.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Iterable[str] | None = ()
    stop_token_ids: Iterable[int] | None = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default_factory=dict)
    values: Mapping[str, float] | None = field(default_factory=dict)
    num_candidates: int = 20
    min_candidates: int = 1
    tail: str = "keep"
    baseline: str = "state"
    tilt: str = "mean"
    advantage_clip: float | None = None
    prune: bool = True
    report_kl: bool = False
    return_hidden_states: bool = False

    def __post_init__(self) -> None:
        checked = {f.name: _CHECKS[f.name](f.name, getattr(self, f.name)) for f in dataclasses.fields(self)}
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            fix = f"must be at most max_tokens={self.max_tokens}"
            raise InvalidArgumentError("min_tokens", self.min_tokens, fix)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> SamplingParams:
        """Builds parameters from a mapping, such as a JSON object; the same errors as the constructor."""
        if not isinstance(options, Mapping):
            raise InvalidArgumentError("params", options, "must be an object of names and values")
        return cls(**{str(name): value for name, value in options.items()})

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON types, for logs and files; `from_dict` reads it back."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, checked again."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**(known | changes))

    @property
    def guided(self) -> bool:
        """Whether values are evaluated at all. A weight of 0 asks for a value without steering by it."""
        return bool(self.values)

    @property
    def exact(self) -> bool:
        """Whether every candidate is evaluated: no pruning, or a result needs the tilted distribution."""
        return not self.prune or self.logprobs is not None or self.report_kl

    def check(self, *, vocab_size: int, value_names: Collection[str]) -> None:
        """What only the loaded model can tell: ids and sizes within its vocabulary, names of its values.

        Raises:
            InvalidArgumentError: naming the argument.
        """
        for name in self.values or ():
            if name not in value_names:
                fix = f"no value of this name is loaded; {nearest(name, value_names)}"
                if not value_names:
                    fix = "no value is loaded; pass LLM(..., values={name: folder})"
                raise InvalidArgumentError("values", {name: self.values[name]}, fix)  # type: ignore[index]
        sizes = {"top_k": self.top_k, "logprobs": self.logprobs or 0}
        if self.guided:
            sizes["num_candidates"] = self.num_candidates
        for name, size in sizes.items():
            if size > vocab_size:
                fix = f"must be at most the model's vocabulary of {vocab_size}"
                raise InvalidArgumentError(name, size, fix)
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids or ():
                if token >= vocab_size:
                    fix = f"token ids of this model end at {vocab_size - 1}"
                    raise InvalidArgumentError(name, token, fix)


def read_params(given: object, count: int) -> list[SamplingParams]:
    """What `sampling_params` means for `count` prompts: one for all of them (None is the default), or one for each.

    Raises:
        InvalidArgumentError: something else.
    """
    return arguments.for_each("sampling_params", SamplingParams() if given is None else given, count, _params)


def _params(name: str, value: object) -> SamplingParams:
    if not isinstance(value, SamplingParams):
        raise InvalidArgumentError(name, value, "must be SamplingParams(...)")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, dict) else value


def _optional(check):
    return lambda name, value: None if value is None else check(name, value)


def _between(low, high=None):
    return lambda name, value: arguments.integer(name, value, low, high)


def _within(low=None, high=None, above_low=False):
    return lambda name, value: arguments.real(name, value, low, high, above_low=above_low)


def _one_of(*options: str):
    return lambda name, value: arguments.choice(name, value, options)


def _top_k(name: str, value: object) -> int:
    return max(arguments.integer(name, value, -1), 0)


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(items, Iterable):
        raise InvalidArgumentError(name, value, "must be a string or a list of strings")
    strings = tuple(items)
    for item in strings:
        if not isinstance(item, str):
            fix = "must hold strings only; ids of tokens go to stop_token_ids"
            raise InvalidArgumentError(name, value, fix)
        if not item:
            raise InvalidArgumentError(name, value, "an empty string would stop at once; leave it out")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidArgumentError(name, value, "must be a list of token ids")
    return tuple(arguments.integer(name, item, 0) for item in value)


def _bias(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(name, value, "must map token ids to numbers")
    bias = {}
    for token, number in value.items():
        # JSON has no integer keys: "42" means 42.
        key = int(token) if isinstance(token, str) and token.isdecimal() else token
        key = arguments.integer(f"{name} key", key, 0)
        bans = isinstance(number, float) and number == float("-inf")
        bias[key] = number if bans else arguments.real(f"{name}[{key}]", number, -MAX_BIAS, MAX_BIAS)
    return bias


def _weights(name: str, value: object) -> dict[str, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgumentError(name, value, "must map names of values to weights, such as {'kind': 2.0}")
    for key in value:
        if not isinstance(key, str):
            raise InvalidArgumentError(name, value, "names of values are strings")
    return {key: arguments.real(f"{name}[{key!r}]", weight, -MAX_WEIGHT, MAX_WEIGHT) for key, weight in value.items()}


_CHECKS = {
    "n": _between(1, MAX_COMPLETIONS),
    "temperature": _within(0.0),
    "top_p": _within(0.0, 1.0, above_low=True),
    "top_k": _top_k,
    "min_p": _within(0.0, 1.0),
    "seed": _optional(_between(0, MAX_SEED)),
    "max_tokens": _optional(_between(1)),
    "min_tokens": _between(0),
    "stop": _strings,
    "stop_token_ids": _token_ids,
    "ignore_eos": arguments.boolean,
    "include_stop_str_in_output": arguments.boolean,
    "skip_special_tokens": arguments.boolean,
    "logprobs": _optional(_between(0, MAX_LOGPROBS)),
    "presence_penalty": _within(-2.0, 2.0),
    "frequency_penalty": _within(-2.0, 2.0),
    "repetition_penalty": _within(0.0, above_low=True),
    "logit_bias": _bias,
    "values": _weights,
    "num_candidates": _between(1),
    "min_candidates": _between(1),
    "tail": _one_of("keep", "drop"),
    "baseline": _one_of("state", "candidate-mean"),
    "tilt": _one_of("mean", "optimal"),
    "advantage_clip": _optional(_within(0.0, above_low=True)),
    "prune": arguments.boolean,
    "report_kl": arguments.boolean,
    "return_hidden_states": arguments.boolean,
}
