"""A server under a real service's load: throughput, time to first token, time between tokens.

    python -m benchmarks.serving                                         135M shape, Azure's conversations
    python -m benchmarks.serving --trace mooncake --rate 2 --json benchmarks/results/serving.json
    python -m benchmarks.serving --vllm-python ENV/bin/python            vLLM's server, plain, beside it
    python -m benchmarks.serving --setting tiny --requests 20 --rate 20  does it run at all?

Every contender is a server in a process of its own, started anew, and gets the same requests at the same times:
arrivals and lengths of the trace scaled to the context (see `benchmarks.traces`), from 200 users each of whom has
weights of its own for two values. Times are a client's: from sending to the first piece of text, and between pieces.
Contenders run one after the other, round after round; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from benchmarks.contenders import SETTINGS, Assets
from benchmarks.record import circumstances, spread, write
from benchmarks.traces import FILES, TraceRequest, read_trace, scale

KINDS = ("reader", "side")
USERS = 200
START_SECONDS = 600.0


@dataclass
class Served:
    """What a client saw of one request; times in seconds."""

    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    limited: int = 0
    evaluations: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Plan:
    """A contender: how its server is started, and whether its requests carry weights."""

    name: str
    command: list[str]
    guided: bool = False
    environment: dict[str, str] = field(default_factory=dict)


def plans(args: argparse.Namespace, assets: Assets) -> list[Plan]:
    """The contenders that were asked for."""
    base = [sys.executable, "-m", "vas_engine.cli", "serve", str(assets.base), "--served-model-name", "model"]
    base += ["--max-model-len", str(args.max_model_len), "--max-waiting", "100000"]
    base += ["--max-num-seqs", str(args.max_num_seqs), "--request-timeout", "3600"]
    values = [word for kind in KINDS for word in ("--value", f"{kind}={assets.value(kind)}")]
    made = [
        Plan("plain", base),
        Plan("guided", base + values, guided=True),
        Plan("guided-slo", [*base, *values, "--itl-slo", args.itl_slo], guided=True),
        Plan("plain-slo", [*base, "--itl-slo", args.itl_slo]),
    ]
    if args.vllm_python:
        command = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(assets.base)]
        command += ["--served-model-name", "model", "--max-model-len", str(args.max_model_len)]
        command += ["--max-num-seqs", str(args.max_num_seqs), "--dtype", "bfloat16"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        made.append(Plan("vllm-plain", command, environment=environment))
    return [plan for plan in made if not args.contenders or plan.name in args.contenders]


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


def weights(user: int) -> dict[str, float]:
    """What this user wants."""
    rng = random.Random(user)
    return {kind: round(rng.uniform(-3, 3), 2) for kind in KINDS}


async def send(client: httpx.AsyncClient, request: TraceRequest, seed: int, guided: bool, started: float) -> Served:
    """One request at its time, read as it comes."""
    body: dict[str, Any] = {
        "model": "model",
        "prompt": request.prompt,
        "max_tokens": request.output,
        "ignore_eos": True,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if guided:
        body["vas_weights"] = weights(request.user)
    await asyncio.sleep(max(started + request.seconds - time.perf_counter(), 0))
    seen = Served()
    last = sent = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as stream:
            if stream.status_code != 200:
                seen.error = str(stream.status_code)
                return seen
            async for line in stream.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if "error" in chunk:
                    seen.error = chunk["error"]["message"]
                    return seen
                if chunk.get("usage"):
                    seen.tokens = chunk["usage"]["completion_tokens"]
                if chunk.get("vas"):
                    seen.limited = chunk["vas"]["limited_tokens"]
                    seen.evaluations = chunk["vas"]["value_evaluations"]
                if chunk["choices"]:
                    if seen.first is None:
                        seen.first = now - sent
                    else:
                        seen.gaps.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        seen.error = repr(error)
    return seen


async def load(url: str, requests: Sequence[TraceRequest], guided: bool, title: str) -> tuple[list[Served], float]:
    """Sends all requests at their times; what was seen, and the seconds it took."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        await send(client, TraceRequest(0.0, requests[0].prompt[:8], 4, 0), 0, guided, time.perf_counter())
        started = time.perf_counter()
        with tqdm(total=len(requests), desc=title, unit="request", disable=not sys.stderr.isatty()) as bar:

            async def one(number: int, request: TraceRequest) -> Served:
                seen = await send(client, request, number, guided, started)
                bar.update()
                return seen

            seen = await asyncio.gather(*(one(number, request) for number, request in enumerate(requests)))
        return list(seen), time.perf_counter() - started


def summarise(seen: Sequence[Served], seconds: float) -> dict[str, float]:
    """One round's figures; times in seconds."""
    fine = [s for s in seen if s.error is None and s.first is not None]
    firsts = [s.first for s in fine if s.first is not None] or [float("nan")]
    gaps = [gap for s in fine for gap in s.gaps] or [float("nan")]
    tokens = sum(s.tokens for s in fine)
    return {
        "completed": len(fine),
        "failed": len(seen) - len(fine),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "ttft_p50": float(np.percentile(firsts, 50)),
        "ttft_p99": float(np.percentile(firsts, 99)),
        "itl_p50": float(np.percentile(gaps, 50)),
        "itl_p99": float(np.percentile(gaps, 99)),
        "evaluations_per_token": sum(s.evaluations for s in fine) / max(tokens, 1),
        "limited_share": sum(s.limited for s in fine) / max(tokens, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints a table; 1 if a request failed."""
    args = _parse(argv)
    setting = SETTINGS[args.setting]
    requests = scale(
        read_trace(args.trace), args.requests, args.rate, args.max_model_len, setting.base.vocab_size, USERS
    )
    rounds: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        assets = Assets(Path(folder), setting)
        save_tokenizer(assets.base, setting.base.vocab_size)
        contenders = plans(args, assets)
        for number in range(args.rounds):
            for plan in contenders if number % 2 == 0 else reversed(contenders):
                with running(plan) as url:
                    seen, seconds = asyncio.run(load(url, requests, plan.guided, plan.name))
                rounds.setdefault(plan.name, []).append(summarise(seen, seconds))
    figures = {
        name: {key: spread([each[key] for each in series]) for key in series[0]} for name, series in rounds.items()
    }
    told = {
        "trace": args.trace,
        "setting": args.setting,
        "requests": args.requests,
        "rate": args.rate,
        "max_model_len": args.max_model_len,
        "max_num_seqs": args.max_num_seqs,
        "itl_slo": args.itl_slo,
        "users": USERS,
        "values": list(KINDS),
        "prompt_tokens": statistics.mean(len(r.prompt) for r in requests),
        "output_tokens": statistics.mean(r.output for r in requests),
        "rounds": args.rounds,
    }
    _print(figures)
    if args.json:
        write(Path(args.json), {**circumstances(), "settings": told, "figures": figures})
    return int(any(series["failed"]["max"] > 0 for series in figures.values()))


def _print(figures: dict[str, dict[str, dict[str, float]]]) -> None:
    print(
        f"{'':12}{'tokens/s':>10}{'TTFT p50':>11}{'p99':>9}{'ITL p50':>10}{'p99':>9}{'values/token':>14}{'limited':>9}"
    )
    for name, series in figures.items():
        middle = {key: each["median"] for key, each in series.items()}
        print(
            f"{name:12}{middle['tokens_per_second']:10.0f}"
            f"{1e3 * middle['ttft_p50']:8.0f} ms{1e3 * middle['ttft_p99']:6.0f} ms"
            f"{1e3 * middle['itl_p50']:7.1f} ms{1e3 * middle['itl_p99']:6.1f} ms"
            f"{middle['evaluations_per_token']:14.1f}{middle['limited_share']:9.0%}"
        )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", choices=sorted(FILES), default="azure-conv")
    add("--setting", choices=sorted(SETTINGS), default="135m")
    add("--requests", type=int, default=120, metavar="N")
    add("--rate", type=float, default=1.0, metavar="R", help="requests a second, on average")
    add("--max-model-len", type=int, default=512, metavar="N")
    add("--max-num-seqs", type=int, default=32, metavar="N")
    add("--itl-slo", default="100ms", metavar="TIME", help="of the contenders with a bound")
    add("--rounds", type=int, default=1, metavar="N")
    add("--contenders", nargs="+", metavar="NAME", help="plain, guided, guided-slo, plain-slo, vllm-plain")
    add("--vllm-python", metavar="FILE", help="interpreter with vLLM")
    add("--json", metavar="FILE", help="write everything there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
