"""A rollout as optimizer steps: every sample once, the same steps on any number of ranks, prompts beside their responses."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest

from rlhf_data.options import build
from rlhf_ray.batches import Reduction, divisor_of, optimizer_steps, token_budget
from rlhf_ray.config import PPOConfig
from rlhf_ray.rollout import Experience
from rlhf_ray.workers.step import Step


def options(**given: Any) -> PPOConfig:
    flat = {
        "pretrain": "unread", "prompt_data": "unread", "reward_pretrain": "unread.py", "rollout_batch_size": 24,
        "train_batch_size": 12, "n_samples_per_prompt": 4, "micro_train_batch_size": 4, "prompt_max_len": 8,
        "generate_max_len": 16, "advantage_estimator": "rloo", "seed": 7,
    }  # fmt: skip
    return build(PPOConfig, flat | given)


def experience(config: PPOConfig, seed: int = 0) -> Experience:
    """Random responses; the seed of each is its number, and every sixth is masked."""
    count, n = config.rollout.rollout_batch_size, config.rollout.n_samples_per_prompt
    rng = np.random.default_rng(seed)
    prompts, responses = np.repeat(rng.integers(1, 9, count // n), n), rng.integers(1, 17, count)
    tokens = int(responses.sum())
    return Experience(
        input_ids=rng.integers(0, 300, int(prompts.sum()) + tokens).astype(np.int32),
        prompt_lengths=prompts,
        response_lengths=responses,
        truncated=responses == 16,
        rollout_logps=np.zeros(tokens, np.float32),
        prompts=np.arange(count) // n,
        groups=np.arange(count) // n + 100,
        seeds=np.arange(count),
        versions=np.zeros(count, np.int64),
        scores=np.zeros(count, np.float32),
        mask=np.repeat(np.arange(count) % 6 != 5, responses),
        advantages=np.zeros(tokens, np.float32),
    )


def divide(config: PPOConfig, rollout: int = 0, ranks: int = 1, reduction: Reduction = "token") -> list[list[Step]]:
    made = experience(config)
    return list(optimizer_steps(made, config, rollout, ranks, longest=LONGEST, kl_coef=0.25, reduction=reduction))


def samples_of(steps: list[Step]) -> list[int]:
    """Numbers of the samples of one optimizer step, given as each rank's."""
    return [int(seed) for step in steps for part in step.parts if not part.idle for seed in part.batch.seeds]


def order_of(config: PPOConfig, rollout: int = 0, ranks: int = 1) -> list[list[int]]:
    """Numbers of the samples of every optimizer step, sorted."""
    return [sorted(samples_of(list(steps))) for steps in zip(*divide(config, rollout, ranks), strict=True)]


LONGEST = 8 + 16
"""Most tokens of a sample."""

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"micro_train_batch_size": 1},
    {"micro_train_batch_size": 3},
    {"micro_train_batch_size": 12},
    {"train_batch_size": 24, "micro_train_batch_size": 24},
    {"train_batch_size": 6, "micro_train_batch_size": 2},
    {"n_samples_per_prompt": 1, "advantage_estimator": "reinforce"},
    {"n_samples_per_prompt": 12},
    {"packing_samples": True},
    {"packing_samples": True, "packing_tokens": 60, "micro_train_batch_size": 12},
]


@pytest.mark.parametrize("given", LAYOUTS, ids=lambda given: ",".join(map(str, given.values())) or "default")
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_sample_is_trained_once_in_an_epoch_and_ranks_have_as_many_micro_batches(given, ranks):
    config = options(**given, max_epochs=2)
    found = divide(config, ranks=ranks)
    per_epoch = 24 // config.batch.train_batch_size
    assert [len(steps) for steps in found] == [2 * per_epoch] * ranks
    steps = [list(each) for each in zip(*found, strict=True)]
    for each in steps:
        assert len({len(step.parts) for step in each}) == 1
        assert len(samples_of(each)) == config.batch.train_batch_size
        most = max(len(part.batch) for step in each for part in step.parts)
        assert config.batch.packing_samples or most <= config.batch.micro_train_batch_size
    for epoch in (steps[:per_epoch], steps[per_epoch:]):
        assert sorted(number for each in epoch for number in samples_of(each)) == list(range(24))


@pytest.mark.parametrize("given", LAYOUTS, ids=lambda given: ",".join(map(str, given.values())) or "default")
def test_which_samples_learn_together_does_not_depend_on_ranks(given):
    config = options(**given)
    assert order_of(config, ranks=1) == order_of(config, ranks=2) == order_of(config, ranks=5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("size", [4, 8, 12])
def test_whole_groups_are_in_a_step_and_lie_together_in_a_micro_batch(size, ranks):
    """So that their prompt is computed once."""
    config = options(micro_train_batch_size=size)
    for steps in zip(*divide(config, ranks=ranks), strict=True):
        for part in (part for step in steps for part in step.parts if not part.idle):
            runs = [(group, len(list(run))) for group, run in groupby(part.batch.groups.tolist())]
            assert len({group for group, _ in runs}) == len(runs)
            assert {length for _, length in runs} == {4}


def test_groups_are_torn_apart_only_where_a_step_is_not_made_of_whole_ones():
    whole, torn = options(), options(train_batch_size=6, micro_train_batch_size=2)
    assert all(len({number // 4 for number in step}) == 3 for step in order_of(whole))
    assert any(len({number // 4 for number in step}) > 2 for step in order_of(torn))


def test_the_order_is_another_in_every_epoch_and_rollout_and_with_every_seed_and_the_same_each_time():
    config = options(max_epochs=2)
    first, again, later, other = (
        order_of(config),
        order_of(config),
        order_of(config, 1),
        order_of(options(max_epochs=2, seed=8)),
    )
    assert first == again
    assert len({str(steps) for steps in (first[:2], first[2:], later[:2], later[2:], other[:2], other[2:])}) == 6


def test_steps_are_numbered_through_the_run_and_know_the_price_of_divergence():
    config = options(max_epochs=2)
    numbers = [[step.number for step in divide(config, rollout, ranks=2)[1]] for rollout in range(3)]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert {step.kl_coef for step in divide(config)[0]} == {0.25}


def test_ranks_have_about_as_many_tokens():
    config = options(
        rollout_batch_size=240, train_batch_size=240, n_samples_per_prompt=1, advantage_estimator="reinforce"
    )
    loads = [sum(len(part.batch.input_ids) for part in steps[0].parts) for steps in divide(config, ranks=4)]
    assert max(loads) - min(loads) <= 24


@pytest.mark.parametrize("tokens", [None, 30, 60])
def test_packed_micro_batches_keep_to_their_tokens(tokens):
    config = options(packing_samples=True, packing_tokens=tokens, micro_train_batch_size=4)
    parts = [part for step in divide(config)[0] for part in step.parts]
    assert max(len(part.batch.input_ids) for part in parts) <= (tokens or 4 * LONGEST)
    assert len(parts) < 24


def test_a_micro_batch_is_as_large_as_that_many_of_the_longest_samples_that_the_model_takes():
    config = options(packing_samples=True, micro_train_batch_size=4, prompt_max_len=1000)
    assert token_budget(config, LONGEST) == 4 * LONGEST
    assert token_budget(options(packing_samples=True, packing_tokens=30), LONGEST) == 30
    assert token_budget(options(), LONGEST) is None


@pytest.mark.parametrize(("reduction", "expected"), [("token", 1 + 2 + 4), ("sequence", 3), ("constant", 4 * 16)])
def test_a_loss_is_divided_by_what_is_trained(reduction, expected):
    config = options(rollout_batch_size=4, train_batch_size=4)
    data = experience(config).select([0, 1, 2, 3])
    lengths = np.array([1, 2, 3, 4])
    data = Experience(
        **{name: getattr(data, name) for name in ("prompt_lengths", "truncated", "prompts", "groups", "seeds", "versions", "scores")},
        input_ids=np.zeros(int(data.prompt_lengths.sum()) + 10, np.int32),
        response_lengths=lengths,
        rollout_logps=np.zeros(10, np.float32),
        mask=np.repeat([True, True, False, True], lengths),
        advantages=np.zeros(10, np.float32),
    )  # fmt: skip
    assert divisor_of(data.by_sample(data.mask.astype(np.int64)), config, reduction) == expected
    ((step,),) = optimizer_steps(data, config, 0, 1, longest=LONGEST, kl_coef=0, reduction=reduction)
    assert step.divisor == expected


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_a_step_of_which_nothing_is_trained_divides_by_one(reduction):
    assert divisor_of(np.zeros(8, np.int64), options(), reduction) == 1


def test_all_ranks_divide_by_the_same():
    config = options()
    divisors = [[step.divisor for step in steps] for steps in divide(config, ranks=3)]
    assert divisors[0] == divisors[1] == divisors[2] == [step.divisor for step in divide(config)[0]]
    assert sum(divisors[0]) == experience(config).mask.sum()
