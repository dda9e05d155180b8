"""Several data sets as one: joined whole, or drawn row by row with given probabilities."""

from __future__ import annotations

import math

import numpy as np

from rlhf_data.errors import InputError

ROUNDING = 1e-3
"""How far from 1 probabilities may sum, as in `0.333,0.333,0.333`."""


def parse_probs(value: str | None, specs: list[str], option: str = "--dataset_probs") -> np.ndarray | None:
    """Mixing probabilities of an option, float64 `[len(specs)]`, summing to 1; None if none are given."""
    if value is None:
        return None
    try:
        probs = [float(part) for part in value.split(",")]
    except ValueError:
        raise InputError(f"{option} {value!r} must be numbers separated by commas, such as 0.7,0.3") from None
    if len(probs) != len(specs):
        raise InputError(
            f"{option} {value} gives {len(probs)} probabilities for {len(specs)} data sets ({', '.join(specs)}); "
            "give one for each"
        )
    if not all(math.isfinite(prob) and prob >= 0 for prob in probs):
        raise InputError(f"{option} {value}: a probability is a number from 0 to 1")
    if abs(sum(probs) - 1) > ROUNDING:
        shown = ", ".join(f"{spec}: {prob:g}" for spec, prob in zip(specs, probs, strict=True))
        raise InputError(f"{option} {value} sums to {sum(probs):g} ({shown}); probabilities must sum to 1")
    return np.array(probs) / sum(probs)


def mix(counts: list[int], probs: np.ndarray | None, seed: int) -> np.ndarray:
    """Order of the rows of a mixture.

    Args:
        counts: rows of each data set.
        probs: float64 `[len(counts)]`, chance of each to give the next row; None joins them whole.
        seed: of the draws.

    Returns:
        int64 `[rows]`, rows numbered through all data sets. Those of one data set come in their order, none twice; with
        `probs` they end with the last row of the data set that is exhausted first.
    """
    total = sum(counts)
    if probs is None or len(counts) == 1:
        return np.arange(total)
    draws = np.random.default_rng(seed).choice(len(counts), size=total, p=probs)
    rows, end = np.empty(total, np.int64), total
    first = 0
    for number, count in enumerate(counts):
        taken = np.flatnonzero(draws == number)
        rows[taken] = first + np.arange(len(taken))
        if len(taken) >= count and probs[number] > 0:
            end = min(end, int(taken[count - 1]) + 1 if count else 0)
        first += count
    return rows[:end]


def limit(rows: np.ndarray, max_rows: int | None, seed: int, in_order: bool) -> np.ndarray:
    """At most `max_rows` of the rows: the first ones if they are mixed already, else drawn from all of them."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    if in_order:
        return rows[:max_rows]
    return rows[np.sort(np.random.default_rng(seed).choice(len(rows), size=max_rows, replace=False))]


def hold_out(rows: np.ndarray, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into those to train on and those held out, at least one of each, drawn with the seed, in order."""
    count = min(max(1, round(len(rows) * ratio)), len(rows) - 1)
    held = np.zeros(len(rows), np.bool_)
    held[np.random.default_rng([seed, 1]).choice(len(rows), size=count, replace=False)] = True
    return rows[~held], rows[held]
