"""Prompts from files and datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vas_engine.errors import InvalidArgumentError, TrainingDataError, nearest
from vas_engine.files import read_text

__all__ = ["Prompt", "load_prompts"]

Prompt = str | list[dict[str, Any]]
"""A text, or a conversation for the model's chat template."""

COLUMNS = ("prompt", "messages", "text")
SUFFIXES = (".txt", ".jsonl", ".json", ".yaml", ".yml", ".parquet")
HUB_NAME = re.compile(r"[\w-]+(/[\w.-]+)?")


def load_prompts(source: str | Path, *, column: str | None = None, split: str | None = None) -> list[Prompt]:
    """Read prompts from a file or a dataset.

    A file goes by its ending: ``.txt`` has a prompt a line (blank lines are skipped); ``.jsonl`` a string or an
    object a line; ``.parquet`` a row each; ``.json``, ``.yaml`` and ``.yml`` a list of strings or objects. A
    folder, or a name that is no file, is a dataset of Hugging Face: one saved by ``save_to_disk``, a folder of
    data files, or one of the hub.

    An object or row has its prompt in the column named, or else in the first of TRL's that it has: ``prompt``,
    ``messages``, ``text``. It is a text or a list of ``{"role": ..., "content": ...}``. Whatever stands beside
    it (``completion``, ``chosen``, ...) is not read, and the answer at the end of a conversation is left out,
    save under ``prompt``, where it is a beginning that the response goes on from.

    Args:
        source: file, folder or name.
        column: where the prompts are.
        split: of a dataset; default "train", or the only one.

    Raises:
        InvalidArgumentError: no such file, dataset, split or column (the message names those there are), or an
            ending that is not known.
        TrainingDataError: an entry without a prompt; the message says which. No prompt at all.
    """
    path = Path(source)
    if split is not None and path.suffix in SUFFIXES:
        raise InvalidArgumentError("split", split, "files have none; leave it out, or give a dataset")
    try:
        if path.is_file():
            entries, column = _read_file(path, column)
        elif path.suffix not in SUFFIXES and (path.is_dir() or HUB_NAME.fullmatch(str(source))):
            entries, column = _read_dataset(str(source), column, split)
        else:
            raise InvalidArgumentError("prompts", str(source), "no such file")
    except InvalidArgumentError:
        raise
    except (ValueError, OSError) as error:
        raise TrainingDataError(f"cannot read prompts from {source}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise TrainingDataError(f"{source} holds no list of prompts: write one prompt per entry")
    return [_prompt(entry, column, f"entry {index} of {source}") for index, entry in enumerate(entries)]


def _read_file(path: Path, column: str | None) -> tuple[Any, str | None]:
    """Entries of a file; the column that was read where only one was."""
    if path.suffix == ".txt":
        return [line for line in read_text(path).splitlines() if line.strip()], column
    if path.suffix == ".jsonl":
        return _read_lines(path), column
    if path.suffix == ".json":
        return json.loads(read_text(path)), column
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path), column
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        column = _find_column(parquet.read_schema(path).names, column, str(path))
        return parquet.read_table(path, columns=[column]).to_pylist(), column
    raise InvalidArgumentError("prompts", str(path), f"unknown ending; use one of {', '.join(SUFFIXES)}")


def _read_lines(path: Path) -> list[Any]:
    entries = []
    # Not splitlines: JSON may hold other line ends of Unicode's as they are.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            entries += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno} is no JSON: {error.msg}") from error
    return entries


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _read_dataset(source: str, column: str | None, split: str | None) -> tuple[list[Any], str]:
    try:
        import datasets
    except ImportError as error:
        fix = "a dataset needs the package datasets: pip install datasets; or give a file"
        raise InvalidArgumentError("prompts", source, fix) from error
    saved = any((Path(source) / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        fix = f"neither a file nor a folder of data here, nor a dataset that could be loaded ({reason})"
        raise InvalidArgumentError("prompts", source, fix) from error
    rows = _choose_split(found, split, source) if isinstance(found, dict) else found
    column = _find_column(rows.column_names, column, source)
    return [{column: row[column]} for row in rows.select_columns([column])], column


def _choose_split(splits: dict[str, Any], split: str | None, source: str) -> Any:
    wanted = split or ("train" if "train" in splits else next(iter(splits)))
    if wanted not in splits or (split is None and "train" not in splits and len(splits) > 1):
        raise InvalidArgumentError("split", split, f"{source} has the splits {', '.join(splits)}; name one of them")
    return splits[wanted]


def _find_column(present: Sequence[str], column: str | None, where: str) -> str:
    wanted = COLUMNS if column is None else (column,)
    found = next((name for name in wanted if name in present), None)
    if found is not None:
        return found
    there = f"{where} has {', '.join(present) or 'none'}"
    if column is not None:
        raise InvalidArgumentError(
            "prompt_column", column, f"there is no such column; {there}; {nearest(column, present)}"
        )
    fix = f"no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}; {there}: say which by --prompt-column"
    raise InvalidArgumentError("prompt_column", column, fix)


def _prompt(entry: Any, column: str | None, where: str) -> Prompt:
    name = "prompt"
    if isinstance(entry, dict):
        name = _find_column(list(entry), column, where)
        entry = entry[name]
    if isinstance(entry, str):
        return entry
    if _is_conversation(entry):
        messages = [{key: value for key, value in message.items() if value is not None} for message in entry]
        while name != "prompt" and messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if messages:
            return messages
        raise TrainingDataError(f"{where} has answers of the assistant's only: give what they answer")
    raise TrainingDataError(
        f"{where} has no prompt: its {name} is {_short(entry)}; give a text, or a list of messages with the texts "
        "role and content"
    )


def _is_conversation(entry: Any) -> bool:
    return isinstance(entry, list) and bool(entry) and all(map(_is_message, entry))


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
