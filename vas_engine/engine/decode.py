"""Steps in which every sequence decodes one token, from its last token to the next without the host in between.

They run over fixed tensors in a few sizes (buckets of sequences and of candidate rows), so that a GPU can keep them
as CUDA graphs: the host fills in numbers, replays, and reads the winners. Rows that fill up a bucket write to a block
of pages that no sequence owns.

A step may be launched behind one whose winners the host has not read: it takes the tokens, and what else depends on
them, from where that one left them on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vas_engine.engine.controls import KEEP_TAIL, TEMPERATURE
from vas_engine.engine.guide import Guide, concatenate
from vas_engine.engine.rows import slot
from vas_engine.engine.scheduler import Work
from vas_engine.engine.sequence import Sequence
from vas_engine.kernels.reference import MAX_CANDIDATES, SETTINGS, ValueSettings, WinnerTensors
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.graphs import Exchange, Graphs
from vas_engine.model.lm import CausalLM, ForwardOutput
from vas_engine.model.transfer import Packed
from vas_engine.params import SamplingParams
from vas_engine.sampling import Winners, select_on_device


@dataclass(slots=True)
class Flight:
    """A step that the device is at.

    Attributes:
        works: what it does: the next token of each one's sequence is drawn.
        read: waits for what was drawn.
    """

    works: list[Work]
    read: Callable[[], Drawn]


@dataclass(slots=True)
class Drawn:
    """What a step drew for S sequences.

    Attributes:
        finite: bool [S], False where the logits are not.
        count: int64 [S], candidates that were scored.
        values, utilities: float32 [S, values], of the winners.
    """

    winners: Winners
    finite: np.ndarray
    count: np.ndarray
    values: np.ndarray
    utilities: np.ndarray


def unfit(params: SamplingParams, lookahead: bool) -> str | None:
    """Why steps of a request cannot be kept as graphs from end to end; None if they can."""
    reasons = {
        "lookahead": lookahead,
        f"more than {MAX_CANDIDATES} candidates": params.num_candidates > MAX_CANDIDATES and bool(params.values),
        "top_k, top_p or min_p": params.top_k > 0 or params.top_p < 1 or params.min_p > 0,
        "penalties": (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0),
        "logit_bias": bool(params.logit_bias),
        "logprobs": bool(params.logprobs),
        "return_hidden_states": params.return_hidden_states,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def bucket(count: int) -> int:
    """The size that stands for a count: at most a quarter more, and eight sizes up to 8, four to each power of two."""
    step = max(1, 2 ** ((count - 1).bit_length() - 3))
    return -(-count // step) * step


class DecodeGraphs:
    """Graphs of decode steps, made when a size is first met.

    Args:
        lm: the base model; a block of its pages, `spare_block`, belongs to no sequence.
        guide: the value networks.
        graphs: keeps them.
        max_num_seqs: sequences of a step at most.
        max_blocks: longest block table.

    Attributes:
        tokens, utilities: int64 [max_num_seqs], float32 [max_num_seqs, values], on the device: the last step's winners
            and U of the states that they lead to, for a step that does not wait for the host to read them.
    """

    def __init__(
        self,
        lm: CausalLM,
        guide: Guide,
        graphs: Graphs,
        max_num_seqs: int,
        max_blocks: int,
        block_size: int,
        spare_block: int,
    ) -> None:
        self.lm, self.guide, self.graphs = lm, guide, graphs
        self.block_size, self.spare_block = block_size, spare_block
        self.tables = BlockTables(bucket(max_num_seqs), max_blocks, lm.device)
        self._decodes: dict[Any, _DecodeStep] = {}
        self._forwards: dict[Any, _ForwardStep] = {}
        self.tokens = torch.zeros(bucket(max_num_seqs), dtype=torch.int64, device=lm.device)
        self.forget()

    def __len__(self) -> int:
        return len(self._decodes) + len(self._forwards)

    def forget(self) -> None:
        """Drop all graphs: networks have come or gone."""
        self._decodes.clear()
        self._forwards.clear()
        self.utilities = torch.zeros(len(self.tokens), len(self.guide.value_names), device=self.lm.device)

    def obstacle(self, works: Iterable[Work]) -> str | None:
        """Why this step cannot be `decode`; None if it can."""
        for work in works:
            sequence = work.sequence
            if not decodes(work):
                return "prompts"
            if sequence.unfit is not None:
                return sequence.unfit
            generated = len(sequence.token_ids) - sequence.prompt_len
            if generated < sequence.params.min_tokens:
                return "min_tokens"
            if sequence.params.n > 1 and not sequence.index and not sequence.forked:
                return "samples to fork"
            if sequence.networks and sequence.filled < work.start + 1:
                return "prompts"
        return None

    def capture(self, most: int, candidates: int, show: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Make the graphs of steps of up to so many sequences: plain, guided by each network alone, by all.

        Args:
            candidates: of each guided sequence. Steps of other numbers are captured when they come.
            show: goes through a list and shows how far it has come.
        """
        able = [i for i, network in enumerate(self.guide.networks) if not network.reads_after]
        shapes = []
        for used in [[], *([i] for i in able), *([able] if len(able) > 1 else [])]:
            each, width = (min(candidates, self.lm.vocab_size) + 1, _width(candidates)) if used else (0, 1)
            sizes = {(bucket(n), bucket(n * each)) for n in range(1, most + 1)}
            shapes += [(used, *size, width) for size in sorted(sizes, reverse=True)]  # the smaller share its memory
        for shape in show(shapes):
            step = self._step(*shape)
            assert step is not None
            step.run([], None)

    def launch(self, works: list[Work], behind: Flight | None = None) -> Flight | None:
        """Set off running the models over the last token of S sequences and drawing the next one of each.

        Args:
            behind: the step before, not read yet: it draws these last tokens.

        Returns:
            None if nothing was done: capturing a new size does the work more than once, which overwrites what it reads
            of the step before.
        """
        sequences = [work.sequence for work in works]
        used = sorted({index for s in sequences for index in s.networks})
        guided = [s for s in sequences if s.networks]
        most = max((s.num_candidates for s in guided), default=0)
        rows = sum(min(s.num_candidates, self.lm.vocab_size) + 1 for s in guided)
        step = self._step(used, bucket(len(sequences)), bucket(rows), _width(most), make=behind is None)
        return None if step is None else Flight(works, step.run(sequences, behind))

    def _step(self, used: list[int], size: int, rows: int, width: int, make: bool = True) -> _DecodeStep | None:
        """The step of a shape, which is made if it was not met before; None if it may not be."""
        key = (size, rows, width, *((index, self.guide.networks[index].scorer.version) for index in used))
        if make and key not in self._decodes:
            self._decodes[key] = _DecodeStep(self, used, size, rows, width)
        return self._decodes.get(key)

    def forward(self, sequences: Seq[Sequence]) -> ForwardOutput:
        """The base model alone, over the last token of S sequences; the result is good until the next step."""
        size = bucket(len(sequences))
        key = (size, *self.guide.states)
        if key not in self._forwards:
            self._forwards[key] = _ForwardStep(self, size)
        return self._forwards[key].run(sequences)


def _width(candidates: int) -> int:
    """Columns of a selection: the best of the other tokens, and a power of two."""
    return 1 + (1 << (candidates - 1).bit_length() if candidates else 0)


def decodes(work: Work) -> bool:
    """Whether a work is the last token of its sequence, and nothing else."""
    return work.count == 1 and work.completes and not work.is_candidates


class BlockTables:
    """Block tables of a step's sequences, one row each, that all steps share. They are long and seldom change.

    Attributes:
        device: int32 [rows, blocks]; behind the sequences' rows, and behind their blocks, blocks of former ones.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device) -> None:
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"tables": ((rows, blocks), torch.int32)}
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


class _Step(ABC):
    """A step of up to `size` sequences over tensors of its own."""

    def __init__(self, owner: DecodeGraphs, size: int, fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self.owner, self.size = owner, size
        device = owner.lm.device
        i64, i32 = torch.int64, torch.int32
        places: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "tokens": ((size,), i64),
            "positions": ((size,), i64),
            "slots": ((size,), i64),
            "prefix_lens": ((size,), i32),
        }
        self.inputs = Exchange(places | fields, device)
        self._offsets = torch.arange(size + 1, dtype=i32, device=device)
        self._replay: Callable[[], None] | None = None

    def _fill(self, sequences: Seq[Sequence], ahead: int = 0) -> None:
        """Tokens and places of the sequences, `ahead` of the last one known; behind them rows that nobody reads."""
        self.inputs.wait()
        host, count, block_size = self.inputs.host, len(sequences), self.owner.block_size
        for i, sequence in enumerate(sequences):
            position = len(sequence.token_ids) - 1 + ahead
            host["tokens"][i], host["positions"][i] = sequence.token_ids[-1], position
            host["slots"][i] = slot(sequence, position, block_size)
        self.owner.tables.bring(sequences)
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
        given, tables = self.inputs.device, self.owner.tables.device[: self.size]
        # Everything that a batch works out from its numbers must be worked out here, each time.
        batch = AttentionBatch(
            tables, self._offsets, given["prefix_lens"], given["slots"], given["positions"], unslotted=False
        )
        return self.owner.lm.forward(token_ids, batch, self.owner.guide.states)


class _ForwardStep(_Step):
    """The base model, for steps whose tokens are drawn by other means."""

    def __init__(self, owner: DecodeGraphs, size: int) -> None:
        super().__init__(owner, size, {})
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


class _DecodeStep(_Step):
    """From the sequences' last tokens to their next ones.

    Args:
        used: places among the guide's networks of those that any of the sequences uses.
        rows: candidate rows there is room for. width: columns of a selection.
    """

    def __init__(self, owner: DecodeGraphs, used: list[int], size: int, rows: int, width: int) -> None:
        networks = [owner.guide.networks[index] for index in used]
        fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "source": ((size,), torch.int64),  # row in the step before, if that is not read; else -1
            "settings": ((SETTINGS, size), torch.int64),
            "optimal": ((size,), torch.bool),
            "candidate_mean": ((size,), torch.bool),
            "next_slots": ((size,), torch.int64),
        }
        for index, network in enumerate(networks):
            shape = (size, network.columns.stop - network.columns.start)
            fields[f"uses{index}"] = (size,), torch.bool
            fields[f"weights{index}"] = shape, torch.float32
            fields[f"limits{index}"] = shape, torch.float64
            fields[f"baselines{index}"] = shape, torch.float32
        super().__init__(owner, size, fields)
        self.used, self.networks, self.rows, self.width = used, networks, rows, width
        self._result: Packed | None = None

    def run(self, sequences: Seq[Sequence], behind: Flight | None) -> Callable[[], Drawn]:
        """Set it off; what is returned waits for what was drawn."""
        count, ahead = len(sequences), int(behind is not None)
        self._fill(sequences, ahead)
        self._fill_settings(sequences, ahead)
        self.inputs.host["source"][:] = -1
        if behind is not None:
            rows = {id(work.sequence): row for row, work in enumerate(behind.works)}
            self.inputs.host["source"][:count] = [rows[id(sequence)] for sequence in sequences]
        self._execute()
        assert self._result is not None
        arrays = self._result.send()
        return lambda: self._read([array[:count] for array in arrays()])

    def _read(self, arrays: list[np.ndarray]) -> Drawn:
        finite, candidates, *found = arrays
        count, guide = len(finite), self.owner.guide
        winners, found = Winners(*found[:5]), found[5:]
        values = np.zeros((count, len(guide.value_names)), np.float32)
        utilities = np.zeros_like(values)
        for index, network in enumerate(self.networks):
            values[:, network.columns], utilities[:, network.columns] = found[2 * index : 2 * index + 2]
        return Drawn(winners, finite, candidates, values, utilities)

    def _fill_settings(self, sequences: Seq[Sequence], ahead: int) -> None:
        host, count = self.inputs.host, len(sequences)
        settings = host["settings"]
        settings[0] = np.arange(self.size)
        settings[:, count:][1:] = 0
        if not count:
            return
        knobs = np.array([s.knobs for s in sequences], np.float64)
        settings[1, :count] = knobs[:, TEMPERATURE].copy().view(np.int64)
        settings[2, :count] = np.array([s.seed for s in sequences], np.uint64).view(np.int64)
        settings[3, :count] = [len(s.token_ids) + ahead for s in sequences]
        settings[4, :count] = [min(s.num_candidates, self.owner.lm.vocab_size) for s in sequences]
        settings[5, :count] = knobs[:, KEEP_TAIL] != 0
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

    def _work(self) -> None:
        lm, guide, given = self.owner.lm, self.owner.guide, self.inputs.device
        # What the step before left on the device, where the host had not read it.
        carried, place = given["source"] >= 0, given["source"].clamp(min=0)
        forward = self._forward(torch.where(carried, self.owner.tokens[place], given["tokens"]))
        logits = lm.logits(forward.last_hidden)
        selection = select_on_device(logits, given["settings"], self.width, guide.sampler)
        results = [selection.finite, selection.count]
        if not self.networks:
            # The only column is the winner's, and what is drawn plainly has no tilt.
            drawn, log_prob = selection.finite, selection.log_probs[:, 0]
            column = torch.where(drawn, 0, -1)
            winners = WinnerTensors(column, selection.token_ids[:, 0], log_prob, log_prob, torch.zeros_like(log_prob))
            self.owner.tokens[: self.size] = winners.token_id.clamp(min=0)
            self._result = Packed([*results, *vars(winners).values()])
            return
        tables, tilt = self.owner.tables.device[: self.size], torch.zeros_like(selection.log_probs)
        row = torch.arange(self.rows, device=tilt.device)
        scored = []
        for index, network in enumerate(self.networks):
            counts = torch.where(given[f"uses{index}"], selection.count, 0)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
            # Rows behind the last sequence's see nothing, and what comes of them is not read.
            owner = torch.searchsorted(offsets[1:], row, right=True)
            live, owner = owner < self.size, owner.clamp(max=self.size - 1)
            column = (row - offsets[owner]).clamp(max=self.width - 1)
            token_ids = selection.token_ids[owner, column].clamp(min=0)
            positions = torch.where(live, given["positions"][owner] + 1, 0)
            groups = offsets.to(torch.int32)
            laid = torch.cat([groups[:-1], groups.new_full((1,), self.rows)])
            batch = AttentionBatch(
                tables, laid, positions.to(torch.int32), torch.full_like(row, -1), positions, unslotted=True
            )
            source = concatenate(forward.hidden, network.scorer.states) if network.reads_before else None
            features = network.scorer.features(token_ids, source, None if source is None else owner, batch)
            weights, limits, baselines = (given[f"{name}{index}"] for name in ("weights", "limits", "baselines"))
            baselines = torch.where(carried[:, None], self.owner.utilities[place, network.columns], baselines)
            found = guide.head_tilt(
                features,
                network.scorer.served_heads.weights,
                ValueSettings(weights, limits, baselines, given["optimal"], given["candidate_mean"]),
                groups,
                column.to(torch.int32),
                selection,
                tilt,
                choose=network is self.networks[-1],
            )
            scored.append((network, given[f"uses{index}"], offsets, found))
        drawn_by = scored[-1][3].winners
        assert drawn_by is not None
        results += vars(drawn_by).values()
        self.owner.tokens[: self.size] = drawn_by.token_id.clamp(min=0)
        for network, uses, offsets, found in scored:
            moves = uses & (drawn_by.column >= 0)
            won = torch.where(moves, offsets[:-1] + drawn_by.column, 0)
            values, utilities = (torch.where(moves[:, None], of[won], 0.0) for of in (found.values, found.utilities))
            self.owner.utilities[: self.size, network.columns] = utilities
            results += [values, utilities]
            if network.scorer.cache is not None:
                network.scorer.commit(won, torch.where(moves, given["next_slots"], -1))
        self._result = Packed(results)
