"""`vas generate`: complete prompts from arguments, a file or stdin."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vas_engine.commands.options import (
    add_api_options,
    add_model_options,
    add_ranks_option,
    add_sampling_options,
    load_llm,
    load_remote,
    read_params,
)
from vas_engine.errors import InvalidArgumentError
from vas_engine.files import read_text
from vas_engine.outputs import CompletionOutput, RequestOutput
from vas_engine.params import SamplingParams

if TYPE_CHECKING:
    from vas_engine.integrations.remote import RemoteLLM
    from vas_engine.llm import LLM
    from vas_engine.prompts import Prompt

_EPILOG = """\
prompts: arguments; or --file, a text file with a prompt a line, .jsonl with texts or objects
  {"prompt": text | "prompt_token_ids": ids | "messages": [...], "params": {...}}, or .json, .yaml or .parquet as
  `vas collect --prompts` takes them; or stdin, as one prompt.

examples:
  vas generate MODEL "Once upon a time" --max-tokens 100
  vas generate MODEL "Once upon a time" --value kind=VALUE --weight kind=2 --show-values
  vas generate MODEL --value kind=V1 --value short=V2 --weight kind=2 --weight short=-1 --file prompts.txt
  echo "Once upon a time" | vas generate MODEL --seed 7 > story.txt
  vas generate MODEL --file prompts.jsonl --json --logprobs 5 > results.jsonl
  vas generate MODEL "Once upon a time" --tensor-parallel-size 2
  vas generate MODEL --chat "Write a poem" --temperature 0.7 --n 3
  vas generate --api-base http://127.0.0.1:8000/v1 --api-model NAME "Once upon a time" --max-tokens 50 \\
      --value kind=VALUE --value-tokenizer kind=FOLDER --weight kind=2 --state-file run.jsonl
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="complete prompts, steered by values",
        description="Completes prompts. One prompt is printed as it is written, several when all are done.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub name of a Hugging Face causal LM; not with --api-base")
    add("prompts", nargs="*", metavar="PROMPT", help="default: --file, or stdin")
    add("--file", metavar="FILE", help="see below; - is stdin, a prompt a line")
    add("--chat", action="store_true", help="each prompt is a user's message, by the model's chat template")
    add("--system", metavar="TEXT", help="system message for --chat")
    add("--json", action="store_true", help="one JSON object a line, with everything there is to know")
    add("--echo", action="store_true", help="print the prompt before its completion")
    add("--show-values", action="store_true", help="value of the state after every token, in a table")
    add("--no-stream", action="store_true", help="print when it is done")
    add("--quiet", action="store_true", help="nothing on stderr but errors")
    add_sampling_options(parser)
    add_model_options(parser)
    add_ranks_option(parser)
    _add_api_options(parser)
    parser.set_defaults(run=run)


def _add_api_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a model behind an API", "Every token is a request. A key is read from OPENAI_API_KEY or VAS_API_KEY."
    )
    add = group.add_argument
    add("--api-base", metavar="URL", help="OpenAI-compatible endpoint with log-probabilities on /completions")
    add("--api-model", metavar="NAME", help="as the endpoint calls it")
    add("--api-body", metavar="JSON", help='fields of every request, such as \'{"top_k": 0, "min_p": 0}\'')
    add("--state-file", metavar="FILE", help="keeps every token; a run that ended early goes on from it")
    add_api_options(group)


def run(args: argparse.Namespace) -> int:
    """Runs the command; 1 if a prompt failed."""
    from vas_engine.model.ranks import is_first

    params = read_params(args)
    if params.guided and not args.value:
        raise InvalidArgumentError("--weight", args.weight[0], "no value is loaded; add --value NAME=FOLDER")
    if args.api_base is not None:
        args.prompts = [text for text in (args.model, *args.prompts) if text is not None]
    elif args.model is None:
        raise InvalidArgumentError("MODEL", None, "give a folder or hub name, or --api-base URL")
    records = list(_read_records(args))
    llm: Any = load_llm(args) if args.api_base is None else _load_remote(args)
    if not is_first():  # the others do the same and say nothing
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    requests = [_read_request(record, llm, params, args) for record in records]
    if args.show_values:
        requests = [(prompt, _watching(own, llm.value_names)) for prompt, own in requests]
    elif llm.value_names and not any(own.values for _, own in requests) and not args.quiet:
        names = ", ".join(llm.value_names)
        print(f"vas: note: no --weight given, so nothing steers; loaded: {names}", file=sys.stderr)
    started = time.perf_counter()
    whole = args.json or args.no_stream or args.api_base is not None
    if len(requests) == 1 and requests[0][1].n == 1 and not whole:
        outputs = [_stream(llm, *requests[0], args)]
    else:
        outputs = _batch(llm, requests, args)
    if not args.quiet:
        print(_summary(outputs, time.perf_counter() - started), file=sys.stderr)
        if args.api_base is not None:
            print(f"vas: {llm.spent.requests} requests, {llm.spent.tokens} tokens charged", file=sys.stderr)
    return int(any(output.error is not None for output in outputs))


def _load_remote(args: argparse.Namespace) -> RemoteLLM:
    if args.api_model is None:
        raise InvalidArgumentError("--api-model", None, "say how the endpoint calls its model")
    if args.tensor_parallel_size is not None:
        raise InvalidArgumentError("--tensor-parallel-size", args.tensor_parallel_size, "not with --api-base")
    for option, given in (("--chat", args.chat), ("--show-values", args.show_values and not args.tokenizer)):
        if given:
            fix = "needs token ids: add --tokenizer" if option == "--show-values" else "not with --api-base"
            raise InvalidArgumentError(option, True, fix)
    return load_remote(
        args,
        args.api_base,
        args.api_model,
        "--api-base",
        "--api-body",
        api_key=os.environ.get("VAS_API_KEY") or os.environ.get("OPENAI_API_KEY"),
        state_file=args.state_file,
    )


# -- input -------------------------------------------------------------------------------------------------


def _read_records(args: argparse.Namespace) -> Iterable[Any]:
    """Texts, or the objects of a .jsonl file."""
    if args.prompts and args.file:
        raise InvalidArgumentError("--file", args.file, "give prompts as arguments or in a file, not both")
    if args.prompts:
        return args.prompts
    if args.file in (None, "-") and (args.tensor_parallel_size or 1) > 1:
        fix = "several processes cannot all read stdin; give prompts as arguments or in a file"
        raise InvalidArgumentError("--tensor-parallel-size", args.tensor_parallel_size, fix)
    if args.file:
        return _read_file(args.file)
    if sys.stdin is None or sys.stdin.isatty():
        raise InvalidArgumentError("PROMPT", None, "give a prompt as argument, by --file or on stdin")
    return [sys.stdin.read().removesuffix("\n")]


def _read_file(name: str) -> list[Any]:
    if name.endswith((".json", ".yaml", ".yml", ".parquet")):
        from vas_engine.training.prompts import load_prompts

        return [prompt if isinstance(prompt, str) else {"messages": prompt} for prompt in load_prompts(name)]
    try:
        text = sys.stdin.read() if name == "-" else read_text(Path(name))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("--file", name, f"cannot be read as UTF-8 text ({error})") from error
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InvalidArgumentError("--file", name, "holds no prompt; write one a line")
    if not name.endswith(".jsonl"):
        return [line.removesuffix("\r") for _, line in lines]
    return [_parse(name, number, line) for number, line in lines]


def _parse(name: str, number: int, line: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidArgumentError("--file", f"{name}:{number}", f"is no JSON ({error})") from error
    if not isinstance(record, str | dict):
        fix = "must be a text or an object with 'prompt', 'prompt_token_ids' or 'messages'"
        raise InvalidArgumentError("--file", f"{name}:{number}", fix)
    return record


def _read_request(
    record: Any, llm: LLM, params: SamplingParams, args: argparse.Namespace
) -> tuple[Any, SamplingParams]:
    """A prompt and its parameters; those of a line of a file come before those of the command line."""
    if isinstance(record, Mapping):
        record = dict(record)
        own = record.pop("params", {})
        if not isinstance(own, Mapping):
            raise InvalidArgumentError("params", own, "must be an object of names and values")
        params = params.replace(**own)
        if "messages" in record:
            if args.api_base is not None:
                raise InvalidArgumentError("messages", record["messages"], "not with --api-base; give a prompt")
            return _render(llm, record["messages"]), params
    if args.chat:
        text = record["prompt"] if isinstance(record, Mapping) else record
        system = [{"role": "system", "content": args.system}] if args.system else []
        messages = [*system, {"role": "user", "content": text}]
        return _render(llm, messages), params
    return record, params


def _render(llm: LLM, messages: Any) -> Prompt:
    """A conversation in which the assistant speaks next."""
    from vas_engine.tokenizer import turn_of

    return llm.render_chat(messages, **turn_of(messages))


def _watching(params: SamplingParams, names: list[str]) -> SamplingParams:
    """The same with every loaded value reported, those without weight at weight 0."""
    return params.replace(values=dict.fromkeys(names, 0.0) | dict(params.values or {}))


# -- output ------------------------------------------------------------------------------------------------


def _stream(llm: LLM, prompt: Any, params: SamplingParams, args: argparse.Namespace) -> RequestOutput:
    out = sys.stdout
    last: RequestOutput | None = None
    for last in llm.stream(prompt, params):
        if args.echo and last.prompt:
            out.write(last.prompt)
            args.echo = False
        out.write(last.outputs[0].delta_text)
        out.flush()
    assert last is not None
    out.write("\n")
    _print_tables(last.outputs[0], args, llm, out)
    return last


def _batch(llm: LLM, requests: list[tuple[Any, SamplingParams]], args: argparse.Namespace) -> list[RequestOutput]:
    prompts, params = [prompt for prompt, _ in requests], [own for _, own in requests]
    bar = not args.quiet and sys.stderr.isatty()
    outputs = llm.generate(prompts, params, use_tqdm=bar, on_error="return")
    for index, output in enumerate(outputs):
        if args.json:
            record = {**output.to_dict(), "params": params[index].to_dict()}
            print(json.dumps(record, ensure_ascii=False, default=_infinite))
        else:
            _print_output(index, len(outputs), output, args, llm)
        if output.error is not None:
            print(f"vas: error: prompt {index}: {output.error}", file=sys.stderr)
    sys.stdout.flush()
    return outputs


def _print_output(index: int, count: int, output: RequestOutput, args: argparse.Namespace, llm: LLM) -> None:
    for completion in output.outputs:
        several = count * len(output.outputs) > 1
        if several:
            part = f".{completion.index + 1}" if len(output.outputs) > 1 else ""
            print(f"--- {index + 1}{part} ({completion.finish_reason})")
        print((output.prompt or "" if args.echo else "") + completion.text)
        _print_tables(completion, args, llm, sys.stdout)


def _print_tables(completion: CompletionOutput, args: argparse.Namespace, llm: LLM, out: TextIO) -> None:
    """Per-token values and log-probabilities, tab separated."""
    from vas_engine.engine.output import Pieces

    names = list(completion.values) if args.show_values else []
    if not names and completion.logprobs is None:
        return
    pieces = Pieces(llm.tokenizer)
    columns = ["token", *(["logprob", "tilted"] if completion.logprobs is not None else []), *names]
    print("\n" + "\t".join(columns), file=out)
    for position, token in enumerate(completion.token_ids):
        cells = [json.dumps(pieces[token] or token, ensure_ascii=False)]
        if completion.logprobs is not None:
            entry = completion.logprobs[position][token]
            cells += [_cell(entry.logprob), _cell(entry.tilted_logprob)]
        cells += [_cell(completion.values[name][position]) for name in names]
        print("\t".join(cells), file=out)


def _cell(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def _infinite(value: Any) -> str:
    return str(value)


def _summary(outputs: list[RequestOutput], seconds: float) -> str:
    tokens = sum(output.metrics.generated_tokens for output in outputs)
    parts = [f"{tokens} tokens", f"{tokens / max(seconds, 1e-9):.0f} tokens/s"]
    evaluations = sum(output.metrics.value_evaluations for output in outputs)
    if evaluations and tokens:
        parts.append(f"{evaluations / tokens:.1f} values/token")
    first = outputs[0].outputs[0]
    if len(outputs) == 1 and len(outputs[0].outputs) == 1:
        parts += [str(first.finish_reason), f"seed {first.seed}"]
        parts += [f"{name} {series[-1]:.3f}" for name, series in first.values.items() if series]
        if first.kl is not None:
            parts.append(f"KL {first.kl:.3f}")
    return f"vas: {', '.join(parts)}"
