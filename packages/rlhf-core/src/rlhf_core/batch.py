"""The one batch type: samples laid end to end, nothing padded.

Shapes: N samples, T tokens over all samples, M targets (tokens that are predicted and trained).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from rlhf_data.encode import Sample


@dataclass(frozen=True)
class Batch:
    """Samples end to end. Whether a model call pads them is the call's business (see `Policy`); losses never see it.

    Two samples, `[7, 8, 9]` of which the last two tokens are targets, and `[5, 6]` of which the last is:

        input_ids    7 8 9 5 6        position_ids 0 1 2 0 1
        cu_seqlens   0 3 5            targets      1 2 4       num_targets 3
    """

    input_ids: Tensor
    """Token ids, `[T]` int64."""

    position_ids: Tensor
    """Position of each token in its sample, `[T]` int64."""

    cu_seqlens: Tensor
    """Where each sample starts, and the end, `[N+1]` int32."""

    targets: Tensor
    """Places in `[0, T)` of the target tokens, `[M]` int64, ascending. Never the first place of a sample."""

    lengths: tuple[int, ...]
    """Length of each sample in tokens; on the host, so that laying out a batch never waits for a device."""

    @classmethod
    def from_samples(cls, samples: Sequence[Sample]) -> Batch:
        """Lay `samples` end to end."""
        lengths = [len(sample.input_ids) for sample in samples]
        mask = np.concatenate([sample.target_mask for sample in samples])
        return cls(
            input_ids=torch.from_numpy(np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            targets=torch.from_numpy(np.flatnonzero(mask)),
            lengths=tuple(lengths),
        )

    def without_targets(self) -> Batch:
        """The same tokens with nothing to train: what a rank runs when the others have one micro-batch more."""
        return Batch(self.input_ids, self.position_ids, self.cu_seqlens, self.targets[:0], self.lengths)

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(
            **{name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in moved.items()}
        )

    @property
    def num_samples(self) -> int:
        return len(self.lengths)

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def labels(self) -> Tensor:
        """The target tokens, `[M]`; each is predicted at the place before it."""
        return self.input_ids[self.targets]

    @cached_property
    def sample_of_token(self) -> Tensor:
        """Which sample each token belongs to, `[T]` int64."""
        counts = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=counts.device), counts, output_size=self.input_ids.numel()
        )
