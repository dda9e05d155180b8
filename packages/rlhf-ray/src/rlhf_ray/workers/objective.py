"""The policy's loss of a micro-batch, and the figures that watch it.

Shapes: N responses, M tokens of responses. Only tokens in the mask count.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from rlhf_losses.linear import Slope
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
    tokens = mask.sum()
    sums: Sums = {"entropy": (masked_sum(entropies, mask), tokens)}
    surrogate, weights, divergence = terms(logps, columns, bounds, config)
    if weights is not None and config.importance_cap is not None:
        sums["importance_weight"] = (masked_sum(weights, mask), tokens)
        sums["importance_truncated"] = (masked_sum((weights >= config.importance_cap).float(), mask), tokens)
    each = surrogate - config.ppo.entropy_coef * entropies if config.ppo.entropy_coef else surrogate
    if divergence is not None:
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


def policy_slope(batch: Batch, config: PPOConfig, kl_coef: float) -> Slope | None:
    """The derivative of the loss by each log-prob, told from that log-prob alone; see `rlhf_losses.linear_token_logps`.

    None where it takes more: GSPO's ratio is that of a response, and an entropy bonus has gradients of its own.
    """
    if config.ppo.policy_loss == "gspo" or config.ppo.entropy_coef:
        return None
    columns, bounds = batch.columns, batch.target_bounds
    counted = columns["mask"].float()
    if config.loss_reduction == "sequence":
        counts = segment_sum(counted, bounds).clamp(min=1)
        counted = counted / counts[segment_ids(bounds, len(counted))]

    def slope(logps: Tensor, places: Tensor) -> Tensor:
        here = {name: column[places] for name, column in columns.items()}
        with torch.enable_grad():
            logps = logps.detach().requires_grad_()
            surrogate, _, divergence = terms(logps, here, None, config)
            each = surrogate if divergence is None else surrogate + kl_coef * divergence
            (gradient,) = torch.autograd.grad(masked_sum(each * counted[places], here["mask"]), logps)
        return gradient

    return slope


def terms(
    logps: Tensor, columns: Mapping[str, Tensor], bounds: Tensor | None, config: PPOConfig
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the loss of each token is made of: the surrogate, the importance weight in it, and the divergence, `[M]`.

    Args:
        logps: under the policy in training, `[M]`.
        columns: of these tokens.
        bounds: of the responses, `[N+1]`; only needed where the ratio is that of a response.
        config: the run's options.
    """
    old = columns.get("logps", logps.detach())
    surrogate = policy_losses(logps, old, columns["advantages"], bounds, columns["mask"], config)
    weights = divergence = None
    if config.importance_cap is not None:
        weights = truncated_importance_weights(old, columns["rollout_logps"], cap=config.importance_cap)
        surrogate = surrogate * weights
    if config.experience.use_kl_loss:
        divergence = kl_estimate(logps, columns["reference_logps"], config.kl_estimator)
    return surrogate, weights, divergence


def policy_losses(
    logps: Tensor, old: Tensor, advantages: Tensor, bounds: Tensor | None, mask: Tensor, config: PPOConfig
) -> Tensor:
    """The surrogate of every token, `[M]`."""
    low, high = config.clip_range
    match config.ppo.policy_loss:
        case "ppo":
            return ppo_loss(logps, old, advantages, clip_low=low, clip_high=high, dual_clip=config.ppo.dual_clip)
        case "gspo":
            assert bounds is not None
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
