"""Packing: documents of different lengths into rows of one capacity, with hardly a token of it unused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PackedRows:
    """Documents laid out in rows.

    Attributes:
        order: int64 `[N]`, document numbers, row after row.
        offsets: int64 `[R + 1]`, where each row starts in `order`.
        tokens: int64 `[R]`, tokens of each row.
        capacity: tokens a row can hold.
    """

    order: np.ndarray
    offsets: np.ndarray
    tokens: np.ndarray
    capacity: int

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, stop in zip(self.offsets[:-1], self.offsets[1:], strict=True):
            yield self.order[start:stop]

    @property
    def utilisation(self) -> float:
        """Share of the rows' capacity that holds tokens, at most 1."""
        return float(self.tokens.sum() / (len(self) * self.capacity)) if len(self) else 1.0


def best_fit(lengths: np.ndarray, capacity: int) -> PackedRows:
    """Pack documents by best fit decreasing: the longest first, each into the fullest row that still has room.

    Lengths are whole numbers, so documents of one length are placed together and rows with the same space are
    interchangeable: the work grows with the number of distinct lengths, not of documents.

    Args:
        lengths: int `[N]`, tokens of each document, from 1 to `capacity`.
        capacity: tokens a row can hold.

    Raises:
        ValueError: a document does not fit into any row, or is empty.

    Source: Johnson, "Near-optimal bin packing algorithms" (1973): at most 11/9 of the fewest rows possible, plus 4.

    >>> [row.tolist() for row in best_fit(np.array([4, 8, 1, 4, 2, 1]), capacity=10)]
    [[1, 2, 5], [0, 3, 4]]
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, capacity)
    longest_first = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    spaces = _Spaces(capacity)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        spaces.place(length, count)
    row_of = np.repeat(np.array(spaces.rows, np.int64), np.array(spaces.repeats, np.int64))
    offsets = np.concatenate([[0], np.bincount(row_of, minlength=spaces.num_rows).cumsum()])
    tokens = np.bincount(row_of, weights=lengths[longest_first], minlength=spaces.num_rows).astype(np.int64)
    return PackedRows(longest_first[np.argsort(row_of, kind="stable")], offsets, tokens, capacity)


def _check(lengths: np.ndarray, capacity: int) -> None:
    if len(lengths) and lengths.max() > capacity:
        number = int(lengths.argmax())
        raise ValueError(f"document {number} has {lengths[number]} tokens, more than a row's capacity of {capacity}")
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"document {int(lengths.argmin())} has no tokens")


class _Spaces:
    """Rows by the space left in them.

    `rows` and `repeats` record the placing: for each entry, the row and how many documents in a row it was given.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.num_rows = 0
        self.rows: list[int] = []
        self.repeats: list[int] = []
        self._with_space: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._nonempty = 0  # bit s is set while some row has space s: finds the smallest that fits in one operation

    def place(self, length: int, count: int) -> None:
        """Give `count` documents of one length, the shortest so far, each to the fullest row with room."""
        while count:
            fitting = self._nonempty >> length
            if not fitting:
                self._open(length, count)
                return
            space = length + (fitting & -fitting).bit_length() - 1
            count -= self._fill(space, length, count)

    def _fill(self, space: int, length: int, count: int) -> int:
        """Fill rows with that space one by one: once a row got a document, it is the fullest for the next."""
        rows, each = self._with_space[space], space // length
        full = min(len(rows), count // each)
        if full:
            self._give(rows[-full:], space, length, each)
            del rows[-full:]
            placed = full * each
        else:
            self._give([rows.pop()], space, length, count)
            placed = count
        if not rows:
            self._nonempty &= ~(1 << space)
        return placed

    def _open(self, length: int, count: int) -> None:
        each = self.capacity // length
        full, rest = divmod(count, each)
        first, self.num_rows = self.num_rows, self.num_rows + full + (rest > 0)
        self._give(list(range(first, first + full)), self.capacity, length, each)
        if rest:
            self._give([first + full], self.capacity, length, rest)

    def _give(self, rows: list[int], space: int, length: int, each: int) -> None:
        """Give each of these rows, all with that space, `each` documents."""
        self.rows += rows
        self.repeats += [each] * len(rows)
        left = space - each * length
        if rows and left:
            self._with_space[left] += rows
            self._nonempty |= 1 << left
