"""The ragged batches: what they hold, how they are cut and joined."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_ray.rollout import Experience, Rollout, columns_of, put, take


@pytest.fixture
def rollout() -> Rollout:
    """The example of the docstring."""
    return Rollout(
        input_ids=np.array([7, 8, 9, 2, 5, 6, 6, 6], np.int32),
        prompt_lengths=np.array([2, 1]),
        response_lengths=np.array([2, 3]),
        truncated=np.array([False, True]),
        rollout_logps=np.array([-0.1, -0.5, -2.0, -0.3, -0.3], np.float32),
        prompts=np.array([0, 1]),
        groups=np.array([0, 1]),
        seeds=np.array([11, 12]),
        versions=np.array([0, 0]),
    )


def test_a_sample_is_its_prompt_and_its_response(rollout):
    assert rollout.sample(0).tolist() == [7, 8, 9, 2]
    assert rollout.response(1).tolist() == [6, 6, 6]
    assert rollout.lengths.tolist() == [4, 4]
    assert (len(rollout), rollout.num_targets) == (2, 5)


def test_selecting_keeps_every_column_with_its_sample(rollout):
    second = rollout.select([1])
    assert second.input_ids.tolist() == [5, 6, 6, 6]
    assert second.rollout_logps.tolist() == pytest.approx([-2.0, -0.3, -0.3])
    assert (second.seeds.tolist(), second.truncated.tolist()) == ([12], [True])


def test_parts_joined_again_are_the_whole(rollout):
    whole = Rollout.concat([rollout.select([1]), rollout.select([0])]).select([1, 0])
    for name in ("input_ids", "prompt_lengths", "response_lengths", "truncated", "rollout_logps", "seeds"):
        assert getattr(whole, name).tolist() == getattr(rollout, name).tolist(), name


def test_consecutive_pieces_are_views_that_make_up_the_whole(rollout):
    pieces = list(rollout.cut([1, 0, len(rollout) - 1]))
    assert [len(piece) for piece in pieces] == [1, 0, len(rollout) - 1]
    assert all(np.shares_memory(piece.input_ids, rollout.input_ids) for piece in (pieces[0], pieces[2]))
    for name, _ in columns_of(type(rollout)):
        assert np.array_equal(getattr(rollout.concat(pieces), name), getattr(rollout, name))
    assert all(np.array_equal(pieces[2].sample(n - 1), rollout.sample(n)) for n in range(1, len(rollout)))


def test_nothing_can_be_selected(rollout):
    nothing = rollout.select([])
    assert (len(nothing), nothing.num_targets, nothing.by_sample(nothing.rollout_logps).tolist()) == (0, 0, [])


def test_values_of_tokens_are_added_up_by_sample(rollout):
    assert rollout.by_sample(rollout.rollout_logps).tolist() == pytest.approx([-0.6, -2.6])
    assert rollout.per_target(np.array([1, 2])).tolist() == [1, 1, 2, 2, 2]


def test_columns_that_are_not_needed_stay_away(rollout):
    experience = Experience.of(
        rollout, scores=np.array([1.0, -0.5]), mask=np.array([1, 1, 0, 0, 0], bool), advantages=np.arange(5.0)
    )
    both = Experience.concat([experience.select([1]), experience.select([0])])
    assert both.values is None and both.logps is None
    assert both.advantages.tolist() == [2, 3, 4, 0, 1] and both.scores.tolist() == [-0.5, 1.0]


def test_lengths_that_do_not_add_up_are_refused(rollout):
    with pytest.raises(ValueError, match="advantages has 4 entries and should have 5"):
        Experience.of(rollout, scores=np.zeros(2), mask=np.ones(5, bool), advantages=np.zeros(4))


def test_parts_that_are_taken_in_any_order_are_put_back():
    bounds, values = np.array([0, 2, 2, 5, 6]), np.arange(6)
    for places in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        taken = take(values, bounds, np.array(places))
        assert taken.tolist() == [v for place in places for v in values[bounds[place] : bounds[place + 1]]]
        assert put(taken, bounds, np.array(places)).tolist() == values.tolist()
    assert take(values, bounds, np.zeros(0, np.int64)).tolist() == []
