"""Policy, value and KL: gradients at the ratio one, where clipped, and in expectation over the vocabulary."""

import math

import pytest
import torch

from rlhf_losses import (
    approx_kl,
    cispo_loss,
    clip_fraction,
    clipped_value_loss,
    explained_variance,
    gspo_loss,
    kl_estimate,
    ppo_loss,
    reverse_kl,
    segment_mean,
    sequence_log_ratio,
    truncated_importance_weights,
    value_clip_fraction,
)


def grad(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def test_at_ratio_one_the_ppo_gradient_is_minus_the_advantage():
    logps, advantages = torch.randn(2, 11)
    torch.testing.assert_close(grad(lambda x: ppo_loss(x, logps, advantages), logps), -advantages)


def test_ppo_is_the_minimum_of_both_surrogates():
    logps, old, advantages = torch.randn(3, 101)
    ratio = (logps - old).exp()
    expected = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.3) * advantages)
    torch.testing.assert_close(ppo_loss(logps, old, advantages, clip_low=0.2, clip_high=0.3), expected)


def test_the_gradient_is_exactly_zero_where_clipped_and_only_there():
    log_ratio = torch.tensor([math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)])
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
    slope = grad(lambda x: ppo_loss(x, torch.zeros(4), advantages), log_ratio)
    torch.testing.assert_close(slope, torch.tensor([0.0, 0.0, 1.5, -0.5]))
    assert (slope[:2] == 0).all()
    assert clip_fraction(log_ratio, torch.zeros(4), advantages) == 0.5


def test_the_clip_fraction_counts_tokens_without_gradient():
    logps, old, advantages = torch.randn(3, 101)
    mask = torch.rand(101) > 0.3
    dead = grad(lambda x: ppo_loss(x, old, advantages, clip_high=0.3), logps) == 0
    fraction = clip_fraction(logps, old, advantages, clip_high=0.3, mask=mask)
    torch.testing.assert_close(fraction, dead[mask].float().mean())


def test_dual_clip_caps_the_loss_of_bad_tokens_and_changes_no_other():
    log_ratio, advantages = torch.linspace(-3, 3, 13), torch.tensor([[-2.0], [2.0]])
    plain = ppo_loss(log_ratio, torch.zeros(13), advantages)
    capped = ppo_loss(log_ratio, torch.zeros(13), advantages, dual_clip=3.0)
    torch.testing.assert_close(capped[0], plain[0].clamp(max=6.0))
    torch.testing.assert_close(capped[1], plain[1])
    with pytest.raises(ValueError, match="dual_clip"):
        ppo_loss(log_ratio, log_ratio, advantages, dual_clip=1.0)


@pytest.mark.parametrize("gap", [1e2, 1e4])
@pytest.mark.parametrize("loss", [ppo_loss, cispo_loss])
def test_extreme_ratios_are_finite_in_value_and_gradient(loss, gap):
    logps = torch.tensor([-gap, 0.0, -gap, 0.0])
    old, advantages = torch.tensor([0.0, -gap, 0.0, -gap]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert loss(logps, old, advantages).isfinite().all()
    assert grad(lambda x: loss(x, old, advantages), logps).isfinite().all()
    assert truncated_importance_weights(logps, old).isfinite().all()
    assert approx_kl(logps, old).isfinite()
    assert all(kl_estimate(logps, old, kind).isfinite().all() for kind in ("k1", "k2", "k3"))


def test_gspo_per_token_is_the_loss_of_the_sequence_in_value_and_gradient():
    cu_seqlens, mask = torch.tensor([0, 3, 3, 8]), torch.rand(8) > 0.2
    logps, old = 0.1 * torch.randn(2, 8, dtype=torch.float64)
    advantages = torch.tensor([1.0, 7.0, -1.0], dtype=torch.float64)
    per_token = advantages[[0, 0, 0, 2, 2, 2, 2, 2]]

    def by_token(x):
        loss = gspo_loss(x, old, per_token, cu_seqlens, mask=mask, clip_low=0.01, clip_high=0.5)
        return segment_mean(loss, cu_seqlens, mask)

    def by_sequence(x):
        ratio = sequence_log_ratio(x, old, cu_seqlens, mask).exp()
        return -torch.minimum(ratio * advantages, ratio.clamp(0.99, 1.5) * advantages)

    torch.testing.assert_close(by_token(logps)[[0, 2]], by_sequence(logps)[[0, 2]])
    torch.testing.assert_close(grad(by_token, logps), grad(by_sequence, logps))


def test_a_masked_nan_does_not_reach_the_sequence_ratio():
    logps = torch.tensor([0.1, math.nan, 0.3], requires_grad=True)
    log_ratio = sequence_log_ratio(logps, torch.zeros(3), torch.tensor([0, 3]), torch.tensor([True, False, True]))
    log_ratio.sum().backward()
    torch.testing.assert_close(log_ratio, torch.tensor([0.2]))
    assert logps.grad.tolist() == [0.5, 0, 0.5]


def test_cispo_weighs_but_never_drops_a_token():
    logps, old, advantages = torch.randn(3, 101)
    weight = (logps - old).exp().clamp(max=1.2)
    slope = grad(lambda x: cispo_loss(x, old, advantages), logps)
    torch.testing.assert_close(slope, -weight * advantages)
    assert (slope != 0).all()


def test_importance_weights_are_capped_above_and_dropped_below():
    train, rollout = torch.tensor([0.3, 2.0, 0.01, 1.0]).log(), torch.zeros(4)
    torch.testing.assert_close(truncated_importance_weights(train, rollout, cap=1.5), torch.tensor([0.3, 1.5, 0.01, 1]))
    weights = truncated_importance_weights(train.requires_grad_(), rollout, cap=1.5, lower=0.1)
    torch.testing.assert_close(weights, torch.tensor([0.3, 1.5, 0.0, 1.0]))
    assert not weights.requires_grad


def vocabulary():
    """Logits of a policy and its reference over 7 tokens."""
    return torch.randn(2, 7, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_summed_over_the_vocabulary_k1_and_k3_are_the_kl(kind):
    policy, reference = vocabulary()
    estimates = kl_estimate(policy.log_softmax(0), reference.log_softmax(0), kind)
    torch.testing.assert_close((policy.softmax(0) * estimates).sum(), reverse_kl(policy, reference))


def test_no_estimate_of_k2_or_k3_is_negative():
    x = torch.linspace(-30, 30, 1001)
    assert (kl_estimate(x, torch.zeros(()), "k2") >= 0).all()
    assert (kl_estimate(x, torch.zeros(()), "k3") >= 0).all()
    assert (kl_estimate(x, torch.zeros(()), "k3", clamp=None) >= 0).all()


def test_as_a_loss_k2_has_the_gradient_of_the_kl_and_k1_has_none():
    policy, reference = vocabulary()
    expected = grad(lambda z: reverse_kl(z, reference), policy)

    def as_loss(kind):
        return grad(lambda z: policy.softmax(0) * kl_estimate(z.log_softmax(0), reference.log_softmax(0), kind), policy)

    torch.testing.assert_close(as_loss("k2"), expected)
    torch.testing.assert_close(as_loss("k1"), torch.zeros(7, dtype=torch.float64))
    other_way = grad(lambda z: reference.softmax(0) * -z.log_softmax(0), policy)
    torch.testing.assert_close(as_loss("k3"), other_way)


def test_the_clamp_bounds_the_estimate_and_stops_its_gradient():
    x = torch.tensor([-50.0, 50.0])
    torch.testing.assert_close(kl_estimate(x, torch.zeros(2), "k1"), torch.tensor([-10.0, 10.0]))
    assert (grad(lambda v: kl_estimate(v, torch.zeros(2), "k3"), x) == 0).all()
    torch.testing.assert_close(kl_estimate(x, torch.zeros(2), "k1", clamp=None), x)
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'k4'"):
        kl_estimate(x, x, "k4")


def test_approx_kl_is_the_kl_from_the_old_policy():
    policy, old = vocabulary()
    samples = torch.multinomial(old.softmax(0), 200_000, replacement=True)
    estimate = approx_kl(policy.log_softmax(0)[samples], old.log_softmax(0)[samples])
    torch.testing.assert_close(estimate, reverse_kl(old, policy), rtol=0.03, atol=0.01)


def test_the_value_loss_is_the_worse_of_both_errors():
    values, old, returns = torch.randn(3, 101)
    clipped = old + (values - old).clamp(-0.2, 0.2)
    expected = 0.5 * torch.stack([(values - returns) ** 2, (clipped - returns) ** 2]).amax(0)
    torch.testing.assert_close(clipped_value_loss(values, old, returns), expected)
    torch.testing.assert_close(clipped_value_loss(values, old, returns, clip=None), 0.5 * (values - returns) ** 2)
    torch.testing.assert_close(grad(lambda v: clipped_value_loss(v, values, returns), values), values - returns)
    dead = grad(lambda v: clipped_value_loss(v, old, returns), values) == 0
    torch.testing.assert_close(value_clip_fraction(values, old, returns), dead.float().mean())


def test_explained_variance_is_one_for_perfect_and_zero_for_constant_values():
    returns, mask = torch.randn(11), torch.arange(11) < 7
    assert explained_variance(returns, returns) == 1
    torch.testing.assert_close(
        explained_variance(torch.full((11,), 3.0), returns), torch.tensor(0.0), atol=1e-6, rtol=0
    )
    assert explained_variance(-returns, returns) < 0
    assert explained_variance(returns, torch.full((11,), 2.0)) == 0
    junk = returns.masked_fill(~mask, math.nan)
    torch.testing.assert_close(explained_variance(junk, returns, mask), torch.tensor(1.0))


def test_two_micro_batches_over_the_global_count_are_one_batch():
    logps, old, advantages = torch.randn(3, 11)
    whole = grad(lambda x: ppo_loss(x, old, advantages) / 11, logps)

    def in_parts(x):
        first = ppo_loss(x[:3], old[:3], advantages[:3]).sum() / 11
        return first + ppo_loss(x[3:], old[3:], advantages[3:]).sum() / 11

    torch.testing.assert_close(grad(in_parts, logps), whole)
