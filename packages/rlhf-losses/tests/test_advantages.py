"""Returns, advantages and group baselines, against naive loops and by their relations."""

import pytest
import torch

from rlhf_losses import (
    discounted_returns,
    gae,
    group_centred,
    group_normalised,
    kl_penalised_rewards,
    leave_one_out,
    masked_moments,
    masked_whiten,
    reinforce,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
)


def naive_gae(rewards, values, gamma, lambda_, mask, bootstrap):
    """One row at a time, one token at a time."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        following, running = bootstrap[row], 0.0
        for t in reversed(range(rewards.shape[1])):
            if mask[row, t]:
                delta = rewards[row, t] + gamma * following - values[row, t]
                running = delta + gamma * lambda_ * running
                advantages[row, t], following = running, values[row, t]
    return advantages, torch.where(mask, advantages + values, 0)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 131])
@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_gae_is_the_naive_loop_also_with_holes_and_bootstrap(length, gamma, lambda_):
    rewards, values = torch.randn(2, 5, length, dtype=torch.float64)
    mask, bootstrap = torch.rand(5, length) > 0.3, torch.randn(5, dtype=torch.float64)
    mask[2], mask[3] = False, True
    expected = naive_gae(rewards, values, gamma, lambda_, mask, bootstrap)
    torch.testing.assert_close(
        gae(rewards, values, gamma=gamma, lambda_=lambda_, mask=mask, bootstrap=bootstrap), expected
    )


def test_gae_in_float32_is_exact_to_a_millionth_over_long_episodes():
    rewards, values = torch.randn(2, 3, 2053)
    exact, _ = gae(rewards.double(), values.double(), lambda_=0.99)
    torch.testing.assert_close(gae(rewards, values, lambda_=0.99)[0].double(), exact, rtol=1e-6, atol=1e-6)


def test_padded_and_ragged_gae_agree():
    lengths = torch.tensor([5, 0, 71, 2])
    valid = torch.arange(71) < lengths[:, None]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    rewards, values = torch.randn(2, 4, 71)
    mask, bootstrap = valid & (torch.rand(4, 71) > 0.2), torch.randn(4)
    padded = gae(rewards, values, mask=mask, bootstrap=bootstrap)
    ragged = gae(rewards[valid], values[valid], mask=mask[valid], cu_seqlens=cu_seqlens, bootstrap=bootstrap)
    torch.testing.assert_close(ragged, (padded[0][valid], padded[1][valid]))


def test_lambda_one_gives_returns_minus_values_and_lambda_zero_td_errors():
    rewards, values = torch.randn(2, 3, 11, dtype=torch.float64)
    advantages, returns = gae(rewards, values, gamma=0.9, lambda_=1.0)
    torch.testing.assert_close(returns, discounted_returns(rewards, gamma=0.9))
    torch.testing.assert_close(advantages, returns - values)
    td = rewards + 0.9 * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    torch.testing.assert_close(gae(rewards, values, gamma=0.9, lambda_=0.0)[0], td)


def test_gae_is_linear_in_rewards_and_values():
    (r1, r2), (v1, v2) = torch.randn(2, 2, 3, 11, dtype=torch.float64)
    torch.testing.assert_close(gae(r1 + 2 * r2, v1 + 2 * v2)[0], gae(r1, v1)[0] + 2 * gae(r2, v2)[0])


def test_true_values_leave_no_advantage():
    rewards = torch.randn(3, 11, dtype=torch.float64)
    advantages, _ = gae(rewards, discounted_returns(rewards, gamma=0.9), gamma=0.9)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_padding_is_not_read(poison):
    rewards, values = torch.randn(2, 3, 7)
    mask = torch.arange(11).expand(3, 11) < 7
    junk = torch.full((3, 4), poison)
    padded = gae(torch.cat([rewards, junk], 1), torch.cat([values, junk], 1), mask=mask)
    for long, short in zip(padded, gae(rewards, values), strict=True):
        torch.testing.assert_close(long[:, :7], short)
        assert (long[:, 7:] == 0).all()


def test_an_episode_cut_off_is_worth_its_bootstrap():
    rewards, values = torch.randn(2, 2, 13, dtype=torch.float64)
    _, whole = gae(rewards, values, gamma=0.9, lambda_=0.7)
    advantages, _ = gae(rewards, values, gamma=0.9, lambda_=0.0)
    cut, _ = gae(rewards[:, :5], values[:, :5], gamma=0.9, lambda_=0.0, bootstrap=values[:, 5])
    torch.testing.assert_close(cut, advantages[:, :5])
    assert whole.shape == (2, 13)


def test_empty_batches_are_empty():
    empty = torch.zeros(0)
    assert gae(empty, empty, cu_seqlens=torch.tensor([0]))[0].shape == (0,)
    assert gae(empty, empty, cu_seqlens=torch.tensor([0, 0]))[0].shape == (0,)
    assert discounted_returns(torch.zeros(3, 0)).shape == (3, 0)


def test_returns_of_ones_count_the_tokens_left():
    mask = torch.tensor([[True, False, True, True], [False, False, False, False]])
    assert discounted_returns(torch.ones(2, 4), mask=mask).tolist() == [[3, 0, 2, 1], [0, 0, 0, 0]]
    assert discounted_returns(torch.ones(3), gamma=0.5, cu_seqlens=torch.tensor([0, 2, 3])).tolist() == [1.5, 1, 1]


def test_reinforce_subtracts_its_baseline_from_response_tokens_only():
    mask = torch.tensor([[True, True, False]])
    assert reinforce(torch.ones(1, 3), baseline=0.5, mask=mask).tolist() == [[1.5, 0.5, 0.0]]
    assert reinforce(torch.ones(2), baseline=1.0, cu_seqlens=torch.tensor([0, 2])).tolist() == [1, 0]


def test_reinforce_plus_plus_whitens_over_all_ranks():
    rewards, mask = torch.randn(5, 7), torch.rand(5, 7) > 0.3
    whole = reinforce_plus_plus(rewards, mask=mask, gamma=0.9)
    torch.testing.assert_close(whole, masked_whiten(discounted_returns(rewards, gamma=0.9, mask=mask), mask))
    moments = masked_moments(discounted_returns(rewards, gamma=0.9, mask=mask), mask)
    rank = reinforce_plus_plus(rewards[:2], mask=mask[:2], gamma=0.9, moments=moments)
    torch.testing.assert_close(rank, whole[:2])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    scores = torch.randn(3, 5)
    for g in range(3):
        for i in range(5):
            others = torch.cat([scores[g, :i], scores[g, i + 1 :]])
            torch.testing.assert_close(leave_one_out(scores)[g, i], scores[g, i] - others.mean())


def test_grpo_is_the_group_z_score_and_dr_grpo_its_numerator():
    scores = torch.randn(3, 5)
    centred = scores - scores.mean(1, keepdim=True)
    torch.testing.assert_close(group_centred(scores), centred)
    torch.testing.assert_close(group_normalised(scores, eps=0.0), centred / scores.std(1, keepdim=True))


@pytest.mark.parametrize("advantage", [leave_one_out, group_normalised, group_centred, reinforce_plus_plus_baseline])
def test_group_advantages_follow_the_ids_in_any_order(advantage):
    scores, order = torch.randn(3, 5), torch.randperm(15)
    ids = torch.tensor([7, -2, 100]).repeat_interleave(5)
    torch.testing.assert_close(advantage(scores.flatten()[order], ids[order]), advantage(scores).flatten()[order])
    torch.testing.assert_close(advantage(scores).sum(1), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("advantage", [leave_one_out, group_normalised, group_centred, reinforce_plus_plus_baseline])
def test_equal_scores_have_exactly_zero_advantage(advantage, dtype):
    scores = torch.tensor([0.1, -1e4, 1 / 3], dtype=dtype)[:, None].expand(3, 7)
    assert (advantage(scores) == 0).all()


@pytest.mark.parametrize("advantage", [leave_one_out, group_normalised, group_centred, reinforce_plus_plus_baseline])
def test_a_group_of_one_is_refused(advantage):
    with pytest.raises(ValueError, match="at least 2 responses in every group, got a group of 1"):
        advantage(torch.ones(3, 1))
    with pytest.raises(ValueError, match="got a group of 1"):
        advantage(torch.ones(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match="scores must be"):
        advantage(torch.ones(3))


def test_groups_of_different_sizes_stand_alone():
    scores, ids = torch.randn(5), torch.tensor([0, 1, 0, 1, 1])
    for advantage in (leave_one_out, group_normalised, group_centred):
        torch.testing.assert_close(advantage(scores, ids)[ids == 1], advantage(scores[ids == 1][None])[0])


def test_baseline_plus_plus_whitens_the_centred_scores():
    scores = torch.randn(3, 5)
    whole = reinforce_plus_plus_baseline(scores)
    torch.testing.assert_close(whole.std(unbiased=False), torch.tensor(1.0))
    moments = masked_moments(group_centred(scores), torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(reinforce_plus_plus_baseline(scores[:1], moments=moments), whole[:1])


def test_the_reward_is_paid_at_the_last_response_token():
    kl = torch.tensor([[1.0, 2.0, 9.0], [3.0, float("nan"), 4.0], [5.0, 6.0, 7.0]])
    mask = torch.tensor([[True, True, False], [True, False, True], [False, False, False]])
    rewards = kl_penalised_rewards(kl, torch.tensor([10.0, 20.0, 30.0]), 0.5, mask=mask)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [-1.5, 0.0, 18.0], [0.0, 0.0, 0.0]]
    ragged = kl_penalised_rewards(
        kl[:2].flatten(), torch.tensor([10.0, 20.0, 30.0]), 0.5, mask=mask[:2].flatten(),
        cu_seqlens=torch.tensor([0, 3, 6, 6]),
    )  # fmt: skip
    torch.testing.assert_close(ragged, rewards[:2].flatten())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gae(torch.ones(3), torch.ones(3)), r"padded \[B, T\].*got \[3\] without cu_seqlens"),
        (lambda: gae(torch.ones(2, 3), torch.ones(2, 4)), r"all be \[2, 3\], got \[2, 4\]"),
        (lambda: gae(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(2, 3)), "mask must be boolean"),
        (lambda: gae(torch.ones(2, 3), torch.ones(2, 3), bootstrap=torch.ones(3)), r"bootstrap must be \[2\]"),
        (lambda: kl_penalised_rewards(torch.ones(2, 3), torch.ones(3), 0.1), r"sequence_rewards must be \[2\]"),
    ],
)
def test_a_wrong_shape_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
