"""Decode steps kept as graphs in a few sizes (buckets of sequences and of candidate rows): which fit, which serve.

A step may be launched behind one whose winners the host has not read: it takes the tokens, and what else depends on
them, from where that one left them on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from vas_engine.engine.controls import has_penalties
from vas_engine.engine.decode_step import DecodeStep, Drawn, ForwardStep, GuidedStep, Lane, LookaheadStep, Shape
from vas_engine.engine.guide import Guide
from vas_engine.engine.scheduler import Work
from vas_engine.engine.sequence import Sequence
from vas_engine.kernels.reference import MAX_CANDIDATES
from vas_engine.model.graphs import Graphs
from vas_engine.model.lm import CausalLM, ForwardOutput
from vas_engine.params import SamplingParams


@dataclass(slots=True)
class Flight:
    """A step that the device is at.

    Attributes:
        parts: what it does, one part a kind of work, and what waits for what was drawn there.
    """

    parts: list[tuple[list[Work], Callable[[], Drawn]]]

    @property
    def works(self) -> list[Work]:
        """All of it: the next token of each one's sequence is drawn."""
        return [work for works, _ in self.parts for work in works]

    def rows(self) -> dict[int, int]:
        """id of a sequence -> its row in its part."""
        return {id(work.sequence): row for works, _ in self.parts for row, work in enumerate(works)}


def unfit(params: SamplingParams, lookahead: bool, reads_before: bool) -> str | None:
    """Why steps of a request cannot be kept as graphs from end to end; None if they can."""
    reasons = {
        "values that read states before and after a candidate": lookahead and reads_before,
        f"more than {MAX_CANDIDATES} candidates": params.num_candidates > MAX_CANDIDATES and bool(params.values),
        "penalties": has_penalties(params),
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
        lanes: of sequences without lookahead (False) and with it (True), which run one after the other.
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
        self._sizes = bucket(max_num_seqs), max_blocks
        self._guided: dict[Any, GuidedStep] = {}
        self._forwards: dict[Any, ForwardStep] = {}
        self.forget()

    def __len__(self) -> int:
        return len(self._guided) + len(self._forwards)

    def forget(self) -> None:
        """Drop all graphs: networks have come or gone."""
        self._guided.clear()
        self._forwards.clear()
        self.graphs.forget()
        values = len(self.guide.value_names)
        self.lanes = {ahead: Lane(*self._sizes, values, self.lm.device) for ahead in (False, True)}

    def obstacle(self, works: Iterable[Work]) -> str | None:
        """Why this step cannot be launched as graphs; None if it can."""
        for work in works:
            sequence = work.sequence
            # One that looks ahead chooses among candidates that the step before selected.
            if not work.is_candidates and (sequence.lookahead or not decodes(work)):
                return "prompts"
            if sequence.unfit is not None:
                return sequence.unfit
            if sequence.num_generated < sequence.params.min_tokens:
                return "min_tokens"
            if sequence.params.n > 1 and not sequence.index and not sequence.forked:
                return "samples to fork"
            if sequence.networks and sequence.filled < len(sequence.token_ids):
                return "prompts"
        return None

    def capture(self, most: int, candidates: int, show: Callable[[list[Any]], Iterable[Any]]) -> None:
        """Make the graphs of steps of up to so many sequences: plain, guided by each network alone, by all.

        Args:
            candidates: of each guided sequence. Steps of other numbers are captured when they come.
            show: goes through a list and shows how far it has come.
        """
        networks = self.guide.networks
        able = [i for i, network in enumerate(networks) if not network.reads_after]
        shapes = []
        for used in [[], *([i] for i in range(len(networks))), *([able] if len(able) > 1 else [])]:
            ahead = any(networks[i].reads_after for i in used)
            each, width = (min(candidates, self.lm.vocab_size) + 1, _width(candidates)) if used else (0, 1)
            sizes = {(bucket(n), bucket(n * each)) for n in range(1, most + 1)}
            shapes += [(ahead, used, Shape(*size, width)) for size in sorted(sizes, reverse=True)]
        for ahead, used, shape in show(shapes):  # the smaller ones share the memory of the larger
            step = self._step(ahead, used, shape)
            assert step is not None
            step.run([], None)

    def launch(self, works: list[Work], behind: Flight | None = None) -> Flight | None:
        """Set off running the models and drawing the next token of each sequence.

        Args:
            behind: the step before, not read yet: it draws these sequences' last tokens.

        Returns:
            None if nothing was done: capturing a new size does the work more than once, which overwrites what it reads
            of the step before.
        """
        parts = []
        for ahead in (False, True):
            own = [work for work in works if work.is_candidates == ahead]
            if own:
                step = self._step_of([work.sequence for work in own], ahead, make=behind is None)
                if step is None:
                    return None
                parts.append((own, step))
        rows = None if behind is None else behind.rows()
        return Flight([(own, step.run([work.sequence for work in own], rows)) for own, step in parts])

    def _step_of(self, sequences: list[Sequence], ahead: bool, make: bool) -> GuidedStep | None:
        used = sorted({index for s in sequences for index in s.networks})
        guided = [s for s in sequences if s.networks]
        most = max((s.num_candidates for s in guided), default=0)
        rows = sum(min(s.num_candidates, self.lm.vocab_size) + 1 for s in guided)
        size, limits = bucket(len(sequences)), sum(s.limited for s in sequences)
        # Their scores are sorted, so not those of all; but each number of them is another graph.
        room = min(size, 1 << 2 * (((limits - 1).bit_length() + 1) // 2)) if limits else 0
        return self._step(ahead, used, Shape(size, bucket(rows), _width(most), room), make)

    def _step(self, ahead: bool, used: list[int], shape: Shape, make: bool = True) -> GuidedStep | None:
        """The step of a shape, which is made if it was not met before; None if it may not be."""
        key = (ahead, shape, *((index, self.guide.networks[index].scorer.version) for index in used))
        if make and key not in self._guided:
            kind = LookaheadStep if ahead else DecodeStep
            self._guided[key] = kind(self, self.lanes[ahead], used, shape)
        return self._guided.get(key)

    def forward(self, sequences: Seq[Sequence]) -> ForwardOutput:
        """The base model alone, over the last token of S sequences; the result is good until the next step."""
        size = bucket(len(sequences))
        key = (size, *self.guide.states)
        if key not in self._forwards:
            self._forwards[key] = ForwardStep(self, self.lanes[False], size)
        return self._forwards[key].run(sequences)


def _width(candidates: int) -> int:
    """Columns of a selection: the best of the other tokens, and a power of two."""
    return 1 + (1 << (candidates - 1).bit_length() if candidates else 0)


def decodes(work: Work) -> bool:
    """Whether a work is the last token of its sequence, and nothing else."""
    return work.count == 1 and work.completes and not work.is_candidates
