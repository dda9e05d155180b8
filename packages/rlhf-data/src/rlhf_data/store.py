"""Token ids on disk: written once in a stream, memory-mapped ever after, safe to share between processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from rlhf_data.encode import Sample
from rlhf_data.errors import InputError

FORMAT_VERSION = 3
"""Part of every key. Raise it when the files, or the ids that the same options give, change."""

COLUMNS = {
    "ids": np.dtype(np.int32),  # [num_tokens]
    "targets": np.dtype(np.bool_),  # [num_tokens]
    "offsets": np.dtype(np.int64),  # [num_samples + 1], where each sample starts in the two above
    "num_targets": np.dtype(np.int32),  # [num_samples]
    "truncated": np.dtype(np.bool_),  # [num_samples]
    "rows": np.dtype(np.int64),  # [num_rows + 1], where the samples of each row start
    "values": np.dtype(np.float32),  # [num_rows], the margin or the label (0 or 1) that comes with the row, else 0
    "shared": np.dtype(np.int32),  # [num_rows], of a pair the prompt tokens that both sides begin with, else 0
}
"""Arrays of a store, each a file `<name>.npy`."""


@dataclass(frozen=True, slots=True)
class RowSamples:
    """What is stored of one row; `value` and `shared` as in `COLUMNS`."""

    samples: list[Sample]
    value: float = 0.0
    shared: int = 0


class TokenStore:
    """Samples of one source, memory-mapped from a folder; opening reads only sizes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: _open_array(folder / f"{name}.npy", dtype) for name, dtype in COLUMNS.items()}
        sizes = {name: len(array) for name, array in arrays.items()}
        if sizes != self.meta["sizes"] or self.meta["version"] != FORMAT_VERSION:
            raise ValueError(f"sizes {sizes} are not those recorded, {self.meta['sizes']}")
        self.key: str = self.meta["key"]
        self.ids, self.targets, self.offsets = arrays["ids"], arrays["targets"], arrays["offsets"]
        self.num_targets, self.truncated, self.rows = arrays["num_targets"], arrays["truncated"], arrays["rows"]
        self.values, self.shared = arrays["values"], arrays["shared"]

    def __len__(self) -> int:
        return len(self.num_targets)

    @property
    def num_rows(self) -> int:
        """Rows kept; a row has one sample, of a pair two, in pre-training as many as it fills."""
        return len(self.rows) - 1

    def sample(self, number: int) -> Sample:
        """One sample, copied out of the files."""
        start, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        ids, targets = np.array(self.ids[start:stop]), np.array(self.targets[start:stop])
        return Sample(ids, targets, bool(self.truncated[number]))


def store_key(**parts: Any) -> str:
    """A name for what these parts (all JSON) determine."""
    text = json.dumps({"version": FORMAT_VERSION, **parts}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def cache_dir(data_cache_dir: str | None) -> Path:
    """Folder of token stores: `--data_cache_dir`, else `rlhf/tokens` in the user's cache folder."""
    if data_cache_dir is not None:
        return Path(data_cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rlhf" / "tokens"


Fill = Callable[["StoreWriter"], dict[str, Any]]
"""Adds all samples to a writer and returns what is to be remembered of them (as JSON)."""


def open_store(folder: Path, key: str, fill: Fill) -> tuple[TokenStore, bool]:
    """Open the store of that key, building it first if it is missing or damaged.

    Of several processes that ask at the same time, one builds and the others wait.

    Returns:
        The store, and whether it was there already.
    """
    from filelock import FileLock

    with _naming_option(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if (store := _intact(folder / key)) is not None:
                return store, True
            _build(folder / key, key, fill)
    return TokenStore(folder / key), False


def _intact(folder: Path) -> TokenStore | None:
    try:
        return TokenStore(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build(folder: Path, key: str, fill: Fill) -> None:
    """Write a store beside its place and rename it there, so that a half-written one is never seen."""
    beside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        beside.mkdir()
        with StoreWriter(beside) as writer:
            report = fill(writer)
        sizes = {name: int(count) for name, count in writer.sizes.items()}
        meta = {"version": FORMAT_VERSION, "key": key, "sizes": sizes, "report": report}
        (beside / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if folder.exists():
            if _intact(folder) is not None:  # another machine was faster: locks do not always reach across
                return
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class StoreWriter:
    """Appends samples to the files of a store; what it holds in memory does not grow with them."""

    def __init__(self, folder: Path):
        self.sizes = dict.fromkeys(COLUMNS, 0)
        self._files: dict[str, IO[bytes]] = {name: (folder / f"{name}.npy").open("wb") for name in COLUMNS}
        for name in COLUMNS:
            self._write_header(name)
        self._append("offsets", np.zeros(1))
        self._append("rows", np.zeros(1))

    def add(self, rows: list[RowSamples]) -> None:
        """Append a block of rows."""
        samples = [sample for row in rows for sample in row.samples]
        if not samples:
            return
        lengths = np.array([len(sample) for sample in samples], np.int64)
        per_row = np.array([len(row.samples) for row in rows], np.int64)
        self._append("offsets", self.sizes["ids"] + lengths.cumsum())
        self._append("rows", self.sizes["num_targets"] + per_row.cumsum())
        self._append("values", np.array([row.value for row in rows]))
        self._append("shared", np.array([row.shared for row in rows]))
        self._append("ids", np.concatenate([sample.input_ids for sample in samples]))
        self._append("targets", np.concatenate([sample.target_mask for sample in samples]))
        self._append("num_targets", np.array([sample.target_mask.sum() for sample in samples]))
        self._append("truncated", np.array([sample.truncated for sample in samples]))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for name, file in self._files.items():
                file.seek(0)
                self._write_header(name)  # with the final size; numpy leaves room for it to grow
                file.flush()
                os.fsync(file.fileno())
        finally:
            for file in self._files.values():
                file.close()

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(values.astype(COLUMNS[name]).data)
        self.sizes[name] += len(values)

    def _write_header(self, name: str) -> None:
        description = {
            "descr": np.lib.format.dtype_to_descr(COLUMNS[name]),
            "fortran_order": False,
            "shape": (self.sizes[name],),
        }
        np.lib.format.write_array_header_1_0(self._files[name], description)


def _open_array(path: Path, dtype: np.dtype) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:  # an empty array cannot be mapped
        array = np.load(path, allow_pickle=False)
    if array.dtype != dtype or array.ndim != 1:
        raise ValueError(f"{path.name} is {array.dtype} with {array.ndim} axes")
    return array


@contextlib.contextmanager
def _naming_option(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"tokenised data cannot be written to {folder} ({error.strerror or error}); "
            "name another folder with --data_cache_dir"
        ) from error
