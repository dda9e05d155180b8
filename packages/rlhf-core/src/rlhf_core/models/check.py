"""The start-up check: what every number rests on, asserted on the loaded model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_core.batch import Batch
from rlhf_data.encode import Sample

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15}
"""Largest difference between two ways to compute log-probs (nats) or rewards (of the largest): any in float32, the mean in bfloat16."""


def probes(vocab_size: int) -> list[Sample]:
    """Three short random samples, of which the last two begin with the same four tokens."""
    ids = torch.randint(vocab_size, (3, 9), generator=torch.Generator().manual_seed(0)).numpy().astype(np.int32)
    ids[2, :4] = ids[1, :4]
    first_target = [1, 4, 4]
    samples = []
    for row, start, length in zip(ids, first_target, (7, 6, 9), strict=True):
        samples.append(Sample(row[:length], np.arange(length) >= start))
    return samples


@torch.no_grad()
def check_model(
    model: Callable[..., Any], verb: str, vocab_size: int, device: torch.device, dtype: torch.dtype, share_prefix: bool
) -> None:
    """Assert that samples do not see each other, that shared prefixes change nothing, and that the head is the model's own.

    Random samples are run together through our call, and apart through the model's own.

    Args:
        model: a prepared `Policy` or `RewardModel`.
        verb: `token_logps` or `rewards`.
        vocab_size: ids to draw from.
        device: where the model is.
        dtype: what it computes in.
        share_prefix: whether the run lays shared prefixes once.

    Raises:
        ValueError: numbers differ by more than the number format explains.
    """
    first, *pair = probes(vocab_size)
    batch = Batch.from_groups([((first,), 0), (pair, 4 if share_prefix else 0)]).to(device)
    ours, _ = model(verb, batch)
    own = apart_logps if verb == "token_logps" else apart_rewards
    theirs = torch.cat([own(model, sample, device) for sample in (first, *pair)])
    gaps = (ours - theirs).abs()
    if verb == "rewards":  # log-probs are nats, rewards have any scale
        gaps = gaps / theirs.abs().max().clamp(min=0.1)
    difference = (gaps.max() if dtype == torch.float32 else gaps.mean()).item()  # bfloat16 rounds logits by up to 0.06
    if not difference <= TOLERANCE[dtype]:
        shared = ", or a segment does not see the prefix it continues (try --no_share_prefix)" if share_prefix else ""
        raise ValueError(
            f"this model's numbers differ by {difference:.3g} between its own forward pass and ours: either samples laid "
            f"end to end see each other in it (try without --flash_attn and --packing_samples){shared}, or its head does "
            "more than the linear map, scale and soft cap that are handled"
        )


def apart_logps(model: Callable[..., Any], sample: Sample, device: torch.device) -> Tensor:
    """Log-probs of one sample's targets by the plain formula."""
    ids = torch.from_numpy(sample.input_ids).long().to(device)
    targets = torch.from_numpy(np.flatnonzero(sample.target_mask)).to(device)
    logps = model("full_logits", ids).float().log_softmax(-1)
    return logps[targets - 1, ids[targets]]


def apart_rewards(model: Callable[..., Any], sample: Sample, device: torch.device) -> Tensor:
    """The reward of one sample by the model's own call."""
    return model("full_rewards", torch.from_numpy(sample.input_ids).long().to(device))
