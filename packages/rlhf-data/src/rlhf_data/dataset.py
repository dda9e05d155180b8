"""Samples as the trainer sees them: a numbered view on token stores."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from rlhf_data.encode import Sample
from rlhf_data.store import TokenStore


class TokenDataset:
    """Samples of one or several stores, in an order of their own; samples stay on disk until asked for.

    Attributes:
        lengths: int64 `[N]`, tokens of each sample.
        num_targets: int64 `[N]`, trained tokens of each sample.
        truncated: bool `[N]`, whether it was cut at `max_len`.
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
