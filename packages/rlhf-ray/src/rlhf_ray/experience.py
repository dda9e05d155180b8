"""From judged responses to advantages: rewards, what they cost in KL and length, and what they say of every token.

Shapes: N responses, M tokens of responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlhf_losses import (
    discounted_returns,
    explained_variance,
    gae,
    group_centred,
    group_normalised,
    kl_estimate,
    kl_penalised_rewards,
    leave_one_out,
    masked_moments,
    masked_whiten,
    reinforce_plus_plus_baseline,
)
from rlhf_ray.config import GROUPED, PPOConfig
from rlhf_ray.rollout import Experience, Rollout, offsets, put, take

Figures = dict[str, float]

AT_ONCE = 2**22
"""Most tokens, padding included, that are taken through time at once: some hundred megabytes."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Responses, and what was computed of them."""

    rollout: Rollout

    scores: NDArray[np.float32]
    """Reward of each response, as all sources together gave it, `[N]`."""

    parts: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """What these are made of, and what reward functions said besides, `[N]` by name."""

    logps: NDArray[np.float32] | None = None
    """Of the policy before the update, at the sampling temperature, `[M]`, if it is needed."""

    reference_logps: NDArray[np.float32] | None = None
    """Of the reference model, at the sampling temperature, `[M]`, with a KL penalty."""

    values: NDArray[np.float32] | None = None
    """Of the state in which each token was chosen, `[M]`, with a critic."""

    after: NDArray[np.float32] | None = None
    """Value of the state after the last token, `[N]`, with a critic."""


def informative(scores: NDArray[np.float32], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the responses to a response's prompt differ in reward, `[N]`: if not, comparing them teaches nothing.

    Source: Yu et al. 2025, DAPO, eq. 11 (arXiv:2503.14476).
    """
    _, index = np.unique(groups, return_inverse=True)
    least = np.full(index.max(initial=-1) + 1, np.inf)
    most = -least
    np.minimum.at(least, index, scores)
    np.maximum.at(most, index, scores)
    return (most > least)[index]


def length_penalty(rollout: Rollout, config: PPOConfig) -> NDArray[np.float32]:
    """What responses lose for their length, `[N]`, at least 0.

    Nothing up to `generate_max_len - overlong_buffer_len` tokens, from there on in a straight line to `overlong_penalty` at
    `generate_max_len`; and with `truncated_responses penalise`, all of it for a response that was cut off.

    Source: Yu et al. 2025, DAPO, eq. 13 (arXiv:2503.14476).
    """
    options, penalty = config.experience, np.zeros(len(rollout), np.float32)
    if buffer := options.overlong_buffer_len:
        over = rollout.response_lengths - (config.rollout.generate_max_len - buffer)
        penalty = np.clip(over / buffer, 0, 1).astype(np.float32) * np.float32(options.overlong_penalty)
    if options.truncated_responses == "penalise":
        penalty = np.where(rollout.truncated, np.float32(options.overlong_penalty), penalty)
    return penalty


def clipped(scores: NDArray[np.float32], config: PPOConfig) -> NDArray[np.float32]:
    """Rewards of responses as they count, `[N]`: within `--reward_clip_range`."""
    return np.clip(scores, *config.experience.reward_clip_range).astype(np.float32)


def make_experience(judged: Judged, config: PPOConfig, kl_coef: float) -> tuple[Experience, Figures]:
    """Advantages of every response token, and the figures of the rollout.

    Where the KL divergence is paid for in the rewards, `gae` and `reinforce` take it from the reward of each token, and the
    estimators that compare responses compare a response's sum of it too.

    Args:
        judged: the responses of one rollout, whole groups.
        config: the run's options.
        kl_coef: price of a nat.
    """
    rollout, options = judged.rollout, config.experience
    penalty = length_penalty(rollout, config)
    scores = clipped(judged.scores, config) - penalty
    kept = ~(rollout.truncated & (options.truncated_responses == "mask"))
    mask = rollout.per_target(kept)
    kl = divergence(judged, config)
    paid = np.zeros(rollout.num_targets, np.float32) if kl is None or options.use_kl_loss else kl
    price = np.float32(kl_coef) * rollout.by_sample(paid)
    if options.advantage_estimator in GROUPED:
        advantages, returns = rollout.per_target(compared(scores, price, rollout.groups, kept, config)), None
    else:
        advantages, returns = over_time(judged, scores, paid, config, kl_coef)
    if whitens(config):
        advantages = masked_whiten(tensor(advantages), tensor(mask)).numpy()
    experience = Experience.of(
        rollout,
        scores=scores,
        mask=mask,
        advantages=np.where(mask, advantages, 0).astype(np.float32),
        returns=returns,
        values=judged.values,
        logps=judged.logps,
        reference_logps=judged.reference_logps,
    )
    return experience, figures_of(judged, experience, config, kl, scores - price, penalty)


def whitens(config: PPOConfig) -> bool:
    """Whether advantages of tokens are whitened: always those of REINFORCE++, which are then complete (Hu et al. 2025, eq. 8,
    arXiv:2501.03262), and by default those of GAE.
    """
    wanted = config.experience.normalize_advantages
    by_default = config.experience.advantage_estimator in ("gae", "reinforce")
    return by_default if wanted is None else wanted


def divergence(judged: Judged, config: PPOConfig) -> NDArray[np.float32] | None:
    """Estimate of the KL divergence from the reference at every token, in nats, `[M]`; None without a reference.

    Where a rollout makes a single update and nothing else needs them, the policy's log-probs are those of the engine.
    """
    if judged.reference_logps is None:
        return None
    logps = judged.rollout.rollout_logps if judged.logps is None else judged.logps
    return kl_estimate(tensor(logps), tensor(judged.reference_logps), config.kl_estimator).numpy()


def compared(
    scores: NDArray[np.float32],
    price: NDArray[np.float32],
    groups: NDArray[np.int64],
    kept: NDArray[np.bool_],
    config: PPOConfig,
) -> NDArray[np.float32]:
    """Advantages of whole responses, from comparing those to one prompt, `[N]`.

    Responses that are not trained on are compared with the others all the same: what they earned is known. Whitening, which
    is of those that are, does not see them.

    Args:
        scores: of the responses, `[N]`.
        price: of their divergence, `[N]`. `grpo` scales rewards only: where all are equal, a deviation that is nothing but
            divergence would make advantages of full size of its noise.
        groups: what each answers, `[N]`.
        kept: whether each is trained on, `[N]`.
        config: the run's options.
    """
    x, ids = tensor(scores - price), tensor(groups)
    match config.experience.advantage_estimator:
        case "rloo":
            return leave_one_out(x, ids).numpy()
        case "grpo":
            return (group_normalised(tensor(scores), ids) - group_centred(tensor(price), ids)).numpy()
        case "dr_grpo":
            return group_centred(x, ids).numpy()
        case _:
            moments = masked_moments(group_centred(x, ids), tensor(kept))
            return reinforce_plus_plus_baseline(x, ids, moments=moments).numpy()


def over_time(
    judged: Judged, scores: NDArray[np.float32], kl: NDArray[np.float32], config: PPOConfig, kl_coef: float
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Advantages, for `reinforce` not yet whitened, and with a critic returns of every token, from rewards of tokens, `[M]` each."""
    rollout, options = judged.rollout, config.experience

    def discounted(bounds: Tensor, kl: Tensor, scores: Tensor) -> tuple[Tensor]:
        rewards = kl_penalised_rewards(kl, scores, kl_coef, cu_seqlens=bounds)
        return (discounted_returns(rewards, gamma=options.gamma, cu_seqlens=bounds),)

    def estimated(bounds: Tensor, kl: Tensor, values: Tensor, scores: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        rewards = kl_penalised_rewards(kl, scores, kl_coef, cu_seqlens=bounds)
        gamma, lambda_ = options.gamma, options.lambd
        return gae(rewards, values, gamma=gamma, lambda_=lambda_, cu_seqlens=bounds, bootstrap=after)

    if options.advantage_estimator == "reinforce":
        (advantages,) = by_length(rollout, discounted, tokens=[kl], responses=[scores])
        return advantages, None
    assert judged.values is not None and judged.after is not None
    cut = rollout.truncated & (options.truncated_responses == "bootstrap")
    after = np.where(cut, judged.after, 0).astype(np.float32)
    advantages, returns = by_length(rollout, estimated, tokens=[kl, judged.values], responses=[scores, after])
    return advantages, returns


def by_length(
    rollout: Rollout,
    compute: Callable[..., Sequence[Tensor]],
    *,
    tokens: Sequence[NDArray[Any]],
    responses: Sequence[NDArray[Any]],
) -> list[NDArray[Any]]:
    """Compute something of every response, at one time of those that are about as long: what runs over time pads them.

    Args:
        rollout: the responses.
        compute: takes where each of some responses starts, and the end, then their `tokens` and their `responses`; returns
            values of tokens.
        tokens: values of tokens, `[M]` each.
        responses: values of responses, `[N]` each.

    Returns:
        What `compute` does, of all responses, `[M]` each.
    """
    bounds, lengths = rollout.target_bounds, rollout.response_lengths
    shortest_first = np.argsort(lengths, kind="stable")
    pieces = -(-len(rollout) * int(lengths.max()) // AT_ONCE)
    found = []
    for places in np.array_split(shortest_first, pieces):
        own = [tensor(take(values, bounds, places)) for values in tokens]
        own += [tensor(values[places]) for values in responses]
        found.append(compute(tensor(offsets(lengths[places])), *own))
    return [put(torch.cat(parts).numpy(), bounds, shortest_first) for parts in zip(*found, strict=True)]


def figures_of(
    judged: Judged,
    experience: Experience,
    config: PPOConfig,
    kl: NDArray[np.float32] | None,
    shaped: NDArray[np.float32],
    penalty: NDArray[np.float32],
) -> Figures:
    """What there is to log of a rollout; see docs/metrics.md."""
    rollout, mask = judged.rollout, experience.mask
    scores = judged.scores
    figures: dict[str, Any] = {
        "reward": scores.mean(),
        "reward_std": scores.std(),
        "reward_min": scores.min(),
        "reward_max": scores.max(),
        "shaped_reward": shaped.mean(),
        "response_length": rollout.response_lengths.mean(),
        "response_length_max": rollout.response_lengths.max(),
        "prompt_length": rollout.prompt_lengths.mean(),
        "truncated": rollout.truncated.mean(),
    }
    figures |= means_of(judged.parts)
    if config.experience.overlong_buffer_len or config.experience.truncated_responses == "penalise":
        figures["length_penalty"] = penalty.mean()
    if mask.any():
        trained = experience.advantages[mask]
        figures |= {"advantage_mean": trained.mean(), "advantage_std": trained.std()}
    if kl is not None:
        figures |= {"kl": kl.mean(), "kl_sequence": rollout.by_sample(kl).mean()}
    if judged.logps is not None:
        gap = np.abs(judged.logps - rollout.rollout_logps)
        figures |= {"rollout_logp_gap": gap.mean(), "rollout_logp_gap_max": gap.max()}
    if experience.values is not None and experience.returns is not None:
        explained = explained_variance(tensor(experience.values), tensor(experience.returns), tensor(mask))
        figures |= {
            "value": experience.values.mean(),
            "return": experience.returns.mean(),
            "explained_variance": explained,
        }
    if config.rollout.n_samples_per_prompt > 1:
        figures["groups_without_spread"] = 1 - informative(clipped(scores, config), rollout.groups).mean()
    return {name: float(value) for name, value in figures.items()}


def means_of(parts: Mapping[str, NDArray[Any]]) -> Figures:
    """The mean of every part of the rewards, as `reward_NAME`, over the responses that have it."""
    return {f"reward_{name}": float(np.nanmean(values)) for name, values in parts.items() if not np.isnan(values).all()}


def tensor(values: NDArray[Any]) -> Tensor:
    """The same memory as a tensor; what Ray hands over cannot be written, and nothing here writes."""
    return torch.from_numpy(values if values.flags.writeable else values.copy())
