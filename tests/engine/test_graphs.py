"""Decode steps over fixed tensors, as graphs hold them, against the engine's ordinary steps.

On a CPU a graph is the function itself, run again on the same tensors. What a GPU would hold fast (numbers that the
host read, tensors made anew), and what it would do late, an emulated device does too.
"""

from __future__ import annotations

import importlib
import random
from collections import Counter

import pytest
import torch

import tests.kernels.conftest  # noqa: F401 - the interpreter, before a kernel is imported
from tests.emulation import emulated
from tests.engine.conftest import distributional, drain, engine, llama, network, tokens
from vas_engine.engine.decode import bucket
from vas_engine.engine.decode_step import BlockTables
from vas_engine.engine.event import TokenEvent
from vas_engine.engine.sequence import Sequence
from vas_engine.model import CausalLM
from vas_engine.model.graphs import Graphs
from vas_engine.params import SamplingParams
from vas_engine.values.config import HeadConfig

HAS_GPU = torch.cuda.is_available()
HEADS = (HeadConfig("plain", "plain"), HeadConfig("bounded", "bounded", bounds=(-1.0, 1.0)), distributional(name="of9"))
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("error:.*CUDA graph"),  # a step that cannot be captured is warned of
]


@pytest.fixture(scope="module")
def networks(lm) -> dict:
    kinds = {
        "a": ("action", None), "r": ("reader", None), "s": ("side", HEADS), "m": ("model", None),
        "l": ("lookahead", HEADS[:2]), "k": ("side-lookahead", None),
    }  # fmt: skip
    return {name: network(kind, lm, heads, seed=i) for i, (name, (kind, heads)) in enumerate(kinds.items())}


def ask(rng: random.Random, names: list[str], limited: bool) -> SamplingParams:
    """A request of any sort; `limited`: perhaps with something that graphs do not hold."""
    extra = rng.choice([{}, {}, {}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1, "top_k": 9}])
    if limited and rng.random() < 0.2:
        extra = extra | rng.choice(
            [{"repetition_penalty": 1.3}, {"logprobs": 2}, {"logit_bias": {3: 1.0}}, {"min_tokens": 3},
             {"return_hidden_states": True}, {"n": 2}]
        )  # fmt: skip
    # Values that look ahead go with those of a model of its own, but not with those that read the state before.
    some = rng.choice([[n for n in names if n[0] not in "lk"], [n for n in names if n[0] in "lkm"]])
    return SamplingParams(
        values={name: rng.uniform(-2, 2) for name in some if rng.random() < 0.4},
        num_candidates=rng.choice([1, 3, 8, 20]),
        max_tokens=rng.randrange(1, 36),
        temperature=rng.choice([0.0, 0.8, 1.0]),
        advantage_clip=rng.choice([None, 0.5]),
        baseline=rng.choice(["state", "candidate-mean"]),
        tail=rng.choice(["keep", "drop"]),
        seed=rng.randrange(1000),
        prune=False,
        **extra,
    )


def traffic(running, seed: int, count: int, limited: bool = True) -> list[TokenEvent]:
    """Requests that join at any time; one is cancelled."""
    rng = random.Random(seed)
    events: list[TokenEvent] = []
    for i in range(count):
        params = ask(rng, running.value_names, limited)
        running.add_request(str(i), [rng.randrange(30) for _ in range(rng.randrange(1, 12))], params)
        for _ in range(rng.choice([0, 0, 0, 3])):
            events += running.step()
        if i == 5:
            running.cancel("4")
    return events + drain(running)


def assert_same(ours: list[TokenEvent], wanted: list[TokenEvent]) -> None:
    assert len(ours) == len(wanted) > 0
    place = Counter()
    for event in wanted:
        place[event.request_id, event.index] += 1
    mine: dict = {}
    for event in ours:
        mine.setdefault((event.request_id, event.index), []).append(event)
    theirs: dict = {}
    for event in wanted:
        theirs.setdefault((event.request_id, event.index), []).append(event)
    assert mine.keys() == theirs.keys()
    for key, found in mine.items():
        for one, other in zip(found, theirs[key], strict=True):
            same = ("token_id", "finish_reason", "stop_token", "evaluations", "seed")
            assert [getattr(one, name) for name in same] == [getattr(other, name) for name in same]
            for name in ("log_prob", "tilted_log_prob", "kl", "values", "prompt_values"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4), name


@pytest.mark.parametrize("seed", range(4))
def test_random_traffic_equals_ordinary_steps(lm, networks, seed: int) -> None:
    """Sequences that join, leave, are preempted; any values; some that graphs do not hold."""
    many = seed > 1
    options = {"num_blocks": 30 if many else 12} if seed % 2 else {}
    plain, kept = engine(lm, networks, **options), engine(lm, networks, graphs=True, overlap=False, **options)
    wanted = traffic(plain, seed, 40 if many else 14, limited=not many)
    assert_same(traffic(kept, seed, 40 if many else 14, limited=not many), wanted)
    ahead = engine(lm, networks, graphs=True, **options)
    found = traffic(ahead, seed, 40 if many else 14, limited=not many)
    # What is cancelled has come to another point by then.
    assert_same(*([event for event in events if event.request_id != "4"] for events in (found, wanted)))
    ahead.scheduler.check()
    assert ahead.blocks.num_used == 0
    assert ahead.stats.graph_steps > 1
    if seed % 2:
        assert ahead.scheduler.num_preemptions > 0
        assert kept.scheduler.num_preemptions == plain.scheduler.num_preemptions > 0
    assert kept.stats.graph_steps > (20 if many else 1)
    assert kept.stats.graph_steps + sum(kept.stats.obstacles.values()) == kept.stats.steps
    assert many or len(kept.stats.obstacles) > 1
    assert plain.stats.graph_steps == 0
    assert plain.stats.obstacles == {}
    for name in ("steps", "tokens", "model_rows", "value_rows"):
        assert getattr(kept.stats, name) == getattr(plain.stats, name)


def test_what_fills_a_bucket_changes_nothing(lm, networks) -> None:
    """Bit for bit: the same bucket with other sequences in it, and their number within it."""
    params = SamplingParams(values={"s.of9": 1.0, "r": -1.0}, num_candidates=6, seed=3, max_tokens=12, ignore_eos=True)

    def values_beside(others: list[int]) -> list[dict]:
        running = engine(lm, networks, graphs=True)
        for i, seed in enumerate([3, *others]):
            prompt = [5, 4, 3] if not i else [seed, seed, 1]
            running.add_request(str(i), prompt, params.replace(seed=seed))
        events = drain(running)
        assert running.stats.graph_steps == 11
        return [(e.token_id, e.values, e.log_prob) for e in events if e.request_id == "0"]

    assert bucket(9) == bucket(10) == 10
    alone = values_beside(list(range(10, 18)))
    assert values_beside(list(range(20, 28))) == alone
    assert values_beside(list(range(20, 29)))[1:] == alone[1:]  # the prompts' step has other shapes


def test_values_come_and_go(lm, networks) -> None:
    """Graphs of the networks there were serve no longer."""
    rng = random.Random(0)
    params = SamplingParams(values={"r": 1.0}, seed=1, max_tokens=10, ignore_eos=True)
    results = []
    for graphs in (False, True):
        running = engine(lm, {"r": networks["r"]}, graphs=graphs)
        running.add_request("0", [1, 2], params)
        events = [event for _ in range(4) for event in running.step()]
        running.add_value("s", network("side", lm, seed=9))
        running.add_request("1", [3], SamplingParams(values={"s": 1.5}, seed=2, max_tokens=8, ignore_eos=True))
        events += [event for _ in range(3) for event in running.step()]
        running.remove_value("r")
        results.append(tokens(events + drain(running)))
        assert not graphs or len(running.graphs) < 3
    assert results[0] == results[1]
    assert rng


def test_weights_that_change_are_seen(lm) -> None:
    """A network trained further between two requests: what was made of its weights is made anew."""
    params = SamplingParams(values={"v": 2.0}, seed=1, max_tokens=8, ignore_eos=True)
    results = []
    for graphs in (False, True):
        value = network("action", lm)
        running = engine(lm, {"v": value}, graphs=graphs)
        running.add_request("0", [1, 2], params)
        first = tokens(drain(running))
        with torch.no_grad():
            value.embed_weight.mul_(-1)
        running.add_request("0", [1, 2], params)
        results.append((first, tokens(drain(running))))
        assert first != results[-1][1]
    assert results[0] == results[1]


def test_logits_that_are_not_finite_end_their_request_alone(lm, networks) -> None:
    def poison(running, length: int):
        logits = running.lm.logits

        def poisoned(states):
            found = logits(states)
            live = running._live.get("1")
            # Of the tokens one may not have been read yet.
            if live and len(live[0].token_ids) + (running._flight is not None) == length:
                found[1] = torch.nan
            return found

        return poisoned

    params = SamplingParams(values={"r": 1.0}, max_tokens=6, ignore_eos=True)
    outcomes = []
    for options in ({}, {"graphs": True, "overlap": False}, {"graphs": True}):
        running = engine(lm, {"r": networks["r"]}, **options)
        for i in range(3):
            running.add_request(str(i), [i + 1], params.replace(seed=i))
        running.lm.logits = poison(running, 3)
        try:
            events = drain(running)
        finally:
            del running.lm.logits
        (failed,) = [e for e in events if e.error is not None]
        assert failed.request_id == "1"
        assert "logits" in str(failed.error)
        outcomes.append([(e.request_id, e.token_id) for e in events if e.error is None])
        running.scheduler.check()
    assert sorted(outcomes[0], key=str) == sorted(outcomes[1], key=str) == sorted(outcomes[2], key=str)


def test_a_step_ahead_is_launched_before_the_last_is_read(lm, networks) -> None:
    """And what ends meanwhile, by the caller or by its tokens, is not heard of again."""
    running = engine(lm, {"r": networks["r"]}, graphs=True)
    params = SamplingParams(values={"r": 1.0}, max_tokens=9, ignore_eos=True)
    for i in range(3):
        running.add_request(str(i), [i + 1], params.replace(seed=i))
    order: list[str] = []
    launch = running.graphs.launch

    def noted(works, behind=None):
        flight = launch(works, behind)
        if flight is not None:
            ((own, read),) = flight.parts
            flight.parts = [(own, lambda: (order.append("read"), read())[1])]
            order.append("launch")
        return flight

    running.graphs.launch = noted
    running.step()  # the prompts
    assert running.step() == []
    first = running.step()
    assert order == ["launch", "launch", "read"]
    assert [event.request_id for event in first] == ["0", "1", "2"]
    running.finish("1", 0)
    running.cancel("2")
    rest = drain(running)
    assert [event.request_id for event in rest if event.token_id is not None] == ["0"] * 7
    assert order.count("launch") == order.count("read") == 8
    running.scheduler.check()
    assert running.blocks.num_used == 0


@pytest.mark.parametrize("value", ["r", "l"])
def test_steps_ahead_keep_count_of_what_is_computed(lm, networks, value: str) -> None:
    """With lookahead the winner's K/V are there at once, without it a step later."""
    running = engine(lm, {value: networks[value]}, graphs=True)
    names = running.value_names
    for i in range(3):
        params = SamplingParams(values={names[0]: 1.0} if i else {}, seed=i, max_tokens=12, ignore_eos=True)
        running.add_request(str(i), [i + 1, 2], params)
    seen = 0
    while running.has_unfinished:
        running.step()
        for sequence in running.scheduler.running:
            seen += running.stats.graph_steps > 1
            assert sequence.num_computed == len(sequence.token_ids) - (not sequence.lookahead)
    assert seen > 20


def test_the_latest_value_is_the_baseline_of_a_step_ahead(lm, networks) -> None:
    """Where only some of the candidates are tilted V(s) counts, which the host has not read either."""
    params = SamplingParams(values={"r": 3.0}, num_candidates=2, max_tokens=20, ignore_eos=True, prune=False)
    results = []
    for options in ({}, {"graphs": True}):
        running = engine(lm, {"r": networks["r"]}, **options)
        for i in range(4):
            running.add_request(str(i), [i + 1], params.replace(seed=i))
        results.append(drain(running))
    assert_same(results[1], results[0])


def test_steps_of_both_sorts_side_by_side(lm) -> None:
    """The base model alone for one batch, whole steps for the next, of the same sizes."""
    results = []
    for graphs in (False, True):
        running = engine(lm, {"v": network("lookahead", lm)}, graphs=graphs)
        running.guide.states = [0, 1]  # what a plain step's sizes could be mistaken for
        events = []
        for penalty in (0.5, 0, 0.5):
            for i in range(4):
                params = SamplingParams(seed=i, presence_penalty=penalty, max_tokens=5)
                running.add_request(f"{penalty}-{i}", [i + 1], params)
            events.append(tokens(drain(running)))
        results.append(events)
        assert not graphs or len(running.graphs) >= 2
    assert results[0] == results[1]


def test_graphs_captured_beforehand_serve(lm, networks) -> None:
    """Nothing is left to capture for usual steps, and what was made without sequences draws what it should."""
    every = {"a": 1.0, "r": 1.0, "s.plain": 0.5, "s.of9": 0.5, "m": -1.0}
    results, known = [], 0
    for graphs in (False, True):
        running = engine(lm, networks, graphs=graphs, max_num_seqs=9)
        running.capture_graphs()
        known = len(running.graphs) if graphs else 0
        events = []
        for name, values in (("plain", {}), ("one", {"r": 2.0}), ("all", every)):
            for i in range(9):
                params = SamplingParams(values=values, seed=i, max_tokens=4 + i, ignore_eos=True, prune=False)
                running.add_request(f"{name} {i}", [i + 1, 2], params)
            events += drain(running)
        results.append(events)
    assert_same(results[1], results[0])
    assert len(running.graphs) == known == 8 * 9  # plain, six networks, all that do not look ahead; nine sizes


def test_tables_follow_their_sequences() -> None:
    """Those that grow, change places, or come back with other blocks after a preemption."""
    tables = BlockTables(4, 6, torch.device("cpu"))
    a, b, c = (Sequence(name, 1, [1], block_table=blocks) for name, blocks in (("a", [3]), ("b", [5, 1]), ("c", [7])))

    def shown(*sequences: Sequence) -> None:
        tables.bring(sequences)
        for row, sequence in enumerate(sequences):
            assert tables.device[row, : len(sequence.block_table)].tolist() == sequence.block_table

    shown(a, b)
    b.block_table.append(4)
    shown(a, b)
    shown(b, c, a)
    shown(c)
    c.block_table, c.num_preemptions = [2], 1
    shown(c, b, a)


def test_buckets() -> None:
    sizes = [bucket(n) for n in range(1, 500)]
    assert all(n <= size <= max(n + 1, 1.25 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 40
    assert sizes == sorted(sizes)


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize(
    "values",
    [
        pytest.param({}, id="plain"),
        pytest.param({"r": 1.0, "s.of9": -1.5}, id="guided"),
        pytest.param({"l": 2.0}, id="lookahead"),
        pytest.param({"k": 2.0, "m": 1.0}, id="lookahead of its own", marks=pytest.mark.slow),
        pytest.param({"m": 2.0}, id="model", marks=pytest.mark.slow),
    ],
)
def test_what_a_gpu_would_do(values: dict[str, float], late: bool) -> None:
    """The Triton backend's steps on an emulated device, beside those of a CPU."""
    pytest.importorskip("triton")
    kinds = {"r": ("reader", None), "s": ("side", HEADS), "m": ("model", None)}
    kinds |= {"l": ("lookahead", None), "k": ("side-lookahead", None)}
    kinds = {name: kind for name, kind in kinds.items() if any(value.startswith(name) for value in values)}

    def found(device: str, graphs: bool) -> list[TokenEvent]:
        lm = CausalLM.load(llama(layers=2).model, device=device, attention_backend="triton" if graphs else "reference")
        nets = {name: network(kind, lm, heads, seed=i) for i, (name, (kind, heads)) in enumerate(kinds.items())}
        running = engine(lm, nets, graphs=graphs)
        events = []
        for i in range(2):
            params = SamplingParams(
                values=values if i else {}, num_candidates=3, seed=i, max_tokens=3 + 2 * i, ignore_eos=True,
                prune=False, top_p=0.8 if not i else 1.0, presence_penalty=0.5 if i and not values else 0.0,
            )  # fmt: skip
            running.add_request(str(i), [i + 1, 2], params)
        events += drain(running)
        if "r" in values:  # trained further: what was made of the weights must be made anew
            with torch.no_grad():
                nets["r"].embed_weight.mul_(-1)
        running.add_request("late", [4, 2], params.replace(presence_penalty=0.0, top_k=5, max_tokens=3))
        events += drain(running)
        assert not graphs or running.stats.graph_steps > 1
        return events

    wanted = found("cpu", False)
    with emulated(late) as device:
        assert_same(found("cuda", True), wanted)
    assert device.replays > device.captures  # some graph served more than once


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpu_that_is_not_the_current_one(graphs: bool) -> None:
    """Another model's, say, or every thread's but the one that chose it."""
    pytest.importorskip("triton")
    params = SamplingParams(values={"r": 1.0, "l": 1.0}, num_candidates=3, max_tokens=3, ignore_eos=True, seed=1)
    with emulated():
        torch.cuda.set_device(1)
        lm = CausalLM.load(llama(layers=1).model, device="cuda:0", attention_backend="triton")
        running = engine(lm, {"r": network("reader", lm), "l": network("lookahead", lm)}, graphs=graphs)
        running.add_request("0", [1, 2], params)
        running.add_request("1", [1, 2, 3, 4], params.replace(values={"r": 1.0}, top_p=0.9))
        assert all(len(ids) == 3 for ids in tokens(drain(running)).values())
        assert torch.cuda.current_device() == 1


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
def test_graphs_after_values_came() -> None:
    """All graphs are dropped then, and with them their pool of memory."""
    pytest.importorskip("triton")
    params = SamplingParams(seed=1, num_candidates=3, max_tokens=8, ignore_eos=True)

    def found(device: str, backend: str, **options) -> tuple[list[TokenEvent], int]:
        lm = CausalLM.load(llama(layers=1).model, device=device, attention_backend=backend)
        running = engine(lm, **options)
        running.add_request("0", [1, 2], params)
        events = [event for _ in range(4) for event in running.step()]
        running.add_value("a", network("action", lm))
        running.add_request("1", [3], params.replace(values={"a": 2.0}))
        return events + drain(running), running.stats.graph_steps

    wanted, _ = found("cpu", "reference")
    with emulated() as device:
        events, steps = found("cuda", "triton", graphs=True)
    assert_same(events, wanted)
    assert steps > 8
    assert device.captures > 2


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
def test_work_that_cannot_be_captured_is_launched() -> None:
    """Once, with a warning; what comes after it is not touched."""
    with emulated() as device:
        kept, seen = Graphs(torch.device("cuda")), torch.zeros(1, device="cuda")

        def waits() -> None:
            seen.add_(1).item()

        before = torch.cuda.current_stream()
        with pytest.warns(UserWarning, match="decoding without a CUDA graph"):
            kept.capture(waits)()
        assert torch.cuda.current_stream() is before
        seen.zero_()
        again = kept.capture(lambda: seen.add_(1))
        again()
        assert device.captures == 2
        assert seen.item() == 3  # before the capture, and two replays


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
def test_limits_within_graphs() -> None:
    """Of some sequences, whose number and places among the others change."""
    pytest.importorskip("triton")

    def found(device: str, **options) -> list[TokenEvent]:
        lm = CausalLM.load(llama(layers=1).model, device=device, attention_backend=options.pop("backend"))
        running = engine(lm, **options)
        asked = [{}, {"top_p": 0.5}, {}, {"top_k": 2}, {"min_p": 0.3, "top_p": 0.9}]
        for i, limits in enumerate(asked):
            params = SamplingParams(seed=i, max_tokens=9 - i if i % 2 else 4 + i, ignore_eos=True, **limits)
            running.add_request(str(i), [i + 1, 2], params)
        events = drain(running)
        assert not options or running.stats.obstacles == {"prompts": 1}
        return events

    wanted = found("cpu", backend="reference")
    with emulated():
        assert_same(found("cuda", backend="triton", graphs=True), wanted)


@pytest.mark.skipif(HAS_GPU, reason="stands for a GPU")
def test_a_graph_splits_prefixes_that_are_longer_than_when_it_was_captured(monkeypatch) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("vas_engine.kernels.candidate_attention")
    monkeypatch.setattr(kernels, "SHORTEST_SPLIT", 8)
    planned, plan = [], kernels.plan
    monkeypatch.setattr(kernels, "plan", lambda *given: planned.append(plan(*given)) or planned[-1])
    with emulated() as device:
        lm = CausalLM.load(llama(layers=2).model, device="cuda", attention_backend="triton")
        running = engine(lm, graphs=True, max_num_seqs=1)
        running.capture_graphs()
        splits = []
        for length in (40, 3):
            running.add_request("0", [1 + i % 20 for i in range(length)], SamplingParams(max_tokens=2, ignore_eos=True))
            drain(running)
            splits.append(planned[-1].table[0, 3].item())  # of the graph's own memory, where it was just replayed
        assert splits == [5, 1]
        assert device.captures == 1


@pytest.mark.skipif(HAS_GPU, reason="counts what an emulated device is asked for")
@pytest.mark.parametrize("value", ["r", "l"])
def test_steady_steps_take_no_memory_and_wait_for_winners_alone(value: str) -> None:
    pytest.importorskip("triton")
    with emulated() as device:
        lm = CausalLM.load(llama(layers=1).model, device="cuda", attention_backend="triton")
        running = engine(lm, {value: network({"r": "reader", "l": "lookahead"}[value], lm)}, graphs=True)
        params = SamplingParams(values={value: 1.0}, num_candidates=3, max_tokens=9, ignore_eos=True)
        for i in range(2):
            running.add_request(str(i), [i + 1, 2], params.replace(seed=i))
        running.step()  # the prompts

        def asked() -> tuple[int, int]:
            return device.allocations, sum(device.waits.values()) - device.waits["event"]

        steps = []
        while running.has_unfinished:
            before, events = asked(), device.waits["event"]
            if len(running.step()) == 2:
                steps.append((asked() == before, device.waits["event"] - events))
        # The tokens of the last step are read without another one behind it.
        assert len(steps) > 5
        assert all(quiet for quiet, _ in steps[1:])
        assert (
            max(waits for _, waits in steps) <= 3
        )  # winners; that numbers of the step before the last have left, twice
