from __future__ import annotations

import numpy as np
import pytest

from rlhf_data.packing import best_fit


def documents(kind: str, count: int, capacity: int = 4096) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "log-normal":
        return np.clip(rng.lognormal(5.9, 0.9, count).astype(np.int64), 1, capacity)
    return rng.integers(int(0.15 * capacity), int(0.75 * capacity) + 1, count)


def best_fit_one_by_one(lengths: np.ndarray, capacity: int) -> int:
    """Rows of best fit decreasing, by its definition."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
            spaces.append(min(fitting) - length)
        else:
            spaces.append(capacity - length)
    return len(spaces)


@pytest.mark.parametrize(
    ("kind", "count", "above_bound"), [("log-normal", 10_000, 0.0008), ("uniform", 100_000, 0.0062)]
)
def test_rows_are_nearly_as_few_as_can_be(kind, count, above_bound):
    lengths = documents(kind, count)
    rows = best_fit(lengths, 4096)
    fewest = -(-lengths.sum() // 4096)
    assert len(rows) <= fewest * (1 + above_bound)
    assert rows.utilisation == lengths.sum() / (len(rows) * 4096)


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_best_fit_and_unpacks_to_every_document_once(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 120)))
    rows = best_fit(lengths, capacity)
    assert np.array_equal(np.sort(rows.order), np.arange(len(lengths)))
    assert np.array_equal(np.concatenate(list(rows)), rows.order)
    assert [int(lengths[row].sum()) for row in rows] == rows.tokens.tolist()
    assert rows.tokens.max() <= capacity
    assert min(len(row) for row in rows) >= 1
    assert len(rows) == best_fit_one_by_one(lengths, capacity)


def test_packing_twice_gives_the_same_rows():
    lengths = documents("log-normal", 500)
    assert np.array_equal(best_fit(lengths, 4096).order, best_fit(lengths.copy(), 4096).order)


def test_documents_that_fit_nowhere_are_refused():
    with pytest.raises(ValueError, match="document 1 has 11 tokens, more than a row's capacity of 10"):
        best_fit(np.array([3, 11]), 10)
    with pytest.raises(ValueError, match="document 0 has no tokens"):
        best_fit(np.array([0, 1]), 10)


def test_nothing_packs_into_no_rows():
    rows = best_fit(np.zeros(0, np.int64), 10)
    assert len(rows) == 0
    assert rows.utilisation == 1.0
