from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlhf_data.errors import InputError
from rlhf_data.sources import looks_local, open_source, open_splits, split_specs

ROWS = [{"prompt": f"q{number}", "response": f"a{number}"} for number in range(3)]


def rows_of(spec: str, split: str = "train") -> list[dict]:
    return [dict(row) for _, row in open_source(spec, split).rows()]


def places_of(spec: str) -> list[str]:
    return [str(place) for place, _ in open_source(spec, "train").rows()]


def test_json_lines_know_their_lines(write):
    path = write("a.jsonl", "\ufeff" + json.dumps(ROWS[0]) + "\r\n\n  \n" + json.dumps(ROWS[1]))
    assert rows_of(path) == ROWS[:2]
    assert places_of(path) == [f"{path}:1", f"{path}:4"]


def test_json_files_hold_an_array_or_data_or_lines(write):
    assert rows_of(write("a.json", ROWS)) == ROWS
    assert rows_of(write("b.json", json.dumps({"data": ROWS, "version": 1}, indent=1))) == ROWS
    lines = write("c.json", "".join(json.dumps(row) + "\n" for row in ROWS))
    assert rows_of(lines) == ROWS
    assert places_of(lines)[1] == f"{lines}:2"
    assert places_of(write("a.json", ROWS))[1].endswith("a.json row 2")


def test_csv_values_stay_text(write):
    path = write("a.csv", 'prompt,response\n"two\nlines",42\nNA,\n')
    assert rows_of(path) == [{"prompt": "two\nlines", "response": "42"}, {"prompt": "NA", "response": ""}]


def test_parquet_arrow_and_saved_folders_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "split")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for path in (tmp_path / "a.parquet", tmp_path / "saved", tmp_path / "split", arrow):
        assert rows_of(str(path)) == ROWS
    assert places_of(str(tmp_path / "a.parquet"))[2].endswith("a.parquet row 3")
    assert rows_of(str(tmp_path / "split"), "test") == ROWS[:1]
    assert open_source(str(tmp_path / "split"), "train").count == 3


def test_folders_hold_splits_by_name(write, tmp_path):
    write("d/train-00000.jsonl", ROWS[:1])
    write("d/train-00001.jsonl", ROWS[1:])
    write("d/test.json", ROWS[:1])
    write("d/validation/x.csv", "prompt,response\nq,a\n")
    write("d/notes.txt", "hello")
    splits = open_splits(str(tmp_path / "d"))
    assert sorted(splits) == ["test", "train", "validation"]
    assert rows_of(str(tmp_path / "d")) == ROWS
    write("e/one.jsonl", ROWS[:1])
    write("e/two.jsonl", ROWS[1:])
    assert rows_of(str(tmp_path / "e")) == ROWS


def test_the_content_key_follows_the_content(write):
    first, same, other = write("a.jsonl", ROWS), write("b.jsonl", ROWS), write("c.jsonl", ROWS[:2])
    keys = [open_source(path, "train").content_key() for path in (first, same, other)]
    assert keys[0] == keys[1] != keys[2]


def test_what_looks_local():
    for spec in ("./a", "../a", "/a", "~/a", "a.jsonl", "dir/a.parquet", "a.py", "a.csv@x"):
        assert looks_local(spec)
    for spec in ("a", "org/name", "org/name@subset", "gsm8k@main"):
        assert not looks_local(spec)


def test_a_row_that_cannot_be_reached_is_not_read(write):
    path = write("a.jsonl", json.dumps(ROWS[0]) + "\n{broken\n")
    rows = open_source(path, "train").rows()
    assert next(rows)[1] == ROWS[0]
    with pytest.raises(InputError, match=r"a.jsonl:2: not valid JSON"):
        next(rows)


BAD_FILES = {
    "malformed line": ("a.jsonl", '{"a": 1}\n{"a": \n', [":2: not valid JSON", '{"a":']),
    "invalid UTF-8": ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', [":2: not valid UTF-8", "0xff", "position 8"]),
    "invalid UTF-8 in an array": ("a.json", b'[\n{"a": "\xe9"}]', [":2: not valid UTF-8", "0xe9"]),
    "a row that is a list": ("a.jsonl", "[1, 2]\n", [":1: a row must be a JSON object"]),
    "an array in JSON lines": ("a.jsonl", '[{"a": 1}]\n', [":1: a row must be a JSON object"]),
    "an element that is a number": ("a.json", '[{"a": 1}, 3]', ["row 2: a row must be a JSON object"]),
    "a lone value": ("a.json", '"hello"', ["must hold an array"]),
    "malformed array": ("a.json", '[{"a": 1},\n{"a": }]', [":2: not valid JSON"]),
    "malformed lines in .json": ("a.json", '{"a": 1}\n{"a"\n', [":2: not valid JSON"]),
    "nested without end": ("a.jsonl", "[" * 100_000, [":1: not valid JSON", "nested too deeply"]),
    "a number without end": ("a.jsonl", "[" + "9" * 5000 + "]", [":1: not valid JSON", "4300"]),
    "empty JSON lines": ("a.jsonl", "\n \n", ["is empty"]),
    "empty JSON": ("a.json", "", ["is empty"]),
    "empty array": ("a.json", "[]", ["is empty"]),
    "empty csv": ("a.csv", "", ["is empty"]),
    "csv with too many values": ("a.csv", "p,r\n1,2\n1,2,3\n", [":3: more values than the 2 columns"]),
    "csv with an open quote": ("a.csv", 'p,r\n"1,2\n', ["not valid CSV"]),
    "csv in Latin-1": ("a.csv", b"p,r\n\xe9,2\n", ["not valid CSV", "utf-8"]),
    "broken parquet": ("a.parquet", "PAR1 no", ["cannot be read as .parquet"]),
    "broken arrow": ("a.arrow", "no", ["cannot be read as .arrow"]),
    "unknown type": ("a.txt", "x", ["files of type .txt are not read", ".jsonl"]),
    "script": ("a.py", "x", ["scripts are not run"]),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_with_their_lines(write, name):
    file, content, parts = BAD_FILES[name]
    path = write(file, content)
    with pytest.raises(InputError) as error:
        rows_of(path)
    for part in [path, *parts]:
        assert part in str(error.value)


def refused(spec: str, split: str = "train") -> str:
    with pytest.raises(InputError) as error:
        rows_of(spec, split)
    return str(error.value)


def test_missing_paths_name_the_nearest(write, tmp_path):
    write("train.jsonl", ROWS)
    assert refused(str(tmp_path / "trian.jsonl")).endswith(f"did you mean {tmp_path / 'train.jsonl'}?")
    assert "no folder" in refused(str(tmp_path / "nowhere" / "a.jsonl"))
    assert "does not exist" in refused("./qqqqqqqq.jsonl")
    assert "`@subset` is for data sets of the Hub" in refused(str(tmp_path / "train.jsonl") + "@main")


def test_missing_splits_list_those_there_are(write, tmp_path):
    path = write("a.jsonl", ROWS)
    assert refused(path, "test") == f"{path} has no split `test`; its splits: train"
    write("d/train.jsonl", ROWS)
    write("d/valid.jsonl", ROWS)
    assert "its splits: train, valid" in refused(str(tmp_path / "d"), "test")


def test_folders_without_an_obvious_reading_are_refused(write, tmp_path):
    write("empty/readme.md", "x")
    assert "holds no data files" in refused(str(tmp_path / "empty"))
    write("mixed/train.jsonl", ROWS)
    write("mixed/extra.jsonl", ROWS)
    assert "extra.jsonl" in refused(str(tmp_path / "mixed"))
    write("saved/state.json", "{}")
    assert "save_to_disk" in refused(str(tmp_path / "saved"))


@pytest.mark.filterwarnings("ignore")
def test_a_name_that_could_be_a_folder_here_or_a_hub_id_is_refused_and_points_to_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("foo").mkdir()
    assert "give ./foo" in refused("foo")
    assert "of the Hub it cannot be loaded" in refused("org/bar@main")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files_are_named(write):
    path = write("a.jsonl", ROWS)
    Path(path).chmod(0)
    assert path in refused(path)


def test_lists_of_data_sets_have_no_holes():
    assert split_specs("a, b@c ,d") == ["a", "b@c", "d"]
    for value in ("a,,b", "a,", ""):
        with pytest.raises(InputError, match="--dataset"):
            split_specs(value)
