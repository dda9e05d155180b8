"""Estimates of the KL divergence from the reference, and rewards that pay for it.

Shapes: T tokens (or `[B, T]` padded). The log-ratio is log π(y) − log π_ref(y) of tokens sampled from π, in nats.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_losses._layout import Layout

KLKind = Literal["k1", "k2", "k3"]


def kl_estimate(logps: Tensor, reference_logps: Tensor, kind: KLKind = "k1", clamp: float | None = 10.0) -> Tensor:
    """Estimate of KL(π ‖ π_ref) from one sampled token, with x = log π(y) − log π_ref(y).

    k1 = x,  k2 = x² / 2,  k3 = e⁻ˣ − 1 + x

    As a reward (no gradient): k1 is unbiased; k3 is too, is never negative and varies less near x = 0; k2 is biased.
    As a loss (differentiated): take k2. Its gradient x ∇log π is in expectation that of KL(π ‖ π_ref); the gradient of
    k1 is zero in expectation, and that of k3 belongs to the other direction, KL(π_ref ‖ π).

    Args:
        logps: log π(y), any shape.
        reference_logps: log π_ref(y), same shape.
        kind: "k1", "k2" or "k3".
        clamp: x is limited to ±clamp, since k3 grows like e⁻ˣ and one odd token could outweigh a batch; beyond it the
            gradient is zero. None trusts every token.

    Returns:
        Nats, same shape, unreduced.

    Source: Schulman 2020, Approximating KL Divergence (joschu.net/blog/kl-approx.html); Tang and Munos 2025, for the
        gradients (arXiv:2506.09477).
    """
    x = logps - reference_logps
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    match kind:
        case "k1":
            return x
        case "k2":
            return x.square() / 2
        case "k3":
            return torch.expm1(-x) + x
        case _:
            raise ValueError(f"kind must be k1, k2 or k3, got {kind!r}")


def kl_penalised_rewards(
    kl: Tensor,
    sequence_rewards: Tensor,
    kl_coef: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Reward of each token, r_t = −c · kl_t + R · 1[t is the last token of the response].

    Args:
        kl: estimate of each token, see `kl_estimate`, nats, `[B, T]`, or `[T]` with `cu_seqlens`.
        sequence_rewards: R, reward of each whole response, `[B]`, or `[N]` with `cu_seqlens`.
        kl_coef: c, price of a nat.
        mask: True for response tokens, boolean `[B, T]`; by default all.
        cu_seqlens: cumulative sequence lengths from 0 to T of a ragged batch, `[N + 1]`; may come with a mask `[T]`.

    Returns:
        The shape of `kl`, without gradient; 0 outside the mask. A response without tokens gets no reward.

    Source: Stiennon et al. 2020, sec. 3.4 (arXiv:2009.01325); Ouyang et al. 2022, eq. 2 (arXiv:2203.02155).
    """
    with torch.no_grad():
        layout = Layout(kl, mask, cu_seqlens)
        layout.check_sequences(sequence_rewards, "sequence_rewards")
        rewards = layout.pack(-kl_coef * kl)
        last = (layout.lengths - 1).clamp(min=0)[:, None]
        paid = torch.where(layout.lengths > 0, sequence_rewards.to(rewards.dtype), 0)[:, None]
        return layout.unpack(rewards.scatter_add(1, last, paid)).to(kl.dtype)
