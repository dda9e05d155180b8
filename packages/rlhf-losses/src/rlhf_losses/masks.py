"""Sums, means and whitening over the positions that a mask selects.

Positions outside the mask are selected away with `where`, never multiplied by zero: 0 · NaN is NaN, and a NaN or inf
in padding would reach the value or the gradient.

Shapes: `values` of any shape, `mask` boolean and broadcastable to it, True where a position counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Spread below this share of the root mean square is rounding of a constant and not signal.
RELATIVE_ZERO = 1e-6


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the selected values, Σ_{i: m_i} x_i.

    Args:
        values: any shape.
        mask: True where a value counts, boolean, broadcastable to `values`.
        dim: dimension to reduce; None reduces all.

    Returns:
        Scalar, or the shape of `values` without `dim`; 0 where nothing is selected.
    """
    return torch.where(_boolean(mask), values, 0).sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the selected values, Σ_{i: m_i} x_i / Σ_i m_i.

    A mean of such means over unequal batches is not the mean of all; for that, sum and divide by the global count.

    Args:
        values: any shape.
        mask: True where a value counts, boolean, broadcastable to `values`.
        dim: dimension to reduce; None reduces all.

    Returns:
        Scalar, or the shape of `values` without `dim`; 0 where nothing is selected.
    """
    count = _boolean(mask).expand_as(values).sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the selected values, (Σ m, Σ m x, Σ m x²).

    They add up over ranks and micro-batches: all-reduce them with a sum, then pass them to `masked_whiten`.

    Args:
        values: any shape.
        mask: True where a value counts, boolean, broadcastable to `values`.

    Returns:
        `[3]`, float64 (a variance is a small difference of large sums), without gradient.
    """
    with torch.no_grad():
        mask = _boolean(mask).expand_as(values)
        selected = torch.where(mask, values, 0).double()
        return torch.stack([mask.sum().double(), selected.sum(), selected.square().sum()])


def masked_whiten(values: Tensor, mask: Tensor, *, moments: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Selected values scaled to unit variance and shifted to zero mean.

    x' = (x − μ) / σ,  μ = Σ m x / Σ m,  σ² = Σ m x² / Σ m − μ²  (population variance)

    Args:
        values: any shape.
        mask: True where a value counts, boolean, broadcastable to `values`.
        moments: count, sum and sum of squares over all ranks, `[3]`, see `masked_moments`; by default of `values`.
        shift_mean: if False the mean is added back and only the scale changes.

    Returns:
        The shape of `values`; 0 outside the mask. Values that do not vary have no scale and become exactly 0 (their
        mean with `shift_mean=False`).
    """
    count, total, squares = (masked_moments(values, mask) if moments is None else moments).unbind()
    count = count.clamp(min=1)
    mean, mean_square = total / count, squares / count
    variance = mean_square - mean**2
    varies = variance > RELATIVE_ZERO**2 * mean_square
    # Two selections: rsqrt(0) outside the branch would still be a NaN in the gradient.
    scale = torch.where(varies, torch.where(varies, variance, 1.0).rsqrt(), 0.0)
    centred = torch.where(_boolean(mask), values, mean.to(values.dtype)) - mean.to(values.dtype)
    whitened = centred * scale.to(values.dtype)
    return whitened if shift_mean else torch.where(mask, whitened + mean.to(values.dtype), 0)


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}; pass mask.bool()")
    return mask
