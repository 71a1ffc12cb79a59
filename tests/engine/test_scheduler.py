"""The scheduler by itself: budget, order, chunks, candidates, forks, preemption, priorities, cancellation."""

from __future__ import annotations

import numpy as np
import pytest

from vas_engine.engine.blocks import BlockManager
from vas_engine.engine.scheduler import PATIENCE, Plan, Scheduler, Work
from vas_engine.engine.sequence import Sequence, SequenceStatus
from vas_engine.errors import InvalidArgumentError, KVCacheError

_ARRIVALS = iter(range(10**9))


def make(num_blocks=64, block_size=4, seqs=8, budget=64, length=1000, caching=True) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size, caching), seqs, budget, length)


def ask(name: str, length: int, token: int = 7, **fields) -> Sequence:
    return Sequence(name, length, [token] * length, arrival=next(_ARRIVALS), **fields)


def shape(plan: Plan) -> list[tuple[str, int, int]]:
    return [(work.sequence.request_id, work.start, work.count) for work in plan.works]


def step(scheduler: Scheduler, token: int = 1) -> Plan:
    """One step in which every sequence whose logits come out gets a token."""
    plan = scheduler.schedule()
    assert plan.rows <= scheduler.max_num_batched_tokens
    for work in plan.works:
        if work.is_candidates:
            work.sequence.token_ids.append(int(work.sequence.pending[-1]))
            work.sequence.pending = None
        scheduler.computed(work)
        if work.completes and not work.is_candidates:
            work.sequence.token_ids.append(token)
    scheduler.check()
    return plan


# -- decoding, chunks, budget --------------------------------------------------------------------------------


def test_a_prompt_then_one_token_a_step() -> None:
    scheduler, a = make(), ask("a", 5)
    scheduler.add(a)
    assert shape(step(scheduler)) == [("a", 0, 5)]
    assert shape(step(scheduler)) == [("a", 5, 1)]
    assert shape(step(scheduler)) == [("a", 6, 1)]
    assert a.num_computed == len(a.token_ids) - 1


def test_where_prompts_get_no_rows_those_that_wait_get_some_now_and_then() -> None:
    """As under a bound on latency that steps exceed without any prompt."""
    scheduler = make(caching=False)
    decoding(scheduler, ask("long", 4))
    for name in "ab":
        scheduler.add(ask(name, 9))
    seen = []
    for number in range(4 * PATIENCE):
        plan = scheduler.schedule(prompt_rows=0)
        for work in plan.works:
            scheduler.computed(work)
            if work.completes:
                work.sequence.token_ids.append(1)
        seen += [
            (work.sequence.request_id, work.count, number)
            for work in plan.works
            if work.sequence.prompt_len > work.start
        ]
    # What the end of one prompt leaves of its rows the next one takes.
    chunks = [("a", 5), ("a", 4), ("b", 1), ("b", 5), ("b", 3)]
    assert [(name, count) for name, count, _ in seen] == chunks
    assert seen[0][2] == PATIENCE


def decoding(scheduler: Scheduler, *sequences: Sequence) -> list[Sequence]:
    """Sequences whose next token is being drawn."""
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    assert [work.sequence for work in scheduler.schedule().works] == list(sequences)
    return list(sequences)


def test_a_step_behind_one_that_is_not_read() -> None:
    scheduler = make()
    running = decoding(scheduler, ask("a", 4), ask("b", 3, reserve_slots=1))
    works = scheduler.follow(running)
    assert [(w.sequence.request_id, w.start, w.count, w.completes) for w in works] == [
        ("a", 5, 1, True),
        ("b", 4, 1, True),
    ]
    assert [len(s.block_table) for s in running] == [2, 2]
    assert [s.num_computed for s in running] == [4, 3]
    scheduler.check()


def test_it_waits_where_blocks_are_short() -> None:
    scheduler = make(num_blocks=4, caching=False)
    running = decoding(scheduler, ask("a", 3), ask("b", 6))
    assert scheduler.follow(running) is not None
    for sequence in running:
        scheduler.computed(Work(sequence, len(sequence.token_ids) - 1, 1, True))
        sequence.token_ids.append(1)
    assert scheduler.follow(running) is None
    assert scheduler.num_running == 2
    assert [len(s.block_table) for s in running] == [2, 2]


@pytest.mark.parametrize(
    ("options", "newcomer", "waits"),
    [
        ({}, {}, True),
        ({"seqs": 1}, {}, False),
        ({"seqs": 1}, {"priority": -1}, True),
        ({"budget": 5}, {"rows_per_token": 5}, False),
    ],
    ids=["a seat is free", "none is", "somebody must make way", "no rows"],
)
def test_it_waits_for_whoever_has_the_turn(options, newcomer, waits) -> None:
    scheduler = make(**options)
    running = decoding(scheduler, ask("a", 4))
    scheduler.add(ask("b", 3, **newcomer))
    assert (scheduler.follow(running) is None) == waits


def test_it_does_not_wait_for_one_that_nobody_can_make_way_for() -> None:
    scheduler = make(num_blocks=8, caching=False)
    running = decoding(scheduler, ask("important", 15, priority=-1), ask("minor", 3, priority=1, token=9))
    scheduler.add(ask("middle", 14, token=3))
    assert scheduler.follow(running) is not None


def test_completes_survives_the_appended_token() -> None:
    scheduler = make(budget=4)
    scheduler.add(ask("a", 6))
    assert [work.completes for work in step(scheduler).works] == [False]
    assert [work.completes for work in step(scheduler).works] == [True]


def test_a_long_prompt_runs_in_chunks_beside_decoding() -> None:
    scheduler = make(budget=8)
    scheduler.add(ask("a", 4))
    step(scheduler)
    scheduler.add(ask("b", 20, token=9))
    assert shape(step(scheduler)) == [("a", 4, 1), ("b", 0, 7)]
    assert shape(step(scheduler)) == [("a", 5, 1), ("b", 7, 7)]
    assert shape(step(scheduler)) == [("a", 6, 1), ("b", 14, 6)]
    assert shape(step(scheduler)) == [("a", 7, 1), ("b", 20, 1)]


def test_a_running_prompt_is_finished_before_another_begins() -> None:
    scheduler = make(budget=8)
    scheduler.add(ask("a", 12))
    scheduler.add(ask("b", 12, token=9))
    assert shape(step(scheduler)) == [("a", 0, 8)]
    assert shape(step(scheduler)) == [("a", 8, 4), ("b", 0, 4)]
    assert shape(step(scheduler)) == [("a", 12, 1), ("b", 4, 7)]


def test_guided_sequences_cost_their_candidates() -> None:
    scheduler = make(budget=10)
    for name in "abc":
        scheduler.add(ask(name, 2, token=ord(name), rows_per_token=5))
    plan = step(scheduler)
    # a: 1 + 5 rows. b: 4 are left: its first token runs, its last waits. c could not decode beside them.
    assert shape(plan) == [("a", 0, 2), ("b", 0, 1)]
    assert plan.rows == 7
    plan = step(scheduler)
    assert shape(plan) == [("a", 2, 1), ("b", 1, 1)]
    assert plan.rows == 10


def test_a_prompt_holds_back_its_last_token_when_the_rows_do_not_suffice() -> None:
    scheduler = make(budget=10)
    scheduler.add(ask("a", 9, rows_per_token=5))
    assert shape(step(scheduler)) == [("a", 0, 8)]
    plan = step(scheduler)
    assert (shape(plan), plan.rows) == ([("a", 8, 1)], 5)


def test_decoding_sequences_never_wait_for_the_budget() -> None:
    scheduler = make(budget=20)
    for i in range(6):
        scheduler.add(ask(f"r{i}", 3, token=i, rows_per_token=5))
    for _ in range(6):
        step(scheduler)
    for _ in range(4):
        assert len(step(scheduler).works) == scheduler.num_running == 4
    assert scheduler.num_waiting == 2


def test_a_request_beyond_the_budget_is_refused_with_the_name_to_change() -> None:
    scheduler = make(budget=8)
    scheduler.add(ask("fits", 2, rows_per_token=8))
    with pytest.raises(InvalidArgumentError, match="max_num_batched_tokens=8"):
        scheduler.add(ask("too much", 2, rows_per_token=9))
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize(("length", "name"), [(0, "token_ids"), (11, "max_model_len")])
def test_impossible_prompts_are_refused(length: int, name: str) -> None:
    scheduler = make(length=10)
    with pytest.raises(InvalidArgumentError, match=name):
        scheduler.add(ask("a", length))
    assert not scheduler.has_work


@pytest.mark.parametrize("name", ["seqs", "budget", "length"])
def test_impossible_limits_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match="max_"):
        make(**{name: 0})


def test_no_more_sequences_than_seats() -> None:
    scheduler = make(seqs=2)
    sequences = [ask(name, 3, token=ord(name)) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    step(scheduler)
    assert [s.is_running for s in sequences] == [True, True, False]
    scheduler.finish(sequences[0])
    assert ("c", 0, 3) in shape(step(scheduler))


def test_nothing_to_compute_is_an_error_not_a_hang() -> None:
    scheduler = make()
    scheduler.add(ask("a", 3))
    scheduler.computed(scheduler.schedule().works[0])
    with pytest.raises(RuntimeError, match="nothing to compute"):
        scheduler.schedule()


# -- candidates ----------------------------------------------------------------------------------------------


def test_pending_candidates_take_a_row_each_and_the_winners_slot() -> None:
    scheduler, a = make(block_size=4), ask("a", 4, rows_per_token=4)
    scheduler.add(a)
    scheduler.computed(scheduler.schedule().works[0])
    assert len(a.block_table) == 1
    a.pending = np.array([11, 12, 13])
    plan = scheduler.schedule()
    work = plan.works[0]
    assert (work.start, work.count, work.is_candidates, plan.rows) == (4, 3, True, 3)
    assert len(a.block_table) == 2
    with pytest.raises(RuntimeError, match="append the winner"):
        scheduler.computed(work)
    a.token_ids.append(12)
    a.pending = None
    scheduler.computed(work)
    assert a.num_computed == len(a.token_ids) == 5


def test_more_candidates_than_announced_are_an_error() -> None:
    scheduler, a = make(), ask("a", 4, rows_per_token=2)
    scheduler.add(a)
    scheduler.computed(scheduler.schedule().works[0])
    a.pending = np.array([1, 2, 3])
    with pytest.raises(RuntimeError, match="3 candidates pending"):
        scheduler.schedule()


def test_reserved_slots_are_there_when_the_token_is_computed() -> None:
    scheduler, a = make(block_size=4, length=8), ask("a", 3, reserve_slots=1)
    scheduler.add(a)
    for _ in range(6):
        plan = scheduler.schedule()
        work = plan.works[0]
        assert len(a.block_table) * 4 >= min(work.start + work.count + 1, 8)
        scheduler.computed(work)
        a.token_ids.append(1)
    assert len(a.block_table) == 2  # max_model_len ends the reserve


# -- prefix cache --------------------------------------------------------------------------------------------


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = make()
    scheduler.add(ask("a", 10))
    step(scheduler)
    b = ask("b", 10)
    scheduler.add(b)
    assert ("b", 8, 2) in shape(step(scheduler))
    assert b.num_cached == 8
    scheduler.add(ask("c", 8))  # two full blocks are known; the last token must be computed all the same
    assert ("c", 4, 4) in shape(step(scheduler))


def test_generated_tokens_are_cached_as_blocks_fill() -> None:
    scheduler, a = make(), ask("a", 3)
    scheduler.add(a)
    for _ in range(6):
        step(scheduler)
    follow = Sequence("b", 9, a.token_ids[:9])
    scheduler.finish(a)
    scheduler.add(follow)
    assert shape(step(scheduler)) == [("b", 8, 1)]


def test_forgotten_keys_and_values_are_computed_again() -> None:
    scheduler, a = make(), ask("a", 9)
    scheduler.add(a)
    step(scheduler)
    scheduler.finish(a, forget=True)
    scheduler.add(ask("b", 9))
    assert shape(step(scheduler)) == [("b", 0, 9)]


# -- forks ---------------------------------------------------------------------------------------------------


def fork_after_prompt(scheduler: Scheduler, parent: Sequence, children: list[Sequence]):
    scheduler.add(parent)
    work = scheduler.schedule().works[0]
    scheduler.computed(work)
    copies = scheduler.fork(parent, children)
    scheduler.check()
    for sequence in (parent, *children):
        if sequence.is_running:
            sequence.token_ids.append(5 + sequence.index)
    return copies


def samples(count: int, length: int, **fields) -> list[Sequence]:
    arrival = next(_ARRIVALS)
    return [Sequence("n", length, [7] * length, index=i, arrival=arrival, **fields) for i in range(count)]


def test_children_share_the_prompt_and_decode_at_once() -> None:
    scheduler = make()
    parent, *children = samples(3, 10, forks=2)
    copies = fork_after_prompt(scheduler, parent, children)
    assert copies == [(parent.block_table[2], child.block_table[2]) for child in children]
    assert shape(step(scheduler)) == [("n", 10, 1)] * 3
    assert scheduler.blocks.num_used == 2 + 3
    scheduler.finish(parent)
    step(scheduler)
    for child in children:
        scheduler.finish(child)
    assert scheduler.blocks.num_used == 0
    assert not scheduler.has_work


@pytest.mark.parametrize(
    ("limits", "running"),
    [({"seqs": 2}, 1), ({"num_blocks": 4}, 1), ({"budget": 9 + 2 * 3}, 1), ({"budget": 9 + 3 * 3 + 2}, 2)],
)
def test_children_without_seat_block_or_rows_wait_and_go_on_from_the_cache(limits: dict, running: int) -> None:
    scheduler = make(**limits)
    parent, *children = samples(4, 10, rows_per_token=3, forks=3)
    fork_after_prompt(scheduler, parent, children)
    assert [child.is_running for child in children].count(True) == running
    assert scheduler.num_waiting == 3 - running
    waiting = next(child for child in children if not child.is_running)
    for sequence in (parent, *children):
        if sequence.is_running:
            scheduler.finish(sequence)
    assert ("n", 8, 2) in shape(step(scheduler))
    assert waiting.is_running


def test_rows_are_kept_free_for_announced_children() -> None:
    parent, *children = samples(3, 4, rows_per_token=2, forks=2)
    scheduler = make(budget=12)
    scheduler.add(parent)
    scheduler.add(ask("other", 20, token=9))
    plan = scheduler.schedule()
    assert shape(plan) == [("n", 0, 4), ("other", 0, 3)]  # 12 rows - 5 for the prompt - 4 for two children
    for work in plan.works:
        scheduler.computed(work)
    scheduler.fork(parent, children)
    assert all(child.is_running for child in children)


@pytest.mark.parametrize("change", [{"token_ids": [99] * 6}, {"salt": b"other"}])
def test_a_child_of_other_tokens_or_salt_is_refused(change: dict) -> None:
    scheduler = make()
    parent, child = samples(2, 6)
    vars(child).update(change)
    with pytest.raises(RuntimeError, match="does not begin with"):
        fork_after_prompt(scheduler, parent, [child])


def test_only_a_running_sequence_forks() -> None:
    scheduler = make()
    parent, child = samples(2, 6)
    scheduler.add(parent)
    with pytest.raises(RuntimeError, match="only a running sequence"):
        scheduler.fork(parent, [child])


# -- memory: preemption and failure --------------------------------------------------------------------------


def test_the_latest_gives_way_and_comes_back_with_its_tokens() -> None:
    scheduler = make(num_blocks=5, caching=False)
    a, b = ask("a", 7), ask("b", 7, token=9)
    scheduler.add(a), scheduler.add(b)
    plans = [step(scheduler) for _ in range(3)]
    assert plans[-1].preempted == [b]  # a took the fifth block at its ninth token
    assert "b" not in [name for name, *_ in shape(plans[-1])]
    assert b.status is SequenceStatus.WAITING
    assert (b.block_table, b.num_computed, b.num_preemptions, scheduler.num_preemptions) == ([], 0, 1, 1)
    kept = list(b.token_ids)
    scheduler.finish(a)
    assert shape(step(scheduler)) == [("b", 0, len(kept))]
    assert b.token_ids[: len(kept)] == kept


def test_preempted_candidates_are_dropped() -> None:
    scheduler = make(num_blocks=5, caching=False)
    a, b = ask("a", 7), ask("b", 7, token=9, rows_per_token=3)
    scheduler.add(a), scheduler.add(b)
    step(scheduler), step(scheduler)
    b.token_ids.pop()
    b.pending = np.array([1, 2])
    assert step(scheduler).preempted == [b]
    assert b.pending is None


def test_admission_leaves_a_block_for_whoever_runs() -> None:
    scheduler = make(num_blocks=4, caching=False)
    a, b = ask("a", 8), ask("b", 8, token=9)
    scheduler.add(a), scheduler.add(b)
    step(scheduler)
    assert (a.is_running, b.is_running) == (True, False)


def test_what_cannot_fit_alone_fails_and_the_others_go_on() -> None:
    scheduler = make(num_blocks=3, caching=False)
    big, small = ask("big", 13), ask("small", 3)
    scheduler.add(big), scheduler.add(small)
    plan = step(scheduler)
    assert [(s, type(e)) for s, e in plan.failed] == [(big, KVCacheError)]
    assert all(word in str(plan.failed[0][1]) for word in ("big", "kv_cache_memory", "max_model_len"))
    assert shape(plan) == [("small", 0, 3)]
    assert big.is_finished


def test_a_sequence_that_outgrows_the_cache_fails_without_pushing_others_out() -> None:
    scheduler = make(num_blocks=3, block_size=2, caching=False)
    a = ask("a", 3)
    scheduler.add(a)
    for _ in range(4):
        assert not step(scheduler).failed
    b = ask("b", 1, priority=-1)
    scheduler.add(b)
    plan = step(scheduler)
    assert plan.preempted == [a]  # b matters more and needs the block
    scheduler.finish(b)
    assert [s for s, _ in step(scheduler).failed] == [a]
    assert scheduler.blocks.num_used == 0


# -- order and priorities ------------------------------------------------------------------------------------


def test_waiting_goes_by_priority_then_arrival() -> None:
    scheduler = make(seqs=1)
    late = [ask("p1", 2, priority=1), ask("p0", 2), ask("p0 later", 2), ask("p-1", 2, priority=-1)]
    for sequence in late:
        scheduler.add(sequence)
    seen = []
    while scheduler.has_work:
        work = scheduler.schedule().works[0]
        seen.append(work.sequence.request_id)
        scheduler.finish(work.sequence)
    assert seen == ["p-1", "p0", "p0 later", "p1"]


def test_arrival_counts_not_the_order_of_adding() -> None:
    scheduler = make(seqs=1)
    early, late = ask("early", 3), ask("late", 3)
    scheduler.add(late)
    scheduler.add(early)
    assert shape(step(scheduler)) == [("early", 0, 3)]


def test_as_many_are_pushed_out_as_the_rows_of_the_more_important_take() -> None:
    scheduler = make(budget=10)
    minor = [ask(f"m{i}", 2, token=i, priority=1, rows_per_token=3) for i in range(3)]
    for sequence in minor:
        scheduler.add(sequence)
    step(scheduler), step(scheduler)
    scheduler.add(ask("urgent", 2, rows_per_token=6))
    assert step(scheduler).preempted == minor[:0:-1]
    assert minor[0].is_running


def test_the_more_important_pushes_out_the_least_important() -> None:
    scheduler = make(seqs=2)
    a, b = ask("a", 3, priority=1), ask("b", 3, priority=2, token=9)
    scheduler.add(a), scheduler.add(b)
    step(scheduler)
    urgent = ask("urgent", 3, token=3)
    scheduler.add(urgent)
    plan = step(scheduler)
    assert plan.preempted == [b]
    assert shape(plan) == [("a", 3, 1), ("urgent", 0, 3)]


def test_equals_are_not_pushed_out() -> None:
    scheduler = make(seqs=1)
    a = ask("a", 3)
    early = Sequence("early", 3, [1, 2, 3], arrival=-1)
    scheduler.add(a)
    step(scheduler)
    scheduler.add(early)
    assert step(scheduler).preempted == []


def test_nobody_is_pushed_out_in_vain() -> None:
    scheduler = make(num_blocks=6, caching=False)
    important, minor = ask("important", 15, priority=-1), ask("minor", 3, priority=1, token=9)
    scheduler.add(important), scheduler.add(minor)
    step(scheduler)
    scheduler.add(ask("middle", 8, token=3))  # even without the minor one there is no room beside the important
    plan = step(scheduler)
    assert plan.preempted == []
    assert minor.is_running


def test_a_prefix_held_by_the_one_pushed_out_is_taken_over() -> None:
    scheduler = make(num_blocks=4, seqs=1)
    minor = ask("minor", 13, priority=1)
    scheduler.add(minor)
    step(scheduler)
    scheduler.add(ask("urgent", 13))
    plan = step(scheduler)
    assert plan.preempted == [minor]
    assert shape(plan) == [("urgent", 12, 1)]


# -- leaving -------------------------------------------------------------------------------------------------


def test_cancel_ends_every_sample_wherever_it_is() -> None:
    scheduler = make(seqs=2)
    parent, *children = samples(4, 6, forks=3)
    fork_after_prompt(scheduler, parent, children)
    other = ask("other", 3, token=9)
    scheduler.add(other)
    assert sorted(s.index for s in scheduler.cancel("n")) == [0, 1, 2, 3]
    assert scheduler.cancel("n") == []
    assert all(s.is_finished for s in (parent, *children))
    assert scheduler.blocks.num_used == 0
    assert shape(step(scheduler)) == [("other", 0, 3)]


def test_leaving_between_plan_and_result_is_harmless() -> None:
    scheduler, a = make(), ask("a", 6)
    scheduler.add(a)
    work = scheduler.schedule().works[0]
    scheduler.cancel("a")
    scheduler.computed(work)
    scheduler.finish(a)
    scheduler.check()
    assert (a.num_computed, scheduler.blocks.num_used, scheduler.has_work) == (0, 0, False)


def test_finishing_a_stranger_changes_nothing() -> None:
    scheduler, a = make(), ask("a", 3)
    scheduler.add(a)
    scheduler.finish(ask("a", 3))
    assert scheduler.num_waiting == 1
    scheduler.check()


def damage_rows(scheduler: Scheduler) -> None:
    scheduler._decode_rows += 1


def damage_order(scheduler: Scheduler) -> None:
    scheduler._running.reverse()


def damage_requests(scheduler: Scheduler) -> None:
    scheduler._requests.popitem()


def damage_status(scheduler: Scheduler) -> None:
    scheduler._running[0].status = SequenceStatus.WAITING


@pytest.mark.parametrize("damage", [damage_rows, damage_order, damage_requests, damage_status])
def test_check_finds_damage(damage) -> None:
    scheduler = make()
    scheduler.add(ask("a", 3)), scheduler.add(ask("b", 3, token=9))
    step(scheduler)
    damage(scheduler)
    with pytest.raises(RuntimeError, match="scheduler"):
        scheduler.check()
