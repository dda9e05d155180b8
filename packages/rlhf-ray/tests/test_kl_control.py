"""The price of KL divergence: fixed, or steered to a target."""

from __future__ import annotations

import math

import pytest

from rlhf_ray.kl_control import KLController


def test_without_a_target_the_price_stays():
    fixed = KLController(0.01, None, 100)
    fixed.update(5.0, 1000)
    assert fixed.coef == 0.01


@pytest.mark.parametrize(
    ("kl", "error"), [(0.11, 0.1), (0.09, -0.1), (0.1, 0), (100.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_the_price_moves_with_the_error_which_is_limited(kl, error):
    steered = KLController(0.5, 0.1, 1000)
    steered.update(kl, 10)
    assert steered.coef == pytest.approx(0.5 * (1 + error * 10 / 1000), rel=1e-5), "as in the paper, to first order"
    assert steered.coef == pytest.approx(0.5 * math.exp(error * 10 / 1000), rel=1e-12)


def test_the_price_is_positive_and_comes_back_however_many_samples_there_are():
    steered = KLController(0.5, 0.1, 1000)
    steered.update(0.0, 100_000)
    assert 0 < steered.coef < 1e-8
    steered.update(1.0, 100_000)
    assert steered.coef == pytest.approx(0.5)


def test_a_divergence_that_falls_with_its_price_is_steered_to_the_target():
    steered = KLController(0.01, 0.05, 1000)
    for _ in range(500):
        steered.update(0.01 / steered.coef, 100)
    assert 0.01 / steered.coef == pytest.approx(0.05, rel=1e-2)


def test_it_goes_on_where_it_was():
    first, resumed = KLController(0.5, 0.1, 1000), KLController(0.5, 0.1, 1000)
    first.update(0.3, 100)
    resumed.restore(first.state())
    first.update(0.2, 100)
    resumed.update(0.2, 100)
    assert resumed.coef == first.coef != 0.5


@pytest.mark.parametrize("coef", [math.nan, math.inf, -0.1])
def test_a_state_that_holds_no_price_is_refused(coef):
    steered = KLController(0.5, 0.1, 1000)
    with pytest.raises(ValueError, match="coefficient"):
        steered.restore({"coef": coef})
    assert steered.coef == 0.5
