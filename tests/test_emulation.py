"""The CUDA device in software does what a GPU does where that matters: late, and with memory that is used again."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator

import pytest
import torch

from tests.emulation import EmulatedDevice, emulated

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


@pytest.fixture
def device() -> Iterator[EmulatedDevice]:
    with emulated() as made:
        yield made


def test_work_is_done_when_somebody_waits(device: EmulatedDevice) -> None:
    x = torch.ones(3, device="cuda")
    x += 1
    host = torch.zeros(3, pin_memory=True)
    host.copy_(x, non_blocking=True)
    assert host.tolist() == [0, 0, 0]
    assert not device.waits
    torch.cuda.synchronize()
    assert host.tolist() == [2, 2, 2]


def test_a_late_copy_takes_what_pinned_memory_holds_then(device: EmulatedDevice) -> None:
    pinned, pageable = torch.ones(3, pin_memory=True), torch.ones(3)
    late, early = pinned.to("cuda", non_blocking=True), pageable.to("cuda", non_blocking=True)
    waited_for = pinned.to("cuda")
    pinned.fill_(2), pageable.fill_(2)
    assert late.tolist() == [2, 2, 2]
    assert early.tolist() == waited_for.tolist() == [1, 1, 1]


def test_host_and_device_do_not_mix(device: EmulatedDevice) -> None:
    x = torch.ones(3, device="cuda")
    for mix in (lambda: x + torch.ones(3), lambda: torch.where(torch.ones(3) > 0, x, x), lambda: x.add_(torch.ones(3))):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]  # one number of the host is read at once
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()


@pytest.mark.parametrize(
    ("read", "wanted"),
    [
        (lambda x: x[1].item(), 1),
        (lambda x: x[x > 0].tolist(), [1, 2]),
        (lambda x: x.nonzero().tolist(), [[1], [2]]),
        (lambda x: bool((x >= 0).all()), True),
        (lambda x: torch.equal(x, x + 0), True),
        (lambda x: x.cpu().tolist(), [0, 1, 2]),
    ],
)
def test_reading_waits_and_is_refused_while_capturing(device: EmulatedDevice, read, wanted) -> None:
    x = torch.arange(3, device="cuda")
    assert read(x) == wanted
    assert device.waits
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        read(x)
    assert read(x) == wanted, "what a capture refused has left nothing behind"


def test_copies_that_wait_are_refused_while_capturing(device: EmulatedDevice) -> None:
    x, pageable, pinned = torch.zeros(2, device="cuda"), torch.ones(2), torch.ones(2, pin_memory=True)
    for send in (lambda: x.copy_(pageable), lambda: x.copy_(pinned), torch.cuda.synchronize):
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            send()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.copy_(pinned, non_blocking=True)
    graph.replay()
    assert x.tolist() == [1, 1]


def test_a_graph_repeats_its_work_on_other_inputs(device: EmulatedDevice) -> None:
    x, calls = torch.zeros(2, device="cuda"), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        calls.append(None)
        y = (x * 2).cumsum(0)
    for number in (1, 5):
        x.fill_(number)
        graph.replay()
        assert y.tolist() == [2 * number, 4 * number]
    assert len(calls) == 1
    assert device.replays == 2
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x += 1
    assert x.tolist() == [5, 5], "capturing does no work"


def test_graphs_of_a_pool_write_over_what_nobody_holds(device: EmulatedDevice) -> None:
    x = torch.ones(2, device="cuda")
    first, second, apart = (torch.cuda.CUDAGraph() for _ in range(3))
    with torch.cuda.graph(first):
        held, dropped = x + 1, x + 2
    memory = dropped.inner
    del dropped
    with torch.cuda.graph(second, pool=first.pool()):
        x + 3
    with torch.cuda.graph(apart):
        x + 4
    for graph, left in ((first, True), (apart, True), (second, False), (first, True)):
        graph.replay()
        torch.cuda.synchronize()
        assert memory.tolist() == [3, 3] if left else memory.isnan().all()
        assert held.tolist() == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool])
def test_new_memory_holds_nonsense(device: EmulatedDevice, dtype: torch.dtype) -> None:
    for fresh in (torch.empty(2, dtype=dtype, device="cuda"), torch.zeros(2, dtype=dtype, device="cuda").new_empty(2)):
        assert all(value != 0 for value in fresh.tolist())
    held = torch.zeros(2, device="cuda")
    memory = held.inner
    torch.cuda.synchronize()
    assert memory.tolist() == [0, 0]
    del held
    torch.cuda.synchronize()
    assert memory.isnan().all(), "freed memory is somebody else's"


def test_an_event_waits_for_the_work_before_it(device: EmulatedDevice) -> None:
    host = [torch.zeros(1, pin_memory=True) for _ in range(2)]
    event, x = torch.cuda.Event(), torch.ones(1, device="cuda")
    host[0].copy_(x, non_blocking=True)
    event.record()
    host[1].copy_(x, non_blocking=True)
    assert not event.query()
    event.synchronize()
    assert event.query()
    assert [number.item() for number in host] == [1, 0]
    torch.cuda.current_stream().synchronize()
    assert host[1].item() == 1


def test_memory_is_counted_until_nobody_holds_it(device: EmulatedDevice) -> None:
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    part = x[:10]
    del x
    assert torch.cuda.memory_allocated() == before + 4000
    del part
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + 4000


def test_modules_are_copied_and_numbers_drawn_on_the_device(device: EmulatedDevice) -> None:
    layer = torch.nn.Linear(2, 2, device="cuda")
    twin = copy.deepcopy(layer)
    layer.weight.fill_(7)
    assert isinstance(twin.weight, torch.nn.Parameter)
    assert twin.weight.device.type == "cuda"
    assert 7 not in twin.weight.tolist()[0]
    drawn = [torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda") for _ in range(2)]
    assert torch.equal(*drawn)


def test_nothing_is_computed_where_it_is_not_wanted(device: EmulatedDevice) -> None:
    device.computes = False
    large = torch.ones(2**14, 2**14, dtype=torch.bfloat16, device="cuda")
    assert large.cumsum(0)[5, 7].item() == 0
    device.computes = True
    assert torch.ones(2, device="cuda").tolist() == [1, 1]
