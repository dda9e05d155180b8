"""A window of samples as this rank's micro-batches: the one place that divides work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from rlhf_core.batch import Batch
from rlhf_core.method import Window
from rlhf_core.ranks import Ranks
from rlhf_data.batching import plan_micro_batches


def micro_batches(
    window: Window, collate: Callable[[list[Any]], Batch], strategy: Ranks, size: int, token_budget: int | None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """This rank's share of a window; every rank has as many micro-batches, because each is a collective operation.

    Args:
        window: the samples.
        collate: samples to a batch.
        strategy: the ranks.
        size: most samples of a micro-batch, where tokens are not counted.
        token_budget: most tokens of a micro-batch; None to count samples.

    Yields:
        Places in the window of a micro-batch's samples, and these on the rank's device; no place and a batch without targets
        where other ranks have one micro-batch more.
    """
    for places in plan_micro_batches(window.lengths, strategy.world_size, size, token_budget)[strategy.rank]:
        if len(places):
            batch = collate([window[int(place)] for place in places])
        else:
            batch = collate([window[0]]).without_targets()
        yield places, batch.to(strategy.device)
