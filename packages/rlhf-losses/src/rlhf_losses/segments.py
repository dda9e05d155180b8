"""Sums and means over the sequences of a ragged batch.

Shapes: T tokens of all sequences in a row, N sequences. `cu_seqlens` `[N + 1]` counts tokens from 0 to T: sequence i
is `values[cu_seqlens[i]:cu_seqlens[i + 1]]`, and may be empty.
"""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, total: int | None = None) -> Tensor:
    """Which sequence each token belongs to.

    `values_per_sequence[segment_ids(cu_seqlens)]` gives every token the value of its sequence.

    Args:
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`.
        total: T, if known; it spares a GPU one synchronisation.

    Returns:
        Indices in [0, N), `[T]`, int64.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be [N + 1], got {list(cu_seqlens.shape)}; an empty batch is [0]")
    sequences = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return sequences.repeat_interleave(cu_seqlens.diff(), output_size=total)


def segment_sum(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of each sequence, Σ_{t ∈ sequence i, m_t} x_t.

    With token log-probs of responses this is the log-probability of each response.

    Args:
        values: one per token, `[T]`.
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`.
        mask: True where a token counts, boolean `[T]`; by default all do.

    Returns:
        `[N]`; 0 for a sequence without tokens.
    """
    if values.ndim != 1:
        raise ValueError(f"values must be [T], got {list(values.shape)}; for a padded batch use masked_sum(..., dim=1)")
    if mask is not None:
        values = torch.where(mask, values, 0)  # never multiply: 0 · NaN is NaN
    ids = segment_ids(cu_seqlens, len(values))
    return values.new_zeros(len(cu_seqlens) - 1).index_add(0, ids, values)


def segment_mean(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of each sequence, Σ_{t ∈ sequence i, m_t} x_t / Σ_{t ∈ sequence i} m_t.

    Args:
        values: one per token, `[T]`.
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`.
        mask: True where a token counts, boolean `[T]`; by default all do.

    Returns:
        `[N]`; 0 for a sequence without tokens.
    """
    counts = cu_seqlens.diff() if mask is None else segment_sum(mask.long(), cu_seqlens)
    return segment_sum(values, cu_seqlens, mask) / counts.clamp(min=1)
