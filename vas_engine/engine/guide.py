"""The value networks of an engine over the rows of a step: fill their caches, score candidates, compose."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from vas_engine.engine.rows import Rows, group_offsets, slot, unslotted
from vas_engine.engine.sequence import Sequence
from vas_engine.kernels import function
from vas_engine.kernels.reference import SelectionTensors, ValueSettings
from vas_engine.kernels.transfer import to_device, to_host
from vas_engine.model.backend import launches
from vas_engine.model.lm import CausalLM
from vas_engine.params import SamplingParams
from vas_engine.sampling import Selection, Winners, choose, prune, tilt_limits, value_tilt
from vas_engine.values.config import HeadConfig
from vas_engine.values.scorer import Scorer, check_tilt, value_heads

Hidden = dict[int, torch.Tensor]
"""Hidden-state index -> [rows, hidden size], as the base model's forward returns them."""


@dataclass(frozen=True, slots=True)
class Network:
    """A loaded scorer and its place among the engine's values: ``columns`` of every [rows, values] array.

    ``number`` is its own for good: another one loaded later under the same name has another.
    """

    name: str
    scorer: Scorer
    columns: slice
    number: int

    @property
    def reads_before(self) -> bool:
        """Whether it needs the hidden state of the position before a token."""
        return self.scorer.input == "action"

    @property
    def reads_after(self) -> bool:
        """Whether it needs the base model's hidden state of the candidate itself: a lookahead."""
        return self.scorer.input == "lookahead"


@dataclass(slots=True)
class Decision:
    """What was drawn for S sequences from selections of W columns, and what their R scored rows said.

    The utility U is what a tilt compares: w V for the mean tilt, log E[exp(w R)] for the optimal one
    (Han et al. 2024; Zhou et al. 2025 for the latter), so that T = sum_m clip(U_m(s, a) - U_m(s)).

    Attributes:
        winners: one a sequence; column -1 where it is not fine.
        tilt: float64 [S, W], T; -inf where a column was not scored, though its sequence has values.
        fine: bool [S], False where a value or a tilt is not finite.
        place: int64 [S, W], the row that scored a column, or -1.
        values, utilities: float32 [R, values]; zero where a request does not use a value.
        scratch: per network with own K/V the number that each row has in its scratch (-1: none).
    """

    winners: Winners
    tilt: np.ndarray
    fine: np.ndarray
    place: np.ndarray
    values: np.ndarray
    utilities: np.ndarray
    scratch: list[tuple[Network, np.ndarray]]


@dataclass(slots=True)
class Asked:
    """What S sequences ask of all values; zero for a sequence without any.

    Attributes:
        weights: float32 [S, values]. limits: float64 [S, values]. baselines: float32 [S, values], U(s).
        optimal, candidate_mean: bool [S].
    """

    weights: np.ndarray
    limits: np.ndarray
    baselines: np.ndarray
    optimal: np.ndarray
    candidate_mean: np.ndarray


@dataclass(slots=True)
class Scored:
    """What one network made of the rows that use it.

    Attributes:
        uses: bool [S]. picked: int64 [n], its rows among all.
        output: features [n, width] on a backend that fuses the heads with what follows, else the heads' output.
    """

    network: Network
    uses: np.ndarray
    picked: np.ndarray
    output: torch.Tensor


class Guide:
    """Everything the engine knows about values.

    Args:
        lm: the base model.
        scorers: name -> bound network. A network of one head gives the value ``name``, one of several gives
            ``name.head``; a network under the empty name gives its heads' own names.

    Attributes:
        fuses: whether heads, tilt and draw are one kernel: where the base model's attention is Triton's too.
        head_tilt, candidate_rows, winner_rows: the kernels of these names, or their references.
        sampler: the backend that selects candidates.
        heads, value_names: value name -> its head, in the order of the values' columns; the names alone.
    """

    def __init__(self, lm: CausalLM, scorers: Mapping[str, Scorer]) -> None:
        self.lm = lm
        self.networks: list[Network] = []
        self._numbers = itertools.count()
        self.fuses = launches(lm.attention_backend)
        self.sampler = "triton" if self.fuses else "auto"
        self.head_tilt = function("value_head_tilt", lm.attention_backend)
        self.candidate_rows = function("candidate_rows", lm.attention_backend)
        self.winner_rows = function("winner_rows", lm.attention_backend)
        self._arrange(scorers)

    def _arrange(self, scorers: Mapping[str, Scorer]) -> None:
        numbers = {network.name: network.number for network in self.networks}
        networks: list[Network] = []
        heads: dict[str, HeadConfig] = {}
        for name, own in value_heads(scorers).items():
            columns = slice(len(heads), len(heads) + len(own))
            heads |= own
            number = numbers[name] if name in numbers else next(self._numbers)
            networks.append(Network(name, scorers[name], columns, number))
        self.networks, self.heads, self.value_names = networks, heads, list(heads)
        self.states = sorted({j for network in networks for j in network.scorer.states})
        bounds = [b for network in networks for b in network.scorer.heads.bounds]
        self._low = np.array([low for low, _ in bounds], np.float64)
        self._high = np.array([high for _, high in bounds], np.float64)

    @property
    def scorers(self) -> dict[str, Scorer]:
        """name -> bound network, as given."""
        return {network.name: network.scorer for network in self.networks}

    def rearrange(self, scorers: Mapping[str, Scorer], sequences: Iterable[Sequence]) -> None:
        """Takes other networks between two steps; live sequences keep those they use, which must stay.

        Raises:
            InvalidArgumentError: two values of one name; nothing has changed.
        """
        columns, names = {name: k for k, name in enumerate(self.value_names)}, [n.name for n in self.networks]
        old_values = self.value_names
        self._arrange(scorers)
        source = np.array([columns.get(name, -1) for name in self.value_names], np.int64)
        place = {network.name: index for index, network in enumerate(self.networks)}
        for sequence in sequences:
            sequence.networks = tuple(place[names[index]] for index in sequence.networks)
            sequence.reports = tuple(self.value_names.index(old_values[m]) for m in sequence.reports)
            for field in ("weights", "limits", "state_values", "utilities", "prompt_values"):
                setattr(sequence, field, _moved(getattr(sequence, field), source))

    # -- admission -------------------------------------------------------------------------------------------

    def admit(self, sequence: Sequence, params: SamplingParams) -> None:
        """Resolve a request's weights against the loaded values; raises InvalidArgumentError for a wrong tilt."""
        asked = params.values or {}
        weights = np.array([asked.get(name, 0.0) for name in self.value_names], np.float32)
        named = [name in asked for name in self.value_names]
        used = [i for i, network in enumerate(self.networks) if any(named[network.columns])]
        check_tilt(params, self.heads)
        sequence.weights = weights
        sequence.networks = tuple(used)
        sequence.reports = tuple(self.value_names.index(name) for name in asked)
        sequence.limits = tilt_limits(weights, params.advantage_clip)
        sequence.optimal = params.tilt == "optimal"
        sequence.lookahead = any(self.networks[i].reads_after for i in used)
        sequence.reads_before = any(self.networks[i].reads_before for i in used)
        sequence.own_cache = any(self.networks[i].scorer.cache is not None for i in used)

    def salt(self, sequence: Sequence) -> bytes:
        """What besides the tokens decides the content of a sequence's pages: the networks that write to them."""
        used = [self.networks[i] for i in sequence.networks]
        return ",".join(str(network.number) for network in used if network.scorer.cache is not None).encode()

    def caches(self) -> list:
        return [n.scorer.cache for n in self.networks if n.scorer.cache is not None]

    # -- prefill ---------------------------------------------------------------------------------------------

    def fill(self, rows: Rows, starts: Seq[int], hidden: Hidden, completes: Seq[bool]) -> None:
        """Run the networks over prefill rows: own K/V to their pages, and V(s) of prompts that are complete.

        Args:
            rows: the rows of the base model's forward.
            starts: for each group the row from which on positions are new to the networks (a row before it,
                if any, is there for its hidden state alone); -1 for groups with nothing to fill.
            hidden: of every row of that forward.
            completes: groups whose last row is the last token of the sequence: its V becomes the state's.
        """
        groups = [g for g, start in enumerate(starts) if start >= 0]
        done = [g for g in groups if completes[g]]
        finished = [rows.sequences[g] for g in done]
        for sequence in finished:
            sequence.utilities = np.zeros(len(self.value_names), np.float32)
        scored = []
        for index, network in enumerate(self.networks):
            # Without K/V of its own a network has only the state's value to give.
            chosen = groups if network.scorer.cache is not None else done
            chosen = [g for g in chosen if index in rows.sequences[g].networks]
            if chosen:
                output = self._fill_network(network, rows, chosen, starts, hidden, completes)
                uses = np.fromiter((index in s.networks for s in finished), bool, len(finished))
                scored.append(Scored(network, uses, np.flatnonzero(uses), output))
        values, utilities = self._read(scored, self._asked(finished), np.arange(len(finished)))
        for i, sequence in enumerate(finished):
            sequence.state_values, sequence.utilities = values[i], utilities[i]
        last = np.asarray(rows.offsets[1:]) - 1
        for g in groups:
            sequence = rows.sequences[g]
            sequence.filled = int(rows.positions[last[g]]) + 1
            sequence.carry = (
                {j: hidden[j][last[g]] for j in self.states} if sequence.reads_before and not completes[g] else None
            )

    def _fill_network(
        self,
        network: Network,
        rows: Rows,
        groups: list[int],
        starts: Seq[int],
        hidden: Hidden,
        completes: Seq[bool],
    ) -> torch.Tensor:
        """The head output of the last rows of the groups that are complete; the K/V of all rows goes to the pages."""
        own = network.scorer.cache is not None
        ends = [int(rows.offsets[g + 1]) for g in groups]
        begins = [starts[g] if own else end - 1 for g, end in zip(groups, ends, strict=True)]
        index = np.concatenate([np.arange(b, e) for b, e in zip(begins, ends, strict=True)])
        counts = [e - b for b, e in zip(begins, ends, strict=True)]
        offsets = group_offsets(counts)
        positions = rows.positions[index]
        slots = rows.slots[index] if own else np.full(len(index), -1, np.int64)
        sequences = [rows.sequences[g] for g in groups]
        prefix = (positions + (slots >= 0)).astype(np.int32)
        part = Rows(sequences, rows.token_ids[index], positions, slots, prefix, offsets)
        source, where = self._source(network, rows, groups, begins, index, hidden)
        wanted = offsets[1:][[completes[g] for g in groups]].astype(np.int64) - 1
        token_ids, batch, (located, last) = part.to_device(self.lm.device, where, wanted)
        return network.scorer.score(token_ids, source, located, batch, last)

    def _source(
        self, network: Network, rows: Rows, groups: list[int], begins: list[int], index: np.ndarray, hidden: Hidden
    ) -> tuple[torch.Tensor | None, np.ndarray]:
        """Hidden states and which of them each row reads: its own (a lookahead) or the one before it, which is that of
        the row above, of the chunk before, or zeros for an empty prefix.
        """
        states = network.scorer.states
        if not network.reads_before:
            return concatenate(hidden, states) if network.reads_after else None, index
        source = concatenate(hidden, states)
        where = index - 1
        extra = [source.new_zeros(1, source.shape[1])]
        zero = len(source)
        for g, begin in zip(groups, begins, strict=True):
            if begin > rows.offsets[g]:
                continue
            carry = rows.sequences[g].carry
            target = zero
            if carry is not None:
                target = zero + len(extra)
                extra.append(torch.cat([carry[j] for j in states]).unsqueeze(0))
            where[index == begin] = target
        return torch.cat([source, *extra]), where

    # -- candidates ------------------------------------------------------------------------------------------

    def needed(self, sequences: Seq[Sequence], selection: Selection) -> np.ndarray:
        """Columns that have to be scored, bool [S, W]: the others cannot win (see `prune`)."""
        low, high = self._tilt_bounds(sequences)
        margin = 1e-5 * (1.0 + np.abs(low) + np.abs(high))  # bounds are exact, float32 tilts are not
        return prune(selection, low - margin, high + margin, np.array([s.all_needed for s in sequences]))

    def decide(
        self,
        sequences: Seq[Sequence],
        selection: Selection,
        needed: np.ndarray,
        before: Hidden,
        after: Hidden | None,
    ) -> Decision:
        """Score candidates of all sequences at once, tilt, and draw a token for each.

        Args:
            sequences: S of them; candidates stand at position len(token_ids).
            selection: what may be drawn.
            needed: bool [S, W], columns to score; all False for a sequence without values.
            before: hidden states [S, H] of the last position of each sequence.
            after: hidden states [R, H] of the needed candidates themselves (lookahead), or None.
        """
        owner, column = np.nonzero(needed)
        scored = self._score(sequences, selection.token_ids[owner, column], owner, before, after)
        place = np.full(needed.shape, -1, np.int64)
        place[owner, column] = np.arange(len(owner))
        plain = ~needed.any(1, keepdims=True)
        tilt = np.where(needed | (selection.filled & plain), 0.0, -np.inf)
        scratch = []
        for part in scored:
            if part.network.scorer.cache is not None:
                number = np.full(len(owner), -1, np.int64)
                number[part.picked] = np.arange(len(part.picked))
                scratch.append((part.network, number))
        conclude = self._fused if self.fuses and scored else self._composed
        winners, tilt, fine, values, utilities = conclude(sequences, selection, scored, owner, column, tilt)
        return Decision(winners, tilt, fine, place, values, utilities, scratch)

    def advance(self, sequences: Seq[Sequence], move: np.ndarray, decision: Decision) -> None:
        """The winners' values become those of the states, and their K/V go from the networks' scratch to their pages.

        Args:
            sequences: as decided on; the winners are not appended yet.
            move: bool [S], those that go on.
        """
        row = decision.place[np.arange(len(sequences)), decision.winners.column]
        moving = np.flatnonzero(move).tolist()
        for i in moving:
            sequences[i].state_values = decision.values[row[i]]
            sequences[i].utilities = decision.utilities[row[i]]
            sequences[i].filled = len(sequences[i].token_ids) + 1
        arrays = []
        for network, number in decision.scratch:
            cache = network.scorer.cache
            assert cache is not None
            used = [i for i in moving if number[row[i]] >= 0]
            slots = [slot(sequences[i], len(sequences[i].token_ids), cache.block_size) for i in used]
            arrays += [number[row[used]], np.array(slots, np.int64)]
        moved = iter(to_device(arrays, self.lm.device))
        for network, _ in decision.scratch:
            winners, targets = next(moved), next(moved)
            if len(winners):
                network.scorer.commit(winners, targets)

    def _score(
        self,
        sequences: Seq[Sequence],
        token_ids: np.ndarray,
        owner: np.ndarray,
        before: Hidden,
        after: Hidden | None,
    ) -> list[Scored]:
        """Run every network over the rows (int64 [R], grouped by owner) of the sequences that use it."""
        counts = np.bincount(owner, minlength=len(sequences))
        length = np.array([len(s.token_ids) for s in sequences], np.int64)
        moved: dict[bytes, tuple] = {}  # networks that the same sequences use share it
        scored = []
        for index, network in enumerate(self.networks):
            uses = np.fromiter((index in s.networks for s in sequences), bool, len(sequences)) & (counts > 0)
            if not uses.any():
                continue
            users = uses.tobytes()
            if users not in moved:
                picked = np.flatnonzero(uses[owner])
                those = [s for s, u in zip(sequences, uses, strict=True) if u]
                rows = unslotted(those, token_ids[picked], length[uses], counts[uses])
                moved[users] = picked, *rows.to_device(self.lm.device, owner[picked], picked)
            picked, tokens, batch, (line, row) = moved[users]
            source, where = None, None
            if network.reads_before:
                source, where = concatenate(before, network.scorer.states), line
            elif network.reads_after:
                assert after is not None
                source, where = concatenate(after, network.scorer.states), row
            run = network.scorer.features if self.fuses else network.scorer.score
            scored.append(Scored(network, uses, picked, run(tokens, source, where, batch)))
        return scored

    def _composed(
        self,
        sequences: Seq[Sequence],
        selection: Selection,
        scored: list[Scored],
        owner: np.ndarray,
        column: np.ndarray,
        tilt: np.ndarray,
    ) -> tuple[Winners, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Heads on the device, the rest on the host: winners, tilt, fine, values, utilities of `Decision`."""
        fine = np.ones(len(sequences), bool)
        if not scored:
            return choose(selection, tilt), tilt, fine, *self._spread([], [], len(owner))
        asked = self._asked(sequences)
        values, utilities = self._read(scored, asked, owner)
        is_tail = column == selection.tail[owner]
        baselines = asked.baselines
        offsets = group_offsets(np.bincount(owner, minlength=len(sequences)))
        for i in np.flatnonzero(asked.candidate_mean):
            rows = slice(offsets[i], offsets[i + 1])
            mine = utilities[rows][~is_tail[rows]]
            baselines[i] = mine.mean(0) if len(mine) else 0.0
        rows_tilt = np.where(is_tail, 0.0, value_tilt(utilities, baselines, asked.limits, owner))
        tilt[owner, column] = rows_tilt
        fine[owner[~np.isfinite(rows_tilt) | ~np.isfinite(values).all(1)]] = False
        tilt[~fine] = np.where(selection.filled[~fine], 0.0, -np.inf)
        return choose(selection, tilt), tilt, fine, values, utilities

    def _fused(
        self,
        sequences: Seq[Sequence],
        selection: Selection,
        scored: list[Scored],
        owner: np.ndarray,
        column: np.ndarray,
        tilt: np.ndarray,
    ) -> tuple[Winners, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """`_composed` by one kernel a network, the last of which draws; one transfer there and one back."""
        asked, counts = self._asked(sequences), np.bincount(owner, minlength=len(sequences))
        arrays: list[np.ndarray] = [tilt, *vars(selection).values(), asked.optimal, asked.candidate_mean]
        for part in scored:
            own = part.network.columns
            arrays += [group_offsets(np.where(part.uses, counts, 0)), column[part.picked].astype(np.int32)]
            arrays += [asked.weights[:, own], asked.limits[:, own], asked.baselines[:, own]]
        moved = iter(to_device(arrays, self.lm.device))
        shift, on_device = next(moved), SelectionTensors(*itertools.islice(moved, 7))
        optimal, candidate_mean = next(moved), next(moved)
        results: list[torch.Tensor] = [shift]
        for part in scored:
            offsets, columns, weights, limits, baselines = itertools.islice(moved, 5)
            found = self.head_tilt(
                part.output,
                part.network.scorer.served_heads.weights,
                ValueSettings(weights, limits, baselines, optimal, candidate_mean),
                offsets,
                columns,
                on_device,
                shift,
                choose=part is scored[-1],
            )
            results += [found.values, found.utilities]
        assert found.winners is not None
        tilt, *back = to_host([*results, *vars(found.winners).values()])
        found, drawn = back[: 2 * len(scored)], back[2 * len(scored) :]
        winners = Winners(*drawn)
        return winners, tilt, winners.column >= 0, *self._spread(scored, found, len(owner))

    def _read(self, scored: list[Scored], asked: Asked, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and utilities of R rows, [R, values], from the heads' outputs; row r asks what ``owner[r]`` does."""
        scored = [part for part in scored if len(part.picked)]
        owners = [owner[part.picked] for part in scored]
        weights = [asked.weights[own, part.network.columns] for own, part in zip(owners, scored, strict=True)]
        moved = to_device([*weights, *(asked.optimal[own] for own in owners)], self.lm.device)
        found = []
        for i, part in enumerate(scored):
            heads = part.network.scorer.heads
            optimal = moved[len(scored) + i] if asked.optimal[owners[i]].any() else None
            found += [heads.mean(part.output), heads.utility(part.output, moved[i], optimal, checked=True)]
        return self._spread(scored, to_host(found), len(owner))

    def _spread(self, scored: list[Scored], found: list[np.ndarray], rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and utilities of every network in turn, as those of all rows and values: float32 [R, values]."""
        values = np.zeros((rows, len(self.value_names)), np.float32)
        utilities = np.zeros_like(values)
        for i, part in enumerate(scored):
            values[part.picked, part.network.columns] = found[2 * i]
            utilities[part.picked, part.network.columns] = found[2 * i + 1]
        return values, utilities

    def _asked(self, sequences: Seq[Sequence]) -> Asked:
        shape = (len(sequences), len(self.value_names))
        weights, limits, baselines = (np.zeros(shape, kind) for kind in (np.float32, np.float64, np.float32))
        means = np.zeros(len(sequences), bool)
        for i, sequence in enumerate(sequences):
            if sequence.networks:
                weights[i], limits[i], baselines[i] = sequence.weights, sequence.limits, sequence.utilities
                means[i] = sequence.params.baseline == "candidate-mean"
        return Asked(weights, limits, baselines, np.array([s.optimal for s in sequences], bool), means)

    def _tilt_bounds(self, sequences: Seq[Sequence]) -> tuple[np.ndarray, np.ndarray]:
        """What T(s, a) of any candidate is known to lie in before it is scored: float64 [S], [S]."""
        weights = np.stack([s.weights for s in sequences]).astype(np.float64)
        limits = np.stack([s.limits for s in sequences])
        base = np.stack([s.utilities for s in sequences]).astype(np.float64)
        used = weights != 0
        ends = np.stack([self._low, self._high])
        # w * inf is fine, 0 * inf is not: values without weight contribute nothing.
        scaled = np.where(used, np.where(used, weights, 1.0) * ends[:, None, :], 0.0)
        low = np.clip(scaled.min(0) - base, -limits, limits)
        high = np.clip(scaled.max(0) - base, -limits, limits)
        return np.where(used, low, 0.0).sum(1), np.where(used, high, 0.0).sum(1)


def _moved(array: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Columns in another order, 0 where ``source`` is -1; an empty array (not known, not used) stays empty."""
    return np.append(array, np.zeros(1, array.dtype))[source] if array.size else array


def concatenate(hidden: Hidden, states: Seq[int]) -> torch.Tensor:
    """The chosen states side by side."""
    return hidden[states[0]] if len(states) == 1 else torch.cat([hidden[j] for j in states], dim=-1)
