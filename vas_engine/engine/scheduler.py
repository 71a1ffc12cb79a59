"""Which tokens of which sequences the next step computes, and who holds the cache meanwhile."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

from vas_engine import arguments
from vas_engine.engine.blocks import BlockManager
from vas_engine.engine.sequence import Sequence, SequenceStatus
from vas_engine.errors import InvalidArgumentError, KVCacheError

PATIENCE = 8  # steps that may leave the waiting sequences no rows for a prompt, one after the other

_ORDER = attrgetter("order")


@dataclass(eq=False, slots=True)
class Work:
    """What one step does for one sequence.

    Attributes:
        start, count: positions [start, start + count) are computed and written to the pages. Of pending
            candidates `count` is their number and all stand at position `start`; one of them will be written.
        completes: the logits that choose the next token come out of this work.
        is_candidates: the rows are the sequence's pending candidates.
    """

    sequence: Sequence
    start: int
    count: int
    completes: bool
    is_candidates: bool = False


@dataclass(eq=False, slots=True)
class Plan:
    """One step: decoding sequences and candidates first, then chunks of prompts.

    Attributes:
        preempted: sequences that lost their blocks; they wait and will be computed again from their tokens.
        failed: sequences that can never fit, with the reason. The scheduler has let go of them already.
        rows: rows of the step, at most max_num_batched_tokens.
    """

    works: list[Work] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[tuple[Sequence, KVCacheError]] = field(default_factory=list)
    rows: int = 0


class Scheduler:
    """Continuous batching: sequences join and leave at any step, prompts run in chunks beside decoding.

    A chunk of c tokens costs c rows of the step; if it reaches the last token, that one counts as
    `rows_per_token` rows, since it is followed by the scoring of that many. Pending candidates cost one row
    each. A sequence is admitted only if every running one, and it, could decode in the same step: so decoding
    never waits for the budget and always leaves some of it to a prompt in progress.

    Everything goes by (priority, arrival): who is admitted first and, from the other end, who gives way when
    blocks run out. A waiting sequence pushes running ones aside only if their priority is strictly worse.
    The best sequence always advances, hence all of them do in the end.

    Args:
        blocks: the cache's blocks.
        max_num_seqs: sequences that may run at once.
        max_num_batched_tokens: rows of a step.
        max_model_len: tokens a sequence may have.
    """

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int
    ) -> None:
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
        ):
            arguments.integer(name, value, 1)
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.num_preemptions = 0
        self._waiting: list[Sequence] = []  # both lists: best (priority, arrival) first
        self._running: list[Sequence] = []
        self._requests: dict[str, list[Sequence]] = {}
        self._decode_rows = 0  # rows of a step in which every running sequence decodes
        self._spare_rows = 0  # rows left in the current step, for children forked during it
        self._turn = 0
        self._passed_over = 0  # steps in a row in which nothing was admitted though something waited

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def running(self) -> Iterable[Sequence]:
        """Sequences that run, best first."""
        return iter(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    # -- coming and going -----------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Puts a new sequence in the queue; InvalidArgumentError if no step could ever hold it."""
        self._refuse_impossible(sequence)
        self._enter(sequence)
        insort(self._waiting, sequence, key=_ORDER)

    def fork(self, parent: Sequence, children: list[Sequence]) -> list[tuple[int, int]]:
        """Starts children on the K/V that the parent has computed, during the step that computed it.

        A child must begin with the parent's computed tokens. A child that finds a seat, blocks and rows left
        in the step is running afterwards, shares the parent's full blocks and has the parent's
        `num_computed`: the caller chooses its next token in this step. The others wait like new sequences.

        Returns:
            (source, destination) blocks to copy in every cache before anything else is written.
        """
        if not parent.is_running:
            raise RuntimeError(f"{_name(parent)} is {parent.status.value}: only a running sequence can fork")
        done = parent.num_computed
        for child in children:
            self._refuse_impossible(child)
            if child.token_ids[:done] != parent.token_ids[:done] or child.salt != parent.salt:
                raise RuntimeError(f"{_name(child)} does not begin with what {_name(parent)} has computed")
        copies = []
        parent.forks = 0
        for child in children:
            self._enter(child)
            if not self._can_fork(parent, child):
                insort(self._waiting, child, key=_ORDER)
                continue
            copy = self.blocks.fork(parent, child)
            if copy is not None:
                copies.append(copy)
            self.blocks.grow(child, self._reach(child))
            self._spare_rows -= child.rows_per_token
            self._run(child)
        return copies

    def finish(self, sequence: Sequence, forget: bool = False) -> None:
        """Lets go of a sequence in whatever state; again is harmless. `forget`: its K/V may serve nobody."""
        if sequence.is_finished or sequence not in self._requests.get(sequence.request_id, ()):
            return
        if sequence.is_running:
            self._stop(sequence, forget)
        else:
            self._waiting.pop(bisect_left(self._waiting, sequence.order, key=_ORDER))
        sequence.status = SequenceStatus.FINISHED
        sequence.pending = None
        siblings = self._requests[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request_id]

    def cancel(self, request_id: str) -> list[Sequence]:
        """Finishes every sequence of a request and returns them; none for an unknown one."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.finish(sequence)
        return sequences

    # -- a step ---------------------------------------------------------------------------------------------

    def schedule(self, prompt_rows: int | None = None) -> Plan:
        """Plans a step and allocates what it writes to. Call `computed` for each work before the next.

        Args:
            prompt_rows: rows that prompts may take beside the decoding sequences (a prompt in progress always gets
                some, and so does one that waits after PATIENCE steps without); None is what the budget holds.
        """
        plan = Plan()
        self._make_way(plan)
        prefills = self._plan_decodes(plan)
        most = self.max_num_batched_tokens
        if prompt_rows is not None and plan.works:
            first = prefills[0] if prefills else None
            if first is None and self._waiting and self._passed_over >= PATIENCE:
                first = self._waiting[0]
            least = 0 if first is None else self.blocks.block_size + first.rows_per_token
            most = min(most, plan.rows + max(prompt_rows, least))
        budget = most - plan.rows
        kept, left = 0, len(self._waiting)
        for sequence in prefills:
            kept += self._plan_chunk(sequence, plan, budget - kept)
            budget = most - plan.rows
        while not plan.preempted and budget > kept:
            head = self._next_waiting(plan)
            if head is None or not self._fits(head):
                break
            self._admit(head)
            kept += self._plan_chunk(head, plan, budget - kept)
            budget = most - plan.rows
        self._passed_over = self._passed_over + 1 if self._waiting and len(self._waiting) == left else 0
        self._spare_rows = self.max_num_batched_tokens - plan.rows
        return plan

    def follow(self, sequences: Iterable[Sequence]) -> list[Work] | None:
        """Plans the step behind one whose winners are not known yet: each of these sequences goes on by one token.

        Allocates what it writes to. None where that step must wait for the winners: there are no blocks without taking
        somebody's, a waiting sequence has its turn, or one that runs is not among these or still in its prompt.
        """
        works, needed, blocks = [], [], 0
        for sequence in sequences:
            length = len(sequence.token_ids)
            if sequence.pending is None:
                works.append(Work(sequence, length, 1, True))
            else:
                works.append(Work(sequence, length + 1, sequence.rows_per_token, True, True))
            needed.append(self._reach(sequence, ahead=1))
            blocks += max(0, self.blocks.blocks_for(needed[-1]) - len(sequence.block_table))
        if blocks > self.blocks.num_free or (self._waiting and self._has_turn(self._waiting[0])):
            return None
        for work, reach in zip(works, needed, strict=True):
            self.blocks.grow(work.sequence, reach)
        return works

    def computed(self, work: Work) -> None:
        """Notes that a work's K/V are in the pages. For candidates: once the winner has been appended."""
        sequence = work.sequence
        if sequence.status is not SequenceStatus.RUNNING:
            return
        done = work.start + (1 if work.is_candidates else work.count)
        if done > len(sequence.token_ids):
            raise RuntimeError(f"{_name(sequence)}: append the winner, then call computed() on its candidates")
        sequence.num_computed = done
        if done // self.blocks.block_size > sequence.num_registered:
            self.blocks.register(sequence)

    def check(self) -> None:
        """Compares all bookkeeping of scheduler and blocks; RuntimeError says what is broken."""
        self.blocks.check(self._running)
        for name, queue in (("waiting", self._waiting), ("running", self._running)):
            if any(a.order >= b.order for a, b in pairwise(queue)):
                raise RuntimeError(f"scheduler: {name} is out of order")
            if any(sequence.status.value != name for sequence in queue):
                raise RuntimeError(f"scheduler: a sequence in {name} has another status")
        if any(sequence.block_table or sequence.num_computed for sequence in self._waiting):
            raise RuntimeError("scheduler: a waiting sequence holds blocks")
        rows = sum(sequence.rows_per_token for sequence in self._running)
        if rows != self._decode_rows or rows > self.max_num_batched_tokens:
            raise RuntimeError(f"scheduler: {rows} rows of running sequences, {self._decode_rows} counted")
        if len(self._running) > self.max_num_seqs:
            raise RuntimeError(f"scheduler: {len(self._running)} sequences run")
        known = {id(sequence) for siblings in self._requests.values() for sequence in siblings}
        if known != {id(sequence) for sequence in self._running + self._waiting}:
            raise RuntimeError("scheduler: requests and queues hold different sequences")

    # -- planning -------------------------------------------------------------------------------------------

    def _plan_decodes(self, plan: Plan) -> list[Sequence]:
        """Plans whatever chooses a token next; returns the running sequences still in their prompts."""
        works, running, block_size = plan.works, self._running, self.blocks.block_size
        prefills: list[Sequence] = []
        rows = index = 0
        while index < len(running):
            sequence = running[index]
            length, pending = len(sequence.token_ids), sequence.pending
            if pending is not None:
                needed, cost = length + 1, len(pending)
                work = Work(sequence, length, cost, True, True)
                self._refuse_pending(sequence, cost)
            elif length - sequence.num_computed == 1:
                needed, cost = length + sequence.reserve_slots, sequence.rows_per_token
                work = Work(sequence, length - 1, 1, True)
            else:
                if length == sequence.num_computed:
                    raise RuntimeError(
                        f"{_name(sequence)} has nothing to compute: append a token, set pending or finish it"
                    )
                prefills.append(sequence)
                index += 1
                continue
            # Only sequences behind this one can be pushed out, so neither plan nor prefills lose an entry.
            if needed > len(sequence.block_table) * block_size and not self._secure(sequence, plan):
                continue
            works.append(work)
            rows += cost
            index += 1
        plan.rows += rows
        return prefills

    def _plan_chunk(self, sequence: Sequence, plan: Plan, budget: int) -> int:
        """Plans as much of a prompt as the budget holds; returns rows to keep for children it will fork."""
        start, cost = sequence.num_computed, sequence.rows_per_token
        todo = len(sequence.token_ids) - start
        completes = todo - 1 + cost <= budget
        count = todo if completes else min(todo - 1, budget)
        if count <= 0:
            return 0
        plan.works.append(Work(sequence, start, count, completes))
        if not completes:
            plan.rows += count
            return 0
        plan.rows += todo - 1 + cost
        left = budget - (todo - 1 + cost)
        return min(sequence.forks, left // cost) * cost

    def _next_waiting(self, plan: Plan) -> Sequence | None:
        """The best waiting sequence that can ever run."""
        while self._waiting:
            head = self._waiting[0]
            if not self._too_long(head):
                return head
            self._fail(head, plan)
        return None

    def _too_long(self, sequence: Sequence) -> bool:
        """Whether all blocks there are would not do."""
        return self.blocks.blocks_for(self._reach(sequence)) > self.blocks.num_blocks

    def _outranks(self, head: Sequence) -> bool:
        """Whether the last of the running could be pushed out for it."""
        return bool(self._running) and head.priority < self._running[-1].priority

    def _has_turn(self, head: Sequence) -> bool:
        """Whether the next plan would do anything about the first of the waiting."""
        return self._too_long(head) or self._fits(head) or bool(self._victims(head))

    def _fits(self, head: Sequence) -> bool:
        """Whether it can be admitted as things are, with a block to spare for each running sequence."""
        if (
            len(self._running) >= self.max_num_seqs
            or self._decode_rows + head.rows_per_token > self.max_num_batched_tokens
        ):
            return False
        prefix = self._prefix(head)
        wanted = self.blocks.blocks_for(self._reach(head)) - len(prefix) + self.blocks.num_idle_of(prefix)
        return wanted + len(self._running) <= self.blocks.num_free

    def _make_way(self, plan: Plan) -> None:
        """Admits waiting sequences that do not fit but outrank running ones, which are pushed out."""
        while self._waiting and self._outranks(self._waiting[0]):
            head = self._next_waiting(plan)
            if head is None or not self._outranks(head) or self._fits(head):
                return
            victims = self._victims(head)
            if not victims:
                return
            for victim in victims:
                self._preempt(victim, plan)
            self._admit(head)

    def _victims(self, head: Sequence) -> list[Sequence]:
        """The fewest running sequences, worst first, whose leaving lets `head` in; none if none suffice."""
        prefix = self._prefix(head)
        wanted = self.blocks.blocks_for(self._reach(head)) - len(prefix)
        free = self.blocks.num_free - self.blocks.num_idle_of(prefix)
        held: Counter[int] = Counter()
        taken = set(prefix)  # what the head takes over does not become free
        rows, victims = self._decode_rows + head.rows_per_token, []
        for victim in reversed(self._running):
            if victim.priority <= head.priority:
                return []
            victims.append(victim)
            rows -= victim.rows_per_token
            for block in victim.block_table:
                held[block] += 1
                free += held[block] == self.blocks.num_owners(block) and block not in taken
            left = len(self._running) - len(victims)
            if rows <= self.max_num_batched_tokens and wanted + left <= free:
                return victims
        return []

    # -- changes of state -----------------------------------------------------------------------------------

    def _enter(self, sequence: Sequence) -> None:
        self._turn += 1
        sequence.order = (sequence.priority, sequence.arrival, self._turn)
        sequence.status = SequenceStatus.WAITING
        self._requests.setdefault(sequence.request_id, []).append(sequence)

    def _admit(self, head: Sequence) -> None:
        """Moves the first waiting sequence to the running ones with blocks for all its tokens.

        All at once, so that a prompt in progress never runs out of blocks half way.
        """
        self._waiting.pop(0)
        self.blocks.match_prefix(head, len(head.token_ids) - 1)
        if not self.blocks.grow(head, self._reach(head)):
            raise RuntimeError(f"{_name(head)} was admitted without enough free blocks")
        self._run(head)

    def _run(self, sequence: Sequence) -> None:
        sequence.status = SequenceStatus.RUNNING
        self._decode_rows += sequence.rows_per_token
        insort(self._running, sequence, key=_ORDER)

    def _stop(self, sequence: Sequence, forget: bool = False) -> None:
        self._running.pop(bisect_left(self._running, sequence.order, key=_ORDER))
        self._decode_rows -= sequence.rows_per_token
        self.blocks.release(sequence, forget)

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.pending = None
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_ORDER)
        plan.preempted.append(sequence)

    def _fail(self, sequence: Sequence, plan: Plan) -> None:
        needed, there = self.blocks.blocks_for(self._reach(sequence)), self.blocks.num_blocks
        error = KVCacheError(
            f"{_name(sequence)}: {len(sequence.token_ids)} tokens need {needed} blocks of "
            f"{self.blocks.block_size}, the cache has {there}: raise kv_cache_memory, or lower max_model_len "
            f"to {there * self.blocks.block_size} so that such requests are refused or cut early"
        )
        self.finish(sequence)
        plan.failed.append((sequence, error))

    def _secure(self, sequence: Sequence, plan: Plan) -> bool:
        """Gets a running sequence blocks for its next token; False if it fails or has to give way itself."""
        needed = self._reach(sequence)
        if self.blocks.blocks_for(needed) > self.blocks.num_blocks:
            self._fail(sequence, plan)
            return False
        while not self.blocks.grow(sequence, needed):
            victim = self._running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        return True

    # -- conditions -----------------------------------------------------------------------------------------

    def _reach(self, sequence: Sequence, ahead: int = 0) -> int:
        """Positions its table must cover before its next token, `ahead` of those known, is chosen."""
        length = len(sequence.token_ids) + ahead
        least = length if sequence.pending is None else length + 1
        return max(least, min(length + sequence.reserve_slots, self.max_model_len))

    def _prefix(self, head: Sequence) -> list[int]:
        return self.blocks.find_prefix(head, len(head.token_ids) - 1)

    def _can_fork(self, parent: Sequence, child: Sequence) -> bool:
        shared = parent.num_computed // self.blocks.block_size
        return (
            len(self._running) < self.max_num_seqs
            and child.rows_per_token <= self._spare_rows
            and self._decode_rows + child.rows_per_token <= self.max_num_batched_tokens
            and self.blocks.blocks_for(self._reach(child)) - shared <= self.blocks.num_free
        )

    def _refuse_impossible(self, sequence: Sequence) -> None:
        if not sequence.token_ids:
            raise InvalidArgumentError("token_ids", sequence.token_ids, "a prompt needs at least one token")
        if len(sequence.token_ids) > self.max_model_len:
            raise InvalidArgumentError(
                "max_model_len",
                self.max_model_len,
                f"the prompt has {len(sequence.token_ids)} tokens; raise max_model_len or shorten the prompt",
            )
        if sequence.rows_per_token > self.max_num_batched_tokens:
            raise InvalidArgumentError(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"one token of this request takes {sequence.rows_per_token} rows; "
                "raise max_num_batched_tokens to at least that, or lower num_candidates",
            )

    def _refuse_pending(self, sequence: Sequence, rows: int) -> None:
        if not 0 < rows <= sequence.rows_per_token:
            raise RuntimeError(
                f"{_name(sequence)}: {rows} candidates pending, rows_per_token is {sequence.rows_per_token}"
            )


def _name(sequence: Sequence) -> str:
    return f"request {sequence.request_id!r}, sample {sequence.index}"
