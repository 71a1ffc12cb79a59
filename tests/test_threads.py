"""The threads of the C++ extensions: PyTorch's own pool, and a pool of their own where there is none to borrow."""

import os
import threading
import time

import numpy as np
import pytest
import torch

from vas_engine.model.backend import has_extension, make_layer
from vas_engine.model.batch import AttentionBatch
from vas_engine.sampling import SamplingArrays, select

SECONDS = 60


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _sample() -> np.ndarray:
    logits = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0))
    arrays = SamplingArrays.build(16, num_candidates=20, top_p=0.9, seed=np.arange(16))
    return select(logits, np.arange(16), arrays, "cpp").token_ids


def _attend() -> np.ndarray:
    generator = torch.Generator().manual_seed(1)
    pages = [torch.randn(64, 16, 2, 64, generator=generator) for _ in range(2)]
    tables = [[4 * group + block for block in range(4)] for group in range(16)]
    batch = AttentionBatch.from_sequences(tables, [[60 + i for i in range(4)]] * 16, [False] * 16, 16)
    q, k, v = (torch.randn(64, heads, 64, generator=generator) for heads in (4, 2, 2))
    return make_layer(*pages, "cpp").attend(q, k, v, batch, 0.125).numpy()


@pytest.mark.skipif(not has_extension() or not hasattr(os, "fork"), reason="needs the C++ extension and fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_child_has_threads_of_its_own(two_threads):
    """A child has none of the threads that its parent worked with: it must neither wait for them nor do without."""
    expected = _sample(), _attend()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = len(os.listdir("/proc/self/task"))
            equal = all(
                np.array_equal(mine, theirs)
                for _ in range(20)
                for mine, theirs in zip((_sample(), _attend()), expected, strict=True)
            )
            status = 0 if equal and len(os.listdir("/proc/self/task")) > before else 2
        finally:
            os._exit(status)
    for _ in range(SECONDS * 20):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    pytest.fail("the child waits for threads that it does not have")


@pytest.mark.skipif(not has_extension(), reason="needs the C++ extension")
def test_other_threads_go_on_while_candidates_are_selected():
    """A server answers meanwhile: the interpreter's lock is not held."""
    logits = torch.randn(16, 2**18)
    arrays = SamplingArrays.build(16, top_p=0.9, seed=np.arange(16), num_candidates=20)
    span = []

    def work():
        select(logits[:1], np.zeros(1, np.int64), SamplingArrays.build(1))  # what a first call does once is done
        start = time.perf_counter()
        while time.perf_counter() < start + 0.5:
            begun = time.perf_counter()
            select(logits, np.arange(16), arrays, "cpp")
            span.append((begun, time.perf_counter()))

    thread = threading.Thread(target=work)
    thread.start()
    seen = []
    while thread.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0)
    # Some time in the middle of a call: its ends hold the lock in any case.
    inside = [(begun + 0.1 * (end - begun), end - 0.1 * (end - begun)) for begun, end in span]
    assert any(first < moment < last for first, last in inside for moment in seen)
