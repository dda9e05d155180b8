from __future__ import annotations

import numpy as np
import pytest

from rlhf_data.errors import InputError
from rlhf_data.mixture import hold_out, limit, mix, parse_probs


def test_probabilities_are_normalised_when_they_are_rounded():
    assert parse_probs(None, ["a"]) is None
    assert parse_probs("1.0", ["a"]).tolist() == [1.0]
    probs = parse_probs("0.333,0.333, 0.333", ["a", "b", "c"])
    assert probs.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("0.5,0.5", ["2 probabilities for 3", "a, b, c", "0.5,0.5"]),
        ("0.5,0.5,x", ["must be numbers", "0.5,0.5,x"]),
        ("0.5,0.6,-0.1", ["from 0 to 1"]),
        ("nan,0.5,0.5", ["from 0 to 1"]),
        ("0.5,0.5,0.5", ["sums to 1.5", "a: 0.5, b: 0.5, c: 0.5"]),
        ("", ["must be numbers"]),
    ],
)
def test_bad_probabilities_are_refused_with_both_sides(value, parts):
    with pytest.raises(InputError) as error:
        parse_probs(value, ["a", "b", "c"])
    for part in ["--dataset_probs", *parts]:
        assert part in str(error.value)


def test_rows_are_drawn_by_probability_until_one_data_set_runs_out():
    rows = mix([1000, 5000], np.array([0.25, 0.75]), seed=3)
    first = rows[rows < 1000]
    second = rows[rows >= 1000] - 1000
    assert np.array_equal(first, np.arange(len(first)))
    assert np.array_equal(second, np.arange(len(second)))
    assert len(first) == 1000
    assert rows[-1] == 999
    assert len(second) == pytest.approx(3000, rel=0.1)
    assert np.array_equal(rows, mix([1000, 5000], np.array([0.25, 0.75]), seed=3))


def test_a_data_set_with_no_chance_is_never_drawn_and_one_alone_is_whole():
    assert mix([3, 5], np.array([0.0, 1.0]), seed=0).tolist() == [3, 4, 5, 6, 7]
    assert mix([4], np.array([1.0]), seed=0).tolist() == [0, 1, 2, 3]
    assert mix([2, 3], None, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_a_limit_takes_from_all_joined_data_sets():
    rows = np.arange(1000)
    assert limit(rows, 5, 0, in_order=True).tolist() == [0, 1, 2, 3, 4]
    drawn = limit(rows, 100, 0, in_order=False)
    assert len(drawn) == 100
    assert drawn.max() > 800
    assert np.array_equal(drawn, np.unique(drawn))
    assert limit(rows, None, 0, in_order=False) is rows


@pytest.mark.parametrize(("count", "ratio", "held"), [(2000, 0.03, 60), (10, 0.001, 1), (2, 0.99, 1), (5, 0.99, 4)])
def test_rows_are_held_out_and_trained_on_never_both(count, ratio, held):
    rows = np.arange(count) * 3
    left, out = hold_out(rows, ratio, seed=42)
    assert len(out) == held
    assert np.array_equal(np.sort(np.concatenate([left, out])), rows)
    assert np.array_equal(out, hold_out(rows, ratio, seed=42)[1])
