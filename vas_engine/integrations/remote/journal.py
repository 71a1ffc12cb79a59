"""The journal of a run: every token that was paid for, so that a run that ended early goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from vas_engine.errors import InvalidArgumentError

VERSION = 1


class Journal:
    """A JSONL file: a header, then a line for every step of every sequence. Lines are whole or, the last one, ignored.

    One run at a time writes into a file.

    Args:
        path: made if it does not exist; None keeps nothing.
        settings: of the run: what has to be the same for its tokens to be continued.

    Attributes:
        steps: key of a sequence -> its steps when the run began, in order.

    Raises:
        InvalidArgumentError: no journal, or one of other settings.
    """

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self.steps: dict[str, list[dict[str, Any]]] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        path = Path(path)
        whole = self._read(path, settings) if path.exists() else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._file.truncate(whole)
        if not whole:
            self._write({"version": VERSION, "settings": settings})

    @property
    def kept(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def add(self, key: str, step: dict[str, Any]) -> None:
        """Keeps a step: it is with the system when this returns, on disk when a sequence has ended."""
        self._write({"key": key, **step})
        if self._file is not None and "finish_reason" in step:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()

    def _read(self, path: Path, settings: dict[str, Any]) -> int:
        """Takes in the whole lines. Returns their bytes."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            header, *records = [json.loads(line) for line in data[:whole].splitlines()] or [None]
            if header is None:
                return 0
            if header["version"] != VERSION:
                raise ValueError(f"version {header['version']}")
            for record in records:
                self.steps.setdefault(record.pop("key"), []).append(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            fix = f"is no journal of `vas generate --api-base` ({error}); give another file"
            raise InvalidArgumentError("state_file", str(path), fix) from error
        for name in settings:
            then, now = header["settings"].get(name), json.loads(json.dumps(settings[name]))
            if then != now:
                fix = f"it was begun with {name}={then!r}, not {now!r}; give another file, or the old setting"
                raise InvalidArgumentError("state_file", str(path), fix)
        return whole
