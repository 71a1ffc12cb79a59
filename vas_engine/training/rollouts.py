"""Rollouts: responses sampled from the frozen model and what they are worth, in a folder of Parquet shards.

    index.json               header, plan and the shards done so far
    shard-00000.parquet      prompt, response, prompt_ids, response_ids, finish_reason, seed, prompt_index,
                             reward.NAME; partial.NAME, rewards of its beginnings, on request; log_ratio and
                             log_ratios where values guided the sampling; messages, as JSON, where a prompt was
                             a conversation
    shard-00000.safetensors  on request: ``states`` [rows, width] and ``offsets`` [responses + 1]

A shard exists for the reader once the index names it. Every file is written beside its place and renamed, the
index last, so a run that is killed leaves whole shards and an index that tells the truth. One run at a time
writes into a folder.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vas_engine.errors import InvalidArgumentError, TrainingDataError, nearest
from vas_engine.files import replacing, write_json
from vas_engine.prompts import ChatPrompt

__all__ = ["Header", "Rollout", "RolloutWriter", "Rollouts", "load_rollouts"]

FORMAT_VERSION = 1
INDEX = "index.json"
REWARD_PREFIX = "reward."
PARTIAL_PREFIX = "partial."
METADATA_KEY = b"vas_engine"


@dataclass(frozen=True)
class Rollout:
    """One response sampled from the frozen model, or from a policy that values guide.

    Attributes:
        prompt: its text; a `ChatPrompt` where it was a conversation.
        response_ids: tokens after the prompt, the one that ended it (EOS or a stop token) included.
        finish_reason: ``"stop"``, or ``"length"`` where the token limit cut it; its rewards are then those of
            the text as it was cut.
        prompt_index: place of the prompt in the list it came from, in which it may stand twice.
        rewards: by name.
        partial_rewards: by name, those of the first N, 2 N, ... of ``response_ids``, as far as they are not all of
            them, N being the header's setting of this name; None where it is 0.
        log_ratio: log π(response | prompt) - log π0(response | prompt) in nats, π being the policy that was
            sampled from and π0 the frozen model; None where they are the same. A mean over the frozen model's
            responses is one over these weighted by exp(-log_ratio).
        log_ratios: its part of each of ``response_ids``.
    """

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    finish_reason: str
    seed: int
    prompt_index: int
    rewards: dict[str, float]
    partial_rewards: dict[str, list[float]] | None = None
    log_ratio: float | None = None
    log_ratios: list[float] | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Header:
    """How rollouts were made; a folder holds rollouts of one header only.

    Attributes:
        fingerprint: of the model sampled from, as `CausalLM.fingerprint` gives it.
        settings: of the sampling: temperature, max_tokens, seed, ... and a digest of the prompts.
        rewards: by name, ``{"spec": description, "bounds": [low, high] | None}``.
        policy: how values guided the sampling (their weights, their networks' hashes, the tilt's settings);
            empty where they did not and the rollouts are the frozen model's own.
    """

    fingerprint: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    @property
    def part_tokens(self) -> int:
        """Tokens from one partial reward to the next; 0 where there are none."""
        return int(self.settings.get("partial_rewards", 0))


@dataclass(frozen=True)
class Rollouts:
    """Rollouts in memory, all with the same rewards."""

    header: Header
    rollouts: list[Rollout]

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    @property
    def reward_names(self) -> list[str]:
        return list(self.header.rewards)

    @property
    def prompt_groups(self) -> list[int]:
        """Number of each rollout's prompt, by first occurrence; prompts of the same tokens are one prompt."""
        numbers: dict[tuple[int, ...], int] = {}
        return [numbers.setdefault(tuple(rollout.prompt_ids), len(numbers)) for rollout in self.rollouts]

    def partial_rewards(self, names: Sequence[str]) -> torch.Tensor:
        """Return the partial rewards named, float32 [rollouts, parts, names]; NaN behind a response's end.

        Raises:
            InvalidArgumentError: a reward that the rollouts do not have.
        """
        self._check(names)
        parts = [rollout.partial_rewards or {} for rollout in self.rollouts]
        longest = max((len(part[name]) for part in parts for name in names if part), default=0)
        table = np.full((len(self), longest, len(names)), np.nan, dtype=np.float32)
        for row, part in enumerate(parts):
            for column, name in enumerate(names if part else ()):
                table[row, : len(part[name]), column] = part[name]
        return torch.from_numpy(table)

    def rewards(self, names: Sequence[str]) -> torch.Tensor:
        """Return the rewards named, float64 [rollouts, names].

        Raises:
            InvalidArgumentError: a reward that the rollouts do not have.
        """
        self._check(names)
        table = [[rollout.rewards[name] for name in names] for rollout in self.rollouts]
        return torch.tensor(table, dtype=torch.float64).reshape(len(self), len(names))

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.header.rewards:
                hint = nearest(name, self.reward_names)
                raise InvalidArgumentError("reward", name, f"the rollouts have no such reward; {hint}")


class RolloutWriter:
    """Writes shards into a folder, or goes on with a folder that an earlier run began.

    Raises:
        InvalidArgumentError: the folder holds rollouts made in another way; the message names what differs.
        TrainingDataError: the folder's index cannot be read.
    """

    def __init__(self, folder: str | Path, header: Header) -> None:
        import pyarrow  # noqa: F401  # wanted when the first shard has been sampled, asked for before

        self.folder, self.header = Path(folder), header
        self.shards: dict[str, int] = {}
        if (self.folder / INDEX).exists():
            index = _read_index(self.folder)
            _check_same(self.folder, index["header"], asdict(header))
            self.shards = {name: rows for name, rows in index["shards"].items() if (self.folder / name).exists()}
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InvalidArgumentError("out", str(folder), "holds other files; choose a new folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_index()

    def has(self, shard: int) -> bool:
        """Whether the shard of this number is done."""
        return _shard_name(shard) in self.shards

    def write(self, shard: int, rollouts: Sequence[Rollout], states: Sequence[Any] | None = None) -> None:
        """Write one shard.

        Args:
            shard: its number; one that exists is replaced.
            rollouts: its rows, with exactly the header's rewards.
            states: hidden states per rollout, each ``[positions, width]``, kept in their dtype.
        """
        import pyarrow.parquet as parquet
        from safetensors.torch import save_file

        path = self.folder / _shard_name(shard)
        table = _to_table(rollouts, self.header)
        if states is not None:
            with replacing(path.with_suffix(".safetensors")) as fresh:
                save_file(_joined(states), fresh)
        with replacing(path) as fresh:
            parquet.write_table(table, fresh, compression="zstd")
        self.shards[path.name] = len(rollouts)
        self._write_index()

    def _write_index(self) -> None:
        shards = dict(sorted(self.shards.items()))
        write_json(self.folder / INDEX, {"header": asdict(self.header), "shards": shards})


def load_rollouts(folder: str | Path) -> Rollouts:
    """Read every finished shard of a folder, in order.

    Raises:
        TrainingDataError: no rollouts there, or a shard that is missing, corrupt or not what the index says.
    """
    folder = Path(folder)
    index = _read_index(folder)
    header = Header(**index["header"])
    rollouts: list[Rollout] = []
    for name, rows in sorted(index["shards"].items()):
        shard = _read_shard(folder / name, header)
        if len(shard) != rows:
            raise TrainingDataError(f"{folder / name} has {len(shard)} rows, its index says {rows}: collect again")
        rollouts += shard
    if not rollouts:
        raise TrainingDataError(f"{folder} holds no finished shard: run `vas collect` to its end")
    return Rollouts(header, rollouts)


def shard_names(folder: str | Path) -> list[str]:
    """Files of a folder's finished shards, in the order of `load_rollouts`.

    Raises:
        TrainingDataError: no rollouts there.
    """
    return sorted(_read_index(Path(folder))["shards"])


def load_states(folder: str | Path, shard: int | str) -> list[torch.Tensor]:
    """Read the hidden states saved beside one shard, by its number or name: per rollout ``[positions, width]``."""
    from safetensors.torch import load_file

    name = _shard_name(shard) if isinstance(shard, int) else shard
    path = Path(folder) / Path(name).with_suffix(".safetensors")
    if not path.exists():
        raise TrainingDataError(f"{path} does not exist: collect with hidden states to have it")
    return _split(load_file(path))


def to_bytes(rollouts: Sequence[Rollout], header: Header, states: Sequence[torch.Tensor] | None = None) -> list[bytes]:
    """A shard's two files, to be carried between machines; the second is empty without hidden states."""
    import pyarrow.parquet as parquet
    from safetensors.torch import save

    rows = io.BytesIO()
    parquet.write_table(_to_table(rollouts, header), rows, compression="zstd")
    return [rows.getvalue(), b"" if states is None else save(_joined(states))]


def from_bytes(files: Sequence[bytes], header: Header) -> tuple[list[Rollout], list[torch.Tensor] | None]:
    """What `to_bytes` was given."""
    import pyarrow.parquet as parquet
    from safetensors.torch import load

    rows, tensors = files
    found = [_to_rollout(row, header) for row in parquet.read_table(io.BytesIO(rows)).to_pylist()]
    return found, _split(load(tensors)) if tensors else None


def _to_table(rollouts: Sequence[Rollout], header: Header) -> Any:
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    columns: dict[str, Any] = {
        "prompt": pa.array([r.prompt for r in rollouts], pa.string()),
        "response": pa.array([r.response for r in rollouts], pa.string()),
        "prompt_ids": pa.array([r.prompt_ids for r in rollouts], tokens),
        "response_ids": pa.array([r.response_ids for r in rollouts], tokens),
        "finish_reason": pa.array([r.finish_reason for r in rollouts], pa.string()),
        "seed": pa.array([r.seed for r in rollouts], pa.uint64()),
        "prompt_index": pa.array([r.prompt_index for r in rollouts], pa.int64()),
    }
    for name in header.rewards:
        columns[REWARD_PREFIX + name] = pa.array([r.rewards[name] for r in rollouts], pa.float64())
        if header.part_tokens:
            parts = [(r.partial_rewards or {})[name] for r in rollouts]
            columns[PARTIAL_PREFIX + name] = pa.array(parts, pa.list_(pa.float32()))
    if header.policy:
        columns["log_ratio"] = pa.array([r.log_ratio for r in rollouts], pa.float64())
        columns["log_ratios"] = pa.array([r.log_ratios for r in rollouts], pa.list_(pa.float32()))
    if any(isinstance(r.prompt, ChatPrompt) for r in rollouts):
        chats = [json.dumps(r.prompt.messages) if isinstance(r.prompt, ChatPrompt) else None for r in rollouts]
        columns["messages"] = pa.array(chats, pa.string())
    metadata = {METADATA_KEY: json.dumps(asdict(header), ensure_ascii=False).encode()}
    return pa.table(columns).replace_schema_metadata(metadata)


def _read_shard(path: Path, header: Header) -> list[Rollout]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
        return [_to_rollout(row, header) for row in rows]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        fix = "delete it and collect again; finished shards are kept"
        raise TrainingDataError(f"cannot read {path} ({type(error).__name__}: {error}): {fix}") from error


def _to_rollout(row: dict[str, Any], header: Header) -> Rollout:
    rewards = {name: row.pop(REWARD_PREFIX + name) for name in header.rewards}
    messages, partial = row.pop("messages", None), None
    if messages is not None:
        row["prompt"] = ChatPrompt(row["prompt"], json.loads(messages))
    if header.part_tokens:
        partial = {name: row.pop(PARTIAL_PREFIX + name) for name in header.rewards}
    return Rollout(rewards=rewards, partial_rewards=partial, **row)


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["header"]["version"]
        index["shards"].items()
    except FileNotFoundError as error:
        raise TrainingDataError(
            f"{folder} holds no rollouts ({INDEX} is missing): give a folder that `vas collect` wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TrainingDataError(f"{path} is not an index of rollouts ({error!r}): collect again") from error
    if version != FORMAT_VERSION:
        raise TrainingDataError(f"{path} has format {version}, this version reads {FORMAT_VERSION}: collect again")
    return index


def _check_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(wanted))
    for part in ("fingerprint", "settings", "rewards", "policy"):
        there, here = found.get(part, {}), wanted[part]
        for key in sorted(there.keys() | here.keys()):
            before, now = there.get(key), here.get(key)
            if before != now:
                found_there = f"its rollouts have {part} {key}={before!r}, not {now!r}"
                fix = f"{found_there}; choose a new folder or the old setting"
                raise InvalidArgumentError("out", str(folder), fix)


def _joined(states: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([0, *map(len, states)])
    return {"states": torch.cat(list(states)).cpu().contiguous(), "offsets": lengths.cumsum(0)}


def _split(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors["states"][start:stop] for start, stop in pairwise(tensors["offsets"].tolist())]


def _shard_name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"
