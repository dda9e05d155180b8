"""Losses and metrics of the value function.

Shapes: T tokens of responses, of any layout. The loss is unreduced, one per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses.masks import masked_mean


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None = 0.2) -> Tensor:
    """Squared error of the values, the worse of moving freely and moving at most ε.

    L = ½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

    Args:
        values: V, `[T]`.
        old_values: V_old, the values that the advantages were made with, `[T]`.
        returns: R, `[T]`.
        clip: ε, in units of the return; None gives ½ (V − R)².

    Returns:
        `[T]`.

    Source: Schulman et al. 2017, OpenAI baselines `ppo2`; Engstrom et al. 2020, sec. 3, item 1 (arXiv:2005.12729).
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * error
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (clipped - returns).square())


def value_clip_fraction(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.2, mask: Tensor | None = None
) -> Tensor:
    """Share of tokens whose gradient the clip of `clipped_value_loss` removes.

    Args:
        values: V, `[T]`.
        old_values: V_old, `[T]`.
        returns: R, `[T]`.
        clip: ε, in units of the return.
        mask: True for response tokens, boolean `[T]`; by default all.

    Returns:
        Scalar in [0, 1], without gradient.

    Source: Engstrom et al. 2020, sec. 3, item 1 (arXiv:2005.12729).
    """
    free = (values - returns).square()
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    removed = (clipped > free).detach()
    return masked_mean(removed.float(), torch.ones_like(removed) if mask is None else mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor | None = None) -> Tensor:
    """Share of the variance of the returns that the values explain, 1 − Var(R − V) / Var(R).

    Args:
        values: V, `[T]`.
        returns: R, `[T]`.
        mask: True for response tokens, boolean `[T]`; by default all.

    Returns:
        Scalar, without gradient: 1 is perfect, 0 no better than a constant, negative worse. 0 where returns do not
        vary and there is nothing to explain.

    Source: Schulman et al. 2017, OpenAI baselines, `explained_variance`.
    """
    if mask is None:
        mask = torch.ones_like(returns, dtype=torch.bool)
    variance = _variance(returns.detach(), mask)
    residual = _variance((returns - values).detach(), mask)
    return torch.where(variance > 0, 1 - residual / variance.clamp(min=torch.finfo(variance.dtype).tiny), 0)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
