"""A short form of benchmarks.decode for pytest-benchmark: few tokens, each contender by itself.

    pytest benchmarks/test_decode.py -o addopts= --benchmark-only

Ratios across contenders are the business of benchmarks.decode, which measures them in turn; this shows what a
change did to one of them, and that all of them run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.contenders import SETTINGS, Assets, Contender, Decoding, builders, names

DECODING = Decoding(new_tokens=16)
PROMPT_TOKENS, MAX_MODEL_LEN = 32, 64
BATCHES = (1, 16)


@pytest.fixture(scope="module")
def makers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Contender]]:
    folder: Path = tmp_path_factory.mktemp("models")
    assets = Assets(folder, SETTINGS["135m"])
    return builders(assets, max(BATCHES), MAX_MODEL_LEN, None, folder / "vllm.log")


@pytest.fixture(scope="module", params=names())
def contender(request: pytest.FixtureRequest, makers: dict[str, Callable[[], Contender]]) -> Contender:
    return makers[request.param]()


@pytest.mark.parametrize("batch", BATCHES)
def test_decode(benchmark, contender: Contender, batch: int) -> None:
    benchmark.group = f"decode, batch {batch}"
    vocabulary = SETTINGS["135m"].base.vocab
    prompts = np.random.default_rng(0).integers(3, vocabulary, (batch, PROMPT_TOKENS)).tolist()

    def run() -> int:
        return contender.run(prompts, DECODING, seed=0)[1]

    tokens = benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    assert tokens == batch * DECODING.new_tokens
    benchmark.extra_info["tokens_per_second"] = tokens / benchmark.stats.stats.median
