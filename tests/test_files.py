"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vas_engine.files import read_text, replacing, write_json


def write(path: Path, content: str, folder: bool) -> None:
    if folder:
        (path / "deep").mkdir(parents=True)
        path = path / "deep" / "file"
    path.write_text(content)


def read(path: Path) -> str:
    return (path / "deep" / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
def test_what_was_there_stays_until_the_new_is_whole(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "target"
    for content in ("first", "second"):
        before = read(target) if target.exists() else None
        with replacing(target) as fresh:
            write(fresh, content, folder)
            assert (read(target) if target.exists() else None) == before
        assert read(target) == content
        assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    write(target, "first", folder)

    def fail() -> None:
        with replacing(target) as fresh:
            write(fresh, "half", folder)
            raise error

    with pytest.raises(error):
        fail()
    assert read(target) == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_what_safetensors_cannot_write_is_an_os_error(tmp_path: Path) -> None:
    def save() -> None:
        with replacing(tmp_path / "target") as fresh:
            save_file({"x": torch.zeros(3)}, fresh / "no folder" / "x")

    with pytest.raises(OSError, match=r"target cannot be written .*No such file"):
        save()


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffé\r\nb".encode())
    assert read_text(tmp_path / "text") == "é\nb"


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_written_over(tmp_path: Path, folder: bool) -> None:
    target, left = tmp_path / "target", []
    with replacing(target) as fresh:
        write(fresh, "first", folder)
        left.append(fresh)
    write(left[0], "half of a killed one", not folder)
    write(target.with_name(".target.old"), "killed between two names", folder)
    with replacing(target) as fresh:
        write(fresh, "second", folder)
    assert read(target) == "second"
    if folder:
        assert list(tmp_path.iterdir()) == [target]


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "here")
        with replacing(Path()) as fresh:
            write(fresh, "whole", folder=True)
    assert read(tmp_path / "here") == "whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "here"]


def test_json(tmp_path: Path) -> None:
    write_json(tmp_path / "content.json", {"reward": "größer", "rows": [1, 2.5, None]})
    text = (tmp_path / "content.json").read_text(encoding="utf-8")
    assert (json.loads(text), "größer" in text, text[-1]) == ({"reward": "größer", "rows": [1, 2.5, None]}, True, "\n")
