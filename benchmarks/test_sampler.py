"""One sampling step over a whole vocabulary: the C++ extension, the reference, and batched torch.

    pytest benchmarks/test_sampler.py --benchmark-json=benchmarks/results/sampler.json

The peer in torch is written the way a good batched sampler is: fused softmax, `topk`, one sort for top-p (of
what top-k left), noise from `exponential_`; it runs on one thread and on all and the faster counts. It
does less than the extension: its noise is streamed float32, it breaks ties at random and has no tail mass.
Compare medians within a group; on a busy machine, minima.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from vas_engine.sampling import SamplingArrays, select

VOCABULARIES = (32_000, 128_256, 256_000)
BATCHES = (1, 8, 64)
TEMPERATURE, TOP_K, TOP_P, MIN_P, REPETITION = 0.8, 200, 0.95, 0.01, 1.1
CANDIDATES, HISTORY = 20, 64
MODES = ("plain", "guided20", "warpers20", "nucleus20")


def _logits(vocabulary: int, batch: int) -> torch.Tensor:
    return torch.randn(batch, vocabulary, generator=torch.Generator().manual_seed(0)) * 2.5


def _history(vocabulary: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(vocabulary, generator=generator)[:HISTORY] for _ in range(batch)])


def _arrays(mode: str, vocabulary: int, batch: int) -> SamplingArrays:
    settings: dict = {"temperature": TEMPERATURE, "seed": np.arange(batch)}
    if mode != "plain":
        settings["num_candidates"] = CANDIDATES
    if mode == "nucleus20":
        settings["top_p"] = TOP_P
    if mode == "warpers20":
        settings |= {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P, "repetition_penalty": REPETITION}
        settings["history"] = [dict.fromkeys(ids, 1) for ids in _history(vocabulary, batch).tolist()]
    return SamplingArrays.build(batch, **settings)


def _top_p(scores: torch.Tensor) -> torch.Tensor:
    ordered, order = scores.sort(-1)
    out = ordered.softmax(-1).cumsum_(-1) <= 1 - TOP_P
    out[:, -1] = False
    return scores.masked_fill_(out.scatter(1, order, out), -torch.inf)


def _torch_candidates(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_probs = scores.log_softmax(-1)
    values, ids = log_probs.topk(CANDIDATES, -1)
    race = log_probs.exp().scatter_(1, ids, 0.0)
    return ids, values, race.div_(torch.empty_like(race).exponential_()).argmax(-1)


def _torch_step(mode: str, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
    """Token ids: of the draw (plain), else of the candidates."""
    if mode == "plain":
        probabilities = logits.div(TEMPERATURE).softmax(-1)
        return probabilities.div_(torch.empty_like(probabilities).exponential_()).argmax(-1)
    if mode == "guided20":
        return _torch_candidates(logits / TEMPERATURE)[0]
    if mode == "nucleus20":
        return _torch_candidates(_top_p(logits / TEMPERATURE))[0]
    seen = logits.gather(1, history)
    scores = logits.scatter(1, history, torch.where(seen < 0, seen * REPETITION, seen / REPETITION))
    # After top_k only its tokens matter: the sort and the rest run over those.
    top, ids = scores.div_(TEMPERATURE).topk(TOP_K, -1)
    top = _top_p(top)
    top.masked_fill_(top < top[:, :1] + np.log(MIN_P), -torch.inf)
    return ids.gather(1, _torch_candidates(top)[0])


def _fastest_threads(step: Callable[[], object]) -> int:
    available, seconds = torch.get_num_threads(), {}
    for threads in {1, available}:
        torch.set_num_threads(threads)
        step()
        start = time.perf_counter()
        step()
        seconds[threads] = time.perf_counter() - start
    torch.set_num_threads(available)
    return min(seconds, key=seconds.__getitem__)


@pytest.mark.parametrize("engine", ["cpp", "torch", "reference"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("mode", MODES)
def test_step(benchmark, mode, vocabulary, batch, engine):
    if engine == "reference" and batch > 1:
        pytest.skip("the reference loops over sequences: batch 1 tells its speed")
    benchmark.group = f"{mode}, vocabulary {vocabulary}, batch {batch}"
    logits, rows = _logits(vocabulary, batch), np.arange(batch)
    arrays, history = _arrays(mode, vocabulary, batch), _history(vocabulary, batch)
    if engine == "torch":
        threads = torch.get_num_threads()
        torch.set_num_threads(_fastest_threads(lambda: _torch_step(mode, logits[:8], history[:8])))
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.pedantic(_torch_step, (mode, logits, history), rounds=5 if batch < 64 else 2)
        torch.set_num_threads(threads)
    else:
        rounds = 30 if engine == "cpp" else 3
        benchmark.pedantic(select, (logits, rows, arrays, engine), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("mode", MODES[1:])
def test_peer_is_correct(mode):
    """Both sides of the comparison find the same candidates."""
    logits, history = _logits(32_000, 2), _history(32_000, 2)
    ours = select(logits, np.arange(2), _arrays(mode, 32_000, 2))
    np.testing.assert_array_equal(_torch_step(mode, logits, history), ours.token_ids[:, :CANDIDATES])
