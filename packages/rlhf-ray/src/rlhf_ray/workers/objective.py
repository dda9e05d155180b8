"""The policy's loss of a micro-batch, and the figures that watch it.

Shapes: N responses, M tokens of responses. Only tokens in the mask count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_core.batch import Batch
from rlhf_core.metrics import Sums
from rlhf_losses import (
    approx_kl,
    cispo_loss,
    clip_fraction,
    gspo_loss,
    kl_estimate,
    masked_sum,
    ppo_loss,
    segment_ids,
    segment_mean,
    segment_sum,
    sequence_log_ratio,
    truncated_importance_weights,
)
from rlhf_ray.config import PPOConfig

COLUMNS = ("mask", "advantages", "rollout_logps", "logps", "reference_logps")
"""Columns of an `Experience` that the loss is made of."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, and what there is to log of it."""

    loss: Tensor
    """Summed as the options say; to be divided by `Step.divisor`."""

    sums: Sums
    """Figures that are means."""

    peaks: dict[str, Tensor]
    """Figures that are largest values, none of them negative."""


def policy_objective(logps: Tensor, entropies: Tensor, batch: Batch, config: PPOConfig, kl_coef: float) -> Objective:
    """The loss of the policy: clipped surrogate, corrected for where tokens came from, with KL and entropy.

    Args:
        logps: log-probs of the response tokens under the policy in training, at the sampling temperature, `[M]`.
        entropies: of the distributions that they were drawn from, `[M]`.
        batch: with `COLUMNS`; without `logps` among them, the policy in training is the one that the batch is an update of.
        config: the run's options.
        kl_coef: price of a nat of KL divergence, where it is in the loss.
    """
    columns, bounds = batch.columns, batch.target_bounds
    mask, advantages, drawn = columns["mask"], columns["advantages"], columns["rollout_logps"]
    old = columns.get("logps", logps.detach())
    surrogate = policy_losses(logps, old, advantages, bounds, mask, config)
    tokens = mask.sum()
    sums: Sums = {"entropy": (masked_sum(entropies, mask), tokens)}
    if config.importance_cap is not None:
        weights = truncated_importance_weights(old, drawn, cap=config.importance_cap)
        surrogate = surrogate * weights
        sums["importance_weight"] = (masked_sum(weights, mask), tokens)
        sums["importance_truncated"] = (masked_sum((weights >= config.importance_cap).float(), mask), tokens)
    each = surrogate - config.ppo.entropy_coef * entropies if config.ppo.entropy_coef else surrogate
    if config.experience.use_kl_loss:
        divergence = kl_estimate(logps, columns["reference_logps"], config.kl_estimator)
        each = each + kl_coef * divergence
        sums["kl_loss"] = (masked_sum(divergence, mask), tokens)
    ratio = (logps - old).detach().exp()
    peaks = {"ratio_max": largest(ratio, mask)}
    if "logps" not in columns:
        gap = (old - drawn).abs()
        sums["rollout_logp_gap"] = (masked_sum(gap, mask), tokens)
        peaks["rollout_logp_gap_max"] = largest(gap, mask)
    sums |= {
        "policy_loss": (summed(surrogate, mask, bounds, config), share_of(mask, bounds, config)),
        "ratio_mean": (masked_sum(ratio, mask), tokens),
        "clip_fraction": (clipped(logps, old, advantages, bounds, mask, config) * tokens, tokens),
        "approx_kl": (approx_kl(logps, old, mask) * tokens, tokens),
    }
    return Objective(summed(each, mask, bounds, config), sums, peaks)


def policy_losses(
    logps: Tensor, old: Tensor, advantages: Tensor, bounds: Tensor, mask: Tensor, config: PPOConfig
) -> Tensor:
    """The surrogate of every token, `[M]`."""
    low, high = config.clip_range
    match config.ppo.policy_loss:
        case "ppo":
            return ppo_loss(logps, old, advantages, clip_low=low, clip_high=high, dual_clip=config.ppo.dual_clip)
        case "gspo":
            return gspo_loss(logps, old, advantages, bounds, mask=mask, clip_low=low, clip_high=high)
        case "cispo":
            return cispo_loss(logps, old, advantages, clip_low=low, clip_high=high)


def clipped(logps: Tensor, old: Tensor, advantages: Tensor, bounds: Tensor, mask: Tensor, config: PPOConfig) -> Tensor:
    """Share of tokens that the clip bears on: whose gradient it removes, or (`cispo`) whose weight it limits."""
    low, high = config.clip_range
    if config.ppo.policy_loss == "cispo":
        ratio = (logps - old).detach().exp()
        limited = (ratio > 1 + high) | (ratio < 1 - low)
        return masked_sum(limited.float(), mask) / mask.sum().clamp(min=1)
    if config.ppo.policy_loss == "gspo":
        logps = sequence_log_ratio(logps, old, bounds, mask)[segment_ids(bounds, len(mask))]
        old = torch.zeros_like(logps)
    return clip_fraction(logps, old, advantages, clip_low=low, clip_high=high, mask=mask)


def summed(values: Tensor, mask: Tensor, bounds: Tensor, config: PPOConfig) -> Tensor:
    """Values of tokens `[M]` added up as `--loss_reduction` says: over tokens, or means of responses over responses."""
    if config.loss_reduction == "sequence":
        return segment_mean(values, bounds, mask).sum()
    return masked_sum(values, mask)


def share_of(mask: Tensor, bounds: Tensor, config: PPOConfig) -> Tensor | float:
    """What the responses here contribute to the divisor of their optimizer step."""
    match config.loss_reduction:
        case "token":
            return mask.sum()
        case "sequence":
            return (segment_sum(mask.long(), bounds) > 0).sum()
        case "constant":
            return float((len(bounds) - 1) * config.rollout.generate_max_len)


def largest(values: Tensor, mask: Tensor) -> Tensor:
    """The largest of the selected values, which are not negative; 0 where nothing is selected."""
    return pad(torch.where(mask, values, 0), (0, 1)).amax()
