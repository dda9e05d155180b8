"""What a frozen model says of every sample, computed once and kept on disk: reference log-probs, a teacher's likeliest tokens.

Written in order, window by window, with a mark of how far it got: a killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from rlhf_core.batch import Batch
from rlhf_core.checkpoint import check_shared
from rlhf_core.method import Method, Window
from rlhf_core.micro_batches import micro_batches
from rlhf_core.strategy import Strategy
from rlhf_data.errors import RunError
from rlhf_data.store import cache_dir

Rows = dict[str, np.ndarray]
"""Values of one sample by column, `[rows of the sample, …]` each."""

Compute = Callable[[Window], Iterator[tuple[int, Rows]]]
"""This rank's part of a window: places in it, and their rows."""

VERSION = 1
"""Part of every key. Raise it when the rows that the same options give change."""

PATIENCE = 30.0
"""Seconds between two looks at whether another run has finished filling a cache."""

WINDOW = 256
"""Samples between two marks: what a kill can cost."""


class SampleCache:
    """Rows of values for every sample of a data set, memory-mapped.

    Args:
        folder: where all caches are.
        key: names what determines the values (see `cache_key`).
        counts: rows of each sample, int `[N]`.
        columns: number format and width of each column; width 0 for one number per row.
    """

    def __init__(
        self, folder: Path, key: str, counts: np.ndarray, columns: dict[str, tuple[np.dtype[Any], int]]
    ) -> None:
        self.folder = folder / key
        self.bounds = np.concatenate([[0], np.cumsum(counts)])
        self.columns = columns

    def __getitem__(self, number: int) -> Rows:
        """The rows of one sample."""
        start, stop = self.bounds[number], self.bounds[number + 1]
        return {name: np.array(array[start:stop]) for name, array in self._arrays.items()}

    def done(self) -> int:
        """How many samples are complete; none if a file is missing or is not what it should be."""
        try:
            samples = int(json.loads((self.folder / "done.json").read_text())["samples"])
            arrays = self._open("c")
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return 0
        whole = all((array.dtype, array.shape) == self._form(name) for name, array in arrays.items())
        return samples if whole and 0 <= samples < len(self.bounds) else 0

    def fill(self, dataset: Any, compute: Callable[[], Compute], strategy: Strategy, what: str) -> None:
        """Compute what is missing.

        Args:
            dataset: the samples.
            compute: called if anything is missing; loads the model and returns what computes a window.
            strategy: the ranks; the first one writes.
            what: shown while it goes on.

        Raises:
            InputError: the folder is not shared by all ranks.
            RunError: it cannot be written.
        """
        total = len(self.bounds) - 1
        with self._alone(strategy):
            check_shared(self.folder.parent, "--data_cache_dir", strategy)
            start = strategy.share(self.done)
            if start < total:
                work = compute()
                with tqdm(total=total, initial=start, desc=what, unit=" samples", disable=not strategy.is_first) as bar:
                    for first in range(start, total, WINDOW):
                        numbers = np.arange(first, min(first + WINDOW, total))
                        parts = strategy.gather(list(work(Window(dataset, numbers))))
                        if strategy.is_first:
                            self._write(first, dict(item for part in parts for item in part))
                        bar.update(len(numbers))
        strategy.barrier()

    @contextmanager
    def _alone(self, strategy: Strategy) -> Iterator[None]:
        """Of several runs that want the same cache, one fills it and the others wait, all ranks together."""
        lock = FileLock(f"{self.folder}.lock")

        def acquired() -> bool:
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                lock.acquire(timeout=0 if told else PATIENCE)
            except Timeout:
                return False
            except OSError as error:
                raise self._unwritable(error) from error
            return True

        told = True
        while not strategy.share(acquired):
            if told:
                strategy.say(f"another run is filling {self.folder}: waiting for it")
            told = False
        try:
            yield
        finally:
            if strategy.is_first:
                lock.release()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"{self.folder} cannot be written ({error.strerror or error}); free some space or name another folder with "
            "--data_cache_dir; what was computed is kept"
        )

    def _write(self, first: int, rows: dict[int, Rows]) -> None:
        """Write the samples from `first` on, then move the mark behind them."""
        try:
            if first == 0:
                self._create()
            arrays = self._open("r+")
            for place, values in rows.items():
                start, stop = self.bounds[first + place], self.bounds[first + place + 1]
                for name, array in arrays.items():
                    array[start:stop] = values[name]
            for array in arrays.values():
                array.flush()  # type: ignore[attr-defined]
            self._mark(first + len(rows))
        except OSError as error:
            raise self._unwritable(error) from error

    def _create(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name in self.columns:
            path = self.folder / f"{name}.npy"
            np.lib.format.open_memmap(path, "w+", *self._form(name)).flush()
            with path.open("r+b") as file:  # a full disk is an error here, and the end of the process in a memory map
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._mark(0)

    def _form(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Number format and shape of a column."""
        dtype, width = self.columns[name]
        return dtype, (int(self.bounds[-1]), width) if width else (int(self.bounds[-1]),)

    def _mark(self, samples: int) -> None:
        part = self.folder / ".done.json"
        part.write_text(json.dumps({"samples": samples}))
        part.replace(self.folder / "done.json")

    def _open(self, mode: Any) -> Rows:
        return {name: np.load(self.folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in self.columns}

    @cached_property
    def _arrays(self) -> Rows:
        """The finished columns, to read."""
        return self._open("r")


class Cached:
    """A data set whose samples come with the rows of a cache: `[i] -> (sample, rows)`; everything else is the data set's."""

    def __init__(self, dataset: Any, cache: SampleCache) -> None:
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> tuple[Any, Rows]:
        return self.dataset[number], self.cache[number]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)


def precompute(
    config: Any,
    method: Method,
    models: Any,
    rows: Callable[[Any, Batch], Iterator[Rows]],
    lay_out: Callable[[list[Any]], Batch],
    counts: Callable[[Any], np.ndarray],
    columns: dict[str, tuple[np.dtype[Any], int]],
    **options: Any,
) -> None:
    """Have a method's frozen model say what it says of all samples, now or earlier, and let it go.

    Afterwards the method's data sets are `Cached`, and it needs no frozen model.

    Args:
        config: the run's options.
        method: with a frozen model.
        models: loads it, if anything is missing.
        rows: given the model and a batch, the rows of each of its samples.
        lay_out: samples to a batch.
        counts: rows of each sample of a data set.
        columns: as of `SampleCache`.
        **options: what else determines the rows.
    """
    frozen, strategy, loaded = method.frozen, models.ranks, []
    assert frozen is not None

    def of_window(window: Window) -> Iterator[tuple[int, Rows]]:
        size = config.batch.micro_train_batch_size
        for places, batch in micro_batches(window, lay_out, strategy, size, method.token_budget):
            with torch.no_grad():
                yield from zip(places.tolist(), rows(loaded[0], batch), strict=False)

    def compute() -> Compute:
        if not loaded:
            loaded.append(models.frozen(frozen))
        return of_window

    model = strategy.share(lambda: model_identity(frozen.name, models.config_of(frozen)))
    for which in ("train", "evaluation"):
        if (dataset := getattr(method, which)) is not None:
            key = cache_key(what=frozen.role, model=model, data=dataset.fingerprint, bf16=config.model.bf16, **options)
            cache = SampleCache(cache_dir(config.data.data_cache_dir), key, counts(dataset), columns)
            cache.fill(dataset, compute, strategy, f"{frozen.role} on the {which} data")
            setattr(method, which, Cached(dataset, cache))
    method.frozen = None


def cache_key(**parts: Any) -> str:
    """A name for what these parts (all JSON) determine."""
    return hashlib.blake2b(
        json.dumps({"version": VERSION, **parts}, sort_keys=True).encode(), digest_size=16
    ).hexdigest()


def model_identity(name: str, config: Any) -> dict[str, Any]:
    """What tells a model from all others, without reading its weights: the names, sizes and times of its weights, configs and
    code; on the Hub, the commit. What else lies in its folder is no part of it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        # a name alone may stand for other weights tomorrow: then nothing is found again
        return {"name": name, "commit": getattr(config, "_commit_hash", None) or secrets.token_hex(8)}
    parts = (".safetensors", ".bin", ".py", "config.json", ".index.json")
    files = sorted(path for path in folder.iterdir() if path.name.endswith(parts))
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
