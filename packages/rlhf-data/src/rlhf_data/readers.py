"""Readers of local files: rows with their places, one at a time, and errors that name file and line."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_data.errors import InputError
from rlhf_data.rows import Row

CHUNK_BYTES = 1 << 20


class Place(NamedTuple):
    """Where a row is; written out only when a message needs it."""

    file: str
    number: int
    by_line: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.number}" if self.by_line else f"{self.file} row {self.number}"


Rows = Iterator[tuple[Place, Row]]


def read_rows(path: Path) -> Rows:
    """Rows of a local file, by its suffix.

    Raises:
        InputError: the file cannot be read, or a line of it is no row.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def content_hash(path: Path) -> str:
    """Hash of a file's content, the same wherever it lies."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()


def _read_jsonl(path: Path) -> Rows:
    found = False
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                found = True
                place = Place(str(path), number, by_line=True)
                yield place, _parse_row(line, place)
    if not found:
        raise InputError(f"{path} is empty")


def _parse_row(line: bytes, place: Place) -> Row:
    text = _decode(line, place.file, place.number)
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({_short(error)}): {text.strip()[:60]}") from None
    if not isinstance(row, dict):
        raise InputError(f"{place}: a row must be a JSON object with named columns, not {text.strip()[:60]}")
    return row


def _decode(line: bytes, file: str, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}:{number}: not valid UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1}); "
            "save the file as UTF-8"
        ) from None


def _read_json(path: Path) -> Rows:
    """A .json file: an array of rows, an object that holds one as `data`, or JSON lines under the wrong name."""
    text = _decode_file(path)
    if not text.strip():
        raise InputError(f"{path} is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and _is_object(text.lstrip().split("\n", 1)[0]):
            yield from _read_jsonl(path)
            return
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not valid JSON ({_short(error)})") from None
    del text
    if isinstance(content, dict):
        content = content["data"] if isinstance(content.get("data"), list) else [content]
    if not isinstance(content, list):
        raise InputError(f"{path}: a .json file must hold an array of rows, not {json.dumps(content)[:60]}")
    if not content:
        raise InputError(f"{path} is empty: its array holds no row")
    for number, row in enumerate(content, start=1):
        if not isinstance(row, dict):
            raise InputError(f"{path} row {number}: a row must be a JSON object with named columns")
        yield Place(str(path), number, by_line=False), row


def _decode_file(path: Path) -> str:
    lines = [
        _decode(line, str(path), number) for number, line in enumerate(path.read_bytes().splitlines(True), start=1)
    ]
    return "".join(lines).removeprefix("\ufeff")


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _read_csv(path: Path) -> Rows:
    """A .csv file with a header line. All values stay text: the standard library turns no `42` into a number."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            if not reader.fieldnames:
                raise InputError(f"{path} is empty")
            for row in reader:
                place = Place(str(path), reader.line_num, by_line=True)
                if None in row:
                    raise InputError(f"{place}: more values than the {len(reader.fieldnames)} columns of the header")
                yield place, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}:{reader.line_num + 1}: not valid CSV ({error})") from None


def _read_parquet(path: Path) -> Rows:
    from datasets import load_dataset

    # streaming: rows are read once, so no second copy is made in the cache of `datasets`
    return _numbered(path, lambda: load_dataset("parquet", data_files=str(path), split="train", streaming=True))


def _read_arrow(path: Path) -> Rows:
    from datasets import Dataset, load_dataset
    from pyarrow import ArrowInvalid

    def open_() -> Any:
        try:
            return Dataset.from_file(str(path))  # the stream format that `datasets` writes, memory-mapped
        except ArrowInvalid:  # the file format instead
            return load_dataset("arrow", data_files=str(path), split="train", streaming=True)

    return _numbered(path, open_)


def _numbered(path: Path, open_: Callable[[], Any]) -> Rows:
    number = 0
    try:
        for number, row in enumerate(open_(), start=1):
            yield Place(str(path), number, by_line=False), row
    except Exception as error:  # pyarrow and datasets raise many kinds, all of them about this file
        reason = str(error.__cause__ or error).strip().split("\n")[0][:200]
        raise InputError(f"{path} cannot be read as {path.suffix} (after {number} rows): {reason}") from error
    if number == 0:
        raise InputError(f"{path} is empty")


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
"""File suffixes that are read, each with its reader."""
