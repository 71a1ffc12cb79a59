"""`vas bench`: how fast a model decodes, measured here or predicted for a GPU that is not here."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vas_engine import arguments
from vas_engine.commands.options import add_model_options, load_llm
from vas_engine.errors import InvalidArgumentError, VASError, nearest

if TYPE_CHECKING:
    from vas_engine.engine.cost import Device, Network, Prediction, Shape
    from vas_engine.engine.event import TokenEvent
    from vas_engine.llm import LLM

T = TypeVar("T")

WARM = 4
"""Steps before the clock starts."""
KINDS = ("plain", "action", "reader", "side", "lookahead", "side-lookahead", "model")

_EPILOG = """\
examples:
  vas bench --predict llama-8b --gpu H200 --batch 1,8,32,64 --context 1024,8192 --kind plain,reader,lookahead
  vas bench --predict path/to/model --gpu A100 --candidates 1,5,20 --values 1,4 --json
  vas bench --predict llama-8b --gpu H200 --value kind=VALUE --bandwidth 4.2e12 --flops 700e12
  vas bench --predict llama-8b --gpu mine --bandwidth 1e12 --flops 100e12
  vas bench MODEL --batch 1,16 --context 128
  vas bench MODEL --value kind=VALUE --batch 8 --gpu H200

--predict takes a folder with a config.json or a shape's name: llama-135m, llama-1b, llama-1.1b, llama-3b, llama-8b,
llama-70b. Rates are the datasheet's unless given; docs/cost-model.md says what the figures mean.
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "bench",
        help="measure speed, or predict it for another machine",
        description="Measures decoding with random prompts; with --predict nothing runs, and a model of the bytes "
        "and operations of a step says what a GPU can do at best.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a causal LM; with --predict see below")
    parser.add_argument("--predict", action="store_true", help="predict, measure nothing")
    parser.add_argument("--batch", type=_integers, default=[1, 8], metavar="N,...", help="requests at once (1,8)")
    parser.add_argument("--context", type=_integers, default=[128], metavar="N,...", help="tokens of a prompt (128)")
    parser.add_argument("--candidates", type=_integers, default=[20], metavar="N,...", help="of a guided step (20)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    predict = parser.add_argument_group("prediction")
    predict.add_argument("--gpu", metavar="NAME", help="A100, L40S, H100, H200, B200, MI300X, or any name with rates")
    predict.add_argument("--kind", type=_words, default=["plain", "reader"], metavar="KIND,...", help=", ".join(KINDS))
    predict.add_argument("--values", type=_integers, default=[1], metavar="N,...", help="networks of that kind (1)")
    predict.add_argument("--backbone", default="llama-1b", metavar="MODEL", help="of a value model (llama-1b)")
    predict.add_argument("--prefill", type=int, default=0, metavar="N", help="prompt tokens taken in by the same step")
    predict.add_argument("--bandwidth", type=float, metavar="BYTES/S", help="in place of the datasheet's")
    predict.add_argument("--flops", type=float, metavar="FLOP/S", help="of matrix products, likewise")
    predict.add_argument("--launch", type=float, metavar="S", help="lost by each kernel (assumed 1.5e-6)")
    predict.add_argument("--step", type=float, metavar="S", help="lost by each step on the host (assumed 30e-6)")
    measure = parser.add_argument_group("measurement")
    measure.add_argument("--new-tokens", type=int, default=64, metavar="N", help="steps timed (64)")
    measure.add_argument("--rounds", type=int, default=3, metavar="N", help="measurements, median taken (3)")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    for name in ("new_tokens", "rounds"):
        arguments.integer(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    report = predict(args) if args.predict else measure(args)
    print(json.dumps(report, indent=2) if args.json else as_text(report))


# -- prediction ----------------------------------------------------------------------------------------------


def predict(args: argparse.Namespace) -> dict[str, Any]:
    """Settings and a row for each combination of kind, batch, context, candidates and number of values."""
    from vas_engine.engine import cost

    if args.gpu is None:
        raise InvalidArgumentError("--gpu", None, f"name one: {', '.join(cost.DEVICES)}, or your own with its rates")
    shape = read_shape(args.model, args.dtype)
    device = read_device(args, shape.dtype)
    loaded = read_networks(args, shape)
    rows = []
    for kind, networks in loaded.items():
        plain = not networks
        for batch, context, candidates, values in itertools.product(
            args.batch, args.context, [1] if plain else args.candidates, [1] if plain else args.values
        ):
            found = cost.predict(shape, device, batch, context, networks * values, candidates, args.prefill)
            setting = {"kind": kind, "batch": batch, "context": context}
            rows.append(
                {**setting, **({} if plain else {"candidates": candidates, "values": values}), **_record(found)}
            )
    return {
        "model": {"name": args.model, **asdict(shape), "parameters": shape.parameters},
        "device": {**asdict(device), "flops": dict(device.flops)},
        "knee": cost.knee(shape, device),
        "predictions": rows,
    }


def read_shape(model: str, dtype: str | None) -> Shape:
    """A shape by name, or of a model's config."""
    from vas_engine.engine.cost import BYTES, SHAPES, Shape

    if dtype not in (None, "auto", *BYTES):
        raise InvalidArgumentError("dtype", dtype, nearest(str(dtype), BYTES))
    kind = None if dtype == "auto" else dtype
    if model in SHAPES:
        return replace(SHAPES[model], dtype=kind) if kind else SHAPES[model]
    if not Path(model).exists() and "/" not in model:
        raise InvalidArgumentError("MODEL", model, f"no such folder, nor a shape; {nearest(model, SHAPES)}")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InvalidArgumentError("MODEL", model, f"has no readable config.json ({error})") from error
    return Shape.of(config, kind)


def read_device(args: argparse.Namespace, dtype: str) -> Device:
    """The GPU named, with the rates that were given; an unknown name needs both."""
    from vas_engine.engine.cost import Device, device

    given = {name: getattr(args, name) for name in ("bandwidth", "launch", "step") if getattr(args, name) is not None}
    if args.flops is not None:
        given["flops"] = {dtype: args.flops}
    if {"bandwidth", "flops"} <= given.keys():
        try:
            return device(args.gpu, **given)
        except InvalidArgumentError as error:
            if error.argument != "gpu":
                raise
            return Device(args.gpu, **given)
    return device(args.gpu, **given)


def read_networks(args: argparse.Namespace, shape: Shape) -> dict[str, list[Network]]:
    """Networks by kind as `vas train` makes them; with --value those of the folders, all at once."""
    from vas_engine.engine.cost import Network, network_config
    from vas_engine.values import HeadConfig, ValueConfig, read_config

    if args.value:
        folders = [value.rpartition("=")[2] for value in args.value]
        networks = []
        for folder in folders:
            config = read_config(folder)
            is_model = config.kind == "model"
            networks.append(Network(config, read_shape(args.backbone, args.dtype) if is_model else None))
        return {"plain": [], "values": networks}
    found: dict[str, list[Network]] = {}
    for kind in args.kind:
        if kind not in KINDS:
            raise InvalidArgumentError("--kind", kind, nearest(kind, KINDS))
        if kind == "plain":
            found[kind] = []
        elif kind == "model":
            backbone = read_shape(args.backbone, args.dtype)
            config = ValueConfig("model", (HeadConfig("value"),), backbone.hidden, backbone.vocab)
            found[kind] = [Network(config, backbone)]
        else:
            found[kind] = [Network(network_config(shape, kind))]
    return found


def _record(found: Prediction) -> dict[str, Any]:
    record = asdict(found)
    record["parts"] = {name: part for name, part in record["parts"].items() if part["bytes"]}
    record.pop("knee")
    return record


# -- measurement ---------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Decodes random prompts, plain and, where values are loaded, guided; the prediction beside it."""
    from vas_engine.engine import cost

    if args.max_num_seqs is not None and args.max_num_seqs < max(args.batch):
        fix = f"must be at least the largest --batch, {max(args.batch)}: all of its requests decode at once"
        raise InvalidArgumentError("--max-num-seqs", args.max_num_seqs, fix)
    args.max_num_seqs = args.max_num_seqs or max(args.batch)
    args.max_model_len = args.max_model_len or room(max(args.context), args.new_tokens, max(args.batch))
    llm = load_llm(args)
    predicting: tuple[Shape, Device] | None = None
    if args.gpu is not None:
        shape = cost.Shape.of(llm.lm)
        predicting = (shape, read_device(args, shape.dtype))
    rows = []
    for batch, context in itertools.product(args.batch, args.context):
        guided = list(args.candidates) if llm.values else []
        for candidates in [0, *guided]:
            rates = [decode(llm, batch, context, candidates, args.new_tokens, seed) for seed in range(args.rounds)]
            row: dict[str, Any] = {"kind": "values" if candidates else "plain", "batch": batch, "context": context}
            if candidates:
                row["candidates"] = candidates
            row |= {"tokens_per_second": statistics.median(rates), "rounds": rates}
            if predicting is not None:
                networks = [cost.Network(s.config, _backbone(s)) for s in llm.values.values()] if candidates else []
                middle = context + WARM + args.new_tokens / 2
                found = cost.predict(*predicting, batch, middle, networks, candidates or 1)
                row["predicted"] = found.tokens_per_second
            rows.append(row)
            print(f"{row['kind']}, batch {batch}: {row['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    return {"model": {"name": args.model}, "new_tokens": args.new_tokens, "measurements": rows}


def _backbone(scorer: Any) -> Shape | None:
    from vas_engine.engine.cost import Shape

    found = getattr(scorer, "lm_of_values", None)
    return None if found is None else Shape.of(found)


def room(context: int, steps: int, batch: int) -> int:
    """Tokens a sequence must have room for where `decode` measures `steps` steps."""
    # While the last prompts are taken in, the first requests decode already.
    return context + steps + WARM + 2 * batch + 2


def decode(llm: LLM, batch: int, context: int, candidates: int, steps: int, seed: int = 0) -> float:
    """Tokens per second of steps in which every request decodes: prompts are taken in before the clock starts.

    Args:
        context: random tokens of each prompt. candidates: 0 is plain decoding.
        steps: timed, one token a request; the LLM must have room for them and for `WARM` more.
    """
    import numpy as np

    from vas_engine.params import SamplingParams

    engine = llm.engine
    prompts = np.random.default_rng(seed).integers(0, llm.lm.vocab_size, (batch, context)).tolist()
    guided: dict[str, Any] = {"values": dict.fromkeys(llm.value_names, 1.0), "num_candidates": candidates}
    room = llm.max_model_len - context
    waiting = set()
    for index, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=room, ignore_eos=True, seed=seed + index, **(guided if candidates else {}))
        engine.add_request(str(index), prompt, params)
        waiting.add(str(index))
    try:
        while waiting:
            waiting -= {event.request_id for event in _sound(engine.step())}
        for _ in range(WARM):
            _sound(engine.step())
        start = time.perf_counter()
        # A step ends when its tokens, or those of the step before, are read: that is the wait for the device.
        tokens = sum(len(_sound(engine.step())) for _ in range(steps))
        return tokens / (time.perf_counter() - start)
    finally:
        for index in range(batch):
            engine.cancel(str(index))
        while engine.has_unfinished:
            engine.step()


def _sound(events: list[TokenEvent]) -> list[TokenEvent]:
    """The events, if all of them are tokens of requests that go on."""
    for event in events:
        if event.error is not None:
            raise event.error
        if event.finish_reason is not None:
            raise VASError(
                f"request {event.request_id} ended while it was measured; give the LLM a longer max_model_len"
            )
    return events


# -- output --------------------------------------------------------------------------------------------------


def as_text(report: dict[str, Any]) -> str:
    """The report as a table."""
    return _predicted_text(report) if "predictions" in report else _measured_text(report)


def _predicted_text(report: dict[str, Any]) -> str:
    model, device = report["model"], report["device"]
    rate = device["flops"][model["dtype"]]
    lines = [
        f"{model['name']}, {model['parameters'] / 1e9:.2f} billion parameters, {model['dtype']}, on {device['name']}: "
        f"{device['bandwidth'] / 1e12:.3g} TB/s, {rate / 1e12:.4g} TFLOP/s",
        f"weights cost more to multiply than to read from {report['knee']:.0f} rows on",
        "",
        f"{'kind':<16}{'batch':>6}{'context':>9}{'cand.':>7}{'values':>8}{'tokens/s':>10}{'of plain':>10}{'ms':>9}  "
        "ms of weights, K/V, network, head, sampler",
    ]
    for row in report["predictions"]:
        parts = " ".join(
            f"{row['parts'][name]['seconds'] * 1e3:8.3f}" if name in row["parts"] else f"{'-':>8}"
            for name in ("weights", "kv", "network", "head", "sampler")
        )
        note = "" if row["fits"] else f"  does not fit: {row['memory'] / 1e9:.0f} GB"
        lines.append(
            f"{row['kind']:<16}{row['batch']:>6}{row['context']:>9}{row.get('candidates', ''):>7}"
            f"{row.get('values', ''):>8}{row['tokens_per_second']:>10.1f}{row['ratio']:>10.3f}"
            f"{row['seconds'] * 1e3:>9.3f}  {parts}{note}"
        )
    return "\n".join(lines)


def _measured_text(report: dict[str, Any]) -> str:
    lines = [f"{'kind':<10}{'batch':>6}{'context':>9}{'cand.':>7}{'tokens/s':>10}{'predicted':>11}"]
    for row in report["measurements"]:
        predicted = f"{row['predicted']:.1f}" if "predicted" in row else ""
        lines.append(
            f"{row['kind']:<10}{row['batch']:>6}{row['context']:>9}{row.get('candidates', ''):>7}"
            f"{row['tokens_per_second']:>10.1f}{predicted:>11}".rstrip()
        )
    return "\n".join(lines)


# -- reading lists -------------------------------------------------------------------------------------------


def _several(text: str, read: Callable[[str], T]) -> list[T]:
    return [read(word.strip()) for word in text.split(",")]


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _integers(text: str) -> Sequence[int]:
    try:
        return _several(text, _positive)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: use positive integers, such as 1,8,32") from None


def _words(text: str) -> Sequence[str]:
    return _several(text, str)
