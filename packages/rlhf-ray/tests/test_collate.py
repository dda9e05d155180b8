"""Rollouts as batches: which tokens are targets, what is laid once, and which columns come along."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from rlhf_ray.cluster.group import Part
from rlhf_ray.collate import WORTH_SHARING, collate, collate_part
from rlhf_ray.rollout import Experience, Rollout


def rollout(prompts: list[int], responses: list[int], groups: list[int]) -> Rollout:
    """Samples of these lengths; responses of one group have the same prompt."""
    pieces = []
    for length, response, group in zip(prompts, responses, groups, strict=True):
        rng = np.random.default_rng(group)
        pieces += [rng.integers(0, 300, length), np.random.default_rng([7, len(pieces)]).integers(0, 300, response)]
    count = np.array(responses)
    return Rollout(
        input_ids=np.concatenate(pieces).astype(np.int32),
        prompt_lengths=np.array(prompts),
        response_lengths=count,
        truncated=count > 4,
        rollout_logps=-np.arange(count.sum(), dtype=np.float32),
        prompts=np.array(groups),
        groups=np.array(groups),
        seeds=np.arange(len(groups)),
        versions=np.zeros(len(groups), np.int64),
    )


LONG = WORTH_SHARING


def test_all_response_tokens_are_targets_and_nothing_else():
    batch = rollout([3, 5, 1], [2, 4, 1], [0, 1, 2])
    laid = collate(batch, share=False)
    assert torch.equal(laid.input_ids, torch.tensor(batch.input_ids).long())
    assert laid.targets.tolist() == [3, 4, 10, 11, 12, 13, 15]
    assert laid.target_bounds.tolist() == batch.target_bounds.tolist()
    assert laid.prefixes is None


def test_a_prompt_is_laid_once_for_the_responses_that_follow_each_other():
    batch = rollout([LONG] * 5, [2, 3, 5, 1, 2], [0, 0, 1, 1, 1])
    laid = collate(batch, share=True)
    assert laid.lengths == (LONG, 2, 3, LONG, 5, 1, 2)
    assert laid.prefixes == (-1, 0, 0, -1, 3, 3, 3)
    assert torch.equal(laid.labels, collate(batch, share=False).labels)
    assert laid.targets_per_sample.tolist() == [2, 3, 5, 1, 2]


@pytest.mark.parametrize(
    ("prompts", "groups"),
    [([LONG - 1] * 3, [0, 0, 0]), ([LONG] * 3, [0, 1, 0]), ([LONG] * 3, [0, 1, 2])],
    ids=["short prompts", "groups that are torn apart", "groups of one"],
)
def test_nothing_is_shared_where_it_is_not_worth_it(prompts, groups):
    laid = collate(rollout(prompts, [2, 3, 4], groups), share=True)
    assert laid.prefixes is None
    assert len(laid.lengths) == 3


def test_columns_become_tensors_of_their_length_and_missing_ones_are_left_out():
    batch = rollout([3, 5], [2, 4], [0, 1])
    experience = Experience.of(
        batch, scores=np.ones(2, np.float32), mask=np.ones(6, bool), advantages=np.arange(6, dtype=np.float32)
    )
    laid = collate(experience, share=False, columns=("scores", "mask", "advantages", "logps", "rollout_logps"))
    assert {name: len(column) for name, column in laid.columns.items()} == {
        "scores": 2, "mask": 6, "advantages": 6, "rollout_logps": 6,
    }  # fmt: skip
    assert laid.columns["mask"].dtype == torch.bool
    with pytest.raises(AttributeError, match="advantage"):
        collate(batch, share=False, columns=("advantages",))


def test_arrays_that_ray_hands_over_can_be_laid_out():
    batch = rollout([3], [2], [0])
    for name in ("input_ids", "rollout_logps"):
        getattr(batch, name).flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collate(batch, share=True, columns=("rollout_logps",)).num_targets == 2


def test_a_micro_batch_that_idles_has_tokens_and_nothing_to_train():
    part = Part(rollout([3], [2], [0]), idle=True)
    laid = collate_part(part, share=False, columns=("rollout_logps",))
    assert laid.input_ids.numel() == 5
    assert laid.num_targets == laid.num_samples == laid.columns["rollout_logps"].numel() == 0
