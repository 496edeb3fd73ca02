"""From errors to divergences: what is exact at the probes and pilots, and rises between them."""

from __future__ import annotations

import math

import pytest

from m3quant.planning.kl_estimate import kl_of_error, kl_through, others_left


def test_kl_of_an_error_follows_the_probes() -> None:
    low, high = (0.01, 0.02), (0.16, 0.16)
    assert kl_of_error(0.01, [high, low]) == pytest.approx(0.02)
    assert kl_of_error(0.16, [high, low]) == pytest.approx(0.16)
    assert kl_of_error(0.04, [high, low]) == pytest.approx((0.02 * 0.16) ** 0.5)  # half way in logarithms
    assert kl_of_error(0.001, [low, high]) == pytest.approx(0.002)
    assert kl_of_error(0.32, [low, high]) == pytest.approx(0.32)
    assert kl_of_error(0.0, [low]) == 0.0 and kl_of_error(0.1, []) == 0.0


def test_divergence_of_a_sum_goes_through_the_pilots_and_rises() -> None:
    pilots = [(1.0, 0.5), (0.01, 0.02), (0.1, 0.01), (0.0, 0.0)]  # one falls: measured, but noise
    assert kl_through(pilots, 0.01) == pytest.approx(0.02) and kl_through(pilots, 1.0) == pytest.approx(0.5)
    assert kl_through(pilots, 0.005) == pytest.approx(0.01) and kl_through(pilots, 2.0) == pytest.approx(1.0)
    assert kl_through(pilots, 0.0) == 0.0 and kl_through([], 0.3) == 0.3
    kls = [kl_through(pilots, 10 ** (n / 20 - 3)) for n in range(80)]
    assert kls == sorted(kls)


def test_what_is_left_of_errors_outside_the_experts_predicts_the_last_pilot() -> None:
    """Experts 4 bits .02 and 2 bits .32; others at 4 bits .01 by their probes, of which .6 is left."""
    known = [((0.32, 0.001), 0.30, False), ((0.02, 0.001), 0.02, False)]
    total = 0.02 + 0.6 * 0.01
    share = math.log(total / (0.02 + 0.6 * 0.001)) / math.log((0.32 + 0.6 * 0.001) / (0.02 + 0.6 * 0.001))
    kl = 0.02 * (0.30 / 0.02) ** share
    assert others_left([*known, ((0.02, 0.01), kl, True)]) == pytest.approx(0.6, rel=1e-6)
    assert others_left([*known, ((0.02, 0.01), 1e-9, True)]) == pytest.approx(0.25)  # not below a quarter
    assert others_left(known) == 1.0
