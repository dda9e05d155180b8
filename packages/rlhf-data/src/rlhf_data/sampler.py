"""The order of training: global, fixed by the seed, resumable at any step, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Progress:
    """How far training has come: whole epochs done, and samples consumed of the current one, over all ranks."""

    epoch: int = 0
    consumed: int = 0

    def to_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"epoch": self.epoch, "consumed": self.consumed}

    @classmethod
    def from_dict(cls, state: dict[str, int]) -> Progress:
        """Inverse of `to_dict`."""
        return cls(int(state["epoch"]), int(state["consumed"]))


class Order:
    """An endless series of epochs, each a permutation of all samples that depends on seed and epoch only.

    Not on the number of ranks: which rank trains a sample is decided later, so a run may resume on more or fewer.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed

    def epoch(self, epoch: int) -> np.ndarray:
        """Samples of an epoch, counted from 0, in order: int64 `[num_samples]`."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def windows(self, train_batch_size: int, progress: Progress | None = None) -> Iterator[tuple[np.ndarray, Progress]]:
        """Samples of each optimizer step from `progress` on, without end.

        An epoch's last window holds what is left of it, so every sample is seen exactly once per epoch.

        Yields:
            Sample numbers, int64 `[at most train_batch_size]`, and the progress once the step is done.
        """
        if train_batch_size < 1:
            raise ValueError(f"a window needs at least one sample, got {train_batch_size}")
        progress = progress or Progress()
        if not 0 <= progress.consumed <= self.num_samples:
            raise ValueError(f"{progress} is not from this data: it has {self.num_samples} samples")
        epoch, start = progress.epoch, progress.consumed
        while True:
            samples = self.epoch(epoch)
            while start < self.num_samples:
                stop = min(start + train_batch_size, self.num_samples)
                after = Progress(epoch, stop) if stop < self.num_samples else Progress(epoch + 1, 0)
                yield samples[start:stop], after
                start = stop
            epoch, start = epoch + 1, 0

    def steps_per_epoch(self, train_batch_size: int) -> int:
        """Optimizer steps of one epoch, the last one with what is left."""
        return -(-self.num_samples // train_batch_size)
