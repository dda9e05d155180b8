"""Log-probs and entropies from logits."""

import math

import pytest
import torch

from rlhf_losses import entropy, token_logps


def test_uniform_logits_give_minus_log_v_and_entropy_log_v():
    logits = torch.full((2, 3, 7), 5.0)
    torch.testing.assert_close(token_logps(logits, torch.zeros(2, 3).long()), torch.full((2, 3), -math.log(7)))
    torch.testing.assert_close(entropy(logits), torch.full((2, 3), math.log(7)))


def test_logps_are_minus_torch_cross_entropy():
    logits, labels = torch.randn(11, 7), torch.randint(7, (11,))
    labels[2] = -100
    expected = -torch.nn.functional.cross_entropy(logits / 0.7, labels, reduction="none")
    torch.testing.assert_close(token_logps(logits, labels, temperature=0.7), expected)


def test_the_gradient_of_a_logp_is_one_hot_minus_probabilities():
    logits = torch.randn(7, requires_grad=True)
    token_logps(logits[None], torch.tensor([2])).sum().backward()
    torch.testing.assert_close(logits.grad, torch.nn.functional.one_hot(torch.tensor(2), 7) - logits.softmax(0))


def test_entropy_is_the_expected_surprise():
    logits = torch.randn(5, 7)
    surprise = torch.stack([-token_logps(logits, torch.full((5,), v), temperature=1.3) for v in range(7)], -1)
    torch.testing.assert_close(entropy(logits, 1.3), ((logits / 1.3).softmax(-1) * surprise).sum(-1))


def test_impossible_tokens_keep_entropy_and_its_gradient_finite():
    logits = torch.tensor([[0.0, 0.0, -math.inf], [1e4, 0.0, -1e4]], requires_grad=True)
    entropies = entropy(logits)
    entropies.sum().backward()
    torch.testing.assert_close(entropies, torch.tensor([math.log(2), 0.0]))
    assert logits.grad.isfinite().all()


def test_a_nan_row_that_is_ignored_does_not_reach_the_gradient():
    logits = torch.randn(3, 5)
    logits[1] = math.nan
    logits.requires_grad_()
    logps = token_logps(logits, torch.tensor([1, -100, 4]))
    logps.sum().backward()
    assert logps.isfinite().all() and logps[1] == 0
    assert logits.grad.isfinite().all() and (logits.grad[1] == 0).all()


def test_bfloat16_logits_are_reduced_in_float32_and_not_changed():
    logits = torch.randn(3, 5).bfloat16()
    before = logits.clone()
    logps = token_logps(logits, torch.zeros(3).long(), temperature=0.5)
    assert logps.dtype == entropy(logits).dtype == torch.float32
    torch.testing.assert_close(logps, token_logps(logits.float(), torch.zeros(3).long(), temperature=0.5))
    assert torch.equal(logits, before)


def test_unshifted_labels_are_refused():
    with pytest.raises(ValueError, match="shift"):
        token_logps(torch.ones(2, 5, 7), torch.zeros(2, 4).long())
    with pytest.raises(ValueError, match="temperature"):
        entropy(torch.ones(2, 7), temperature=0)
