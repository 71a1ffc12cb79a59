"""Command line options that several commands share: the model with its values, and sampling."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from vas_engine.errors import InvalidArgumentError
from vas_engine.params import GUIDANCE, SamplingParams

if TYPE_CHECKING:
    from vas_engine.integrations.remote import RemoteLLM
    from vas_engine.llm import LLM

_MODEL_OPTIONS = (
    "device",
    "dtype",
    "load_format",
    "revision",
    "tokenizer",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "kv_cache_memory",
    "block_size",
    "attention_backend",
    "enable_prefix_caching",
    "enforce_eager",
)
_API_LIMITS = (
    "concurrency",
    "timeout",
    "max_retries",
    "max_wait",
    "requests_per_second",
    "max_requests",
    "max_spent_tokens",
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """`--value` and how the model is loaded; `load_llm` reads them, beside `args.model`."""
    group = parser.add_argument_group("model and engine")
    add = group.add_argument
    add("--value", action="append", default=[], metavar="[NAME=]FOLDER", help="load a value; may be repeated")
    add("--tokenizer", metavar="FOLDER", help="default: the model's own")
    add("--device", metavar="auto|cpu|cuda", help="default: CUDA where there is one")
    add("--dtype", metavar="auto|float32|bfloat16|float16", help="default: the checkpoint's")
    add("--load-format", metavar="auto|dummy", help="dummy: random weights of the real shape")
    add("--revision", help="of a model on the hub")
    add("--max-num-seqs", type=int, metavar="N", help="completions that run at once")
    add("--max-num-batched-tokens", type=int, metavar="N", help="rows of one step")
    add("--max-model-len", type=int, metavar="N", help="longest prompt and completion together")
    add("--kv-cache-memory", metavar="SIZE", help="such as 2GiB")
    add("--block-size", type=int, metavar="N", help="tokens of a page of the KV cache (default 16)")
    add("--attention-backend", metavar="auto|cpp|triton|flash-attn|reference")
    ways = group.add_mutually_exclusive_group()
    ways.add_argument(
        "--compile",
        dest="enforce_eager",
        action="store_const",
        const=False,
        help="compile model and values while loading: about a second a layer, then faster steps",
    )
    ways.add_argument(
        "--enforce-eager",
        action="store_const",
        const=True,
        help="neither compile the model nor keep decode steps as CUDA graphs",
    )
    add("--no-prefix-caching", dest="enable_prefix_caching", action="store_const", const=False)


def add_ranks_option(parser: argparse.ArgumentParser) -> None:
    """How many processes share the model; `load_llm` reads it."""
    parser.add_argument(
        "--tensor-parallel-size",
        type=int,
        metavar="N",
        help="processes that share the model, one an accelerator; this command starts them (by torchrun)",
    )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Every field of SamplingParams that makes sense on a command line; `read_params` reads them."""
    group = parser.add_argument_group("sampling")
    add = group.add_argument
    add("--n", type=int, metavar="N", help="completions of each prompt")
    add("--temperature", type=float, metavar="T", help="0 takes the best token (default 1)")
    add("--top-p", type=float, metavar="P")
    add("--top-k", type=int, metavar="K")
    add("--min-p", type=float, metavar="P")
    add("--seed", type=int, help="repeats a run")
    add("--max-tokens", type=int, metavar="N", help="default: until the context is full")
    add("--min-tokens", type=int, metavar="N")
    add("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    add("--stop-token-ids", type=int, nargs="+", metavar="ID")
    add("--ignore-eos", action="store_const", const=True)
    add("--include-stop-str-in-output", action="store_const", const=True, help="keep the stop text")
    add("--keep-special-tokens", dest="skip_special_tokens", action="store_const", const=False)
    add("--logprobs", type=int, metavar="N", help="log-probability of each token and of the N best, both ways")
    add("--presence-penalty", type=float, metavar="X")
    add("--frequency-penalty", type=float, metavar="X")
    add("--repetition-penalty", type=float, metavar="X")
    add("--logit-bias", action="append", default=[], metavar="ID=X", help="-inf bans; may be repeated")
    values = add_guidance_options(parser)
    add = values.add_argument
    add("--no-prune", dest="prune", action="store_const", const=False, help="evaluate every candidate")
    add("--report-kl", action="store_const", const=True, help="exact KL from the base model")


def add_guidance_options(parser: argparse.ArgumentParser) -> Any:
    """The strengths of values and how they guide; `read_guidance` reads them. Returns the group."""
    values = parser.add_argument_group("values")
    add = values.add_argument
    add("--weight", action="append", default=[], metavar="NAME=W", help="strength of a value; may be repeated")
    add("--num-candidates", type=int, metavar="K", help="tokens that the values look at (default 20)")
    add("--tail", metavar="keep|drop", help="what becomes of the other tokens")
    add("--baseline", metavar="state|candidate-mean")
    add("--tilt", metavar="mean|optimal")
    add("--advantage-clip", type=float, metavar="X", help="bound each advantage; speeds decoding up")
    return values


def add_api_options(group: Any) -> None:
    """How an endpoint may be used; `load_remote` reads them."""
    add = group.add_argument
    add("--value-tokenizer", action="append", default=[], metavar="[NAME=]FOLDER", help="a value's own tokenizer")
    add("--concurrency", type=int, metavar="N", help="requests at once (default 8)")
    add("--timeout", type=float, metavar="S", help="seconds for an answer (default 60)")
    add("--max-retries", type=int, metavar="N", default=6, help="further tries of a request (default %(default)s)")
    add(
        "--max-wait",
        type=float,
        metavar="S",
        default=600.0,
        help="longest Retry-After that is waited for (default %(default)g)",
    )
    add("--requests-per-second", type=float, metavar="R")
    add("--max-requests", type=int, metavar="N", help="end there; what is done is kept")
    add("--max-spent-tokens", type=int, metavar="N", help="the same, by the tokens that the endpoint charges")


def load_remote(args: argparse.Namespace, url: str, model: str, other: str, body_option: str, **more: Any) -> RemoteLLM:
    """The RemoteLLM that the model options and those of an endpoint describe.

    Args:
        other: option that calls for an endpoint. body_option: that of fields for every request.
        more: further arguments.
    """
    from vas_engine.integrations.remote import RemoteLLM

    for name in _MODEL_OPTIONS:
        if name not in ("tokenizer", "max_model_len") and getattr(args, name) is not None:
            raise InvalidArgumentError("--" + name.replace("_", "-"), getattr(args, name), f"not with {other}")
    text = getattr(args, body_option.removeprefix("--").replace("-", "_"))
    try:
        body = json.loads(text or "{}")
    except ValueError as error:
        raise InvalidArgumentError(body_option, text, f"is no JSON ({error})") from error
    if not isinstance(body, dict):
        raise InvalidArgumentError(body_option, text, "must be a JSON object")
    tokenizers = read_values(args.value_tokenizer) or {}
    hide_loading(args)
    return RemoteLLM(
        url,
        model,
        read_values(args.value),
        tokenizer=args.tokenizer,
        value_tokenizers={"": tokenizers} if isinstance(tokenizers, str) else tokenizers,
        max_model_len=args.max_model_len,
        extra_body=body,
        **given(args, _API_LIMITS),
        **more,
    )


def load_llm(args: argparse.Namespace, values: Any = None) -> LLM:
    """The LLM that the model options describe; `values` in place of those that they name.

    With a --tensor-parallel-size the command begins anew as so many processes, which then get here.
    """
    size = getattr(args, "tensor_parallel_size", None)
    ranks = 1 if size is None else size
    if ranks > 1 and "WORLD_SIZE" not in os.environ:
        _start_ranks(ranks, args.words)
    from vas_engine.llm import LLM

    hide_loading(args)
    loaded = read_values(args.value) if values is None else values
    return LLM(args.model, loaded, tensor_parallel_size=ranks, **given(args, _MODEL_OPTIONS))


def hide_loading(args: argparse.Namespace) -> None:
    """No progress bars of transformers' where nobody watches, or with --quiet."""
    from transformers.utils import logging

    if getattr(args, "quiet", False) or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _start_ranks(count: int, words: Sequence[str]) -> NoReturn:
    """This command in so many processes in place of this one."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    os.execv(sys.executable, [*command, "-m", "vas_engine.cli", *words])


def read_values(values: Sequence[str]) -> Any:
    """`["kind=folder", ...]` or one `["folder"]` as LLM's `values`."""
    if not values:
        return None
    if len(values) == 1 and "=" not in values[0]:
        return values[0]
    named = {}
    for value in values:
        name, sign, folder = value.partition("=")
        if not sign or not name or not folder:
            raise InvalidArgumentError("--value", value, "write NAME=FOLDER; of several values each needs a name")
        if name in named:
            raise InvalidArgumentError("--value", value, "this name is taken; give each value another")
        named[name] = folder
    return named


def read_params(args: argparse.Namespace) -> SamplingParams:
    """SamplingParams from the sampling options that were given."""
    options = given(args, [field.name for field in dataclasses.fields(SamplingParams) if field.name != "logit_bias"])
    if args.logit_bias:
        pairs = [_pair("--logit-bias", text, "ID=NUMBER") for text in args.logit_bias]
        options["logit_bias"] = dict(pairs)
    return SamplingParams(**(options | read_guidance(args)))


def read_guidance(args: argparse.Namespace) -> dict[str, Any]:
    """Those of SamplingParams' fields that say how values guide, where they were given."""
    options = given(args, GUIDANCE)
    if args.weight:
        options["values"] = dict(_pair("--weight", text, "NAME=NUMBER") for text in args.weight)
    return options


def given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of some options that the command has and that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def _pair(option: str, text: str, form: str) -> tuple[str, float]:
    name, sign, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        sign = ""
    if not sign or not name:
        raise InvalidArgumentError(option, text, f"write {form}")
    return name, value
