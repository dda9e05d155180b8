"""Rollouts and experience as the batches that models take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from rlhf_core.batch import Batch
from rlhf_data.encode import Sample
from rlhf_ray.cluster.group import Part
from rlhf_ray.rollout import Rollout

WORTH_SHARING = 8
"""Tokens from which on a prompt is laid once for several responses."""


def collate(batch: Rollout, *, share: bool, columns: Sequence[str] = ()) -> Batch:
    """Samples end to end, all response tokens being targets.

    Args:
        batch: N responses of M tokens together.
        share: lay a prompt once for all responses to it that follow each other.
        columns: what else models or losses need to know of the samples: names of columns of `batch`, which become tensors of
            as many entries (`[M]` or `[N]`) under the same name. Those that `batch` does not have are left out.
    """
    kept = {name: getattr(batch, name) for name in columns}
    groups = groupby(range(len(batch)), key=lambda number: int(batch.groups[number]) if share else number)
    laid = [group_of(batch, list(numbers)) for _, numbers in groups]
    return Batch.from_groups(
        laid, **{name: torch.tensor(values) for name, values in kept.items() if values is not None}
    )


def collate_part(part: Part, *, share: bool, columns: Sequence[str] = ()) -> Batch:
    """A rank's micro-batch; one that idles has no targets."""
    batch = collate(part.batch, share=share, columns=columns)
    return batch.without_targets() if part.idle else batch


def group_of(batch: Rollout, numbers: Sequence[int]) -> tuple[list[Sample], int]:
    """Samples with one prompt as `Batch.from_groups` takes them, and how many of their tokens are laid once."""
    prompt = int(batch.prompt_lengths[numbers[0]])
    samples = [sample_of(batch, number) for number in numbers]
    return samples, prompt if len(samples) > 1 and prompt >= WORTH_SHARING else 0


def sample_of(batch: Rollout, number: int) -> Sample:
    """One sample, the response being its targets."""
    ids, prompt = batch.sample(number), int(batch.prompt_lengths[number])
    mask = np.arange(len(ids)) >= prompt
    return Sample(ids, mask, truncated=bool(batch.truncated[number]))
