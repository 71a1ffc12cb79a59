"""Steps over fixed tensors, from what the sequences' last tokens are to their next ones without the host in between.

A GPU keeps them as CUDA graphs: the host fills in numbers, replays, and reads the winners. Rows that fill up a bucket
write to a block of pages that no sequence owns.

A sequence without lookahead goes from its last token through the base model, the selection of candidates and the value
networks to the next token. With lookahead it starts in between: the candidates that the step before selected go through
the base model, and the one that wins is at once the row from whose logits the next ones are selected.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from vas_engine.engine.controls import Knobs
from vas_engine.engine.guide import Hidden, Network, concatenate
from vas_engine.engine.rows import slot
from vas_engine.engine.sequence import Sequence
from vas_engine.kernels.reference import (
    MAX_CANDIDATES,
    SETTINGS,
    CandidateRows,
    SelectionTensors,
    Setting,
    ValueSettings,
    WinnerTensors,
)
from vas_engine.kernels.transfer import Packed
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.graphs import Exchange
from vas_engine.model.lm import ForwardOutput
from vas_engine.sampling import Selection, Winners, select_on_device

if TYPE_CHECKING:
    from vas_engine.engine.decode import DecodeGraphs

Fields = dict[str, tuple[tuple[int, ...], torch.dtype]]
_NO_MASS = np.float64(-np.inf).view(np.int64)
_WIDE = {"token_ids": -1, "log_probs": _NO_MASS, "noise": 0}
_NARROW = {"count": 0, "tail": -1, "tail_log_mass": _NO_MASS, "finite": 0}
"""Fields of a selection that have columns, and those that have none: the word that stands where there is nothing."""


@dataclass(slots=True)
class Lines:
    """Selections of sequences in two tensors: few kernels move them about.

    Attributes:
        wide: int64 [3, size, columns], the words of the fields that have columns.
        narrow: int64 [4, size], of the others.
    """

    wide: torch.Tensor
    narrow: torch.Tensor

    @staticmethod
    def fields(size: int, width: int) -> Fields:
        """Shapes and dtypes."""
        return {"wide": ((len(_WIDE), size, width), torch.int64), "narrow": ((len(_NARROW), size), torch.int64)}

    @classmethod
    def of(cls, selection: SelectionTensors) -> Lines:
        """Those of a selection."""
        one_by_one = vars(selection) | {"finite": selection.finite.long()}
        wide, narrow = (
            torch.stack([one_by_one[name].view(torch.int64) for name in names]) for names in (_WIDE, _NARROW)
        )
        return cls(wide, narrow)

    @property
    def selection(self) -> SelectionTensors:
        """What they are lines of."""
        token_ids, log_probs, noise = self.wide
        count, tail, mass, finite = self.narrow
        log_probs, noise, mass = (words.view(torch.float64) for words in (log_probs, noise, mass))
        return SelectionTensors(token_ids, log_probs, noise, count, tail, mass, finite != 0)


@dataclass(slots=True)
class Drawn:
    """What a step drew for S sequences.

    Attributes:
        finite: bool [S], False where the logits that it drew from are not.
        count: int64 [S], candidates that were scored.
        values, utilities: float32 [S, values], of the winners.
        following: candidates of the next token, of sequences that look ahead.
    """

    winners: Winners
    finite: np.ndarray
    count: np.ndarray
    values: np.ndarray
    utilities: np.ndarray
    following: Selection | None = None


class BlockTables:
    """Block tables of a step's sequences, one row each, that all steps share. They are long and seldom change.

    Attributes:
        device: int32 [rows, blocks]; behind the sequences' rows, and behind their blocks, blocks of former ones.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        fields: Fields = {"tables": ((rows, blocks), torch.int32)}
        self._exchange = Exchange(fields, device)
        self.device = self._exchange.device["tables"]
        # Whose row it is, how often that one had been preempted, and how many of its blocks are there.
        self._known: list[tuple[Sequence | None, int, int]] = [(None, 0, 0)] * rows

    def bring(self, sequences: Seq[Sequence]) -> None:
        """Their tables to the device, as far as they are not there."""
        host, known = self._exchange.host["tables"], self._known
        news = []
        for i, sequence in enumerate(sequences):
            owner, preemptions, blocks = known[i]
            # Tables only grow, unless their sequence was preempted.
            if owner is not sequence or preemptions != sequence.num_preemptions:
                blocks = 0
            if blocks < len(sequence.block_table):
                news.append((i, blocks, sequence.block_table))
                known[i] = sequence, sequence.num_preemptions, len(sequence.block_table)
        if news:
            self._exchange.wait()
            for i, start, table in news:
                host[i, start : len(table)] = table[start:]
            self._exchange.send(host[: len(sequences)].nbytes)


class Lane:
    """What steps of one kind leave on the device for the next one, which may not wait for the host to read it.

    Attributes:
        tables: of the step's sequences.
        tokens: int64 [size], the last winners.
        utilities: float32 [size, values], U of the states that they lead to.
        lines: of candidates of the next tokens, as wide as there may be.
    """

    def __init__(self, size: int, blocks: int, values: int, device: torch.device) -> None:
        self.tables = BlockTables(size, blocks, device)
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.utilities = torch.zeros(size, values, device=device)
        fields = Lines.fields(size, MAX_CANDIDATES + 1).items()
        self.lines = Lines(**{name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in fields})

    def keep(self, lines: Lines) -> None:
        """Notes the selection of the first sequences; the next step asks for no more columns than it has."""
        _, size, width = lines.wide.shape
        self.lines.wide[:, :size, :width].copy_(lines.wide)
        self.lines.narrow[:, :size].copy_(lines.narrow)

    def kept(self, place: torch.Tensor, carried: torch.Tensor, given: Lines) -> Lines:
        """The lines of S sequences: noted at `place` (int64 [S]) where `carried` (bool [S]), elsewhere `given`."""
        wide, narrow = self.lines.wide[:, :, : given.wide.shape[2]], self.lines.narrow
        return Lines(
            torch.where(carried[:, None], wide[:, place], given.wide),
            torch.where(carried, narrow[:, place], given.narrow),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a step has room for.

    Attributes:
        size: sequences. rows: candidate rows. width: columns of a selection.
        limits: sequences with a top_k, top_p or min_p.
    """

    size: int
    rows: int
    width: int
    limits: int = 0


class _Step(ABC):
    """A step of up to `size` sequences over tensors of its own."""

    def __init__(self, owner: DecodeGraphs, lane: Lane, size: int, fields: Fields) -> None:
        self.owner, self.lane, self.size = owner, lane, size
        i64, i32 = torch.int64, torch.int32
        places: Fields = {
            "tokens": ((size,), i64),
            "positions": ((size,), i64),
            "slots": ((size,), i64),
            "prefix_lens": ((size,), i32),
        }
        self.inputs = Exchange(places | fields, owner.lm.device)
        self._offsets = torch.arange(size + 1, dtype=i32, device=owner.lm.device)
        self._replay: Callable[[], None] | None = None

    def _fill(self, sequences: Seq[Sequence], ahead: int = 0) -> None:
        """Tokens and places of the sequences, `ahead` of the last one known; behind them rows that nobody reads."""
        self.inputs.wait()
        host, count, block_size = self.inputs.host, len(sequences), self.owner.block_size
        for i, sequence in enumerate(sequences):
            position = len(sequence.token_ids) - 1 + ahead
            host["tokens"][i], host["positions"][i] = sequence.token_ids[-1], position
            host["slots"][i] = slot(sequence, position, block_size)
        self.lane.tables.bring(sequences)
        host["prefix_lens"][:count] = host["positions"][:count] + 1
        host["tokens"][count:] = host["positions"][count:] = 0
        host["prefix_lens"][count:] = 1
        host["slots"][count:] = self.owner.spare_block * block_size

    def _execute(self) -> None:
        self.inputs.send()
        if self._replay is None:
            self._replay = self.owner.graphs.capture(self._work)
        else:
            self._replay()

    @abstractmethod
    def _work(self) -> None:
        """What a graph holds."""

    def _forward(self, token_ids: torch.Tensor) -> ForwardOutput:
        """The base model over the sequences' last tokens int64 [size]."""
        given, tables = self.inputs.device, self.lane.tables.device[: self.size]
        # Everything that a batch works out from its numbers must be worked out here, each time.
        batch = AttentionBatch(
            tables,
            self._offsets,
            given["prefix_lens"],
            given["slots"],
            given["positions"],
            unslotted=False,
            alone=True,
        )
        return self.owner.lm.forward(token_ids, batch, self.owner.guide.states)


class ForwardStep(_Step):
    """The base model, for steps whose tokens are drawn by other means."""

    def __init__(self, owner: DecodeGraphs, lane: Lane, size: int) -> None:
        super().__init__(owner, lane, size, {})
        self._output: ForwardOutput | None = None

    def _work(self) -> None:
        # Replays of a graph write to the tensors that its capture made, the last run of this.
        self._output = self._forward(self.inputs.device["tokens"])

    def run(self, sequences: Seq[Sequence]) -> ForwardOutput:
        """Over the last token of each sequence."""
        self._fill(sequences)
        self._execute()
        found, count = self._output, len(sequences)
        assert found is not None
        hidden = {index: states[:count] for index, states in found.hidden.items()}
        return ForwardOutput(hidden, found.last_hidden[:count])


@dataclass(slots=True)
class _Scored:
    """What the value networks made of candidates: the winners, and of them values and utilities by network."""

    winners: WinnerTensors
    parts: list[tuple[Network, torch.Tensor, torch.Tensor]]


class GuidedStep(_Step):
    """A step that draws a token for each sequence.

    Args:
        used: places among the guide's networks of those that any of the sequences uses.
        shape: what there is room for.
    """

    def __init__(
        self, owner: DecodeGraphs, lane: Lane, used: list[int], shape: Shape, fields: Fields | None = None
    ) -> None:
        networks, size = [owner.guide.networks[index] for index in used], shape.size
        fields = (fields or {}) | {
            "source": ((size,), torch.int64),  # row in the step before, if that is not read; else -1
            "settings": ((SETTINGS, size), torch.int64),
            "optimal": ((size,), torch.bool),
            "candidate_mean": ((size,), torch.bool),
            "next_slots": ((size,), torch.int64),
            "lines": ((shape.limits,), torch.int64),  # those with limits; others, or one of them twice, do no harm
        }
        for index, network in enumerate(networks):
            lines = (size, network.columns.stop - network.columns.start)
            fields[f"uses{index}"] = (size,), torch.bool
            fields[f"weights{index}"] = lines, torch.float32
            fields[f"limits{index}"] = lines, torch.float64
            fields[f"baselines{index}"] = lines, torch.float32
        super().__init__(owner, lane, size, fields)
        self.used, self.networks, self.shape = used, networks, shape
        self._row = torch.arange(shape.rows, device=owner.lm.device)
        self._unslotted = torch.full_like(self._row, -1)
        self._result: Packed | None = None

    def run(self, sequences: Seq[Sequence], source: Mapping[int, int] | None) -> Callable[[], Drawn]:
        """Set it off; what is returned waits for what was drawn.

        Args:
            source: id -> row in the step before, which is not read yet; None: all before is known.
        """
        count, ahead = len(sequences), int(source is not None)
        self._fill(sequences, ahead)
        self.inputs.host["source"][:] = -1
        if source is not None:
            self.inputs.host["source"][:count] = [source[id(sequence)] for sequence in sequences]
        self._fill_settings(sequences, ahead)
        self._execute()
        assert self._result is not None
        arrays = self._result.send()
        return lambda: self._read([array[:count] for array in arrays()])

    @abstractmethod
    def _read(self, arrays: list[np.ndarray]) -> Drawn:
        """Of the sequences' lines of the result."""

    def _fill_settings(self, sequences: Seq[Sequence], ahead: int) -> None:
        host, count = self.inputs.host, len(sequences)
        settings = host["settings"]
        settings[:, count:] = 0
        settings[Setting.ROW] = np.arange(self.size)
        if not count:
            return
        settings, knobs = settings[:, :count], Knobs.columns(sequences)
        settings[Setting.TEMPERATURE] = knobs.temperature.view(np.int64)
        settings[Setting.SEED] = np.array([s.seed for s in sequences], np.uint64).view(np.int64)
        settings[Setting.POSITION] = [len(s.token_ids) + ahead for s in sequences]
        settings[Setting.CANDIDATES] = [min(s.num_candidates, self.owner.lm.vocab_size) for s in sequences]
        settings[Setting.KEEP_TAIL] = knobs.keep_tail
        settings[Setting.TOP_K] = knobs.top_k
        settings[Setting.TOP_P] = knobs.top_p.view(np.int64)
        settings[Setting.MIN_P] = knobs.min_p.view(np.int64)
        if self.shape.limits:
            lines = np.flatnonzero([s.limited for s in sequences])
            host["lines"][: len(lines)] = lines
        if not self.networks:
            return
        host["optimal"][:count] = [s.optimal for s in sequences]
        host["candidate_mean"][:count] = [s.params.baseline == "candidate-mean" for s in sequences]
        host["next_slots"][:count] = [
            slot(s, len(s.token_ids) + ahead, self.owner.block_size) if s.own_cache else -1 for s in sequences
        ]
        for index, (place, network) in enumerate(zip(self.used, self.networks, strict=True)):
            uses, own = host[f"uses{index}"], network.columns
            uses[:count] = [place in s.networks for s in sequences]
            uses[count:] = False
            for i in np.flatnonzero(uses).tolist():
                sequence = sequences[i]
                host[f"weights{index}"][i] = sequence.weights[own]
                host[f"limits{index}"][i] = sequence.limits[own]
                host[f"baselines{index}"][i] = sequence.utilities[own]

    def _carried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """bool [size], int64 [size]: whether the host has not read what the step before left, and in which row."""
        source = self.inputs.device["source"]
        return source >= 0, source.clamp(min=0)

    def _select(self, logits: torch.Tensor) -> SelectionTensors:
        """Candidates from the logits [size, V] of each sequence."""
        given = self.inputs.device
        lines = given["lines"] if self.shape.limits else None
        return select_on_device(logits, given["settings"], self.shape.width, lines, self.owner.guide.sampler)

    def _lay(
        self, selection: SelectionTensors, uses: torch.Tensor | None, positions: torch.Tensor
    ) -> tuple[CandidateRows, AttentionBatch]:
        """Rows of all candidates, of sequences that use (bool [size]) a network; they stand at int64 [size]."""
        lay = self.owner.guide.candidate_rows
        rows = lay(selection.count, uses, selection.token_ids, positions, self.shape.rows)
        tables = self.lane.tables.device[: self.size]
        return rows, AttentionBatch(
            tables, rows.groups, rows.prefix_lens, self._unslotted, rows.positions, unslotted=True
        )

    def _score(
        self,
        selection: SelectionTensors,
        positions: torch.Tensor,
        carried: torch.Tensor,
        place: torch.Tensor,
        before: Hidden,
        after: tuple[Hidden, CandidateRows, AttentionBatch] | None = None,
    ) -> _Scored:
        """Values of all candidates, which stand at `positions` int64 [size], their tilt, and the winners.

        Args:
            carried, place: of `_carried`.
            before: states [size, H] of the positions before.
            after: states [rows, H] of the candidates themselves, and which rows these are; of a step with lookahead.
        """
        guide, given = self.owner.guide, self.inputs.device
        tilt = torch.zeros_like(selection.log_probs)
        scored = []
        for index, network in enumerate(self.networks):
            uses, source, where = given[f"uses{index}"], None, None
            if after is not None and len(self.networks) == 1:
                rows, batch = after[1:]  # all of them use it
            else:
                rows, batch = self._lay(selection, uses, positions)
            if network.reads_before:
                source, where = concatenate(before, network.scorer.states), rows.owner
            elif network.reads_after:
                assert after is not None
                source = concatenate(after[0], network.scorer.states)
                where = self._row
                if rows is not after[1]:
                    where = (after[1].offsets[rows.owner] + rows.column).clamp(max=self.shape.rows - 1).long()
            features = network.scorer.features(rows.token_ids, source, where, batch)
            weights, limits, baselines = (given[f"{name}{index}"] for name in ("weights", "limits", "baselines"))
            baselines = torch.where(carried[:, None], self.lane.utilities[place, network.columns], baselines)
            found = guide.head_tilt(
                features,
                network.scorer.served_heads.weights,
                ValueSettings(weights, limits, baselines, given["optimal"], given["candidate_mean"]),
                rows.offsets,
                rows.column,
                selection,
                tilt,
                choose=network is self.networks[-1],
            )
            scored.append((network, uses, rows.offsets, found))
        winners = scored[-1][3].winners
        assert winners is not None
        parts = []
        for network, uses, offsets, found in scored:
            won = guide.winner_rows(winners.column, uses, offsets, given["next_slots"], found.values, found.utilities)
            self.lane.utilities[: self.size, network.columns] = won.utilities
            parts.append((network, won.values, won.utilities))
            if network.scorer.cache is not None:
                network.scorer.commit(won.rows, won.slots)
        return _Scored(winners, parts)

    def _drawn(self, arrays: list[np.ndarray]) -> tuple[Drawn, list[np.ndarray]]:
        """What the first of the result's arrays are, and the others."""
        finite, candidates, *found = arrays
        winners, found = Winners(*found[:5]), found[5:]
        values = np.zeros((len(finite), len(self.owner.guide.value_names)), np.float32)
        utilities = np.zeros_like(values)
        for network in self.networks:
            values[:, network.columns], utilities[:, network.columns], *found = found
        return Drawn(winners, finite, candidates, values, utilities), found


class DecodeStep(GuidedStep):
    """From the sequences' last tokens to their next ones."""

    def _read(self, arrays: list[np.ndarray]) -> Drawn:
        return self._drawn(arrays)[0]

    def _work(self) -> None:
        lm, given = self.owner.lm, self.inputs.device
        carried, place = self._carried()
        forward = self._forward(torch.where(carried, self.lane.tokens[place], given["tokens"]))
        logits = lm.logits(forward.last_hidden)
        selection = self._select(logits)
        if self.networks:
            scored = self._score(selection, given["positions"] + 1, carried, place, forward.hidden)
        else:
            # The only column is the winner's, and what is drawn plainly has no tilt.
            column, log_prob = torch.where(selection.finite, 0, -1), selection.log_probs[:, 0]
            nothing = torch.zeros_like(log_prob)
            scored = _Scored(WinnerTensors(column, selection.token_ids[:, 0], log_prob, log_prob, nothing), [])
        self.lane.tokens[: self.size] = scored.winners.token_id.clamp(min=0)
        self._result = Packed([selection.finite, selection.count, *_flat(scored)])


class LookaheadStep(GuidedStep):
    """From candidates to the one that wins, and on to the candidates of the token behind it."""

    def __init__(self, owner: DecodeGraphs, lane: Lane, used: list[int], shape: Shape) -> None:
        super().__init__(owner, lane, used, shape, Lines.fields(shape.size, shape.width))

    def _fill(self, sequences: Seq[Sequence], ahead: int = 0) -> None:
        """Candidates stand behind the last token; the host brings those that it knows of."""
        super()._fill(sequences, ahead + 1)
        host = self.inputs.host
        known = None if ahead or not sequences else Selection.stack([s.selection for s in sequences])
        for lines, words in ((host["wide"], _WIDE), (host["narrow"], _NARROW)):
            for line, (name, nothing) in zip(lines, words.items(), strict=True):
                line[:] = nothing
                if known is not None:
                    found = getattr(known, name)
                    line[tuple(map(slice, found.shape))] = found.view(np.int64) if found.itemsize == 8 else found

    def _fill_settings(self, sequences: Seq[Sequence], ahead: int) -> None:
        super()._fill_settings(sequences, ahead)
        # What is selected here are candidates of the position behind the winner's.
        self.inputs.host["settings"][Setting.POSITION, : len(sequences)] += 1

    def _read(self, arrays: list[np.ndarray]) -> Drawn:
        drawn, found = self._drawn(arrays)
        drawn.following = Selection(*found)
        return drawn

    def _work(self) -> None:
        lm, guide, given = self.owner.lm, self.owner.guide, self.inputs.device
        carried, place = self._carried()
        selection = self.lane.kept(place, carried, Lines(given["wide"], given["narrow"])).selection
        rows, batch = self._lay(selection, None, given["positions"])
        forward = lm.forward(rows.token_ids, batch, guide.states)
        scored = self._score(selection, given["positions"], carried, place, {}, (forward.hidden, rows, batch))
        column = scored.winners.column
        won = torch.where(column >= 0, rows.offsets[:-1] + column, 0)
        lm.commit(won, torch.where(column >= 0, given["slots"], -1))
        following = self._select(lm.logits(forward.last_hidden[won]))
        self.lane.keep(Lines.of(following))
        self._result = Packed([selection.finite, selection.count, *_flat(scored), *vars(following).values()])


def _flat(scored: _Scored) -> list[torch.Tensor]:
    parts = [tensor for _, *tensors in scored.parts for tensor in tensors]
    return [*vars(scored.winners).values(), *parts]
