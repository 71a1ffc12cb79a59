"""Requests of real services, scaled to a model's context: when they came, how long they were, what they shared.

Azure's traces give arrival times and lengths; Mooncake's give hashes of blocks of 512 prompt tokens too, so that
prompts that began alike do so here. Nobody's text is in them: a block is a passage of some other text, by its hash.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

SHARED = Path(os.environ.get("VAS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
FILES = {
    "azure-conv": "AzureLLMInferenceTrace_conv.csv",
    "azure-code": "AzureLLMInferenceTrace_code.csv",
    "mooncake": "mooncake_conversation.jsonl",
}
BLOCK = 512  # prompt tokens of one of Mooncake's hashes
PAGE = 16  # those of a page of the servers' caches, the least that prompts can share


@dataclass(frozen=True)
class Arrival:
    """A request of a trace: seconds since the first, lengths in tokens, hashes of its prompt's blocks (or none)."""

    seconds: float
    prompt: int
    output: int
    hashes: tuple[int, ...] = ()


@dataclass(frozen=True)
class TraceRequest:
    """A request to send: when, which tokens, how many to generate, for which user."""

    seconds: float
    prompt: list[int]
    output: int
    user: int


def read_trace(name: str, folder: Path = SHARED / "traces") -> list[Arrival]:
    """A trace by its name in `FILES`."""
    path = folder / FILES[name]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        times = [datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
        lengths = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]
        return [Arrival(time - times[0], *length) for time, length in zip(times, lengths, strict=True)]
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        seconds, hashes = entry["timestamp"] / 1000, tuple(entry["hash_ids"])
        found.append(Arrival(seconds, entry["input_length"], entry["output_length"], hashes))
    return found


def scale(
    trace: Sequence[Arrival], count: int, rate: float, max_model_len: int, text: np.ndarray, users: int, seed: int = 0
) -> list[TraceRequest]:
    """The first `count` requests of a trace, as many a second as the machine is to take.

    Times are stretched evenly, so bursts stay bursts. Lengths shrink by one factor each for prompts and outputs such
    that the 99th percentiles fill three quarters and a quarter of the context; what is longer is cut. Prompts with
    hashes shrink so that a block becomes a page: what could be shared still can. Prompts are passages of `text`, token
    ids; which ones goes by the hashes and `seed`.
    """
    part = list(trace[:count])
    span = max(part[-1].seconds - part[0].seconds, 1e-9)
    stretch = (len(part) / rate) / span
    most_prompt, most_output = max_model_len * 3 // 4, max_model_len // 4 - 1
    shrink = min(1.0, most_prompt / float(np.percentile([a.prompt for a in part], 99)))
    if part[0].hashes:
        shrink = PAGE / BLOCK
    shorten = min(1.0, most_output / float(np.percentile([a.output for a in part], 99)))
    rng = np.random.default_rng(seed)
    requests = []
    for number, arrival in enumerate(part):
        length = min(max(round(arrival.prompt * shrink), 1), most_prompt)
        output = min(max(round(arrival.output * shorten), 1), most_output)
        prompt = _prompt(arrival.hashes or (-1 - number,), length, text, seed)
        requests.append(
            TraceRequest((arrival.seconds - part[0].seconds) * stretch, prompt, output, int(rng.integers(users)))
        )
    return requests


def _prompt(hashes: Sequence[int], length: int, text: np.ndarray, seed: int) -> list[int]:
    """A passage of a page for each block, by its hash; the last hash stands for all that is left."""
    tokens: list[int] = []
    for place, key in enumerate(hashes):
        left = length - len(tokens)
        size = left if place == len(hashes) - 1 else min(PAGE, left)
        start = np.random.default_rng((seed, abs(key), key < 0)).integers(len(text))
        tokens += text.take(range(start, start + size), mode="wrap").tolist()
    return tokens
