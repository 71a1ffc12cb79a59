"""Files and folders that appear whole or not at all; texts that people wrote."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write a file or a folder; what is there when the block ends takes its place.

    After an error, Ctrl-C included, ``path`` is as it was and nothing lies beside it. What a killed process left is
    written over by the next, so two must not write to one path at a time.

    Raises:
        OSError: it cannot be written, a full disk say, also where safetensors were being written.
    """
    path = Path(os.path.abspath(path))  # `.` has no name
    fresh, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    _remove(fresh)
    try:
        yield fresh
        for part in (fresh, *fresh.rglob("*")):
            if part.is_file():
                with part.open("rb") as file:
                    os.fsync(file.fileno())  # the name must not outlive a power cut that the contents do not
        if path.is_dir():  # which only an empty folder could be replaced by
            _remove(old)
            path.rename(old)
        os.replace(fresh, path)
        _remove(old)
    except SafetensorError as error:  # what it makes of an OSError
        raise OSError(f"{path} cannot be written ({error})") from error
    finally:
        _remove(fresh)


def read_text(path: Path) -> str:
    """UTF-8 text of a file that people wrote, without the byte order mark that some editors begin it with.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is no UTF-8.
    """
    return path.read_text(encoding="utf-8-sig")


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
