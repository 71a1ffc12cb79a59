import json
import sys

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


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    for name, text in (("a.txt", "One"), ("a.jsonl", '"One"'), ("a.json", '["One"]'), ("a.yaml", "- One")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert load_prompts(tmp_path / name) == ["One"]


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="no such file"):
        load_prompts(tmp_path / "a.txt")
    (tmp_path / "a.csv").write_text("One")
    with pytest.raises(InvalidArgumentError, match="unknown ending"):
        load_prompts(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text('"One"\n{"text": 3}\n')
    with pytest.raises(TrainingDataError, match=r"entry 1 of .* has no prompt: its text is 3"):
        load_prompts(tmp_path / "a.jsonl")
    for name, text in (("b.jsonl", "{"), ("b.yaml", "a: [b"), ("b.json", "{}"), ("b.txt", "\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(TrainingDataError, match=name):
            load_prompts(tmp_path / name)


ANSWERED = [*CHAT, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "prompt-completion": ({"prompt": "Hi", "completion": " there"}, "Hi"),
    "preference": ({"chosen": "a", "rejected": "b", "prompt": "Hi"}, "Hi"),
    "language modelling": ({"text": "Hi", "label": 1}, "Hi"),
    "chat prompt": ({"prompt": CHAT, "completion": ANSWERED[1:]}, CHAT),
    "begun answer": ({"prompt": ANSWERED}, ANSWERED),
    "chat": ({"messages": ANSWERED}, CHAT),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved splits", "folder"])
def test_the_formats_of_trl(kind, form, tmp_path):
    row, expected = ROWS[kind]
    if form == "jsonl":
        path = tmp_path / "a.jsonl"
        path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    elif form == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        datasets = pytest.importorskip("datasets")
        path = tmp_path / "data"
        rows = datasets.Dataset.from_list([row, row])
        if form == "folder":
            path.mkdir()
            rows.to_parquet(path / "train.parquet")
        else:
            (rows if form == "saved" else datasets.DatasetDict(train=rows, test=rows.select([0]))).save_to_disk(path)
    assert load_prompts(path) == [expected, expected]


def test_splits_and_columns_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    first, second = ({"question": [word], "answer": ["x"]} for word in ("one", "two"))
    splits = datasets.DatasetDict(fit=datasets.Dataset.from_dict(first), test=datasets.Dataset.from_dict(second))
    splits.save_to_disk(tmp_path / "data")
    assert load_prompts(tmp_path / "data", column="question", split="test") == ["two"]
    for split in (None, "train"):
        with pytest.raises(InvalidArgumentError, match=r"has the splits fit, test; name one"):
            load_prompts(tmp_path / "data", column="question", split=split)
    with pytest.raises(InvalidArgumentError, match=r"no column prompt, messages or text; .* has question, answer: say"):
        load_prompts(tmp_path / "data", split="fit")
    with pytest.raises(InvalidArgumentError, match=r"no such column; .* has question, answer; did you mean 'question'"):
        load_prompts(tmp_path / "data", split="fit", column="qestion")


def test_a_name_that_is_no_dataset(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgumentError, match="nor a dataset that could be loaded"):
        load_prompts(tmp_path / "empty")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidArgumentError, match="pip install datasets"):
        load_prompts("somebody/prompts")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_columns_of_a_file(tmp_path, name):
    row = {"question": "Hi", "answer": "x"}
    if name == "a.jsonl":
        (tmp_path / name).write_text(json.dumps(row))
    else:
        parquet.write_table(pa.Table.from_pylist([row]), tmp_path / name)
    assert load_prompts(tmp_path / name, column="question") == ["Hi"]
    with pytest.raises(InvalidArgumentError, match=r"no column prompt, messages or text; .* has question, answer: say"):
        load_prompts(tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="did you mean 'answer'"):
        load_prompts(tmp_path / name, column="anwser")
    with pytest.raises(InvalidArgumentError, match="files have none"):
        load_prompts(tmp_path / name, split="train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "its prompt is None"),
        ({"messages": []}, r"its messages is \[\]"),
        ({"messages": [{"role": "user"}]}, "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "role and content"),
        ({"messages": ANSWERED[1:]}, "answers of the assistant's only"),
    ],
)
def test_entries_without_a_prompt(tmp_path, row, message):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row))
    with pytest.raises(TrainingDataError, match=f"entry 1 of .*{message}"):
        load_prompts(tmp_path / "a.jsonl")


def test_a_line_that_is_no_json_is_named_by_its_place_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('"One"\n\n"Two"\n{"prompt": Three}\n')
    with pytest.raises(TrainingDataError, match=r"line 4, column 12 is no JSON"):
        load_prompts(tmp_path / "a.jsonl")
