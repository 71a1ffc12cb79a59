import json
import os

import pyarrow.parquet as parquet
import pytest
import torch

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.base import read_states
from vas_engine.training.rollouts import (
    Header,
    Rollout,
    RolloutWriter,
    from_bytes,
    load_rollouts,
    load_states,
    to_bytes,
)

HEADER = Header(
    fingerprint={"architecture": "Tiny", "weights": "abc"},
    settings={"seed": 1, "max_tokens": 8},
    rewards={"mood": {"spec": "vader", "bounds": [-1.0, 1.0]}, "length": {"spec": "length", "bounds": None}},
)


def rollout(number: int) -> Rollout:
    return Rollout(
        prompt="Ünicode \N{GRINNING FACE}",
        response=f"text {number}",
        prompt_ids=[1, 2],
        response_ids=list(range(number)),
        finish_reason="stop" if number % 2 else "length",
        seed=2**64 - 1 - number,
        prompt_index=number // 2,
        rewards={"mood": number / 7, "length": float(number)},
    )


SHARDS = [[rollout(0), rollout(1)], [rollout(2), rollout(3)], [rollout(4)]]
EVERYTHING = [row for shard in SHARDS for row in shard]


def write_missing(folder) -> list[int]:
    writer = RolloutWriter(folder, HEADER)
    missing = [number for number in range(len(SHARDS)) if not writer.has(number)]
    for number in missing:
        writer.write(number, SHARDS[number])
    return missing


def test_round_trip(tmp_path):
    write_missing(tmp_path / "run")
    found = load_rollouts(tmp_path / "run")
    assert found.rollouts == EVERYTHING
    assert found.header == HEADER
    assert found.rewards(["length"])[:, 0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(InvalidArgumentError, match="did you mean 'length'"):
        found.rewards(["lenght"])
    table = parquet.read_table(tmp_path / "run" / "shard-00000.parquet")
    assert "reward.mood" in table.column_names
    assert json.loads(table.schema.metadata[b"vas_engine"])["fingerprint"]["weights"] == "abc"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", range(1, 9))
def test_killed_at_any_rename_it_goes_on_to_the_same_rows(tmp_path, monkeypatch, at):
    folder, real, count = tmp_path / "run", os.replace, 0

    def dying(source, target):
        nonlocal count
        count += 1
        if count == at:
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    try:
        write_missing(folder)
    except Killed:
        pass
    else:
        assert at == 8  # seven renames in all: index, then shard and index three times
    monkeypatch.setattr(os, "replace", real)
    if at > 3:
        assert load_rollouts(folder).rollouts == EVERYTHING[: 2 * ((at - 2) // 2)]
    write_missing(folder)
    assert load_rollouts(folder).rollouts == EVERYTHING
    assert not list(folder.glob(".*"))


def test_half_a_shard_is_not_a_shard(tmp_path, monkeypatch):
    """Killed in the middle of writing a file: what is left lies under another name and is not read."""
    write = parquet.write_table

    def dying(table, path, **options):
        write(table, path, **options)
        with open(path, "r+b") as file:
            file.truncate(100)
        os.link(path, path.with_suffix(".orphan"))
        raise Killed

    monkeypatch.setattr(parquet, "write_table", dying)
    with pytest.raises(Killed):
        write_missing(tmp_path / "run")
    monkeypatch.setattr(parquet, "write_table", write)
    with pytest.raises(TrainingDataError, match="no finished shard"):
        load_rollouts(tmp_path / "run")
    assert write_missing(tmp_path / "run") == [0, 1, 2]
    assert load_rollouts(tmp_path / "run").rollouts == EVERYTHING


def test_done_shards_are_not_written_again(tmp_path):
    assert write_missing(tmp_path / "run") == [0, 1, 2]
    assert write_missing(tmp_path / "run") == []
    (tmp_path / "run" / "shard-00001.parquet").unlink()
    assert write_missing(tmp_path / "run") == [1]


def test_other_settings_are_refused(tmp_path):
    write_missing(tmp_path / "run")
    other = Header(HEADER.fingerprint, HEADER.settings | {"seed": 2}, HEADER.rewards)
    with pytest.raises(InvalidArgumentError, match="settings seed=1, not 2"):
        RolloutWriter(tmp_path / "run", other)
    other = Header({"architecture": "Tiny", "weights": "abd"}, HEADER.settings, HEADER.rewards)
    with pytest.raises(InvalidArgumentError, match="fingerprint weights='abc'"):
        RolloutWriter(tmp_path / "run", other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InvalidArgumentError, match="holds other files"):
        RolloutWriter(tmp_path / "mine", HEADER)


def test_corruption_is_named(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(TrainingDataError, match="holds no rollouts"):
        load_rollouts(folder)
    write_missing(folder)
    (folder / "shard-00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TrainingDataError, match=r"shard-00001\.parquet"):
        load_rollouts(folder)
    RolloutWriter(folder, HEADER).write(1, SHARDS[2])
    (folder / "index.json").write_text((folder / "index.json").read_text().replace('.parquet": 1', '.parquet": 2'))
    with pytest.raises(TrainingDataError, match="has 1 rows, its index says 2"):
        load_rollouts(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(TrainingDataError, match="not an index"):
        load_rollouts(folder)


def test_hidden_states_beside_a_shard(tmp_path):
    states = [torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(1, 4, dtype=torch.bfloat16)]
    RolloutWriter(tmp_path / "run", HEADER).write(0, SHARDS[0], states)
    found = load_states(tmp_path / "run", 0)
    assert [torch.equal(a, b) for a, b in zip(found, states, strict=True)] == [True, True]
    with pytest.raises(TrainingDataError, match="does not exist"):
        load_states(tmp_path / "run", 1)


@pytest.mark.parametrize("states", [None, [torch.randn(3, 4, dtype=torch.bfloat16), torch.randn(1, 4).bfloat16()]])
def test_a_shard_as_bytes_is_the_shard(states):
    rows, found = from_bytes(to_bytes(SHARDS[0], HEADER, states), HEADER)
    assert rows == SHARDS[0]
    assert (found is None) == (states is None)
    assert all(map(torch.equal, found or [], states or []))


def test_states_are_those_of_the_shards_that_the_index_names(tmp_path):
    """Not those of a number that is missing, or of a file that was written and not indexed."""
    writer = RolloutWriter(tmp_path / "run", HEADER)
    for number in (0, 2):
        writer.write(number, SHARDS[number], [torch.full((1, 2), row.rewards["length"]) for row in SHARDS[number]])
    (tmp_path / "run" / "shard-00001.parquet").touch()
    found = load_rollouts(tmp_path / "run")
    states = read_states(tmp_path / "run", found)
    assert [float(state[0, 0]) for state in states] == [row.rewards["length"] for row in found]
