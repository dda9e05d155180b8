"""Losses, advantages and log-probs for post-training language models: functions of tensors, unreduced."""

from rlhf_losses.advantages import discounted_returns, gae, reinforce, reinforce_plus_plus
from rlhf_losses.distillation import forward_kl, jsd, reverse_kl, skew_kl, topk_forward_kl
from rlhf_losses.groups import group_centred, group_normalised, leave_one_out, reinforce_plus_plus_baseline
from rlhf_losses.heads import linear_divergence, linear_topk_logps
from rlhf_losses.kl import kl_estimate, kl_penalised_rewards
from rlhf_losses.kto import kto_kl, kto_loss
from rlhf_losses.linear import linear_cross_entropy_sum, linear_token_logps
from rlhf_losses.linear_distillation import linear_distillation_sum, linear_topk_distillation_sum
from rlhf_losses.logprobs import entropy, token_logps
from rlhf_losses.masks import masked_mean, masked_moments, masked_sum, masked_whiten
from rlhf_losses.policy import (
    approx_kl,
    cispo_loss,
    clip_fraction,
    gspo_loss,
    ppo_loss,
    sequence_log_ratio,
    truncated_importance_weights,
)
from rlhf_losses.preference import (
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    nll_regulariser,
    orpo_loss,
    preference_margin,
    robust_dpo_loss,
    simpo_loss,
)
from rlhf_losses.reward import pairwise_logexp_loss, pairwise_sigmoid_loss, process_reward_loss
from rlhf_losses.segments import segment_ids, segment_mean, segment_sum
from rlhf_losses.value import clipped_value_loss, explained_variance, value_clip_fraction

__all__ = [
    "approx_kl",
    "cispo_loss",
    "clip_fraction",
    "clipped_value_loss",
    "discounted_returns",
    "dpo_loss",
    "entropy",
    "explained_variance",
    "forward_kl",
    "gae",
    "group_centred",
    "group_normalised",
    "gspo_loss",
    "hinge_loss",
    "implicit_rewards",
    "ipo_loss",
    "jsd",
    "kl_estimate",
    "kl_penalised_rewards",
    "kto_kl",
    "kto_loss",
    "leave_one_out",
    "linear_cross_entropy_sum",
    "linear_distillation_sum",
    "linear_divergence",
    "linear_token_logps",
    "linear_topk_distillation_sum",
    "linear_topk_logps",
    "masked_mean",
    "masked_moments",
    "masked_sum",
    "masked_whiten",
    "nll_regulariser",
    "orpo_loss",
    "pairwise_logexp_loss",
    "pairwise_sigmoid_loss",
    "ppo_loss",
    "preference_margin",
    "process_reward_loss",
    "reinforce",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reverse_kl",
    "robust_dpo_loss",
    "segment_ids",
    "segment_mean",
    "segment_sum",
    "sequence_log_ratio",
    "simpo_loss",
    "skew_kl",
    "token_logps",
    "topk_forward_kl",
    "truncated_importance_weights",
    "value_clip_fraction",
]
