from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from rlhf_data.sampler import Order, Progress


def test_an_epoch_is_a_permutation_of_seed_and_epoch_alone():
    order = Order(31, seed=7)
    assert sorted(order.epoch(0).tolist()) == list(range(31))
    assert np.array_equal(order.epoch(3), Order(31, seed=7).epoch(3))
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), Order(31, seed=8).epoch(0))


def test_the_last_window_of_an_epoch_holds_what_is_left():
    windows = list(islice(Order(10, seed=0).windows(4), 6))
    assert [len(samples) for samples, _ in windows] == [4, 4, 2, 4, 4, 2]
    assert sorted(np.concatenate([samples for samples, _ in windows[:3]]).tolist()) == list(range(10))
    assert [after for _, after in windows[1:4]] == [Progress(0, 8), Progress(1, 0), Progress(1, 4)]
    assert Order(10, seed=0).steps_per_epoch(4) == 3


@pytest.mark.parametrize("steps_before", range(9))
def test_resumed_equals_uninterrupted(steps_before):
    whole = list(islice(Order(23, seed=5).windows(7), 12))
    progress = whole[steps_before - 1][1] if steps_before else Progress()
    state = Progress.from_dict(progress.to_dict())
    resumed = list(islice(Order(23, seed=5).windows(7, state), 12 - steps_before))
    for (expected, after), (samples, now) in zip(whole[steps_before:], resumed, strict=True):
        assert np.array_equal(expected, samples)
        assert after == now


def test_a_run_may_resume_with_another_batch_size():
    first = list(islice(Order(20, seed=1).windows(8), 1))
    rest = list(islice(Order(20, seed=1).windows(6, first[0][1]), 2))
    seen = np.concatenate([first[0][0], *(samples for samples, _ in rest)])
    assert sorted(seen.tolist()) == list(range(20))


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, seed=0)
    with pytest.raises(ValueError, match="is not from this data"):
        next(Order(3, seed=0).windows(2, Progress(0, 9)))
    with pytest.raises(ValueError, match="at least one sample"):
        next(Order(3, seed=0).windows(0))
