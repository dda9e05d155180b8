"""Losses on pairs: closed forms, gradients, symmetries and extremes."""

import math

import pytest
import torch

from rlhf_losses import (
    dpo_loss,
    hinge_loss,
    implicit_rewards,
    ipo_loss,
    kto_kl,
    kto_loss,
    nll_regulariser,
    orpo_loss,
    pairwise_logexp_loss,
    pairwise_sigmoid_loss,
    preference_margin,
    process_reward_loss,
    robust_dpo_loss,
    simpo_loss,
)

BETA, EPS = 0.3, 0.2


def grad(loss, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x).sum(), x)[0]


def test_a_policy_equal_to_its_reference_has_margin_zero_and_dpo_loss_log_two():
    chosen, rejected = torch.randn(2, 5)
    margin = preference_margin(chosen, rejected, chosen, rejected)
    torch.testing.assert_close(margin, torch.zeros(5))
    for loss in (dpo_loss(margin, BETA), dpo_loss(margin, BETA, EPS), robust_dpo_loss(margin, BETA, EPS)):
        torch.testing.assert_close(loss, torch.full((5,), math.log(2)))


def test_the_margin_is_the_difference_of_implicit_rewards():
    policy_c, policy_r, ref_c, ref_r = torch.randn(4, 5)
    rewards = implicit_rewards(policy_c, ref_c, BETA) - implicit_rewards(policy_r, ref_r, BETA)
    torch.testing.assert_close(BETA * preference_margin(policy_c, policy_r, ref_c, ref_r), rewards)
    assert not implicit_rewards(policy_c.requires_grad_(), ref_c, BETA).requires_grad


@pytest.mark.parametrize("eps", [0.0, EPS, 0.5])
def test_the_dpo_gradient_is_beta_times_the_error_of_the_predicted_preference(eps):
    margin = torch.randn(7)
    expected = BETA * (torch.sigmoid(BETA * margin) - (1 - eps))
    torch.testing.assert_close(grad(lambda m: dpo_loss(m, BETA, eps), margin), expected)


def test_smoothing_by_half_forgets_the_label():
    margin = torch.randn(7)
    torch.testing.assert_close(dpo_loss(margin, BETA, 0.5), dpo_loss(-margin, BETA, 0.5))


def test_the_smoothed_minimum_is_at_the_log_odds_of_the_label():
    best = torch.tensor([math.log((1 - EPS) / EPS) / BETA])
    torch.testing.assert_close(grad(lambda m: dpo_loss(m, BETA, EPS), best), torch.zeros(1), atol=1e-6, rtol=0)


def test_the_robust_loss_under_flipped_labels_is_on_average_the_loss_under_true_ones():
    margin = torch.randn(7)
    average = (1 - EPS) * robust_dpo_loss(margin, BETA, EPS) + EPS * robust_dpo_loss(-margin, BETA, EPS)
    torch.testing.assert_close(average, dpo_loss(margin, BETA))
    torch.testing.assert_close(robust_dpo_loss(margin, BETA, 0.0), dpo_loss(margin, BETA))
    with pytest.raises(ValueError, match="label_smoothing"):
        robust_dpo_loss(margin, BETA, 0.5)


def test_the_ipo_minimum_is_one_over_two_beta():
    best = torch.tensor([1 / (2 * BETA)])
    assert ipo_loss(best, BETA) == 0
    torch.testing.assert_close(grad(lambda m: ipo_loss(m, BETA), best + 1), torch.tensor([2.0]))


def test_the_hinge_costs_nothing_beyond_its_margin_and_beta_per_nat_before():
    margin = torch.tensor([1 / BETA + 1, 1 / BETA - 1])
    torch.testing.assert_close(hinge_loss(margin, BETA), torch.tensor([0.0, BETA]))
    torch.testing.assert_close(grad(lambda m: hinge_loss(m, BETA), margin), torch.tensor([0.0, -BETA]))


def test_simpo_is_dpo_on_means_with_a_shifted_margin():
    chosen, rejected = torch.randn(2, 5)
    torch.testing.assert_close(simpo_loss(chosen, rejected, 2.0, 0.6), dpo_loss(chosen - rejected - 0.3, 2.0))


def test_orpo_is_the_log_sigmoid_of_the_odds_ratio():
    p, q = torch.tensor([0.5, 0.9, 0.01]), torch.tensor([0.5, 0.2, 0.3])
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    torch.testing.assert_close(orpo_loss(p.log(), q.log()), -(odds_ratio / (1 + odds_ratio)).log())
    x = torch.tensor([-0.7, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: orpo_loss(v, v.flip(0)), (x,))


def test_the_nll_regulariser_is_a_mean_over_tokens():
    assert nll_regulariser(torch.tensor([-6.0, 0.0]), torch.tensor([3, 0])).tolist() == [2, 0]


PAIR_LOSSES = {
    "dpo": lambda m: dpo_loss(m, 0.1),
    "cdpo": lambda m: dpo_loss(m, 0.1, EPS),
    "robust": lambda m: robust_dpo_loss(m, 0.1, EPS),
    "ipo": lambda m: ipo_loss(m, 0.1),
    "hinge": lambda m: hinge_loss(m, 0.1),
    "simpo": lambda m: simpo_loss(m, -m),
    "orpo": lambda m: orpo_loss(-m.abs(), -m.abs().flip(0)),
    "sigmoid": lambda m: pairwise_sigmoid_loss(m, -m),
    "logexp": lambda m: pairwise_logexp_loss(m, -m),
    "kto": lambda m: kto_loss(m, -m, m > 0, m.mean()),
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_extreme_margins_are_finite_in_value_and_gradient(name):
    margin = torch.tensor([-1e6, -1e4, -89.0, 0.0, 89.0, 1e4, 1e6])
    loss = PAIR_LOSSES[name](margin)
    assert loss.shape == margin.shape
    assert loss.isfinite().all() and grad(PAIR_LOSSES[name], margin).isfinite().all()


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_losses_pass_finite_differences(name):
    margin = torch.tensor([-1.7, -0.3, 0.5, 2.3], dtype=torch.float64, requires_grad=True)
    loss = (lambda m: kto_loss(m, -m, m > 0, torch.ones(()))) if name == "kto" else PAIR_LOSSES[name]
    assert torch.autograd.gradcheck(loss, (margin,))


def test_the_pairwise_losses_are_one_function():
    chosen, rejected, margin = torch.randn(3, 11)
    torch.testing.assert_close(
        pairwise_sigmoid_loss(chosen, rejected, margin), pairwise_logexp_loss(chosen, rejected, margin)
    )
    torch.testing.assert_close(pairwise_logexp_loss(chosen, rejected), (1 + (rejected - chosen).exp()).log())
    torch.testing.assert_close(
        pairwise_sigmoid_loss(chosen, rejected, margin), pairwise_sigmoid_loss(chosen - margin, rejected)
    )


def test_bfloat16_rewards_are_compared_in_float32():
    chosen, rejected = torch.tensor([100.0]).bfloat16(), torch.tensor([0.3]).bfloat16()
    loss = pairwise_sigmoid_loss(rejected, chosen)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, chosen.float() - rejected.float())


def test_kto_is_half_at_the_reference_point_and_moves_with_the_label():
    kl = torch.tensor(0.7)
    policy, reference = torch.full((2,), 0.7), torch.zeros(2)
    labels = torch.tensor([True, False])
    torch.testing.assert_close(kto_loss(policy, reference, labels, kl), torch.full((2,), 0.5))
    weighted = kto_loss(policy, reference, labels, kl, desirable_weight=1.3, undesirable_weight=0.8)
    torch.testing.assert_close(weighted, torch.tensor([0.65, 0.4]))
    slope = grad(lambda x: kto_loss(x, reference, labels, kl, beta=BETA), policy)
    torch.testing.assert_close(slope, torch.tensor([-BETA / 4, BETA / 4]))


def test_kto_follows_the_paper_away_from_the_reference_point():
    policy, reference, labels = torch.randn(7), torch.randn(7), torch.rand(7) > 0.5
    r, z = policy - reference, 0.4
    value = torch.where(labels, torch.sigmoid(BETA * (r - z)), torch.sigmoid(BETA * (z - r)))
    torch.testing.assert_close(kto_loss(policy, reference, labels, torch.tensor(z), BETA), 1 - value)


def test_the_kto_reference_point_is_never_negative_and_has_no_gradient():
    policy, reference, labels = torch.randn(5), torch.randn(5), torch.rand(5) > 0.5
    torch.testing.assert_close(
        kto_loss(policy, reference, labels, torch.tensor(-3.0)), kto_loss(policy, reference, labels, torch.tensor(0.0))
    )
    kl = torch.tensor(1.0, requires_grad=True)
    assert not kto_loss(policy, reference, labels, kl).requires_grad
    assert not kto_kl(policy.requires_grad_(), reference).requires_grad
    torch.testing.assert_close(kto_kl(policy, reference), (policy - reference).mean().detach())


def test_kto_refuses_labels_that_are_not_boolean_and_pairs_that_are_not_there():
    with pytest.raises(ValueError, match=r"labels must be boolean, got torch\.float32"):
        kto_loss(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(()))
    with pytest.raises(ValueError, match="at least two"):
        kto_kl(torch.zeros(0), torch.zeros(0))


def test_the_process_loss_takes_classes_or_probabilities():
    logits, labels = torch.randn(5, 2).bfloat16(), torch.tensor([0, 1, 1, -100, 0])
    hard = process_reward_loss(logits, labels)
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), 2).float()
    soft = process_reward_loss(logits, one_hot)
    torch.testing.assert_close(hard, soft.masked_fill(labels == -100, 0))
    assert hard.dtype == torch.float32
    with pytest.raises(ValueError, match="step_labels"):
        process_reward_loss(logits, torch.ones(5))
