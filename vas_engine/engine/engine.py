"""The engine: requests in, token events out, one pass of the models a step.

Plain decoding is guided decoding with one candidate. Every running sequence goes through the same steps
(forward, select, score, choose); one without values has a single row to choose from and nothing to score.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from vas_engine.engine.blocks import BlockManager
from vas_engine.engine.clock import Clock
from vas_engine.engine.controls import Knobs, bias_row, gather, has_limits, has_penalties
from vas_engine.engine.decode import DecodeGraphs, Flight, decodes, unfit
from vas_engine.engine.decode_step import Drawn
from vas_engine.engine.event import EngineStats, TokenEvent, TokenLogprob
from vas_engine.engine.guide import Decision, Guide, Hidden
from vas_engine.engine.history import History
from vas_engine.engine.memory import free_memory
from vas_engine.engine.pace import Pace, first_guess, floors, spend
from vas_engine.engine.rows import Rows, pack, slot
from vas_engine.engine.scheduler import Scheduler, Work
from vas_engine.engine.sequence import Sequence, SequenceStatus
from vas_engine.errors import InvalidArgumentError, KVCacheError, NonFiniteError, nearest
from vas_engine.kernels.transfer import to_device
from vas_engine.model.cache import KVCache
from vas_engine.model.graphs import Graphs
from vas_engine.model.lm import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.sampling import Selection, fork_seed, select
from vas_engine.values.scorer import Scorer


class Engine:
    """Continuous-batching decoder over paged K/V.

    Args:
        lm: the frozen base model; its pages are allocated here.
        scorers: name -> bound value network (see ``Guide`` for the names of the values they give).
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: rows a step may process; candidates and prefill tokens count alike.
        max_model_len: longest sequence, prompt included.
        num_blocks: pages of the KV cache; every cache (base, side networks, value models) has as many.
        block_size: tokens a page.
        enable_prefix_caching: reuse pages of equal prefixes.
        graphs: keep decode steps as graphs on the device (on a CPU, where this is for tests, as functions).
        overlap: launch a graph while the one before is at work, whose winners are read meanwhile: a step late.
    """

    def __init__(
        self,
        lm: CausalLM,
        scorers: Mapping[str, Scorer] | None = None,
        *,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int = 8192,
        max_model_len: int | None = None,
        num_blocks: int = 1024,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        graphs: bool = False,
        overlap: bool = True,
    ) -> None:
        self.lm = lm
        scorers = dict(scorers or {})
        made_for = min([lm.max_model_len, *(scorer.max_model_len for scorer in scorers.values())])
        self.max_model_len = min(max_model_len or made_for, made_for)
        self.block_size = block_size
        self._allocated = num_blocks + graphs  # a block for what nobody reads
        lm.allocate(self._allocated, block_size)
        for scorer in scorers.values():
            scorer.allocate(self._allocated, block_size)
        self.guide = Guide(lm, scorers)
        self.graphs: DecodeGraphs | None = None
        if graphs:
            longest = -(-self.max_model_len // block_size) + 1
            self.graphs = DecodeGraphs(lm, self.guide, Graphs(lm.device), max_num_seqs, longest, block_size, num_blocks)
        self.overlap = overlap
        self._flight: Flight | None = None
        self._retired: set[str] = set()
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(self.blocks, max_num_seqs, max_num_batched_tokens, self.max_model_len)
        self.stats = EngineStats()
        self.pace: Pace | None = None
        self.clock = Clock()
        self._live: dict[str, list[Sequence]] = {}
        self._timed: dict[str, None] = {}  # the live requests that have a deadline
        self._arrivals = 0
        self._ended: list[TokenEvent] = []

    @staticmethod
    def bytes_per_block(lm: CausalLM, scorers: Mapping[str, Scorer], block_size: int) -> int:
        """Bytes that one page takes in all caches together: the base model's and the networks' own."""
        shapes = [*lm.layer_shapes, *(shape for scorer in scorers.values() for shape in scorer.cache_layers)]
        return KVCache.bytes_per_block(shapes, block_size, lm.dtype)

    # -- requests --------------------------------------------------------------------------------------------

    @property
    def value_names(self) -> list[str]:
        """Names that a new request may weight."""
        if not self._retired:
            return self.guide.value_names
        kept = [network for network in self.guide.networks if network.name not in self._retired]
        return [name for network in kept for name in self.guide.value_names[network.columns]]

    @property
    def has_unfinished(self) -> bool:
        """Whether there is something to do for a step: requests, ends to report, a value to let go."""
        return bool(self._live or self._ended or self._retired)

    def add_request(
        self,
        request_id: str,
        prompt_ids: Seq[int],
        params: SamplingParams,
        priority: int = 0,
        salt: bytes = b"",
        deadline: float | None = None,
    ) -> None:
        """Queue a request; its ``n`` samples share the prompt's pages.

        Args:
            salt: requests of different salts share no page, so none can tell by its speed what another asked.
            deadline: time (of `time.monotonic`) at which it ends with what it has, with finish reason "length"; while
                it is behind, its values look at no more than `min_candidates`.

        Raises:
            InvalidArgumentError: names what does not fit; nothing of the request is kept.
        """
        if request_id in self._live:
            raise InvalidArgumentError("request_id", request_id, "already running; give every request its own")
        if any(event.request_id == request_id for event in self._ended):
            fix = "its end has not been reported yet; call step() before, or give every request its own"
            raise InvalidArgumentError("request_id", request_id, fix)
        prompt = [int(token) for token in prompt_ids]
        self._check_prompt(prompt)
        params.check(vocab_size=self.lm.vocab_size, value_names=self.value_names)
        seed = params.seed if params.seed is not None else int.from_bytes(os.urandom(8), "little")
        sequence = self._sequence(request_id, 0, prompt, params, seed, priority)
        sequence.salt += salt and b"\0\0" + salt
        sequence.deadline = deadline
        self.scheduler.add(sequence)
        self._live[request_id] = [sequence]
        if deadline is not None:
            self._timed[request_id] = None

    def add_value(self, name: str, scorer: Scorer) -> None:
        """Load a bound network between two steps; the requests that run go on as if nothing had happened.

        Raises:
            InvalidArgumentError: the name is taken, or the network was made for shorter sequences.
            KVCacheError: there is no memory for its pages.
        """
        if name in self.guide.scorers:
            fix = "its last request is still running" if name in self._retired else "is loaded; unload it first"
            raise InvalidArgumentError("name", name, fix)
        if scorer.max_model_len < self.max_model_len:
            fix = f"was made for sequences of {scorer.max_model_len}; this engine runs up to {self.max_model_len}"
            raise InvalidArgumentError("name", name, fix)
        needed = KVCache.bytes_per_block(scorer.cache_layers, self.block_size, self.lm.dtype) * self._allocated
        if needed > free_memory(self.lm.device):
            raise KVCacheError(f"value {name!r}: its pages take {needed:,} bytes, more than there is")
        scorer.allocate(self._allocated, self.block_size)
        self._rearrange({**self.guide.scorers, name: scorer})

    def remove_value(self, name: str) -> None:
        """Unload a network: new requests can no longer name its values, and it goes when its last request has ended.

        Raises:
            InvalidArgumentError: no such network.
        """
        known = [n for n in self.guide.scorers if n not in self._retired]
        if name not in known:
            raise InvalidArgumentError("name", name, f"no value of this name is loaded; {nearest(name, known)}")
        self._retired.add(name)
        self._drop_retired()

    def is_retired(self, name: str) -> bool:
        """Whether a network only stays for the requests that use it."""
        return name in self._retired

    def _drop_retired(self) -> None:
        if not self._retired:
            return
        used = {self.guide.networks[i].name for sequence in self._sequences() for i in sequence.networks}
        gone = self._retired - used
        if gone:
            kept = {name: scorer for name, scorer in self.guide.scorers.items() if name not in gone}
            self._rearrange(kept)
            self._retired -= gone

    def _rearrange(self, scorers: Mapping[str, Scorer]) -> None:
        self._land(self._ended)  # what was launched knows the values by their places
        self.guide.rearrange(scorers, self._sequences())
        if self.graphs is not None:
            self.graphs.forget()

    def _sequences(self) -> list[Sequence]:
        return [sequence for siblings in self._live.values() for sequence in siblings]

    def _check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise InvalidArgumentError("prompt", prompt, "is empty; give at least one token (the model's BOS, say)")
        if len(prompt) >= self.max_model_len:
            fix = f"must be shorter than max_model_len={self.max_model_len}, to leave room for a token"
            raise InvalidArgumentError("prompt", f"[{len(prompt)} tokens]", fix)
        worst = min(prompt) if min(prompt) < 0 else max(prompt)
        if not 0 <= worst < self.lm.vocab_size:
            fix = f"is no token of this model; ids run from 0 to {self.lm.vocab_size - 1} (another tokenizer's?)"
            raise InvalidArgumentError("prompt", worst, fix)

    def _sequence(
        self, request_id: str, index: int, prompt: list[int], params: SamplingParams, seed: int, priority: int
    ) -> Sequence:
        self._arrivals += 1
        sequence = Sequence(
            request_id=request_id,
            index=index,
            prompt_len=len(prompt),
            token_ids=list(prompt),
            params=params,
            seed=seed,
            priority=priority,
            arrival=self._arrivals,
        )
        self.guide.admit(sequence, params)
        guided = bool(sequence.networks)
        sequence.rows_per_token = params.num_candidates + 1 if guided else 1
        sequence.num_candidates = params.num_candidates if guided else 0
        # The winner's own K/V is written when it is chosen, a step before the base model processes it.
        sequence.reserve_slots = int(sequence.own_cache or sequence.lookahead)
        sequence.forks = params.n - 1 if index == 0 else 0
        sequence.salt = self.guide.salt(sequence)
        sequence.use_prefix_cache = not params.return_hidden_states
        sequence.knobs = Knobs.of(params)
        sequence.limited = has_limits(params)
        sequence.history = History(len(prompt)) if has_penalties(params) else None
        eos = () if params.ignore_eos else self.lm.eos_token_ids
        sequence.end_ids = frozenset(eos) | frozenset(params.stop_token_ids or ())
        bias = params.logit_bias or {}
        sequence.bias = bias_row(bias)
        sequence.early_bias = bias_row({**bias, **dict.fromkeys(sequence.end_ids, -np.inf)})
        sequence.all_needed = params.exact or params.baseline == "candidate-mean"
        sequence.unfit = unfit(params, sequence.lookahead, sequence.reads_before)
        return sequence

    def cancel(self, request_id: str) -> None:
        """End a request at once; the next ``step`` reports its sequences as aborted. Unknown ids are ignored."""
        for sequence in list(self._live.get(request_id, ())):
            self._ended += self._end(sequence, finish_reason="abort")

    def finish(self, request_id: str, index: int) -> None:
        """End one sample (its text met a stop string, say); no further event comes for it, but for one with the last
        token's state and the end where the request returns hidden states."""
        for sequence in self._live.get(request_id, []):
            if sequence.index == index:
                if not sequence.params.return_hidden_states:
                    self._remove(sequence)
                elif sequence.num_hidden >= len(sequence.token_ids):
                    self._ended += self._end(sequence, finish_reason="stop", hidden=sequence.take_hidden())
                else:
                    sequence.draining, sequence.pending = sequence.draining or "stop", None
                return

    def bound_latency(self, seconds: float | None) -> None:
        """Have steps take no longer than this, as far as that can be: smaller chunks of prompts, fewer sequences at
        once, fewer candidates (near-ties first, never fewer than a request's `min_candidates`).

        Tokens then depend on the load. None is no bound. Sequences whose values look ahead keep all their candidates.
        """
        self.pace = Pace(seconds, first_guess(self.lm, list(self.guide.scorers.values()))) if seconds else None

    def recover(self, error: Exception) -> list[TokenEvent]:
        """After a step that raised: ends every request that took part in it; those that wait are not touched.

        What had been gathered until then is reported first. A sample whose end was cut in half has no event: its
        request is not live afterwards, for a request is ended with all its samples.

        Raises:
            RuntimeError: the bookkeeping of pages and queues is broken too; this engine cannot go on.
        """
        events, self._ended = self._ended, []
        self._flight = None
        for sequences in list(self._live.values()):
            if all(s.status is SequenceStatus.WAITING and not s.forked and not s.index for s in sequences):
                for sequence in sequences:
                    sequence.forget()  # it may have been pushed out by the step that raised
                continue
            for sequence in list(sequences):
                events += self._fail(sequence, error, forget=True)  # its pages may be half written
        self.scheduler.check()
        return events

    def is_live(self, request_id: str) -> bool:
        """Whether anything of a request runs or waits."""
        return request_id in self._live

    def _remove(self, sequence: Sequence, forget: bool = False) -> None:
        self.scheduler.finish(sequence, forget)
        siblings = self._live[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            self._timed.pop(sequence.request_id, None)
            del self._live[sequence.request_id]

    def capture_graphs(self) -> None:
        """Capture the steps of all sizes before the first request pays for them; nothing without graphs."""
        if self.graphs is None:
            return
        show = partial(tqdm, desc="capture", unit="graph", disable=None)
        with torch.inference_mode():
            self.graphs.capture(self.scheduler.max_num_seqs, SamplingParams().num_candidates, show)

    # -- the step --------------------------------------------------------------------------------------------

    def step(self) -> list[TokenEvent]:
        """One pass: forward all planned rows, then choose a token for every sequence whose logits are at hand."""
        self._drop_retired()
        events, self._ended = self._ended, []
        self.clock.start()
        try:
            self._end_overdue(events)
            with torch.inference_mode():
                worked = self._advance_flight(events) or self._plan_and_run(events)
        except BaseException:
            self._ended = events + self._ended  # what has happened is told by `recover`, or the next step
            raise
        self.clock.stop(worked, self.has_unfinished)
        return events

    def _plan_and_run(self, events: list[TokenEvent]) -> bool:
        """Whether there was anything to run."""
        plan = self.scheduler.schedule(None if self.pace is None else self._prompt_rows(self.pace))
        for sequence, error in plan.failed:
            events += self._fail(sequence, error)
        for sequence in plan.preempted:
            sequence.forget()
        if plan.works:
            self._run(plan.works, events)
        return bool(plan.works)

    def _end_overdue(self, events: list[TokenEvent]) -> None:
        timed = [sequence for request_id in self._timed for sequence in self._live[request_id]]
        for sequence in filter(self.clock.is_overdue, timed):
            events += self._end(sequence, finish_reason="length", overdue=True)

    def _prompt_rows(self, pace: Pace) -> int:
        """Rows of prompts that the latency bound leaves beside the sequences that decode."""
        decoding = [s for s in self.scheduler.running if len(s.token_ids) - s.num_computed == 1]
        floor = sum(s.params.min_candidates + 1 for s in decoding if s.networks)
        return pace.prompt_rows(len(decoding), sum(len(s.token_ids) for s in decoding), floor)

    def _run(self, planned: list[Work], events: list[TokenEvent]) -> None:
        """Does what was planned: as graphs, read later, where that can be, else here and now."""
        obstacle = self._obstacle(planned)
        if obstacle is None:
            self._flight = self._launch(planned)
            if not self.overlap:
                self._land(events)
            return
        if self.graphs is not None:
            self.stats.obstacles[obstacle] = self.stats.obstacles.get(obstacle, 0) + 1
        self._run_now(planned, events)

    def _run_now(self, planned: list[Work], events: list[TokenEvent]) -> None:
        """The base model over all rows, the networks over what is new to them, a token where there are logits."""
        for work in planned:
            if work.sequence.networks and not work.is_candidates:
                # A hit in the prefix cache brings the networks' own pages along.
                work.sequence.filled = max(work.sequence.filled, work.start)
        warm = {i for i, work in enumerate(planned) if _needs_warm_row(work)}
        works, rows = pack(planned, warm, self.block_size)
        scored = self.stats.value_rows
        if self.graphs is not None and not warm and all(decodes(w) and not w.sequence.lookahead for w in works):
            forward = self.graphs.forward(rows.sequences)
        else:
            token_ids, batch, _ = rows.to_device(self.lm.device)
            forward = self.lm.forward(token_ids, batch, self.guide.states)
        hidden: Hidden = forward.hidden
        self.stats.steps += 1
        self.stats.model_rows += len(rows)

        completes = [work.completes and not work.is_candidates for work in works]
        starts = [_fill_start(work, rows, g) for g, work in enumerate(works)]
        if any(start >= 0 for start in starts):
            self.guide.fill(rows, starts, hidden, completes)

        ready: list[Sequence] = []
        at: list[int] = []
        for g, work in enumerate(works):
            sequence = work.sequence
            if sequence.params.return_hidden_states and not work.is_candidates:
                end = int(rows.offsets[g + 1])
                sequence.keep_hidden(forward.last_hidden[end - work.count : end], work.start)
            if completes[g]:
                ready.append(sequence)
                at.append(int(rows.offsets[g + 1]) - 1)
        self._choose_lookahead(works, rows, forward.last_hidden, hidden, ready, at, events)
        for work in works:
            if not work.is_candidates:
                self.scheduler.computed(work)
        drained = [i for i, sequence in enumerate(ready) if sequence.draining]
        for i in reversed(drained):
            sequence = ready.pop(i)
            del at[i]
            events += self._end(sequence, finish_reason=sequence.draining, hidden=sequence.take_hidden())
        if ready:
            places = np.array(at, np.int64)
            (located,) = to_device([places], self.lm.device)
            self._choose(ready, places, self.lm.logits(forward.last_hidden[located]), hidden, events)
        if self.pace is not None:
            context = int(rows.prefix_lens.sum())
            self.pace.observe(len(rows), context, self.stats.value_rows - scored, self.clock.elapsed)

    def _obstacle(self, works: list[Work]) -> str | None:
        """Why this step cannot be a graph from end to end; None if it can."""
        if self.graphs is None:
            return "no graphs"
        if self.pace is not None or any(self.clock.is_behind(work.sequence) for work in works):
            return "a bound on latency"
        return self.graphs.obstacle(works)

    def _launch(self, works: list[Work], behind: Flight | None = None) -> Flight | None:
        """Set off a step in which every sequence decodes its next token, on the device from end to end."""
        assert self.graphs is not None
        flight = self.graphs.launch(works, behind)
        if flight is not None:
            self.stats.steps += 1
            self.stats.graph_steps += 1
        return flight

    def _advance_flight(self, events: list[TokenEvent]) -> bool:
        """Read the step that the device is at; whether another has been launched behind it before."""
        flight = self._flight
        if flight is None:
            return False
        works = self._follow(flight)
        following = self._launch(works, flight) if works else None
        self._land(events)
        self._flight = following
        return following is not None

    def _follow(self, flight: Flight) -> list[Work] | None:
        """What the step behind one that is not read yet does; None or nothing: read that first."""
        running = [work.sequence for work in flight.works if work.sequence.is_running]
        if (
            self.scheduler.num_running > len(running)
            or self.pace is not None
            or any(map(self.clock.is_behind, running))
        ):
            return None
        # What ends for another reason than its length ends a step late; the row it has there is nobody's.
        return self.scheduler.follow([s for s in running if not self._is_last(s, len(s.token_ids) + 1)])

    def _land(self, events: list[TokenEvent]) -> None:
        """Read what the device drew in the step that is in flight, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        for works, read in flight.parts:
            self._take_in(works, read(), events)

    def _take_in(self, works: list[Work], drawn: Drawn, events: list[TokenEvent]) -> None:
        """What was drawn for some sequences of a step."""
        sequences = [work.sequence for work in works]
        guided = np.array([bool(s.networks) for s in sequences])
        evaluated = np.where(guided, drawn.count, 0)
        following = drawn.following
        self.stats.model_rows += len(works) if following is None else int(evaluated.sum())
        self.stats.value_rows += int(evaluated.sum())
        # Others have ended since it was launched.
        live = np.array([s.is_running for s in sequences], bool)
        if following is None:
            for work in works:
                self.scheduler.computed(work)
        fine = drawn.winners.column >= 0
        self._drop_failed(sequences, drawn.finite | ~live, "logits", events)
        self._drop_failed(sequences, fine | ~drawn.finite | ~live, "values", events)
        self._note_prompts([s for s, alive in zip(sequences, live, strict=True) if alive])
        for i in np.flatnonzero(fine & live).tolist():
            sequence = sequences[i]
            if guided[i]:
                sequence.state_values, sequence.utilities = drawn.values[i], drawn.utilities[i]
                sequence.filled = len(sequence.token_ids) + 1
            self._accept(sequence, drawn.winners, i, events, evaluations=int(evaluated[i]))
            if following is not None:
                sequence.pending = sequence.selection = None
                self.scheduler.computed(works[i])
        if following is not None:
            live = np.array([s.is_running for s in sequences], bool)
            self._drop_failed(sequences, following.finite | ~live, "logits", events)
            for i in np.flatnonzero(following.finite & live).tolist():
                _await(sequences[i], following, i)

    # -- choosing --------------------------------------------------------------------------------------------

    def _choose(
        self, ready: list[Sequence], at: np.ndarray, logits: torch.Tensor, hidden: Hidden, events: list[TokenEvent]
    ) -> None:
        """Select candidates for every ready sequence; those without lookahead get their token now.

        Args:
            ready: sequences; ``logits[i]`` are those of ``ready[i]``, whose hidden states are in row ``at[i]``.
        """
        source = list(range(len(ready)))
        for i in range(len(ready)):
            for child in self._fork(ready[i]):
                ready.append(child)
                source.append(i)
        logit_rows = np.array(source, np.int64)
        at = at[logit_rows]
        arrays = gather(ready, np.array([s.num_candidates for s in ready]))
        selection = select(logits, logit_rows, arrays, self.guide.sampler)
        self._list_alternatives(ready, logits, logit_rows)
        sound = np.array([bool(np.isfinite(s.state_values).all() and np.isfinite(s.utilities).all()) for s in ready])
        self._drop_failed(ready, selection.finite, "logits", events)
        self._drop_failed(ready, sound | ~selection.finite, "values", events)
        fine = selection.finite & sound
        wait = np.array([s.lookahead for s in ready], bool) & fine
        for i in np.flatnonzero(wait).tolist():
            sequence = ready[i]
            _await(sequence, selection, i)
            sequence.carry = {j: states[at[i]] for j, states in hidden.items()} if sequence.reads_before else None
        now = np.flatnonzero(~wait & fine)
        if len(now):
            part = selection if len(now) == len(ready) else selection.pick(now)
            deciding = [ready[i] for i in now]
            before: Hidden = {}
            if any(s.reads_before for s in deciding):
                (located,) = to_device([at[now]], logits.device)
                before = {j: states[located] for j, states in hidden.items()}
            self._decide(deciding, part, before, None, events)

    def _choose_lookahead(
        self,
        works: list[Work],
        rows: Rows,
        last_hidden: torch.Tensor,
        hidden: Hidden,
        ready: list[Sequence],
        at: list[int],
        events: list[TokenEvent],
    ) -> None:
        """Choose among candidates that this step's forward processed; the winner's logits are then at hand."""
        groups = [g for g, work in enumerate(works) if work.is_candidates]
        if not groups:
            return
        sequences = [works[g].sequence for g in groups]
        index = np.concatenate([np.arange(rows.offsets[g], rows.offsets[g + 1]) for g in groups])
        (located,) = to_device([index], self.lm.device)
        after = {j: states[located] for j, states in hidden.items()}
        before = {
            # A state that only networks loaded since then read is nothing to this sequence.
            j: torch.stack([(s.carry or {}).get(j, hidden[j].new_zeros(hidden[j].shape[1])) for s in sequences])
            for j in self.guide.states
        }
        selection = Selection.stack([s.selection for s in sequences])
        firsts = np.array([rows.offsets[g] for g in groups], np.int64)
        columns = self._decide(sequences, selection, before, after, events)
        alive = np.flatnonzero(columns >= 0)
        winners = firsts[alive] + columns[alive]
        if len(alive):
            targets = [slot(sequences[i], len(sequences[i].token_ids) - 1, self.block_size) for i in alive]
            self.lm.commit(*to_device([winners, np.array(targets, np.int64)], self.lm.device))
        for i, row in zip(alive, winners, strict=True):
            sequence = sequences[i]
            sequence.pending = sequence.selection = None
            self.scheduler.computed(works[groups[i]])
            if sequence.params.return_hidden_states:
                sequence.keep_hidden(last_hidden[row : row + 1], len(sequence.token_ids) - 1)
            ready.append(sequence)
            at.append(int(row))

    def _decide(
        self,
        sequences: list[Sequence],
        selection: Selection,
        before: Hidden,
        after: Hidden | None,
        events: list[TokenEvent],
    ) -> np.ndarray:
        """Score, tilt and choose; append the winners and report them.

        Returns:
            int64 [S]: the winner's column, or -1 for a sequence that ended here.
        """
        guided = np.array([bool(s.networks) for s in sequences])
        needed = np.zeros(selection.token_ids.shape, bool)
        limited = np.zeros(len(sequences), bool)
        self._note_prompts(sequences)
        if guided.any():
            users = [s for s in sequences if s.networks]
            part = selection.pick(np.flatnonzero(guided)) if not guided.all() else selection
            # Candidates that have been through the model are scored in any case: there is nothing left to spare.
            needed[guided] = wanted = self.guide.needed(users, part) if after is None else part.filled
            self.stats.pruned_rows += int(part.count.sum() - wanted.sum())
            if after is None:
                needed[guided] = self._afford(users, part, wanted)
                limited[guided] = needed[guided].sum(1) < wanted.sum(1)
        evaluated = needed.sum(1)
        self.stats.value_rows += int(evaluated.sum())
        decision = self.guide.decide(sequences, selection, needed, before, after)
        winners, fine = decision.winners, decision.fine
        self.guide.advance(sequences, guided & fine, decision)
        self._drop_failed(sequences, fine, "values", events)
        result = np.where(fine, winners.column, -1)
        for i, sequence in enumerate(sequences):
            if not fine[i]:
                continue
            top = None if sequence.alternatives is None else self._alternatives(sequence, selection, decision, i)
            fields = {"evaluations": int(evaluated[i]), "limited": bool(limited[i]), "top_logprobs": top}
            event = self._accept(sequence, winners, i, events, **fields)
            self.stats.limited_tokens += event.limited
            if event.finish_reason is not None:
                result[i] = -1
        return result

    def _note_prompts(self, sequences: Seq[Sequence]) -> None:
        """V of the prompts that have been read, before their first tokens' take its place."""
        for sequence in sequences:
            if sequence.networks and len(sequence.token_ids) == sequence.prompt_len:
                sequence.prompt_values = sequence.state_values

    def _afford(self, users: list[Sequence], selection: Selection, needed: np.ndarray) -> np.ndarray:
        """Of the columns that are worth scoring those that there is time for."""
        hurried = np.array([self.clock.is_behind(s) for s in users])
        if self.pace is None and not hurried.any():
            return needed
        least = floors(users, needed.shape[1])
        kept = needed.copy()
        if hurried.any():
            kept[hurried] = spend(selection.pick(np.flatnonzero(hurried)), needed[hurried], least[hurried], 0)
        if self.pace is not None:
            room = self.pace.candidates(self.clock.elapsed)
            if kept.sum() > room:
                kept = spend(selection, kept, least, room)
        return kept

    def _accept(self, sequence: Sequence, winners, i: int, events: list[TokenEvent], **fields) -> TokenEvent:
        """Append a winner; its event, with what only the caller knows of it, is there before the sequence goes."""
        token = int(winners.token_id[i])
        sequence.token_ids.append(token)
        self.stats.tokens += 1
        values = self._named(sequence, sequence.state_values)
        event = self._event(
            sequence,
            token_id=token,
            log_prob=float(winners.log_prob[i]),
            tilted_log_prob=float(winners.tilted_log_prob[i]),
            kl=float(winners.kl[i]),
            values=values,
            **fields,
        )
        if sequence.networks and len(sequence.token_ids) == sequence.prompt_len + 1:
            event.prompt_values = self._named(sequence, sequence.prompt_values)
        params = sequence.params
        if token in sequence.end_ids:
            event.finish_reason, event.stop_token = "stop", token
        elif self._is_last(sequence, len(sequence.token_ids)):
            event.finish_reason = "length"
        if params.return_hidden_states:
            if event.finish_reason is not None:
                # One more forward gives the last token's state; the end is reported with it.
                sequence.draining, event.finish_reason = event.finish_reason, None
                sequence.pending = None
            else:
                event.hidden = sequence.take_hidden()
        events.append(event)
        if event.finish_reason is not None:
            self._remove(sequence)
        return event

    def _is_last(self, sequence: Sequence, length: int) -> bool:
        """Whether a sequence of so many tokens has all that it may have."""
        most = sequence.params.max_tokens or self.max_model_len
        return length - sequence.prompt_len >= most or length >= self.max_model_len

    # -- forks, failures, extras -----------------------------------------------------------------------------

    def _fork(self, parent: Sequence) -> list[Sequence]:
        """The other samples of a request whose prompt is complete; they share its pages and its logits.

        A sibling that finds no seat or no page now waits in the queue like any request.
        """
        if parent.index or parent.forked or parent.params.n == 1:
            return []
        parent.forked = True
        prompt = parent.token_ids
        children = [
            self._sequence(parent.request_id, i, prompt, parent.params, fork_seed(parent.seed, i), parent.priority)
            for i in range(1, parent.params.n)
        ]
        for child in children:
            child.salt, child.deadline = parent.salt, parent.deadline
        self._live[parent.request_id] += children
        copies = self.scheduler.fork(parent, children)
        if copies:
            sources, targets = (list(x) for x in zip(*copies, strict=True))
            for cache in [self.lm.cache, *self.guide.caches()]:
                cache.copy_blocks(sources, targets)
        ready = [child for child in children if child.is_running]
        for child in ready:
            child.filled, child.carry = parent.filled, parent.carry
            child.state_values, child.utilities = parent.state_values, parent.utilities
            child.hidden, child.num_hidden = list(parent.hidden), parent.num_hidden
        return ready

    def _drop_failed(self, sequences: Seq[Sequence], fine: np.ndarray, what: str, events: list[TokenEvent]) -> None:
        for sequence in (s for s, good in zip(sequences, fine, strict=True) if not good):
            error = NonFiniteError(
                f"{what} of request {sequence.request_id!r} are not finite at position {len(sequence.token_ids)}: "
                "check logit_bias, the dtype (float16 overflows) and the value's weights"
            )
            events += self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception, forget: bool = False) -> list[TokenEvent]:
        """End a sequence with an error."""
        # What is not finite must not be found again as somebody's prefix.
        return self._end(sequence, forget or isinstance(error, NonFiniteError), finish_reason="error", error=error)

    def _end(self, sequence: Sequence, forget: bool = False, **fields) -> list[TokenEvent]:
        """End a sequence; samples of the same request that were never started end with it."""
        missing = range(1, sequence.params.n) if not sequence.index and not sequence.forked else range(0)
        ended = self._event(sequence, **fields)
        self._remove(sequence, forget)
        return [ended, *(replace(ended, index=i, seed=fork_seed(sequence.seed, i)) for i in missing)]

    def _event(self, sequence: Sequence, **fields) -> TokenEvent:
        return TokenEvent(sequence.request_id, sequence.index, seed=sequence.seed, **fields)

    def _named(self, sequence: Sequence, values: np.ndarray) -> dict[str, float]:
        """The values that a sequence reports, by name."""
        return {self.guide.value_names[m]: float(values[m]) for m in sequence.reports}

    def _list_alternatives(self, ready: list[Sequence], logits: torch.Tensor, rows: np.ndarray) -> None:
        """Most probable tokens of the position, for sequences that report them."""
        wanted = [i for i, s in enumerate(ready) if s.params.logprobs]
        if not wanted:
            return
        part = [ready[i] for i in wanted]
        arrays = gather(part, np.array([s.params.logprobs for s in part]))
        top = select(logits, rows[wanted], arrays, self.guide.sampler)
        for k, sequence in enumerate(part):
            count = min(int(top.count[k]), sequence.params.logprobs)
            sequence.alternatives = (top.token_ids[k, :count].copy(), top.log_probs[k, :count].copy())

    def _alternatives(self, sequence: Sequence, selection: Selection, decision: Decision, i: int) -> list[TokenLogprob]:
        """The stored alternatives with their tilted log-probabilities, log pi = log pi0 + T - log Z, and values."""
        assert sequence.alternatives is not None
        token_ids, log_probs = sequence.alternatives
        sequence.alternatives = None
        winners, tilt = decision.winners, decision.tilt
        column = int(winners.column[i])
        log_z = winners.log_prob[i] + tilt[i, column] - winners.tilted_log_prob[i]
        candidates = {int(t): k for k, t in enumerate(selection.token_ids[i]) if t >= 0}
        guided = bool(sequence.networks)
        outside = 0.0 if sequence.params.tail == "keep" or not guided else -np.inf
        found = []
        for token, log_prob in zip(token_ids.tolist(), log_probs.tolist(), strict=True):
            k = candidates.get(token)
            row = -1 if k is None else decision.place[i, k]
            values = self._named(sequence, decision.values[row]) if row >= 0 else {}
            tilted = float(log_prob + (outside if k is None else tilt[i, k]) - log_z)
            found.append(TokenLogprob(token, log_prob, tilted, values))
        return found


def _needs_warm_row(work: Work) -> bool:
    """Whether the row before a chunk is run once more for its hidden state, which nobody has kept (see `pack`)."""
    sequence = work.sequence
    if work.is_candidates or not sequence.networks or sequence.filled > work.start:
        return False
    return sequence.reads_before and sequence.carry is None and work.start > 0


def _fill_start(work: Work, rows: Rows, group: int) -> int:
    """First row of a group that is new to the value networks, or -1."""
    sequence = work.sequence
    if work.is_candidates or not sequence.networks or sequence.filled >= work.start + work.count:
        return -1
    return int(rows.offsets[group + 1]) - work.count


def _await(sequence: Sequence, selection: Selection, i: int) -> None:
    """Line `i` of a selection are the candidates that the sequence's next step is to look at."""
    count = int(selection.count[i])
    sequence.selection = selection.pick(slice(i, i + 1), count)
    sequence.pending = sequence.selection.token_ids[0]
