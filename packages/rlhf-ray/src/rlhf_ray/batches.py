"""A rollout as optimizer steps: which samples learn together, and which rank sees them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.cluster.group import divided, part_of
from rlhf_ray.config import PPOConfig
from rlhf_ray.rollout import Experience
from rlhf_ray.workers.step import Step

Reduction = Literal["token", "sequence", "constant"]


def optimizer_steps(
    experience: Experience,
    config: PPOConfig,
    rollout_number: int,
    ranks: int,
    *,
    kl_coef: float,
    reduction: Reduction,
) -> list[list[Step]]:
    """All optimizer steps that a rollout makes, for every rank of a role.

    Which samples are in which step depends on the seed, the rollout and the epoch, not on the ranks. Responses to one prompt
    stay together where a step is made of whole groups, so that their prompt is computed once.

    Args:
        experience: the rollout, the responses to a prompt being adjacent.
        config: the run's options.
        rollout_number: of the rollout in the run.
        ranks: of the role.
        kl_coef: price of a nat, where it is in the loss.
        reduction: what the loss is a mean of.
    """
    size, epochs = config.batch.train_batch_size, config.batch.max_epochs
    group = group_size(config)
    per_epoch = -(-len(experience) // size)
    found: list[list[Step]] = [[] for _ in range(ranks)]
    for epoch in range(epochs):
        order = shuffled(len(experience), group, [config.batch.seed, rollout_number, epoch])
        for place in range(per_epoch):
            samples = experience.select(order[place * size : (place + 1) * size])
            number = (rollout_number * epochs + epoch) * per_epoch + place
            divisor = divisor_of(samples, config, reduction)
            plan = divided(samples, ranks, config.batch.micro_train_batch_size, token_budget(config))
            for rank, micro_batches in enumerate(plan):
                parts = [part_of(samples, row) for row in micro_batches]
                found[rank].append(Step(parts, divisor, kl_coef, number))
    return found


def group_size(config: PPOConfig) -> int:
    """Samples that stay together: all responses to a prompt, if a step is made of whole groups."""
    n = config.rollout.n_samples_per_prompt
    return n if config.batch.train_batch_size % n == 0 else 1


def shuffled(count: int, group: int, seed: list[int]) -> NDArray[np.int64]:
    """Numbers below `count` in a random order in which every `group` adjacent ones stay so."""
    order = np.random.default_rng(seed).permutation(-(-count // group))
    places = (order[:, None] * group + np.arange(group)).ravel()
    return places[places < count]


def token_budget(config: PPOConfig) -> int | None:
    """Most tokens of a micro-batch, with `--packing_samples`."""
    if not config.batch.packing_samples:
        return None
    longest = config.rollout.max_len or config.data.prompt_max_len + config.rollout.generate_max_len
    return config.batch.packing_tokens or config.batch.micro_train_batch_size * longest


def divisor_of(samples: Experience, config: PPOConfig, reduction: Reduction) -> float:
    """What the loss of a step is divided by: its trained tokens, its responses that have some, or all tokens it could have."""
    match reduction:
        case "token":
            return float(max(1, samples.mask.sum()))
        case "sequence":
            return float(max(1, (samples.by_sample(samples.mask.astype(np.int64)) > 0).sum()))
        case "constant":
            return float(len(samples) * config.rollout.generate_max_len)
