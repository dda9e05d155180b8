"""A rollout as optimizer steps: which samples learn together, and which rank sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.cluster.group import divided, parts_of
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
    longest: int,
    kl_coef: float,
    reduction: Reduction,
) -> Iterator[list[Step]]:
    """All optimizer steps that a rollout makes, for one rank of a role after the other.

    Which samples are in which step depends on the seed, the rollout and the epoch, not on the ranks. Responses to one prompt
    stay together where a step is made of whole groups, so that their prompt is computed once.

    Args:
        experience: the rollout, the responses to a prompt being adjacent.
        config: the run's options.
        rollout_number: of the rollout in the run.
        ranks: of the role.
        longest: most tokens of a sample.
        kl_coef: price of a nat, where it is in the loss.
        reduction: what the loss is a mean of.
    """
    size, epochs = config.batch.train_batch_size, config.batch.max_epochs
    per_epoch = -(-len(experience) // size)
    trained = experience.by_sample(experience.mask.astype(np.int64))
    planned = []
    for epoch in range(epochs):
        order = shuffled(len(experience), group_size(config), [config.batch.seed, rollout_number, epoch])
        for place in range(per_epoch):
            samples = order[place * size : (place + 1) * size]
            plan = divided(
                experience.lengths[samples],
                experience.groups[samples],
                ranks,
                config.batch.micro_train_batch_size,
                token_budget(config, longest),
            )
            divisor = divisor_of(trained[samples], config, reduction)
            planned.append(((rollout_number * epochs + epoch) * per_epoch + place, samples, plan, divisor))
    for rank in range(ranks):
        yield [
            Step(parts_of(experience, [samples[row] for row in plan[rank]]), divisor, kl_coef, number)
            for number, samples, plan, divisor in planned
        ]


def group_size(config: PPOConfig) -> int:
    """Samples that stay together: all responses to a prompt, if a step is made of whole groups."""
    n = config.rollout.n_samples_per_prompt
    return n if config.batch.train_batch_size % n == 0 else 1


def shuffled(count: int, group: int, seed: list[int]) -> NDArray[np.int64]:
    """Numbers below `count` in a random order in which every `group` adjacent ones stay so."""
    order = np.random.default_rng(seed).permutation(-(-count // group))
    places = (order[:, None] * group + np.arange(group)).ravel()
    return places[places < count]


def token_budget(config: PPOConfig, longest: int) -> int | None:
    """Most tokens of a micro-batch, with `--packing_samples`.

    Args:
        config: the run's options.
        longest: most tokens of a sample.
    """
    if not config.batch.packing_samples:
        return None
    return config.batch.packing_tokens or config.batch.micro_train_batch_size * longest


def divisor_of(trained: NDArray[np.int64], config: PPOConfig, reduction: Reduction) -> float:
    """What the loss of a step is divided by: its trained tokens, its responses that have some, or all tokens it could have.

    Args:
        trained: tokens that are trained of each response in the step, `[N]`.
        config: the run's options.
        reduction: which of the three.
    """
    match reduction:
        case "token":
            return float(max(1, trained.sum()))
        case "sequence":
            return float(max(1, (trained > 0).sum()))
        case "constant":
            return float(len(trained) * config.rollout.generate_max_len)
