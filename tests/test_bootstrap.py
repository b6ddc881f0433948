"""The interval of a mean difference over pairs."""

import numpy as np
import pytest

from ziplora_lib.bootstrap import interval


def test_equal_differences_leave_nothing_open():
    assert interval([0.25] * 5) == (0.25, 0.25)


def test_two_pairs_reach_from_one_to_the_other():
    # the means of two draws are 0, 1/2 and 1, each end with probability 1/4
    assert interval([0.0, 1.0]) == (0.0, 1.0)
    assert interval([0.0, 1.0], level=0.4) == (0.5, 0.5)


def test_three_pairs_by_enumeration():
    values = np.array([0.0, 1.0, 5.0])
    means = np.array([(a + b + c) / 3 for a in values for b in values for c in values])
    wanted = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert interval(values, level=0.8) == pytest.approx(tuple(wanted))


def test_many_pairs_are_as_the_normal_approximation():
    values = np.random.default_rng(0).normal(0.3, 1.0, 2000)
    wide = 1.96 * values.std() / len(values) ** 0.5
    assert interval(values) == pytest.approx((values.mean() - wide, values.mean() + wide), abs=0.002)


@pytest.mark.parametrize(("pairs", "least", "most"), [(20, 0.89, 0.97), (8, 0.83, 0.94), (4, 0.68, 0.86)])
def test_how_often_it_holds_the_true_mean(pairs, least, most):
    generator = np.random.default_rng(1)
    held = 0
    for k in range(500):
        low, high = interval(generator.normal(0.1, 1.0, pairs), draws=500, seed=k)
        held += low <= 0.1 <= high
    assert least < held / 500 < most


def test_pairing_matters():
    # pairs differ far more from each other than the two methods do
    generator = np.random.default_rng(2)
    hardness = generator.normal(0.0, 1.0, 12)
    one = hardness + generator.normal(0.1, 0.02, 12)
    other = hardness + generator.normal(0.0, 0.02, 12)
    low, high = interval(one - other)
    assert 0.05 < low < high < 0.15
    low, high = interval(one - generator.permutation(other))
    assert low < 0 < high


def test_it_follows_unit_sign_and_shift():
    values = np.random.default_rng(3).normal(size=9)
    low, high = interval(values)
    assert interval(values * 10 + 3) == pytest.approx((low * 10 + 3, high * 10 + 3))
    assert interval(-values) == pytest.approx((-high, -low), abs=0.02)


def test_the_seed_decides():
    values = [0.1, 0.4, -0.3, 0.2, 0.9]
    assert interval(values) == interval(tuple(values)) == interval(np.array(values))
    assert interval(values, draws=99) != interval(values, draws=99, seed=1)


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, float("nan")], [0.1, float("inf")], [[0.1, 0.2]]], ids=str)
def test_too_little_is_refused(differences):
    with pytest.raises(ValueError, match="two finite differences"):
        interval(differences)


@pytest.mark.parametrize("level", [0, 1, 95, float("nan")])
def test_levels_are_shares(level):
    with pytest.raises(ValueError, match="level"):
        interval([0.1, 0.2], level=level)
