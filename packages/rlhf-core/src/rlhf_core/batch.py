"""The one batch type: samples laid end to end, nothing padded, and what samples have in common laid once.

Shapes: N samples, S segments (runs of tokens that are laid without a break), T tokens over all segments, M targets (tokens
that are predicted and trained). Where no samples share a prefix, segments are samples and S = N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_data.encode import Sample
from rlhf_losses import segment_sum


@dataclass(frozen=True)
class Batch:
    """Samples end to end. Whether a model call pads them is the call's business (see `Backbone`); losses never see it.

    Two samples, `[7, 8, 9]` of which the last two tokens are targets, and `[5, 6]` of which the last is:

        input_ids    7 8 9 5 6        position_ids  0 1 2 0 1        cu_seqlens     0 3 5
        targets      1 2 4            predictors    0 1 3            target_bounds  0 2 3

    Two samples that begin alike, `[7, 8, 1]` and `[7, 8, 2, 3]`, what follows `[7, 8]` being targets: the prefix is a
    segment of its own, which the segments of both continue.

        input_ids    7 8 1 2 3        position_ids  0 1 2 2 3        cu_seqlens     0 2 3 5     prefixes  -1 0 0
        targets      2 3 4            predictors    1 1 3            target_bounds  0 1 3
    """

    input_ids: Tensor
    """Token ids, `[T]` int64."""

    position_ids: Tensor
    """Position of each token in its sample, `[T]` int64."""

    cu_seqlens: Tensor
    """Where each segment starts, and the end, `[S+1]` int32."""

    targets: Tensor
    """Places in `[0, T)` of the target tokens, `[M]` int64, ascending. Never the first place of a sample."""

    predictors: Tensor
    """Places whose hidden states predict the targets, `[M]` int64: where the token before each target is."""

    target_bounds: Tensor
    """Where each sample's targets start, and the end, `[N+1]` int64."""

    ends: Tensor
    """Place of each sample's last token, `[N]` int64."""

    lengths: tuple[int, ...]
    """Tokens of each segment; on the host, so that laying out a batch never waits for a device."""

    prefixes: tuple[int, ...] | None = None
    """The segment that each segment continues, or -1; None where nothing is shared."""

    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What else a method knows of its samples (margins, labels, reference log-probs), by name."""

    @classmethod
    def from_samples(cls, samples: Sequence[Sample], **columns: Tensor) -> Batch:
        """Lay `samples` end to end."""
        return cls.from_groups([((sample,), 0) for sample in samples], **columns)

    @classmethod
    def from_groups(cls, groups: Sequence[tuple[Sequence[Sample], int]], **columns: Tensor) -> Batch:
        """Lay groups of samples end to end, the prefix of each group once.

        Args:
            groups: samples, and how many leading tokens they have in common that are laid once (0 to share nothing). No
                target may be among these tokens.
            **columns: kept as `columns`.
        """
        layout = _Layout()
        for samples, shared in groups:
            layout.add(samples, shared)
        return layout.batch(columns)

    def without_targets(self) -> Batch:
        """The same tokens with nothing to train: what a rank runs when the others have one micro-batch more."""
        return replace(
            self,
            targets=self.targets[:0],
            predictors=self.predictors[:0],
            target_bounds=self.target_bounds[:1],
            ends=self.ends[:0],
            columns={name: column[:0] for name, column in self.columns.items()},
        )

    def to(self, device: torch.device) -> Batch:
        def moved(x: object) -> object:
            return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

        columns = {name: column.to(device, non_blocking=True) for name, column in self.columns.items()}
        others = {f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "columns"}
        return Batch(**others, columns=columns)  # type: ignore[arg-type]

    @property
    def num_samples(self) -> int:
        return self.ends.numel()

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def labels(self) -> Tensor:
        """The target tokens, `[M]`."""
        return self.input_ids[self.targets]

    @property
    def targets_per_sample(self) -> Tensor:
        """Number of targets of each sample, `[N]` int64."""
        return self.target_bounds.diff()

    def sum_by_sample(self, values: Tensor) -> Tensor:
        """Sum `[M]` values of targets over each sample, `[N]`."""
        return segment_sum(values, self.target_bounds)

    @cached_property
    def segment_of_token(self) -> Tensor:
        """Which segment each token is in, `[T]` int64."""
        counts = self.cu_seqlens.diff().long()
        return torch.repeat_interleave(
            torch.arange(len(self.lengths), device=counts.device), counts, output_size=self.input_ids.numel()
        )

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Where segments continue others: the row of keys in which every prefix is laid before each that continues it.

        `key_places` `[K]` int64, places in `[0, T)`; `cu_seq_lens_k` `[S+1]` int32, its limits; `max_length_k`.
        """
        assert self.prefixes is not None
        starts = np.concatenate([[0], np.cumsum(self.lengths)])
        segments = [np.arange(starts[s], starts[s + 1]) for s in range(len(self.lengths))]
        keys = [
            own if prefix < 0 else np.concatenate([segments[prefix], own])
            for own, prefix in zip(segments, self.prefixes, strict=True)
        ]
        lengths = [len(places) for places in keys]
        device = self.input_ids.device
        return {
            "key_places": torch.from_numpy(np.concatenate(keys)).to(device),
            "cu_seq_lens_k": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device),
            "max_length_k": max(lengths),
        }


class _Layout:
    """Segments and targets while they are laid."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.predictors: list[np.ndarray] = []
        self.ends: list[int] = []
        self.prefixes: list[int] = []
        self.tokens = 0

    def add(self, samples: Sequence[Sample], shared: int) -> None:
        prefix, last = -1, -1
        if shared:
            prefix = self.segment(samples[0].input_ids[:shared], 0, -1)
            last = self.tokens - 1
        for sample in samples:
            start = self.tokens
            self.segment(sample.input_ids[shared:], shared, prefix)
            targets = np.flatnonzero(sample.target_mask) + (start - shared)
            assert not len(targets) or targets[0] >= start, "a target is part of a shared prefix"
            self.targets.append(targets)
            self.predictors.append(np.where(targets == start, last, targets - 1))
            self.ends.append(self.tokens - 1)

    def segment(self, ids: np.ndarray, position: int, prefix: int) -> int:
        """Lay one segment, and give its number."""
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.prefixes.append(prefix)
        self.tokens += len(ids)
        return len(self.ids) - 1

    def batch(self, columns: Mapping[str, Tensor]) -> Batch:
        lengths = [len(ids) for ids in self.ids]
        counts = [len(targets) for targets in self.targets]
        return Batch(
            input_ids=torch.from_numpy(np.concatenate(self.ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate(self.positions)),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            targets=torch.from_numpy(np.concatenate(self.targets)),
            predictors=torch.from_numpy(np.concatenate(self.predictors)),
            target_bounds=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
            ends=torch.tensor(self.ends),
            lengths=tuple(lengths),
            prefixes=tuple(self.prefixes) if max(self.prefixes) >= 0 else None,
            columns=columns,
        )
