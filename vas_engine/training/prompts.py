"""Prompt files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vas_engine.errors import InvalidArgumentError, TrainingDataError

__all__ = ["Prompt", "load_prompts"]

Prompt = str | list[dict[str, str]]
"""A text, or a conversation for the model's chat template."""

COLUMNS = ("prompt", "messages", "text")


def load_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a file, by its ending.

    ``.txt`` has a prompt a line (blank lines are skipped); ``.jsonl`` a string or an object a line;
    ``.parquet`` a row each; ``.json``, ``.yaml`` and ``.yml`` a list of strings or objects. An object or row
    has its prompt under ``prompt``, ``messages`` or ``text``: a text, or a list of ``{"role": ..., "content":
    ...}``.

    Raises:
        InvalidArgumentError: no such file, or an ending that is not known.
        TrainingDataError: an entry without a prompt; the message says which. No prompt at all.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidArgumentError("prompts", str(path), "no such file")
    try:
        entries = _read_entries(path)
    except InvalidArgumentError:
        raise
    except (ValueError, OSError) as error:
        raise TrainingDataError(f"cannot read prompts from {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise TrainingDataError(f"{path} holds no list of prompts: write one prompt per entry")
    return [_prompt(entry, index, path) for index, entry in enumerate(entries)]


def _read_entries(path: Path) -> Any:
    if path.suffix == ".txt":
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if path.suffix in (".yaml", ".yml"):
        return _read_yaml(path)
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return parquet.read_table(path).to_pylist()
    raise InvalidArgumentError("prompts", str(path), "unknown ending; use .txt, .jsonl, .json, .yaml or .parquet")


def _read_yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _prompt(entry: Any, index: int, path: Path) -> Prompt:
    if isinstance(entry, dict):
        entry = next((entry[column] for column in COLUMNS if column in entry), None)
    if isinstance(entry, str):
        return entry
    if (
        isinstance(entry, list)
        and entry
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in entry)
    ):
        return entry
    raise TrainingDataError(
        f"entry {index} of {path} has no prompt: give a string, or one of {', '.join(COLUMNS)} with a "
        "string or a list of messages (role, content)"
    )
