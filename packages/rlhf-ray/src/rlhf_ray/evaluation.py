"""How well the policy answers held-out prompts."""

from __future__ import annotations

import numpy as np

from rlhf_infer.engines.engine import sample_seed
from rlhf_ray.config import PPOConfig
from rlhf_ray.engines.request import Answer
from rlhf_ray.experience import means_of
from rlhf_ray.prompts import Prompts
from rlhf_ray.roles import Roles
from rlhf_ray.rollouts import Rollouts, batch_of, make_request

HELD_OUT = 1
"""Added to the run's seed for held-out prompts, so that they are answered alike in every evaluation."""

FIRST = -1
"""The turn of held-out prompts: before those of any rollout: training waits for them."""


def evaluate(prompts: Prompts, rollouts: Rollouts, roles: Roles, config: PPOConfig) -> dict[str, float]:
    """Answer every held-out prompt and judge the answers; those to other requests, which come in between, are kept.

    Returns:
        `eval_reward` and its parts, `eval_best_reward` (the mean over prompts of the best answer, with several each),
        `eval_response_length`, `eval_truncated`.
    """
    n, seed = config.data.eval_n_samples_per_prompt, config.batch.seed + HELD_OUT
    numbers = {-1 - number: number for number in range(len(prompts))}
    roles.engines.submit(
        [
            make_request(
                request,
                prompts.ids(number),
                sample_seed(seed, number),
                config,
                rollouts.context,
                n=n,
                temperature=config.data.eval_temperature,
            )
            for request, number in numbers.items()
        ],
        turn=FIRST,
    )
    answers: list[Answer] = []
    while len(answers) < len(prompts):
        for answer in roles.engines.collect():
            answers.append(answer) if answer[0] < 0 else rollouts.take([answer])
    answers.sort(key=lambda answer: -answer[0])
    rollout = batch_of(answers, [numbers[request] for request, _ in answers], prompts)
    rewards = roles.rewards.start(rollout, prompts)
    roles.wait(rewards.calls, rewards.servers)
    scores, parts = rewards.result()
    figures = {"eval_reward": float(scores.mean())}
    figures |= {f"eval_{name}": mean for name, mean in means_of(parts).items()}
    if n > 1:
        figures["eval_best_reward"] = float(np.maximum.reduceat(scores, np.arange(0, len(scores), n)).mean())
    figures["eval_response_length"] = float(rollout.response_lengths.mean())
    figures["eval_truncated"] = float(rollout.truncated.mean())
    return figures
