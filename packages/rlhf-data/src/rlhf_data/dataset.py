"""Samples, pairs and labelled samples as the trainer sees them: numbered views on token stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from rlhf_data.encode import Sample
from rlhf_data.store import TokenStore


@dataclass(frozen=True, slots=True)
class SamplePair:
    """Two responses, of which one is preferred.

    Attributes:
        chosen: the preferred side.
        rejected: the other side.
        margin: by how much the chosen side is to win; 0 where nothing was said.
        shared: leading tokens, all of the prompt, that both sides have in common and that may be computed once; 0 where
            they are not shared.
    """

    chosen: Sample
    rejected: Sample
    margin: float
    shared: int


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """A response and whether it is desirable."""

    sample: Sample
    label: bool


class TokenDataset:
    """Samples of one or several stores, in an order of their own; samples stay on disk until asked for.

    Attributes:
        lengths: int64 `[N]`, tokens of each sample.
        num_targets: int64 `[N]`, trained tokens of each sample.
        truncated: bool `[N]`, whether it was cut at `max_len`.
        longest: tokens of the longest sample.
        fingerprint: changes when any sample, or their order, does.
    """

    def __init__(self, stores: Sequence[TokenStore], indices: np.ndarray | None = None):
        """View on `stores`.

        Args:
            stores: where the samples are.
            indices: int64 `[N]`, numbers of samples, counted through all stores; None for all of them in order.
        """
        self._stores = tuple(stores)
        self._starts = np.cumsum([0, *(len(store) for store in stores)])
        self._indices = np.arange(self._starts[-1]) if indices is None else np.asarray(indices, np.int64)
        self.lengths = self._gather([np.diff(store.offsets) for store in stores]).astype(np.int64)
        self.num_targets = self._gather([store.num_targets for store in stores]).astype(np.int64)
        self.truncated = self._gather([store.truncated for store in stores]).astype(np.bool_)
        self.longest = int(self.lengths.max(initial=0))
        digest = hashlib.blake2b(",".join(store.key for store in stores).encode(), digest_size=16)
        digest.update(self._indices.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, number: int) -> Sample:
        index = int(self._indices[number])
        store = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._stores[store].sample(index - int(self._starts[store]))

    def subset(self, indices: np.ndarray) -> TokenDataset:
        """View on some of these samples, in the order given."""
        return TokenDataset(self._stores, self._indices[np.asarray(indices, np.int64)])

    def _gather(self, columns: list[np.ndarray]) -> np.ndarray:
        joined = np.concatenate(columns) if columns else np.zeros(0)
        return joined[self._indices]


class RowDataset:
    """Rows of one or several stores, in an order of their own, each with its samples and the number that comes with it.

    Attributes:
        samples: all samples of all rows, in order.
        lengths: int64 `[N]`, tokens of each row as they are laid out in a batch.
        num_targets: int64 `[N]`, trained tokens of each row.
        truncated: bool `[N]`, whether a sample of it was cut at `max_len`.
        longest: tokens of the longest single sample.
        common: int64 `[N]`, prompt tokens that all samples of a row begin with, whether they are shared or not.
        fingerprint: changes when any sample, number, or their order, does.
    """

    samples_per_row = 1

    def __init__(self, stores: Sequence[TokenStore], rows: np.ndarray | None = None, share_prefix: bool = False):
        """View on `stores`.

        Args:
            stores: where the rows are.
            rows: int64 `[N]`, numbers of rows, counted through all stores; None for all of them in order.
            share_prefix: tokens that the samples of a row begin with are laid out once.
        """
        self._stores, self._share_prefix = tuple(stores), share_prefix
        total = sum(store.num_rows for store in stores)
        self._rows = np.arange(total) if rows is None else np.asarray(rows, np.int64)
        self.samples = TokenDataset(stores, samples_of_rows(stores, self._rows))
        self._values = np.concatenate([store.values for store in stores])[self._rows]
        self.common = np.concatenate([store.shared for store in stores])[self._rows].astype(np.int64)
        self._shared = self.common if share_prefix else np.zeros_like(self.common)
        self.lengths = self._by_row(self.samples.lengths).sum(1) - self._shared
        self.num_targets = self._by_row(self.samples.num_targets).sum(1)
        self.truncated = self._by_row(self.samples.truncated).any(1)
        self.longest = self.samples.longest
        digest = hashlib.blake2b(self.samples.fingerprint.encode(), digest_size=16)
        digest.update(self._values.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def subset(self, indices: np.ndarray) -> Self:
        """View on some of these rows, in the order given."""
        return type(self)(self._stores, self._rows[np.asarray(indices, np.int64)], self._share_prefix)

    def _by_row(self, column: np.ndarray) -> np.ndarray:
        """A column of the samples, `[N * samples_per_row]`, as `[N, samples_per_row]`."""
        return column.reshape(len(self), self.samples_per_row)


class PairDataset(RowDataset):
    """Pairs; `samples` are chosen0, rejected0, chosen1 and so on.

    Further attributes:
        margins: float32 `[N]`.
        shared: int64 `[N]`, prompt tokens that are laid out once; 0 where they are not shared.
    """

    samples_per_row = 2

    @property
    def margins(self) -> np.ndarray:
        return self._values

    @property
    def shared(self) -> np.ndarray:
        return self._shared

    def __getitem__(self, number: int) -> SamplePair:
        number = range(len(self))[number]
        chosen, rejected = self.samples[2 * number], self.samples[2 * number + 1]
        return SamplePair(chosen, rejected, float(self._values[number]), int(self._shared[number]))


class LabelledDataset(RowDataset):
    """Samples, each desirable or not.

    Further attributes:
        labels: bool `[N]`.
    """

    @property
    def labels(self) -> np.ndarray:
        return self._values != 0

    def __getitem__(self, number: int) -> LabelledSample:
        return LabelledSample(self.samples[number], bool(self._values[number]))


def samples_of_rows(stores: Sequence[TokenStore], rows: np.ndarray) -> np.ndarray:
    """Numbers of the samples of rows, both counted through all stores; a row's samples stay together, in order.

    Args:
        stores: where rows and samples are.
        rows: int64 `[R]`.

    Returns:
        int64 `[N]`; R of them unless documents were cut into pieces.
    """
    sizes = np.concatenate([np.diff(store.rows) for store in stores])
    starts = np.concatenate([[0], sizes.cumsum()])[:-1]
    counts = sizes[rows]
    ends = counts.cumsum()
    within = np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)
    return np.repeat(starts[rows], counts) + within
