"""Scheduler and block manager under arbitrary orders of joining, stepping, forking, leaving and giving way.

The model's side is simulated to the letter: instead of keys and values, a slot of the page store holds the
salt and the tokens up to its position, since that is all that real K/V depend on. Every step reads back
every position that the real attention would see.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from vas_engine.engine.blocks import BlockManager
from vas_engine.engine.scheduler import Plan, Scheduler, Work
from vas_engine.engine.sequence import Sequence, SequenceStatus

SEED = st.integers(0, 2**32 - 1)
ORDINARY = settings(
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=True,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
# A planted bug has to be found, not minimised.
HUNT = settings(ORDINARY, max_examples=1000, phases=[Phase.generate])


class Pages:
    """Contents of every slot: what its K/V were computed from."""

    def __init__(self, blocks: BlockManager) -> None:
        self.block_size = blocks.block_size
        self.slots: list[object] = [None] * (blocks.num_blocks * blocks.block_size)

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def write(self, sequence: Sequence, start: int, stop: int) -> None:
        for position in range(start, stop):
            history = (sequence.salt, tuple(sequence.token_ids[: position + 1]))
            self.slots[self.slot(sequence, position)] = history

    def holds(self, sequence: Sequence, position: int) -> bool:
        history = (sequence.salt, tuple(sequence.token_ids[: position + 1]))
        return self.slots[self.slot(sequence, position)] == history

    def read(self, sequence: Sequence, stop: int) -> None:
        for position in range(stop):
            found = self.slots[self.slot(sequence, position)]
            wanted = (sequence.salt, tuple(sequence.token_ids[: position + 1]))
            assert found == wanted, f"{sequence}: position {position} holds {found}, not {wanted}"

    def copy(self, source: int, target: int) -> None:
        size = self.block_size
        self.slots[target * size : target * size + size] = self.slots[source * size : source * size + size]


class SchedulerMachine(RuleBasedStateMachine):
    """One engine's life. `seen` counts what happened over all lives of a class, lest the test be idle."""

    block_manager: ClassVar[type[BlockManager]] = BlockManager
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_blocks=st.integers(2, 16),
        block_size=st.integers(1, 4),
        seqs=st.integers(1, 5),
        budget=st.integers(2, 20),
        length=st.integers(6, 30),
        caching=st.booleans(),
    )
    def build(self, num_blocks: int, block_size: int, seqs: int, budget: int, length: int, caching: bool) -> None:
        self.blocks = self.block_manager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.blocks, seqs, budget, length)
        self.pages = Pages(self.blocks)
        self.own = Pages(self.blocks)  # a network's K/V, written one step ahead of the model's
        self.live: list[Sequence] = []
        self.lookahead: set[Sequence] = set()
        self.names = 0
        self.mid_step = False

    # -- what users do ---------------------------------------------------------------------------------------

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        repeat=SEED,
        rows=st.integers(1, 4),
        kind=st.sampled_from(["plain", "own", "lookahead", "lookahead own"]),
        priority=st.integers(0, 2),
        salt=st.booleans(),
        cached=st.booleans(),
        forks=st.integers(0, 3),
    )
    def add(
        self,
        tokens: list[int],
        repeat: int,
        rows: int,
        kind: str,
        priority: int,
        salt: bool,
        cached: bool,
        forks: int,
    ) -> None:
        if self.live and repeat % 2:  # continue somebody's text: prefixes should be shared often
            tokens = self.live[repeat % len(self.live)].token_ids[: 1 + repeat % 9] + tokens[:3]
        self.names += 1
        sequence = Sequence(
            f"r{self.names}",
            len(tokens),
            list(tokens),
            priority=priority,
            arrival=self.names,
            rows_per_token=min(rows, self.scheduler.max_num_batched_tokens),
            salt=b"own" if "own" in kind else b"salt" * salt,
            reserve_slots=int("own" in kind),
            use_prefix_cache=cached,
            forks=forks,
        )
        if len(tokens) > self.scheduler.max_model_len - 1:
            return
        if "lookahead" in kind:
            self.lookahead.add(sequence)
        self.scheduler.add(sequence)
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(seed=SEED)
    def cancel(self, seed: int) -> None:
        request = self.live[seed % len(self.live)].request_id
        gone = self.scheduler.cancel(request)
        assert set(gone) == {s for s in self.live if s.request_id == request}
        self.forget(gone)
        self.verify()

    @precondition(lambda self: self.live)
    @rule(seed=SEED)
    def finish(self, seed: int) -> None:
        self.end(self.live[seed % len(self.live)], broken=seed % 3 == 0)
        self.verify()

    @precondition(lambda self: self.live)
    @rule(seed=SEED)
    def urgent_request(self, seed: int) -> None:
        """Longer than most and more important than any: somebody will have to give way."""
        size = min(1 + seed % 12, self.scheduler.max_model_len - 1)
        self.add([seed >> k & 1 for k in range(size)], 0, 1 + seed % 3, "plain", -1, False, True, 0)

    @rule(seeds=st.lists(SEED, min_size=1, max_size=6))
    def steps(self, seeds: list[int]) -> None:
        for seed in seeds:
            self.step(Random(seed))

    @precondition(lambda self: self.live)
    @rule(seed=SEED, count=st.integers(5, 15))
    def many_steps(self, seed: int, count: int) -> None:
        random = Random(seed)
        for _ in range(count):
            self.step(random)

    # -- what the engine does --------------------------------------------------------------------------------

    def step(self, random: Random) -> None:
        self.mid_step = True
        before = {s: list(s.token_ids) for s in self.live}
        had_work = self.scheduler.has_work
        plan = self.scheduler.schedule()
        self.verify()
        self.judge(plan, had_work)
        self.forget([sequence for sequence, _ in plan.failed])
        if self.can_fly(plan.works) and random.random() < 0.7:
            self.fly(plan.works, random)
        else:
            for work in plan.works:
                self.forward(work, random)
            for work in plan.works:
                if work.completes:
                    self.choose(work, random)
        for sequence in self.live:
            if sequence in before:
                assert sequence.token_ids[: len(before[sequence])] == before[sequence]
        self.verify()
        self.mid_step = False

    def judge(self, plan: Plan, had_work: bool) -> None:
        sequences = [work.sequence for work in plan.works]
        assert len(set(sequences)) == len(sequences)
        assert all(s.status is SequenceStatus.RUNNING for s in sequences)
        assert all(s.status is SequenceStatus.WAITING for s in plan.preempted)
        cost = 0
        for work in plan.works:
            if work.is_candidates:
                cost += work.count
            else:
                cost += work.count - 1 + (work.sequence.rows_per_token if work.completes else 1)
        assert cost == plan.rows <= self.scheduler.max_num_batched_tokens
        assert bool(plan.works or plan.failed) == had_work, "the engine would stand still"
        running = sorted((s for s in self.live if s.is_running), key=lambda s: s.order)
        assert not running or running[0] in sequences, "the best one must always advance"
        for sequence, error in plan.failed:
            needed = len(sequence.token_ids) + max(1, sequence.reserve_slots)
            assert needed > self.blocks.num_blocks * self.blocks.block_size, error
        self.seen["preempted"] += len(plan.preempted)
        self.seen["failed"] += len(plan.failed)
        self.seen["mixed steps"] += {work.completes for work in plan.works} == {True, False}
        self.seen["candidates"] += sum(work.is_candidates for work in plan.works)
        running_now = [s.priority for s in self.live if s.is_running]
        self.seen["outranked"] += any(s.priority > min(running_now, default=9) for s in plan.preempted)

    def forward(self, work: Work, random: Random) -> None:
        sequence = work.sequence
        self.pages.read(sequence, work.start)
        if work.is_candidates:
            self.own_written(sequence, work.start)
            sequence.token_ids.append(random.choice(list(sequence.pending)))
            sequence.pending = None
            self.pages.write(sequence, work.start, work.start + 1)
            self.write_own(sequence, work.start)
            self.scheduler.computed(work)
            assert sequence.num_computed == len(sequence.token_ids)
            return
        stop = work.start + work.count
        assert stop <= len(sequence.token_ids)
        assert work.completes == (stop == len(sequence.token_ids))
        self.own_written(sequence, work.start)
        self.pages.write(sequence, work.start, stop)
        if sequence.reserve_slots:
            self.own.write(sequence, work.start, stop)
        self.scheduler.computed(work)
        assert sequence.num_computed == stop

    def can_fly(self, works: list[Work]) -> bool:
        """Whether a step can be launched behind this one: the engine asks for as much."""
        simple = all(w.count == 1 and w.completes and not w.is_candidates and not w.sequence.forks for w in works)
        filled = all(self.own.holds(w.sequence, w.start) for w in works if w.sequence.reserve_slots)
        return simple and filled and self.lookahead.isdisjoint(w.sequence for w in works) and bool(works)

    def fly(self, works: list[Work] | None, random: Random) -> None:
        """Steps launched before the winners of those before are known to the host; somebody may leave meanwhile."""
        drawn = self.launch(works or [], {}, random)
        while works:
            running = [w.sequence for w in works if w.sequence.is_running]
            going_on = [s for s in running if len(s.token_ids) + 1 < self.scheduler.max_model_len]
            behind = None
            if self.scheduler.num_running == len(running) and random.random() < 0.9:
                held = {s: list(s.block_table) for s in self.live}
                behind = self.scheduler.follow(going_on)
                assert all(s.block_table[: len(blocks)] == blocks for s, blocks in held.items())
            self.seen["followed"] += bool(behind)
            coming = self.launch(behind or [], drawn, random)
            for work in works:
                self.land(work, drawn[work.sequence], random)
            self.verify()
            if self.live and random.random() < 0.1:
                self.cancel(random.randrange(99))
            works, drawn = behind, coming

    def launch(self, works: list[Work], drawn: dict[Sequence, int], random: Random) -> dict[Sequence, int]:
        """What the device does: it knows the tokens that it drew."""
        coming = {}
        for work in works:
            sequence, size = work.sequence, len(work.sequence.token_ids)
            if sequence in drawn:
                sequence.token_ids.append(drawn[sequence])
            assert len(sequence.token_ids) == work.start + 1
            self.pages.read(sequence, work.start)
            self.own_written(sequence, work.start)
            self.pages.write(sequence, work.start, work.start + 1)
            sequence.token_ids.append(random.randrange(2))
            coming[sequence] = sequence.token_ids[-1]
            self.write_own(sequence, work.start + 1)
            del sequence.token_ids[size:]  # which the host does not
        return coming

    def land(self, work: Work, token: int, random: Random) -> None:
        sequence = work.sequence
        if not sequence.is_running:
            return
        self.scheduler.computed(work)
        assert sequence.num_computed == len(sequence.token_ids)
        if len(sequence.token_ids) == self.scheduler.max_model_len or random.random() < 0.04:
            self.end(sequence, broken=random.random() < 0.2)
        else:
            sequence.token_ids.append(token)

    def own_written(self, sequence: Sequence, stop: int) -> None:
        if sequence.reserve_slots:
            self.own.read(sequence, stop)

    def write_own(self, sequence: Sequence, position: int) -> None:
        if sequence.reserve_slots and position < self.scheduler.max_model_len:
            self.own.write(sequence, position, position + 1)

    def choose(self, work: Work, random: Random) -> None:
        """What follows once the logits of the last position are at hand."""
        sequence = work.sequence
        ready = [sequence]
        if sequence.forks:
            ready += self.fork(sequence, random)
        for one in ready:
            room = self.scheduler.max_model_len - len(one.token_ids)
            if room <= 0 or random.random() < 0.04:
                self.end(one, broken=random.random() < 0.2)
            elif one in self.lookahead:
                one.pending = np.array([random.randrange(2) for _ in range(random.randint(1, one.rows_per_token))])
            else:
                one.token_ids.append(random.randrange(2))
                self.write_own(one, len(one.token_ids) - 1)

    def fork(self, parent: Sequence, random: Random) -> list[Sequence]:
        children = []
        for index in range(1, parent.forks + 1):
            child = Sequence(
                parent.request_id,
                parent.prompt_len,
                list(parent.token_ids),
                index=index,
                priority=parent.priority,
                arrival=parent.arrival,
                rows_per_token=parent.rows_per_token,
                salt=parent.salt,
                reserve_slots=parent.reserve_slots,
                use_prefix_cache=parent.use_prefix_cache,
            )
            if parent in self.lookahead:
                self.lookahead.add(child)
            children.append(child)
        for source, target in self.scheduler.fork(parent, children):
            self.pages.copy(source, target)
            self.own.copy(source, target)
            self.seen["copies"] += 1
        self.live += children
        started = [child for child in children if child.is_running]
        for child in started:
            assert child.num_computed == parent.num_computed == len(child.token_ids)
            self.pages.read(child, child.num_computed)
            self.own_written(child, child.num_computed)
        self.seen["forked"] += len(started)
        self.seen["forks put off"] += len(children) - len(started)
        return started

    # -- bookkeeping of the test -----------------------------------------------------------------------------

    def end(self, sequence: Sequence, broken: bool) -> None:
        if broken:  # its pages hold nonsense from now on, which nobody may find; sharers are spared
            self.spoil(sequence)
        self.scheduler.finish(sequence, forget=broken)
        self.scheduler.finish(sequence)
        self.forget([sequence])

    def spoil(self, sequence: Sequence) -> None:
        for block in sequence.block_table:
            if self.blocks.num_owners(block) == 1:
                start = block * self.blocks.block_size
                for pages in (self.pages, self.own):
                    pages.slots[start : start + self.blocks.block_size] = ["NaN"] * self.blocks.block_size

    def forget(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            assert sequence.is_finished
            assert not sequence.block_table
            self.live.remove(sequence)
            self.lookahead.discard(sequence)

    def verify(self) -> None:
        self.scheduler.check()
        used = {block for sequence in self.live for block in sequence.block_table}
        assert self.blocks.num_used == len(used)
        self.seen["prefix hits"] += any(self.blocks.num_owners(block) > 1 for block in used)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler") or self.mid_step:  # a step has failed: let that error stand
            return
        for _ in range(3):  # a few more steps, then everybody leaves
            self.step(Random(0))
        for sequence in list(self.live):
            self.scheduler.cancel(sequence.request_id)
        self.scheduler.check()
        assert not self.scheduler.has_work
        assert self.blocks.num_free == self.blocks.num_blocks, "blocks leaked"


def test_no_leak_and_no_wrong_page_in_any_order_of_events() -> None:
    SchedulerMachine.seen.clear()
    run_state_machine_as_test(SchedulerMachine, settings=ORDINARY)
    for event in (
        "preempted",
        "outranked",
        "failed",
        "mixed steps",
        "candidates",
        "forked",
        "forks put off",
        "copies",
        "prefix hits",
        "followed",
    ):
        assert SchedulerMachine.seen[event] >= 5, f"{event}: hardly happened: {SchedulerMachine.seen}"


def test_everybody_is_served_in_the_end() -> None:
    """No new requests: under memory pressure, with preemptions, each sequence reaches its length."""
    random = Random(1)
    for trial in range(30):
        blocks = BlockManager(8, 2, enable_prefix_caching=bool(trial % 2))
        scheduler = Scheduler(blocks, 4, 9, 16)
        sequences = [
            Sequence(f"r{i}", 3, [random.randrange(2) for _ in range(3)], arrival=i, rows_per_token=1 + i % 3)
            for i in range(10)
        ]
        for sequence in sequences:
            scheduler.add(sequence)
        for _ in range(1000):
            for work in scheduler.schedule().works:
                scheduler.computed(work)
                if work.completes:
                    work.sequence.token_ids.append(random.randrange(2))
                    if len(work.sequence.token_ids) == 14:
                        scheduler.finish(work.sequence)
            if not scheduler.has_work:
                break
        assert all(len(s.token_ids) == 14 and s.is_finished for s in sequences)
        assert blocks.num_free == blocks.num_blocks
        assert scheduler.num_preemptions > 0


# -- planted bugs: the machine must find each of them --------------------------------------------------------


class ReleaseForgetsABlock(BlockManager):
    def release(self, sequence: Sequence, forget: bool = False) -> None:
        del sequence.block_table[2:3]  # only of sequences that hold three blocks or more
        super().release(sequence, forget)


class ForkForgetsTheOwner(BlockManager):
    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        copy = super().fork(parent, child)
        if parent.num_computed >= self.block_size:
            self._owners[child.block_table[0]] -= 1
        return copy


class ForkForgetsTheCopy(BlockManager):
    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        super().fork(parent, child)
        return None


class ReuseKeepsTheHash(BlockManager):
    def _take(self) -> int:
        if self._empty:
            return super()._take()
        block, _ = self._idle.popitem(last=False)
        self._owners[block] = 1
        return block


class HashForgetsTheParent(BlockManager):
    def _hash(self, parent: bytes, token_ids: list[int], index: int) -> bytes:
        return super()._hash(b"", token_ids, index)


class HashForgetsTheSalt(BlockManager):
    @staticmethod
    def _root(sequence: Sequence) -> bytes:
        return b""


class MatchCoversTheLastToken(BlockManager):
    def match_prefix(self, sequence: Sequence, limit: int) -> int:
        return super().match_prefix(sequence, limit + 1)


class RegisterRunsAhead(BlockManager):
    def register(self, sequence: Sequence) -> None:
        sequence.num_computed += 1  # the block that the next token would fill
        if sequence.num_computed <= len(sequence.token_ids):
            super().register(sequence)
        sequence.num_computed -= 1


class ForgetDoesNot(BlockManager):
    def release(self, sequence: Sequence, forget: bool = False) -> None:
        super().release(sequence)


@pytest.mark.parametrize(
    "planted",
    [
        ReleaseForgetsABlock,
        ForkForgetsTheOwner,
        ForkForgetsTheCopy,
        ReuseKeepsTheHash,
        HashForgetsTheParent,
        HashForgetsTheSalt,
        MatchCoversTheLastToken,
        RegisterRunsAhead,
        ForgetDoesNot,
    ],
)
def test_the_machine_finds_a_planted_bug(planted: type[BlockManager]) -> None:
    machine = type(f"Machine{planted.__name__}", (SchedulerMachine,), {"block_manager": planted, "seen": Counter()})
    symptom = (
        r"block manager: |position \d+ holds|the best one must always advance|has nothing to compute|would stand still"
    )
    with pytest.raises((AssertionError, RuntimeError), match=symptom):
        run_state_machine_as_test(machine, settings=HUNT)
