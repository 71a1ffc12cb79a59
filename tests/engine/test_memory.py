"""What the KV cache may take: the arithmetic, and the step that is measured for it."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.emulation import emulated
from tests.engine.conftest import drain, engine, generate, llama, network
from vas_engine.engine import memory, profile
from vas_engine.engine.engine import Engine
from vas_engine.errors import KVCacheError
from vas_engine.model import CausalLM
from vas_engine.params import SamplingParams

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GIB = 2**30


def test_what_steps_need_is_put_aside(monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * GIB)
    often = {"bytes_per_block": 2**20, "block_size": 16, "max_num_seqs": 10**6, "max_model_len": 1600}
    count = memory.count_blocks(**often, device=CUDA, activations=20 * GIB)
    assert count == int(80 * GIB * memory.CUDA_FRACTION) // 2**20
    assert memory.count_blocks(**often, device=CPU) == int(100 * GIB * memory.CPU_FRACTION) // 2**20
    # What was asked for is taken, whatever steps need, and no more than can be used.
    assert memory.count_blocks(**often, device=CUDA, kv_cache_memory=3 * 2**20, activations=20 * GIB) == 3
    assert memory.count_blocks(**(often | {"max_num_seqs": 2}), device=CUDA, activations=20 * GIB) == 2 * 101
    with pytest.raises(KVCacheError, match="0 bytes hold no block"):
        memory.count_blocks(**often, device=CUDA, activations=101 * GIB)


@pytest.mark.parametrize(("seqs", "rows"), [(4, 400), (64, 100), (3, 10_000)])
def test_the_largest_step_is_the_one_measured(lm, monkeypatch, seqs: int, rows: int) -> None:
    """Prompts fill the rows there may be; then every sequence that fits scores its candidates."""
    nets = {"r": network("reader", lm), "s": network("side", lm)}
    made, log = [], []

    class Noted(Engine):
        def __init__(self, *args, **how) -> None:
            super().__init__(*args, **how)
            made.append(self)

        def step(self):
            before = self.stats.model_rows, self.stats.value_rows
            events = super().step()
            log.append((self.stats.model_rows - before[0], self.stats.value_rows - before[1]))
            return events

    class Noting:
        def start(self) -> None:
            assert not log

        def peak(self) -> int:
            return len(log)

    monkeypatch.setattr(profile, "Engine", Noted)
    assert profile.activation_memory(lm, nets, seqs, rows, 128, 4, Noting()) == 3
    (running,) = made
    most = min(seqs, rows // 21)
    assert max(candidates for _, candidates in log) == most * 21
    if rows < 1000:  # 3 sequences of 128 tokens are all there can be of 10,000
        assert max(step for step, _ in log) > 0.7 * (rows - 21 * most)
    running.scheduler.check()
    # What is made afterwards knows nothing of it.
    ask = SamplingParams(values={"r": 1.0, "s": 1.0}, seed=2, max_tokens=6)
    after = generate(engine(lm, nets), [1, 2, 3], ask)
    assert after == generate(engine(lm, nets), [1, 2, 3], ask)


def test_a_vocabulary_of_few_tokens_is_measured_too() -> None:
    """There are no more candidates than tokens."""

    class Silent:
        def start(self) -> None:
            pass

        def peak(self) -> int:
            return 7

    lm = llama(layers=1, vocab=9)
    assert profile.activation_memory(lm, {"a": network("action", lm)}, 2, 100, 64, 4, Silent()) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a GPU")
@pytest.mark.parametrize("limit", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1, "top_p": 0.5}])
def test_sorting_the_scores_of_every_sequence_is_measured_too(limit: dict) -> None:
    """With a vocabulary of usual size that is most of what a step takes beside its products."""
    pytest.importorskip("triton")
    with emulated(late=False):
        lm = CausalLM.load(llama(layers=1, vocab=2000).model, device="cuda", attention_backend="triton")
        meter = profile.CudaMeter(lm.device)
        needed = profile.activation_memory(lm, {}, 8, 64, 64, 4, meter)
        running = engine(lm, max_num_seqs=8, max_num_batched_tokens=64)
        for i in range(8):
            running.add_request(str(i), [i + 1] * 7, SamplingParams(max_tokens=2, seed=i, ignore_eos=True, **limit))
        meter.start()
        drain(running)
        assert meter.peak() <= needed
