"""Where rows come from: files, folders and the Hub, each a set of named splits of places and rows."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_data.errors import InputError
from rlhf_data.readers import READERS, Place, Rows, content_hash, read_rows

SPLIT_NAMES = ("train", "test", "validation", "valid", "val", "dev", "eval")
"""File and folder names (up to the first of `-`, `_`, `.`) that name a split."""

KNOWN = ", ".join(READERS)


@dataclass(frozen=True)
class Source:
    """Rows of one split of one data set.

    Attributes:
        name: how messages call it: the file or folder as given, or the Hub id.
        split: name of the split.
        rows: starts reading from the first row.
        content_key: a text that changes when the rows do; reads the files once.
        count: number of rows where it is known without reading, else None.
    """

    name: str
    split: str
    rows: Callable[[], Rows]
    content_key: Callable[[], str]
    count: int | None = None


Splits = dict[str, Source]


def split_specs(value: str, option: str = "--dataset") -> list[str]:
    """Data sets of an option that takes several, separated by commas."""
    specs = [spec.strip() for spec in value.split(",")]
    if not all(specs):
        raise InputError(f"{option} {value!r} names an empty data set; separate names with single commas")
    return specs


def open_source(spec: str, split: str) -> Source:
    """Open one split of a data set.

    Raises:
        InputError: there is no such data set, or it has no such split.
    """
    return pick(open_splits(spec), spec, split)


def pick(splits: Splits, spec: str, split: str) -> Source:
    """The split of that name, or an error that lists those there are."""
    if split not in splits:
        raise InputError(f"{spec} has no split `{split}`; its splits: {', '.join(splits)}")
    return splits[split]


def open_splits(spec: str) -> Splits:
    """All splits of a data set: a local file or folder (by explicit path or known suffix), else a Hub id."""
    path = Path(spec).expanduser()
    if not looks_local(spec):
        return _open_hub(spec)
    if path.suffix == ".py":
        raise InputError(f"{spec}: data set scripts are not run; give the data itself as {KNOWN}")
    if path.is_dir():
        return _open_folder(path, spec)
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise InputError(f"{spec}: files of type {path.suffix or '(none)'} are not read; known types: {KNOWN}")
        return {"train": _files_source(spec, "train", [path])}
    raise InputError(_missing(spec, path))


def looks_local(spec: str) -> bool:
    """Whether a data set is given as a path: it starts with `.`, `/` or `~`, or ends like a data file."""
    before = spec.partition("@")[0]
    return spec.startswith((".", "/", "~")) or any(
        Path(part).suffix.lower() in (*READERS, ".py") for part in (spec, before)
    )


def _missing(spec: str, path: Path) -> str:
    before, mark, _ = spec.rpartition("@")
    if mark and Path(before).expanduser().exists():
        return f"{spec}: `@subset` is for data sets of the Hub; {before} is local, give it without"
    parent = path.parent
    if not parent.is_dir():
        return f"{spec} does not exist (there is no folder {parent})"
    close = difflib.get_close_matches(path.name, [entry.name for entry in parent.iterdir()], n=1)
    return f"{spec} does not exist" + (f"; did you mean {parent / close[0]}?" if close else f" in {parent.resolve()}")


def _files_source(name: str, split: str, paths: list[Path]) -> Source:
    def rows() -> Rows:
        for path in paths:
            yield from read_rows(path)

    def key() -> str:
        return ",".join(content_hash(path) + path.suffix.lower() for path in paths)

    return Source(name, split, rows, key)


def _open_folder(path: Path, spec: str) -> Splits:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path, spec)
    found: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for entry in sorted(path.iterdir()):
        files = _data_files(entry)
        if (name := _split_name(entry)) and files:
            found.setdefault(name, []).extend(files)
        elif entry.is_file():
            unnamed.extend(files)
    if found and unnamed:
        raise InputError(
            f"{spec}: some files name a split ({', '.join(found)}) and some do not ({unnamed[0].name}, …); "
            "give the file you mean, or rename them"
        )
    if not found and not unnamed:
        raise InputError(f"the folder {spec} holds no data files; known types: {KNOWN}")
    return {name: _files_source(spec, name, files) for name, files in (found or {"train": unnamed}).items()}


def _data_files(entry: Path) -> list[Path]:
    entries = sorted(entry.iterdir()) if entry.is_dir() else [entry]
    return [file for file in entries if file.is_file() and file.suffix.lower() in READERS]


def _split_name(entry: Path) -> str | None:
    name = entry.name.lower()
    for mark in "-_.":
        name = name.split(mark, 1)[0]
    return name if name in SPLIT_NAMES else None


def _open_saved(path: Path, spec: str) -> Splits:
    from datasets import load_from_disk

    try:
        loaded = load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{spec} cannot be read as a `save_to_disk` folder: {_first_line(error)}") from error
    return _dataset_splits(spec, loaded)


def _open_hub(spec: str) -> Splits:
    from datasets import load_dataset

    name, _, subset = spec.partition("@")
    if Path(name).exists():  # `datasets` would read it, and nobody could tell which of the two was meant
        raise InputError(
            f"{spec} could be a data set of the Hub or {name} in this folder: to use the latter, give ./{name}"
        )
    try:
        loaded = load_dataset(name, subset or None)
    except Exception as error:  # network, missing, private, unknown subset, script: all are about this data set
        raise InputError(
            f"{spec} is not a path (it does not start with ./ or /, nor end in one of {KNOWN}), and as a data set of "
            f"the Hub it cannot be loaded: {_first_line(error)}"
        ) from error
    return _dataset_splits(spec, loaded)


def _dataset_splits(name: str, loaded: Any) -> Splits:
    """Splits of a `datasets.DatasetDict`, or of a lone `Dataset` as `train`."""
    named = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {split: _dataset_source(name, split, dataset) for split, dataset in named.items()}


def _dataset_source(name: str, split: str, dataset: Any) -> Source:
    def rows() -> Iterator[tuple[Place, dict[str, Any]]]:
        for number, row in enumerate(dataset, start=1):
            yield Place(f"{name}[{split}]", number, by_line=False), row

    def key() -> str:
        return hashlib.blake2b(str(dataset._fingerprint).encode(), digest_size=16).hexdigest()

    return Source(name, split, rows, key, len(dataset))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
