"""Values of token sequences by value models alone, for hosts that show nothing of their own model's inside."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vas_engine.errors import InvalidArgumentError, NonFiniteError
from vas_engine.model.batch import AttentionBatch
from vas_engine.model.fingerprint import vocabulary_hash
from vas_engine.params import SamplingParams
from vas_engine.sampling import tilt_limits, value_tilt
from vas_engine.values.artifact import load_value, read_config
from vas_engine.values.files import read_json
from vas_engine.values.scorer import Scorer, check_tilt, value_heads
from vas_engine.values.value_model import ValueModel

BLOCKS_AT_FIRST = 64


@dataclass(frozen=True)
class Host:
    """What a value model has to know of a base model that runs elsewhere; stands for it when values are loaded."""

    vocab_size: int
    dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"
    attention_backend: str = "auto"
    tensor_parallel_size: int = 1

    def fingerprint(self, tokenizer: Any | None = None) -> dict[str, str | None]:
        """The vocabulary's hash; nothing else is known."""
        known = vocabulary_hash(tokenizer) if tokenizer is not None else None
        return {"architecture": None, "weights": None, "vocabulary": known}


def load_value_model(folder: str | Path, host: Host | None = None, tokenizer: Any | None = None) -> ValueModel:
    """A value of kind "model" (or a checkpoint with a backbone and a head), without its base model.

    Args:
        folder: as `load_value` takes it.
        host: of whose token ids the value will be asked; None where it reads text by a tokenizer of its own.
        tokenizer: the base model's, to be compared.

    Raises:
        InvalidArgumentError: a kind that reads the base model's states, which this host does not show.
        ValueArtifactError: as `load_value`.
    """
    path = Path(folder) / "config.json"
    values = read_json(path) if path.is_file() else {}
    own = "format_version" in values
    if own and (kind := read_config(folder).kind) != "model":
        fix = (
            f"it is of kind {kind!r}, which reads the base model's states, and this host does not show them; train "
            "one with `vas train --kind model`"
        )
        raise InvalidArgumentError("values", str(folder), fix)
    if host is None:
        # It meets no ids but those of its own tokenizer.
        host = Host(int(values.get("vocab_size") or 0))
    loaded = load_value(folder, host, as_="auto" if own else "model", tokenizer=tokenizer)  # type: ignore[arg-type]
    assert isinstance(loaded, ValueModel)
    return loaded


@dataclass(eq=False)
class _Sequence:
    """Tokens whose K/V are in the pages, the pages, and what the last forward knows of what may come next."""

    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    output: Tensor | None = None
    """Head output [O] after the last token."""
    next_rows: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Token -> its row in the last forward, whose K/V still wait to be written, and its line of `next_outputs`."""
    next_outputs: Tensor | None = None


class PrefixValues:
    """Head outputs of token sequences that grow, by one value model with pages of its own.

    What a sequence shares with what was asked of it before is not run again; its continuations see the prefix's
    pages and themselves, never one another.

    Args:
        value: bound; its pages belong to this object.
        block_size: tokens of a page.
    """

    def __init__(self, value: ValueModel, block_size: int = 16) -> None:
        self.value, self.block_size = value, block_size
        self._sequences: dict[Hashable, _Sequence] = {}
        self._free: list[int] = []
        self._blocks = 0

    def forget(self, key: Hashable) -> None:
        """Gives a sequence's pages back."""
        gone = self._sequences.pop(key, None)
        if gone is not None:
            self._free += gone.blocks

    def score(
        self, keys: Sequence[Hashable], prefixes: Sequence[Sequence[int]], suffixes: Sequence[Sequence[Sequence[int]]]
    ) -> list[Tensor]:
        """Head outputs after each prefix and after each of its continuations, in one forward.

        Args:
            keys: one a sequence; the same key again is the same sequence, usually longer.
            prefixes: its tokens, at least one.
            suffixes: continuations of each, at least one token each.

        Returns:
            For each sequence [1 + continuations, O] float32, the prefix's own first.

        Raises:
            InvalidArgumentError: no tokens, or more than the value model has positions.
        """
        self._check_lengths(prefixes, suffixes)
        self._take_winners(keys, prefixes)
        rows = _Rows(self.block_size)
        borrowed: list[int] = []
        plan: list[tuple[_Sequence, int | None, list[int]]] = []
        try:
            for key, prefix, ends in zip(keys, prefixes, suffixes, strict=True):
                sequence = self._sequences.setdefault(key, _Sequence())
                start = self._cut_back(sequence, prefix)
                singles = [end[0] for end in ends if len(end) == 1]
                first = rows.add(sequence.blocks, prefix[start:], start, singles)
                last = first + len(prefix) - start - 1
                near = iter(range(last + 1, rows.count))
                places = [next(near) if len(end) == 1 else -1 for end in ends]
                for index, end in enumerate(ends):
                    if len(end) > 1:
                        places[index] = self._add_long(rows, sequence, prefix, end, borrowed)
                plan.append((sequence, last if start < len(prefix) else None, places))
            for other in self._sequences.values():
                other.next_rows = {}
            wanted = [place for _, own, places in plan for place in (own, *places) if place is not None]
            outputs = self._run(rows, wanted)
        finally:
            self._free += borrowed
        results, line = [], 0
        for (sequence, own, places), prefix, ends in zip(plan, prefixes, suffixes, strict=True):
            sequence.tokens = list(prefix)
            if own is not None:
                sequence.output, line = outputs[line], line + 1
            assert sequence.output is not None
            after, line = outputs[line : line + len(places)], line + len(places)
            known = enumerate(zip(ends, places, strict=True))
            sequence.next_rows = {end[0]: (place, index) for index, (end, place) in known if len(end) == 1}
            sequence.next_outputs = after
            results.append(torch.cat([sequence.output[None], after]))
        return results

    def _add_long(
        self, rows: _Rows, sequence: _Sequence, prefix: Sequence[int], end: Sequence[int], borrowed: list[int]
    ) -> int:
        """Adds a continuation of several tokens, which must see one another: a group of its own, on the prefix's
        whole pages and on borrowed ones. Returns its last row."""
        whole = len(prefix) // self.block_size
        table = sequence.blocks[:whole]
        self._reserve(table, len(prefix) + len(end))
        borrowed += table[whole:]
        rows.add(table, [*prefix[whole * self.block_size :], *end], whole * self.block_size, [])
        return rows.count - 1

    def _check_lengths(self, prefixes: Any, suffixes: Any) -> None:
        for prefix, ends in zip(prefixes, suffixes, strict=True):
            longest = len(prefix) + max((len(end) for end in ends), default=0)
            if not len(prefix):
                raise InvalidArgumentError("prompt", list(prefix), "is empty; a value model needs at least one token")
            if longest > self.value.max_model_len:
                fix = f"the value model has {self.value.max_model_len} positions; generate fewer tokens"
                raise InvalidArgumentError("max_tokens", longest, fix)

    def _take_winners(self, keys: Sequence[Hashable], prefixes: Sequence[Sequence[int]]) -> None:
        """Sequences that went on with a continuation of the last call keep its K/V and its output."""
        rows, slots = [], []
        for key, prefix in zip(keys, prefixes, strict=True):
            sequence = self._sequences.get(key)
            if sequence is None or prefix[-1] not in sequence.next_rows or list(prefix[:-1]) != sequence.tokens:
                continue
            row, line = sequence.next_rows[prefix[-1]]
            assert sequence.next_outputs is not None
            sequence.output = sequence.next_outputs[line]
            place = len(sequence.tokens)
            rows.append(row)
            slots.append(sequence.blocks[place // self.block_size] * self.block_size + place % self.block_size)
            sequence.tokens = list(prefix)
        if rows:
            device = self.value.lm_of_values.device
            self.value.commit(torch.tensor(rows, device=device), torch.tensor(slots, device=device))

    def _cut_back(self, sequence: _Sequence, prefix: Sequence[int]) -> int:
        """Keeps what the sequence shares with the prefix, and pages for this and one token more. The first position
        that has to be run."""
        start = len(prefix)
        if sequence.output is None or sequence.tokens != list(prefix):
            pairs = zip(sequence.tokens, prefix, strict=False)
            shared = next(
                (place for place, (a, b) in enumerate(pairs) if a != b), min(len(sequence.tokens), len(prefix))
            )
            # The last token is run again where only its output is missing.
            start = min(shared, len(prefix) - 1)
            sequence.tokens, sequence.output = sequence.tokens[:start], None
        needed = -(-(len(prefix) + 1) // self.block_size)
        self._free += sequence.blocks[needed:]
        del sequence.blocks[needed:]
        self._reserve(sequence.blocks, len(prefix) + 1)
        return start

    def _reserve(self, blocks: list[int], tokens: int) -> None:
        """Lengthens a block table to hold so many tokens."""
        while len(blocks) * self.block_size < tokens:
            if not self._free:
                self._grow()
            blocks.append(self._free.pop())

    def _grow(self) -> None:
        """Twice the pages; what the old ones hold is kept."""
        more = max(2 * self._blocks, BLOCKS_AT_FIRST)
        old = self.value.cache if self._blocks else None
        self.value.allocate(more, self.block_size)
        new = self.value.cache
        assert new is not None
        if old is not None:
            for target, source in zip((*new.keys, *new.values), (*old.keys, *old.values), strict=True):
                target[: self._blocks] = source
        self._free += range(self._blocks, more)
        self._blocks = more

    def _run(self, rows: _Rows, wanted: list[int]) -> Tensor:
        """Head outputs of the wanted rows, on the CPU."""
        if not wanted:
            return torch.zeros(0, self.value.config.outputs)
        device = self.value.lm_of_values.device
        places = torch.tensor(wanted, device=device)
        return self.value.score(rows.token_ids(device), None, None, rows.batch(device), places).float().cpu()


class _Rows:
    """Rows of one forward, group by group."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.count = 0
        self._tables: list[list[int]] = []
        self._tokens: list[Sequence[int]] = []
        self._positions: list[np.ndarray] = []
        self._slots: list[np.ndarray] = []
        self._offsets = [0]

    def add(self, table: list[int], fed: Sequence[int], start: int, candidates: Sequence[int]) -> int:
        """A group: tokens written from position `start` on, then tokens that may follow them. Its first row."""
        first, end = self.count, start + len(fed)
        places = np.arange(start, end)
        blocks = np.array(table, np.int64)
        self._tables.append(list(table))
        self._tokens += [fed, candidates]
        self._positions += [places, np.full(len(candidates), end)]
        slots = blocks[places // self.block_size] * self.block_size + places % self.block_size
        self._slots += [slots, np.full(len(candidates), -1)]
        self.count += len(fed) + len(candidates)
        self._offsets.append(self.count)
        return first

    def token_ids(self, device: torch.device) -> Tensor:
        return torch.tensor([token for part in self._tokens for token in part], dtype=torch.int64, device=device)

    def batch(self, device: torch.device) -> AttentionBatch:
        tables = np.zeros((len(self._tables), max(map(len, self._tables))), np.int32)
        for row, table in zip(tables, self._tables, strict=True):
            row[: len(table)] = table
        positions, slots = np.concatenate(self._positions), np.concatenate(self._slots)
        return AttentionBatch.build(tables, self._offsets, positions, slots, device)


class Values:
    """Values under their names, and the tilts that requests' weights make of their outputs.

    Args:
        models: name -> value; of several heads each goes by "name.head".

    Attributes:
        heads: value name -> its head. names: what weights refer to. names_of: those of each model.
    """

    def __init__(self, models: Mapping[str, Scorer]) -> None:
        self.models = dict(models)
        heads_of = value_heads(self.models)
        self.names_of = {name: list(heads) for name, heads in heads_of.items()}
        self.heads = {name: head for heads in heads_of.values() for name, head in heads.items()}
        self.names = list(self.heads)

    def check(self, params: SamplingParams) -> None:
        """Raises InvalidArgumentError for the optimal tilt of a scalar head."""
        check_tilt(params, self.heads)

    def tilts(
        self, outputs: Sequence[Sequence[Tensor]], params: Sequence[SamplingParams]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """T of sequences' candidates, and V of their states and of each candidate.

        Args:
            outputs: of each model in order, of each sequence [1 + c, O], the state's first.
            params: of each sequence: weights, tilt, baseline and clip, checked.

        Returns:
            Of each sequence float64 [c] in nats, all NaN where a value of it is not finite, and float32
            [1 + c, names] in the rewards' units.
        """
        if not params:
            return []
        counts = [len(output) for output in outputs[0]]
        owner = np.repeat(np.arange(len(params)), counts)
        weights = np.array([[(one.values or {}).get(name, 0.0) for name in self.names] for one in params], np.float32)
        optimal = torch.from_numpy(np.array([one.tilt == "optimal" for one in params])[owner])
        rows = torch.from_numpy(weights[owner])
        values, utilities, start = [], [], 0
        for model, given in zip(self.models.values(), outputs, strict=True):
            output, end = torch.cat(list(given)), start + len(model.heads.names)
            values.append(model.heads.mean(output))
            utilities.append(model.heads.utility(output, rows[:, start:end], optimal))
            start = end
        value, utility = torch.cat(values, 1).numpy(), torch.cat(utilities, 1).numpy()
        firsts = np.cumsum([0, *counts[:-1]])
        base = utility[firsts].copy()
        for s, one in enumerate(params):
            if one.baseline == "candidate-mean":
                base[s] = utility[firsts[s] + 1 : firsts[s] + counts[s]].mean(0)
        limits = np.stack([tilt_limits(own, one.advantage_clip) for own, one in zip(weights, params, strict=True)])
        tilt = value_tilt(utility, base, limits, owner)
        broken = np.unique(owner[~np.isfinite(utility).all(1)])
        tilt[np.isin(owner, broken)] = np.nan
        cuts = firsts[1:]
        return list(zip((t[1:] for t in np.split(tilt, cuts)), np.split(value, cuts), strict=True))


def check_finite(tilt: np.ndarray) -> None:
    """Raises NonFiniteError for the tilt of a sequence with a value that is not."""
    if not np.isfinite(tilt).all():
        raise NonFiniteError("a value is not finite; check the value model with `vas info`")
