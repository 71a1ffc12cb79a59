"""`vas serve`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from vas_engine.commands.options import add_api_options, add_model_options, given, load_llm, load_remote
from vas_engine.errors import InvalidArgumentError
from vas_engine.files import read_text

_EPILOG = """\
examples:
  vas serve MODEL
  vas serve MODEL --value kind=VALUE --value concise=VALUE --port 9000
  vas serve MODEL --value kind=VALUE --api-key-file keys.txt --host 0.0.0.0 --salt-per-key
  VAS_API_KEY=secret vas serve MODEL --value kind=VALUE --itl-slo 30ms --json
  vas serve --upstream http://127.0.0.1:9000/v1 --value kind=VALUE --value-tokenizer kind=FOLDER
  vas serve --upstream https://api.example.com/v1 --upstream-model NAME --upstream-key-env EXAMPLE_KEY \\
      --tokenizer FOLDER --value kind=VALUE --max-spent-tokens 1000000 --port 9001

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "MODEL", "prompt": "Once upon a time", "vas_weights": {"kind": 2}}'

On SIGTERM or Ctrl-C what was accepted is finished and new requests get 503; a second one does not wait.
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LIMITS = {"max_body": "body_bytes", "max_n": "n", "max_candidates": "candidates", "max_logprobs": "logprobs"}
"""Options, and what the server's limits call them."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="OpenAI-compatible HTTP server",
        description="Serves a model and its values over HTTP, as OpenAI's API does: every request its own weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="folder or hub name of a Hugging Face causal LM; not with --upstream")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=8000, help="0 takes a free one (default 8000)")
    add("--served-model-name", metavar="NAME", help="what clients call the model (default: MODEL as given)")
    add("--chat-template", metavar="FILE", help="Jinja template in place of the tokenizer's own")
    add("--otlp-traces-endpoint", metavar="URL", help="send an OpenTelemetry span for each request (OTLP over HTTP)")
    add("--json", action="store_true", help="the ready line and logs as JSON")
    security = parser.add_argument_group("security").add_argument
    security("--api-key", action="append", default=[], metavar="KEY", help="may be repeated; also VAS_API_KEY")
    security("--api-key-file", metavar="FILE", help="keys, one a line")
    security("--salt-per-key", action="store_true", help="no prefix is shared between keys")
    security("--admin-key", metavar="KEY", help="opens /admin (values, profiles); also VAS_ADMIN_KEY; off without")
    security("--values-dir", metavar="FOLDER", help="the only folder that /admin may load values from")
    security("--profiles", metavar="FILE", help="YAML file of named weights; /admin writes to it")
    limits = parser.add_argument_group("limits").add_argument
    limits("--max-body", type=int, metavar="BYTES", help="of a request")
    limits("--max-n", type=int, metavar="N", help="completions of a prompt")
    limits("--max-candidates", type=int, metavar="N", help="that a request's values may look at")
    limits("--max-logprobs", type=int, metavar="N", help="alternatives a token is reported with")
    limits("--max-waiting", type=int, metavar="N", help="completions that may wait; more get 429")
    limits(
        "--itl-slo",
        type=seconds,
        metavar="TIME",
        help="such as 30ms: fit steps into it; tokens then depend on the load (off)",
    )
    limits("--request-timeout", type=float, metavar="S", help="seconds a request may take")
    limits("--write-timeout", type=float, metavar="S", help="seconds a stream may be left unread")
    limits("--drain-timeout", type=float, metavar="S", help="seconds to finish after SIGTERM")
    limits("--step-timeout", type=float, metavar="S", help="seconds after which a step is reported as stuck")
    add_model_options(parser)
    group = parser.add_argument_group(
        "a model behind an API", "In place of MODEL. Its values are of kind model; every token is a request."
    )
    add = group.add_argument
    add("--upstream", metavar="URL", help="OpenAI-compatible endpoint with log-probabilities on /completions")
    add("--upstream-model", metavar="NAME", help="as the endpoint calls it (default: the only one it lists)")
    add("--upstream-key-env", metavar="VAR", help="environment variable that holds the endpoint's key")
    add("--upstream-body", metavar="JSON", help='fields of every request, such as \'{"top_k": 0, "min_p": 0}\'')
    add_api_options(group)
    parser.set_defaults(run=run, max_retries=2, max_wait=30.0)


def run(args: argparse.Namespace) -> int:
    """Runs the command until it is told to end."""
    from vas_engine.serving.logs import set_up
    from vas_engine.serving.server import listen, serve

    remote = _load_remote(args)
    settings = read_settings(args)
    tracer = None
    if args.otlp_traces_endpoint is not None:
        from vas_engine.serving.tracing import make_tracer

        tracer = make_tracer(args.otlp_traces_endpoint)
    listener = listen(args.host, args.port)  # before the model, which takes longer to load
    if not settings.api_keys and args.host not in LOOPBACK:
        print(f"vas: warning: {args.host} is open to others and no --api-key is set", file=sys.stderr)
    set_up(args.json)
    with listener:
        llm = remote or load_llm(args)
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        serve(llm, settings, listener, lambda: _say_ready(url, settings.model_name, llm.value_names, args.json), tracer)
    return 0


def _load_remote(args: argparse.Namespace) -> Any:
    """The model behind --upstream; None without. Gives `args` the name to serve it by."""
    if args.upstream is None:
        if args.model is None:
            raise InvalidArgumentError("MODEL", None, "give a folder or hub name, or --upstream URL")
        return None
    for name in ("model", "itl_slo", "values_dir", "salt_per_key"):
        if value := getattr(args, name):
            option = "MODEL" if name == "model" else "--" + name.replace("_", "-")
            raise InvalidArgumentError(option, value, "not with --upstream")
    key = None
    if args.upstream_key_env is not None:
        key = os.environ.get(args.upstream_key_env)
        if not key:
            raise InvalidArgumentError("--upstream-key-env", args.upstream_key_env, "no such variable is set")
    llm = load_remote(args, args.upstream, args.upstream_model or "", "--upstream", "--upstream-body", api_key=key)
    if args.upstream_model is None:
        names = asyncio.run(llm.models())
        if len(names) != 1:
            fix = f"say which of the endpoint's models to serve: {', '.join(names) or 'it lists none'}"
            raise InvalidArgumentError("--upstream-model", None, fix)
        llm.model = names[0]
    args.model = llm.model
    return llm


def seconds(text: str) -> float:
    """Seconds from "30ms", "0.03s" or "0.03"."""
    number, unit = (text[:-2], 1e-3) if text.endswith("ms") else (text.removesuffix("s"), 1.0)
    found = float(number) * unit
    if not 0 < found < 3600:
        raise ValueError(text)
    return found


def read_settings(args: argparse.Namespace) -> Any:
    """Settings from the options that were given."""
    from vas_engine.serving.settings import Limits, Settings

    limits = given(args, LIMITS)
    options = given(args, ("max_waiting", "request_timeout", "write_timeout", "drain_timeout", "step_timeout"))
    for name, number in {**limits, **options}.items():
        if number <= 0:
            raise InvalidArgumentError("--" + name.replace("_", "-"), number, "must be above 0")
    return Settings(
        itl_slo=args.itl_slo,
        model_name=args.served_model_name or args.model,
        chat_template=None if args.chat_template is None else _read("--chat-template", args.chat_template),
        api_keys=tuple(_read_keys(args)),
        hosts=LOOPBACK if args.host in LOOPBACK else (),
        admin_key=args.admin_key or os.environ.get("VAS_ADMIN_KEY") or None,
        profiles=None if args.profiles is None else Path(args.profiles),
        values_dir=None if args.values_dir is None else _folder("--values-dir", args.values_dir),
        salt_per_key=args.salt_per_key,
        limits=Limits(**{LIMITS[name]: number for name, number in limits.items()}),
        **options,
    )


def _read_keys(args: argparse.Namespace) -> list[str]:
    keys = [*args.api_key, os.environ.get("VAS_API_KEY", "")]
    if args.api_key_file is not None:
        lines = [line.strip() for line in _read("--api-key-file", args.api_key_file).splitlines()]
        if not any(lines):
            raise InvalidArgumentError("--api-key-file", args.api_key_file, "holds no key; write one a line")
        keys += lines
    return [key for key in keys if key]


def _folder(option: str, name: str) -> Path:
    if not Path(name).is_dir():
        raise InvalidArgumentError(option, name, "is no folder")
    return Path(name)


def _read(option: str, name: str) -> str:
    try:
        return read_text(Path(name))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(option, name, f"cannot be read as UTF-8 text ({error})") from error


def _say_ready(url: str, model: str, values: list[str], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "ready", "url": url, "model": model, "values": values}), flush=True)
    else:
        named = f", values {', '.join(values)}" if values else ""
        print(f"vas: serving {model}{named} on {url}/v1 (Ctrl-C ends)", flush=True)
