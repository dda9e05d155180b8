"""One optimizer step's samples to ranks and micro-batches: the same number for every rank, the work shared fairly."""

from __future__ import annotations

import numpy as np

from rlhf_data.packing import best_fit


def plan_micro_batches(
    lengths: np.ndarray, world_size: int, micro_batch_size: int, token_budget: int | None = None
) -> list[list[np.ndarray]]:
    """Divide the samples of one optimizer step.

    All ranks get the same number of micro-batches, because each is a collective operation; where there are not enough
    samples, a micro-batch is empty and its rank computes a dummy. The plan depends on the arguments only, so every rank
    computes the same one and takes its part.

    Args:
        lengths: int `[N]`, tokens of each sample of the step.
        world_size: number of ranks.
        micro_batch_size: most samples in a micro-batch; not used with a token budget.
        token_budget: most tokens in a micro-batch, filled by best fit; None to count samples instead.

    Returns:
        For each rank its micro-batches, each int64 positions in `lengths`, ascending. Each position is there once.
        Micro-batches that run at the same time on different ranks have about the same number of tokens.
    """
    lengths = np.asarray(lengths, np.int64)
    if world_size < 1 or micro_batch_size < 1:
        raise ValueError(f"world_size ({world_size}) and micro_batch_size ({micro_batch_size}) must be at least 1")
    if token_budget is None:
        return _by_count(lengths, world_size, micro_batch_size)
    return _by_tokens(lengths, world_size, token_budget)


def _by_count(lengths: np.ndarray, world_size: int, micro_batch_size: int) -> list[list[np.ndarray]]:
    """Deal samples to ranks, and cut each rank's into micro-batches of similar lengths: there is little to pad."""
    per_rank = -(-len(lengths) // (micro_batch_size * world_size))
    if per_rank == 0:
        return [[] for _ in range(world_size)]
    ranks = _deal(lengths, world_size)
    return [[np.sort(batch) for batch in np.array_split(longest_first, per_rank)] for longest_first in ranks]


def _by_tokens(lengths: np.ndarray, world_size: int, token_budget: int) -> list[list[np.ndarray]]:
    """Fill micro-batches to the budget, halve the fullest until every rank can have the same number, and deal them."""
    batches = list(best_fit(lengths, token_budget))
    while len(batches) % world_size:
        divisible = [number for number, batch in enumerate(batches) if len(batch) > 1]
        if not divisible:
            batches.append(np.zeros(0, np.int64))
            continue
        fullest = max(divisible, key=lambda number: int(lengths[batches[number]].sum()))
        batches[fullest : fullest + 1] = _halve(batches[fullest], lengths)
    tokens = np.array([lengths[batch].sum() for batch in batches], np.int64)
    return [[np.sort(batches[number]) for number in rank] for rank in _deal(tokens, world_size)]


def _halve(batch: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Two parts of about equally many tokens: the longest first, each to the part with less."""
    parts: list[list[int]] = [[], []]
    tokens = [0, 0]
    for position in batch[np.argsort(-lengths[batch], kind="stable")].tolist():
        lighter = int(tokens[1] < tokens[0])
        parts[lighter].append(position)
        tokens[lighter] += int(lengths[position])
    return [np.array(part, np.int64) for part in parts]


def _deal(weights: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Deal items to ranks in rounds of one for each, heaviest first, the heaviest of a round to the lightest rank.

    Args:
        weights: int `[N]`, of each item.
        world_size: number of ranks.

    Returns:
        For each rank int64 item numbers, heaviest first; no rank has two more than another.
    """
    heaviest_first = np.argsort(-weights, kind="stable").tolist()
    ranks: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for start in range(0, len(heaviest_first), world_size):
        lightest_first = sorted(range(world_size), key=lambda rank: (loads[rank], rank))
        for rank, item in zip(lightest_first, heaviest_first[start : start + world_size], strict=False):
            ranks[rank].append(item)
            loads[rank] += int(weights[item])
    return [np.array(rank, np.int64) for rank in ranks]
