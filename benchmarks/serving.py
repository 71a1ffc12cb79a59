"""A server under a real service's load: throughput, time to first token, time between tokens.

    python -m benchmarks.serving --model MODEL --value reader=VALUE           Azure's conversations, plain and guided
    python -m benchmarks.serving --vllm-python ENV/bin/python --rate 2        135M shape, vLLM's server beside it
    python -m benchmarks.serving --contenders plain reader reader-slo --itl-slo 50ms --rate 6
    python -m benchmarks.serving --setting tiny --requests 20 --rate 20       does it run at all?

Every contender is a server in a process of its own; all are started before the first round, and one at a time gets
the load: the same requests at the same times, arrivals and lengths of the trace scaled to the context (see
`benchmarks.traces`), from 200 users each of whom has weights of its own for the server's values. A contender is
"plain", the name of a value (that value loaded, every request with weights), "vllm", or one of the first with "-slo"
behind it (`--itl-slo`). Each round has other prompts of the same lengths, so that no prefix cache knows them.

Times are a client's: from sending to the first event, between events (several tokens may come in one), and for a whole
request from its first event to its last, by token. The client runs on the same machine and takes from all alike;
`client` is its share of one core. Figures are medians over the rounds, with least and most in the JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.contenders import SETTINGS, Assets
from benchmarks.record import circumstances, spread, write
from benchmarks.traces import FILES, PAGE, SHARED, TraceRequest, read_trace, scale

KINDS = ("reader", "side")
"""Values of the random models, untrained."""
USERS = 200
WEIGHT = 3.0
"""Largest weight of a user, in standard deviations of the reward."""
START_SECONDS = 600.0
SLO = "-slo"
QUANTILES = (*range(1, 100), 99.5, 99.9)
WARM_UP = 16
"""Requests that a server gets all at once before a round."""
SPARE = 16
"""Tokens that a passage may gain when its text is tokenised anew."""


@dataclass
class Served:
    """What a client saw of one request; times in seconds."""

    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    limited: int = 0
    evaluations: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """A contender: how its server is started."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Models:
    """What is served: the base model's folder, those of the values, and what prompts are made of.

    Attributes:
        tokens: a long text's, int64; prompts are passages of it.
    """

    base: Path
    values: Mapping[str, Path]
    tokenizer: Any
    tokens: np.ndarray


def plans(args: argparse.Namespace, served: Models) -> list[Plan]:
    """The contenders that were asked for."""
    same = ["--served-model-name", "model", "--max-model-len", str(args.max_model_len), "--dtype", args.dtype]
    same += ["--max-num-seqs", str(args.max_num_seqs), "--max-num-batched-tokens", str(args.max_num_batched_tokens)]
    base = [sys.executable, "-m", "vas_engine.cli", "serve", str(served.base), *same, "--kv-cache-memory", "1GiB"]
    base += ["--max-waiting", "100000", "--request-timeout", "3600", *(["--compile"] if args.compile else [])]
    own = {"plain": base} | {name: [*base, "--value", f"{name}={path}"] for name, path in served.values.items()}
    made = {name: Plan(name, command) for name, command in own.items()}
    made |= {name + SLO: Plan(name + SLO, [*command, "--itl-slo", args.itl_slo]) for name, command in own.items()}
    if args.vllm_python:
        command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served.base), *same]
        command += ["--block-size", str(2 * PAGE)]  # the least it takes on a CPU; hardly two prompts share its 128
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        made["vllm"] = Plan("vllm", command, environment)
    wanted = args.contenders or [name for name in made if not name.endswith(SLO)]
    if unknown := [name for name in wanted if name not in made]:
        raise SystemExit(f"--contenders {' '.join(unknown)}: there are {', '.join(made)}")
    return [made[name] for name in wanted]


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[str]:
    """A contender's server; its address once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [*plan.command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **plan.environment}
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(url + "/health", timeout=5).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise SystemExit(f"{plan.name} does not start:\n{output.read()[-3000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer for the random model, a word a token, so that servers make text as they do elsewhere."""
    words = {f"word{token}": token for token in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="word2").save_pretrained(folder)


def random_models(folder: Path, setting: str, dtype: str) -> Models:
    """A model of a setting's shape with untrained values; prompts are words at random."""
    import torch

    assets = Assets(folder, SETTINGS[setting], getattr(torch, dtype))
    vocabulary = SETTINGS[setting].base.vocab
    save_tokenizer(assets.base, vocabulary)
    tokens = np.random.default_rng(0).integers(3, vocabulary, 1_000_000)
    values = {kind: assets.value(kind) for kind in KINDS}
    return Models(assets.base, values, AutoTokenizer.from_pretrained(assets.base), tokens)


def real_models(base: str, values: Sequence[str]) -> Models:
    """A model and values from their folders ("name=folder"); prompts are passages of TinyStories."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    file = SHARED / "data" / "tinystories" / "stories.jsonl"
    stories = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    tokens = [token for ids in tokenizer(stories, add_special_tokens=False)["input_ids"] for token in ids]
    folders = {name: Path(folder) for name, _, folder in (value.partition("=") for value in values)}
    return Models(Path(base), folders, tokenizer, np.array(tokens))


def weights(user: int, scales: Mapping[str, float]) -> dict[str, float]:
    """What this user wants of each value, whose reward has this standard deviation."""
    rng = random.Random(user)
    return {name: round(rng.uniform(-WEIGHT, WEIGHT) / scale, 4) for name, scale in scales.items()}


async def read_scales(client: httpx.AsyncClient) -> dict[str, float]:
    """The values of a server, with the standard deviation of their rewards; vLLM has none."""
    card = (await client.get("/v1/models")).json()["data"][0]
    found = {}
    for name, told in card.get("vas_scales", {}).items():
        low, high = told["interval"] or (0.0, 0.0)
        found[name] = told["std"] or (high - low) / 4 or 1.0
    return found


async def prefix_tokens(client: httpx.AsyncClient) -> np.ndarray:
    """Prompt tokens looked up in a server's prefix cache so far, and those found, by the metrics that vLLM has too."""
    lines = [line.rpartition(" ") for line in (await client.get("/metrics")).text.splitlines()]
    names = [f"vllm:prefix_cache_{name}_total{{" for name in ("queries", "hits")]
    return np.array([sum(float(value) for key, _, value in lines if key.startswith(name)) for name in names])


async def send(client: httpx.AsyncClient, body: dict[str, Any], due: float) -> Served:
    """One request at its time, read as it comes and looked at when it has ended."""
    await asyncio.sleep(max(due - time.perf_counter(), 0))
    pieces: list[tuple[float, bytes]] = []
    sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            if stream.status_code != 200:
                return Served(error=f"{stream.status_code}: {(await stream.aread())[:500]!r}")
            async for piece in stream.aiter_raw():
                pieces.append((time.perf_counter(), piece))
    except httpx.HTTPError as error:
        return Served(error=repr(error))
    return look(pieces, sent)


def look(pieces: Sequence[tuple[float, bytes]], sent: float) -> Served:
    """What arrived, piece by piece, of a request sent at a time; an event counts when its end is there."""
    seen, rest, last = Served(), b"", sent
    for now, piece in pieces:
        *events, rest = (rest + piece).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data: {"):
                continue
            chunk = json.loads(event[6:])
            if "error" in chunk:
                return Served(error=chunk["error"]["message"])
            if chunk.get("usage"):
                seen.prompt_tokens, seen.tokens = (chunk["usage"][f"{n}_tokens"] for n in ("prompt", "completion"))
            if chunk.get("vas"):
                seen.limited, seen.evaluations = chunk["vas"]["limited_tokens"], chunk["vas"]["value_evaluations"]
            if chunk["choices"]:
                if seen.first is None:
                    seen.first = now - sent
                else:
                    seen.gaps.append(now - last)
                last = now
    return seen


async def load(
    url: str, requests: Sequence[TraceRequest], warm_up: Sequence[TraceRequest], tokenizer: Any, title: str
) -> tuple[list[Served], dict[str, float]]:
    """Sends the requests of the warm-up all at once, then the others at their times; what was seen of these, and in
    how many seconds, with which share of prompt tokens from the prefix cache and of a core for this client."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        scales = await read_scales(client)

        def body(request: TraceRequest) -> dict[str, Any]:
            made = {
                "model": "model",
                "prompt": tokenizer.decode(request.prompt),
                "max_tokens": request.output,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            return made | ({"vas_weights": weights(request.user, scales)} if scales else {})

        bodies = [body(request) for request in requests]
        await asyncio.gather(*(send(client, body(request), 0.0) for request in warm_up))
        before = await prefix_tokens(client)
        cpu, started = time.process_time(), time.perf_counter()
        with tqdm(total=len(requests), desc=title, unit="request", disable=not sys.stderr.isatty()) as bar:

            async def one(request: TraceRequest, body: dict[str, Any]) -> Served:
                seen = await send(client, body, started + request.seconds)
                bar.update()
                return seen

            seen = await asyncio.gather(*(one(*pair) for pair in zip(requests, bodies, strict=True)))
        seconds = time.perf_counter() - started
        share = (time.process_time() - cpu) / seconds
        asked, hits = await prefix_tokens(client) - before
        return list(seen), {"seconds": seconds, "prefix_hits": hits / max(asked, 1), "client": share}


def summarise(seen: Sequence[Served], seconds: float) -> dict[str, float]:
    """One round's figures; times in seconds."""
    fine = [s for s in seen if s.error is None and s.first is not None]
    tokens = sum(s.tokens for s in fine)
    figures = {
        "completed": len(fine),
        "failed": len(seen) - len(fine),
        "prompt_tokens": sum(s.prompt_tokens for s in fine),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "tokens_per_event": tokens / max(sum(1 + len(s.gaps) for s in fine), 1),
        "evaluations_per_token": sum(s.evaluations for s in fine) / max(tokens, 1),
        "limited_share": sum(s.limited for s in fine) / max(tokens, 1),
        "limited_requests": sum(s.limited > 0 for s in fine) / max(len(fine), 1),
    }
    for name, series in times(fine).items():
        for q in (50, 99):
            figures[f"{name}_p{q}"] = float(np.percentile(series, q)) if series else float("nan")
    return figures


def times(fine: Sequence[Served]) -> dict[str, list[float]]:
    """Time to first token, between tokens, and per token over a whole request, in seconds."""
    return {
        "ttft": [s.first for s in fine if s.first is not None],
        "itl": [gap for s in fine for gap in s.gaps],
        "tpot": [sum(s.gaps) / (s.tokens - 1) for s in fine if s.tokens > 1],
    }


def measure(
    args: argparse.Namespace, contenders: Sequence[Plan], served: Models
) -> tuple[dict[str, list[dict[str, float]]], dict[str, list[Served]]]:
    """Figures of each round, and all that was seen, by contender."""
    rounds: dict[str, list[dict[str, float]]] = {plan.name: [] for plan in contenders}
    everything: dict[str, list[Served]] = {plan.name: [] for plan in contenders}
    trace = read_trace(args.trace)
    with contextlib.ExitStack() as servers:
        urls = {plan.name: servers.enter_context(running(plan)) for plan in contenders}
        for number in range(args.rounds):
            most = args.max_model_len - SPARE
            requests = scale(trace, args.requests, args.rate, most, served.tokens, USERS, seed=2 * number)
            warm_up = scale(trace[:WARM_UP], WARM_UP, 1.0, most, served.tokens, USERS, seed=2 * number + 1)
            if args.wait:
                input(f"round {number + 1} of {args.rounds}: Enter starts it ")
            for plan in contenders if number % 2 == 0 else reversed(contenders):
                seen, told = asyncio.run(load(urls[plan.name], requests, warm_up, served.tokenizer, plan.name))
                figures = summarise(seen, told["seconds"]) | told
                rounds[plan.name].append(figures)
                everything[plan.name] += [s for s in seen if s.error is None]
                for error in {s.error for s in seen if s.error is not None}:
                    print(f"{plan.name}: {error}", file=sys.stderr)
                middle, worst = (1e3 * figures[f"itl_p{q}"] for q in (50, 99))
                line = f"{figures['tokens_per_second']:.0f} tokens/s, {middle:.1f} ms between tokens (p99 {worst:.1f})"
                print(f"{plan.name}: {line}", file=sys.stderr, flush=True)
    return rounds, everything


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints a table; 1 if a request failed."""
    args = _parse(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            served = real_models(args.model, args.value)
        else:
            served = random_models(Path(folder), args.setting, args.dtype)
        contenders = plans(args, served)
        rounds, everything = measure(args, contenders, served)
    figures = {
        name: {key: spread([each[key] for each in series]) for key in series[0]} for name, series in rounds.items()
    }
    quantiles = {
        name: {key: np.percentile(series, QUANTILES).tolist() for key, series in times(seen).items() if series}
        for name, seen in everything.items()
    }
    _print(figures)
    if args.json:
        settings = {name: value for name, value in vars(args).items() if name not in ("json", "wait", "vllm_python")}
        settings |= {"users": USERS, "model": Path(args.model).name if args.model else args.setting}
        settings["value"] = list(served.values)
        record = {**circumstances(), "settings": settings, "rounds": rounds, "figures": figures}
        write(Path(args.json), {**record, "quantiles": {"at": QUANTILES, "seconds": quantiles}})
        draw(Path(args.json).with_suffix(".svg"), quantiles, args)
    return int(any(series["failed"]["max"] > 0 for series in figures.values()))


def draw(path: Path, quantiles: Mapping[str, Mapping[str, Sequence[float]]], args: argparse.Namespace) -> None:
    """The share of requests (or gaps) that took no longer than so many milliseconds, a line a contender."""
    # Figure and not pyplot: no window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    titles = {"ttft": "time to first token", "itl": "between tokens"}
    for (key, title), axes in zip(titles.items(), figure.subplots(1, len(titles)), strict=True):
        for name, series in quantiles.items():
            style = "--" if name.endswith(SLO) else ":" if name == "vllm" else "-"
            axes.plot([1e3 * seconds for seconds in series[key]], QUANTILES, style, label=name)
        axes.set(xscale="log", xlabel=f"{title}, ms", ylabel="percent within", ylim=(0, 100))
        axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.suptitle(f"{args.trace}, {args.rate:g} requests a second")
    figure.savefig(path, format="svg")


def _print(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    print(
        f"{'':12}{'tokens/s':>10}{'TTFT p50':>11}{'p99':>9}{'ITL p50':>10}{'p99':>9}{'TPOT p50':>10}"
        f"{'values/token':>14}{'limited':>9}{'prefix':>8}{'client':>8}"
    )
    for name, series in figures.items():
        middle = {key: each["median"] for key, each in series.items()}
        print(
            f"{name:12}{middle['tokens_per_second']:10.0f}"
            f"{1e3 * middle['ttft_p50']:8.0f} ms{1e3 * middle['ttft_p99']:6.0f} ms"
            f"{1e3 * middle['itl_p50']:7.1f} ms{1e3 * middle['itl_p99']:6.1f} ms{1e3 * middle['tpot_p50']:7.1f} ms"
            f"{middle['evaluations_per_token']:14.1f}{middle['limited_share']:9.0%}"
            f"{middle['prefix_hits']:8.0%}{middle['client']:8.0%}"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", choices=sorted(FILES), default="azure-conv")
    add("--model", metavar="FOLDER", help="a model that writes English (default: random weights of --setting)")
    add("--value", action="append", default=[], metavar="NAME=FOLDER", help="of --model; may be repeated")
    add("--setting", choices=sorted(SETTINGS), default="135m", help="shape of the random model")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--compile", action="store_true", help="compile the model (vLLM always does)")
    add("--requests", type=int, default=120, metavar="N")
    add("--rate", type=float, default=1.0, metavar="R", help="requests a second, on average")
    add("--max-model-len", type=int, default=512, metavar="N")
    add("--max-num-seqs", type=int, default=32, metavar="N")
    add("--max-num-batched-tokens", type=int, default=2048, metavar="N")
    add("--itl-slo", default="100ms", metavar="TIME", help="of the contenders with a bound")
    add("--rounds", type=int, default=1, metavar="N")
    add("--wait", action="store_true", help="wait for Enter before each round, so that the machine can be cleared")
    add("--contenders", nargs="+", metavar="NAME", help="default: all but those with a bound")
    add("--vllm-python", metavar="FILE", help="interpreter with vLLM")
    add("--json", metavar="FILE", help="write everything there, and a plot beside it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
