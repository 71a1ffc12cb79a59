import json

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from vas_engine.errors import InvalidArgumentError, TrainingDataError
from vas_engine.training.prompts import load_prompts

CHAT = [{"role": "user", "content": "Hi"}]


def test_every_format(tmp_path):
    (tmp_path / "a.txt").write_text("One\n\n Two \n")
    assert load_prompts(tmp_path / "a.txt") == ["One", " Two "]
    lines = ["One", {"prompt": "Two"}, {"messages": CHAT}, CHAT]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load_prompts(tmp_path / "a.jsonl") == ["One", "Two", CHAT, CHAT]
    (tmp_path / "a.json").write_text(json.dumps(lines))
    assert load_prompts(tmp_path / "a.json") == ["One", "Two", CHAT, CHAT]
    (tmp_path / "a.yaml").write_text("- |-\n  One\n  line\n- prompt: Two\n")
    assert load_prompts(tmp_path / "a.yaml") == ["One\nline", "Two"]
    parquet.write_table(pa.table({"prompt": ["One", "Two"]}), tmp_path / "a.parquet")
    assert load_prompts(tmp_path / "a.parquet") == ["One", "Two"]
    parquet.write_table(pa.table({"messages": [CHAT]}), tmp_path / "b.parquet")
    assert load_prompts(tmp_path / "b.parquet") == [CHAT]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no such file"):
        load_prompts(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("One")
    with pytest.raises(InvalidArgumentError, match="unknown ending"):
        load_prompts(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('"One"\n{"text": 3}\n')
    with pytest.raises(TrainingDataError, match=r"entry 1 of .* has no prompt"):
        load_prompts(tmp_path / "a.jsonl")
    for name, text in (("b.jsonl", "{"), ("b.yaml", "a: [b"), ("b.json", "{}"), ("b.txt", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(TrainingDataError, match=name):
            load_prompts(tmp_path / name)
