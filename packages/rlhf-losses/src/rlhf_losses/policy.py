"""Policy-gradient losses per token, their importance weights, and the metrics that watch them.

Shapes: T tokens of responses, of any layout (`[T]` or `[B, T]`); N sequences. `logps` are of sampled tokens under the
policy in training, `old_logps` under the policy that the batch is an update of. A log-ratio is limited to ±20 (a
factor of 5e8) before it is exponentiated; beyond that its gradient is zero. Every loss is unreduced, one per token:
select response tokens, sum, and divide by the global count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_losses.kl import kl_estimate
from rlhf_losses.masks import masked_mean
from rlhf_losses.segments import segment_ids, segment_mean

MAX_LOG_RATIO = 20.0


def ppo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate of proximal policy optimisation.

    L = −min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A),  ρ = π(y) / π_old(y);  with dual clip L ≤ c |A| where A < 0

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        advantages: A, `[T]`.
        clip_low: ε_low.
        clip_high: ε_high; larger than ε_low leaves rare tokens room to grow (DAPO).
        dual_clip: c > 1, bounds the loss of bad tokens that became likely; None does not.

    Returns:
        `[T]`; the gradient is −A ∇log π at ρ = 1, and exactly 0 where clipped.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347); Ye et al. 2019, eq. 4, for dual clip (arXiv:1912.09729); Yu
        et al. 2025, eq. 10, for two clip ranges (arXiv:2503.14476).
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be greater than 1, got {dual_clip}; pass None to switch it off")
    ratio = _ratio(logps - old_logps)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


def gspo_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Tensor:
    """Clipped surrogate on the ratio of whole sequences, per token.

    L_t = −min(s_t A, clip(s_t, 1 − ε_low, 1 + ε_high) A),  s_t = sg[s] · π(y_t) / sg[π(y_t)]
    s = exp(1/|y| Σ_t (log π(y_t) − log π_old(y_t))), see `sequence_log_ratio`

    In value s_t is the ratio of its sequence; its gradient is that of the token. The mean over the tokens of a
    sequence (`segment_mean`) is GSPO's loss of that sequence, in value and gradient.

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        advantages: A, `[T]`.
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`.
        mask: True for response tokens, boolean `[T]`; by default all.
        clip_low: ε_low; sequence ratios vary far less than those of tokens.
        clip_high: ε_high.

    Returns:
        `[T]`.

    Source: Zheng et al. 2025, eq. 5 and 13 to 15 (arXiv:2507.18071).
    """
    log_ratio = sequence_log_ratio(logps, old_logps, cu_seqlens, mask).detach()
    # Relative to the old policy, whose log-probs are then zero.
    straight_through = log_ratio[segment_ids(cu_seqlens, len(logps))] + logps - logps.detach()
    return ppo_loss(straight_through, torch.zeros_like(logps), advantages, clip_low=clip_low, clip_high=clip_high)


def sequence_log_ratio(logps: Tensor, old_logps: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Length-normalised log-ratio of each sequence, log s = 1/|y| Σ_t (log π(y_t) − log π_old(y_t)).

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        cu_seqlens: cumulative sequence lengths from 0 to T, `[N + 1]`.
        mask: True for response tokens, boolean `[T]`; by default all.

    Returns:
        Nats per token, `[N]`; 0 for a sequence without tokens.

    Source: Zheng et al. 2025, eq. 7 (arXiv:2507.18071).
    """
    return segment_mean(logps - old_logps, cu_seqlens, mask)


def cispo_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_low: float = 1.0, clip_high: float = 0.2
) -> Tensor:
    """REINFORCE with a clipped importance weight, −sg[clip(ρ, 1 − ε_low, 1 + ε_high)] A log π(y).

    Unlike PPO's, the clip limits how much a token weighs and never removes its gradient.

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        advantages: A, `[T]`.
        clip_low: ε_low; 1 sets no lower limit.
        clip_high: ε_high.

    Returns:
        `[T]`.

    Source: MiniMax 2025, MiniMax-M1, eq. 4 and 5 (arXiv:2506.13585).
    """
    weight = _ratio(logps - old_logps).detach().clamp(1 - clip_low, 1 + clip_high)
    return -weight * advantages * logps


def truncated_importance_weights(
    train_logps: Tensor, rollout_logps: Tensor, cap: float = 2.0, lower: float | None = None
) -> Tensor:
    """Weights that correct for tokens sampled by another engine than the trainer's, min(π_train / π_rollout, cap).

    Multiply the loss of each token by them. Engines differ in kernels and precision, so their log-probs differ even
    for equal weights, most where a token is unlikely.

    Args:
        train_logps: log-probs under the trainer's old policy, `[T]`.
        rollout_logps: log-probs that the inference engine reported, `[T]`.
        cap: upper limit of a weight.
        lower: weights below this become 0, and the token is dropped; None keeps all.

    Returns:
        `[T]`, without gradient.

    Source: Espeholt et al. 2018, sec. 4.1, truncated importance weights (arXiv:1802.01561); Yao et al. 2025, Your
        Efficient RL Framework Secretly Brings You Off-Policy RL Training.
    """
    ratio = _ratio(train_logps - rollout_logps).detach()
    kept = ratio if lower is None else torch.where(ratio < lower, 0, ratio)
    return kept.clamp(max=cap)


def clip_fraction(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """Share of tokens whose gradient PPO's clip removes: ρ > 1 + ε_high where A > 0, or ρ < 1 − ε_low where A < 0.

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        advantages: A, `[T]`.
        clip_low: ε_low.
        clip_high: ε_high.
        mask: True for response tokens, boolean `[T]`; by default all.

    Returns:
        Scalar in [0, 1], without gradient.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347).
    """
    ratio = _ratio(logps - old_logps).detach()
    clipped = torch.where(advantages > 0, ratio > 1 + clip_high, (ratio < 1 - clip_low) & (advantages < 0))
    return masked_mean(clipped.float(), torch.ones_like(clipped) if mask is None else mask)


def approx_kl(logps: Tensor, old_logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """How far the policy has moved from the old one, mean of k3 = ρ − 1 − log ρ, an estimate of KL(π_old ‖ π).

    The tokens were sampled from the old policy, so it is the first argument of the divergence.

    Args:
        logps: log π(y), `[T]`.
        old_logps: log π_old(y), `[T]`.
        mask: True for response tokens, boolean `[T]`; by default all.

    Returns:
        Nats per token, scalar, without gradient.

    Source: Schulman 2020, Approximating KL Divergence (joschu.net/blog/kl-approx.html).
    """
    k3 = kl_estimate(old_logps, logps, "k3", clamp=MAX_LOG_RATIO).detach()
    return masked_mean(k3, torch.ones_like(k3, dtype=torch.bool) if mask is None else mask)


def _ratio(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
