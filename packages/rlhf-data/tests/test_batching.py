from __future__ import annotations

import numpy as np
import pytest

from rlhf_data.batching import plan_micro_batches


def sample_lengths(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(4, 0.9, count).astype(np.int64), 1, 500)


@pytest.mark.parametrize("budget", [None, 500, 1013])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 131])
def test_each_sample_is_trained_once_and_all_ranks_take_as_many_steps(count, world_size, budget):
    lengths = sample_lengths(count)
    plan = plan_micro_batches(lengths, world_size, 4, budget)
    assert len(plan) == world_size
    assert len({len(batches) for batches in plan}) == 1
    positions = [position for batches in plan for batch in batches for position in batch.tolist()]
    assert sorted(positions) == list(range(count))
    for batches in plan:
        for batch in batches:
            assert np.array_equal(batch, np.sort(batch))
            assert batch.dtype == np.int64
            assert len(batch) <= 4 if budget is None else lengths[batch].sum() <= budget


@pytest.mark.parametrize("budget", [None, 1000])
def test_ranks_get_about_the_same_work(budget):
    lengths = sample_lengths(512)
    plan = plan_micro_batches(lengths, 4, 8, budget)
    work = [sum(int(lengths[batch].sum()) for batch in batches) for batches in plan]
    assert max(work) <= 1.02 * min(work)


def test_without_a_budget_there_is_no_more_micro_batch_than_needed():
    plan = plan_micro_batches(sample_lengths(128), 4, 8)
    assert [len(batches) for batches in plan] == [4, 4, 4, 4]


def test_samples_of_similar_lengths_share_a_micro_batch():
    lengths = sample_lengths(256)
    planned = [batch for batches in plan_micro_batches(lengths, 2, 8) for batch in batches]
    padded = sum(int(lengths[batch].max()) * len(batch) for batch in planned)
    as_they_come = sum(int(part.max()) * len(part) for part in np.split(lengths, 32))
    assert padded - lengths.sum() < 0.25 * (as_they_come - lengths.sum())


def test_fewer_samples_than_ranks_leave_dummies():
    plan = plan_micro_batches(np.array([3]), 3, 2)
    assert sorted(sum(len(batch) for batch in batches) for batches in plan) == [0, 0, 1]
    assert [len(batches) for batches in plan] == [1, 1, 1]
    packed = plan_micro_batches(np.array([3]), 3, 2, 10)
    assert [len(batches) for batches in packed] == [1, 1, 1]


def test_a_full_row_is_halved_rather_than_leaving_a_rank_idle():
    plan = plan_micro_batches(np.array([5, 5, 4, 4]), 2, 1, token_budget=18)
    assert [[batch.tolist() for batch in batches] for batches in plan] == [[[0, 2]], [[1, 3]]]


def test_the_plan_depends_on_lengths_only():
    lengths = sample_lengths(77)
    first, second = plan_micro_batches(lengths, 3, 4, 700), plan_micro_batches(lengths.copy(), 3, 4, 700)
    assert all(np.array_equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_impossible_plans_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        plan_micro_batches(np.array([3]), 0, 2)
    with pytest.raises(ValueError, match="more than a row's capacity"):
        plan_micro_batches(np.array([3]), 1, 2, 2)
