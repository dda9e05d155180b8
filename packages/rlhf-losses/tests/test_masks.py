"""Masked and segmented reductions: equal to slicing, deaf to what is masked."""

import pytest
import torch

from rlhf_losses import (
    masked_mean,
    masked_moments,
    masked_sum,
    masked_whiten,
    segment_ids,
    segment_mean,
    segment_sum,
)

POISON = [float("nan"), float("inf"), float("-inf"), 3e38]


def test_a_masked_reduction_is_the_reduction_of_the_slice():
    x, mask = torch.randn(5, 7), torch.rand(5, 7) > 0.4
    torch.testing.assert_close(masked_sum(x, mask), x[mask].sum())
    torch.testing.assert_close(masked_mean(x, mask), x[mask].mean())
    for row in range(5):
        torch.testing.assert_close(masked_sum(x, mask, dim=1)[row], x[row][mask[row]].sum())
        torch.testing.assert_close(masked_mean(x, mask, dim=1)[row], x[row][mask[row]].mean())


def test_mean_over_a_dimension_keeps_rows_apart_in_a_square_batch():
    x = torch.tensor([[1.0, 3.0], [10.0, 30.0]])
    torch.testing.assert_close(masked_mean(x, torch.ones(2, 2, dtype=torch.bool), dim=1), torch.tensor([2.0, 20.0]))


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("reduce", [masked_sum, masked_mean, masked_whiten])
def test_a_masked_value_reaches_neither_value_nor_gradient(reduce, poison):
    x, mask = torch.randn(3, 5), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False
    clean, dirty = x.clone().requires_grad_(), x.masked_fill(~mask, poison).requires_grad_()
    weights = torch.randn(3, 5)
    (reduce(clean, mask) * weights).sum().backward()
    (reduce(dirty, mask) * weights).sum().backward()
    torch.testing.assert_close(reduce(dirty, mask), reduce(clean, mask))
    torch.testing.assert_close(dirty.grad, clean.grad)
    assert (dirty.grad[~mask] == 0).all()


def test_nothing_selected_gives_zero_with_a_zero_gradient():
    x = torch.full((2, 3), float("nan"), requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    total = masked_sum(x, nothing) + masked_mean(x, nothing, dim=1).sum() + masked_whiten(x, nothing).sum()
    total.backward()
    assert total == 0
    assert (x.grad == 0).all()


def test_whitening_gives_zero_mean_and_unit_variance():
    x, mask = 7 + 3 * torch.randn(11, 13), torch.rand(11, 13) > 0.3
    white = masked_whiten(x, mask)[mask]
    torch.testing.assert_close(white.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(white.var(unbiased=False), torch.tensor(1.0))
    kept = masked_whiten(x, mask, shift_mean=False)[mask]
    torch.testing.assert_close(kept.mean(), x[mask].mean())


def test_whitening_with_summed_moments_is_whitening_of_the_whole():
    x, mask = torch.randn(11, 3), torch.rand(11, 3) > 0.3
    moments = masked_moments(x[:4], mask[:4]) + masked_moments(x[4:], mask[4:])
    parts = torch.cat(
        [masked_whiten(x[:4], mask[:4], moments=moments), masked_whiten(x[4:], mask[4:], moments=moments)]
    )
    torch.testing.assert_close(parts, masked_whiten(x, mask))


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e-30])
def test_whitening_a_constant_gives_exactly_zero(constant):
    x = torch.full((3, 7), constant)
    assert (masked_whiten(x, torch.ones(3, 7, dtype=torch.bool)) == 0).all()


def test_an_integer_mask_is_refused():
    with pytest.raises(ValueError, match="mask must be boolean"):
        masked_sum(torch.ones(3), torch.ones(3).long())


def test_segments_are_slices_also_empty_ones():
    cu_seqlens = torch.tensor([0, 3, 3, 8, 8])
    x = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert segment_ids(cu_seqlens).tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    expected = torch.stack([x[:3].sum(), x.new_zeros(()), x[3:].sum(), x.new_zeros(())])
    torch.testing.assert_close(segment_sum(x, cu_seqlens), expected)
    torch.testing.assert_close(segment_mean(x, cu_seqlens), expected / torch.tensor([3, 1, 5, 1]))
    assert torch.autograd.gradcheck(lambda v: segment_mean(v, cu_seqlens), (x,))


def test_no_sequences_give_no_sums():
    assert segment_sum(torch.zeros(0), torch.tensor([0])).shape == (0,)
    assert segment_mean(torch.zeros(0), torch.tensor([0, 0])).tolist() == [0]


def test_padded_and_ragged_reductions_agree():
    lengths = torch.tensor([5, 2, 7])
    padded, valid = torch.randn(3, 7), torch.arange(7) < lengths[:, None]
    chosen = valid & (torch.rand(3, 7) > 0.3)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    torch.testing.assert_close(segment_sum(padded[valid], cu_seqlens, chosen[valid]), masked_sum(padded, chosen, dim=1))
    torch.testing.assert_close(
        segment_mean(padded[valid], cu_seqlens, chosen[valid]), masked_mean(padded, chosen, dim=1)
    )


@pytest.mark.parametrize("poison", POISON)
def test_a_masked_token_does_not_reach_its_segment(poison):
    x = torch.tensor([1.0, poison, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    out = segment_mean(x, torch.tensor([0, 2, 3]), mask)
    out.sum().backward()
    assert out.tolist() == [1, 3]
    assert x.grad.tolist() == [1, 0, 1]


def test_padded_values_are_refused_by_segments():
    with pytest.raises(ValueError, match="masked_sum"):
        segment_sum(torch.ones(2, 3), torch.tensor([0, 3]))
