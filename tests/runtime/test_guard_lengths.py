"""What answers' lengths teach: against numpy's quantiles, with cut answers, and by clients that try to mislead."""

from __future__ import annotations

import random

import numpy as np
import pytest

from m3quant.runtime.guard.lengths import AT_RISK, CLASSES, EDGES, REMEMBERED, Lengths, LengthTable

MOST = 10**6
FINE = 2**0.125 * (1 + 1e-3)  # the width of a bin


def drawn(kind: str, rng: np.random.Generator, count: int) -> np.ndarray:
    if kind == "uniform":
        return rng.integers(1, 4000, count)
    if kind == "geometric":
        return rng.geometric(1 / 300, count)
    return np.ceil(rng.lognormal(5, 1, count)).astype(int)


@pytest.mark.parametrize("kind", ["uniform", "geometric", "lognormal"])
@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_quantiles_are_numpys_within_a_bin(kind: str, share: float) -> None:
    rng = np.random.default_rng()
    lengths, sample = Lengths(), drawn(kind, rng, int(REMEMBERED))
    for length in sample:
        lengths.learn(int(length), ended=True)
    expected = np.quantile(sample, share, method="inverted_cdf")
    assert expected <= lengths.likely(0, MOST, share) <= max(expected * FINE, expected + 1)


@pytest.mark.parametrize("written", [50, 400])
def test_an_answer_under_way_is_compared_with_those_that_came_as_far(written: int) -> None:
    rng = np.random.default_rng()
    lengths, sample = Lengths(), drawn("geometric", rng, int(REMEMBERED))
    for length in sample:
        lengths.learn(int(length), ended=True)
    at = next(number for number, edge in enumerate(EDGES) if edge > written)
    longer = sample[sample > EDGES[at - 1]]
    expected = np.quantile(longer, 0.7, method="inverted_cdf")
    assert expected <= lengths.likely(written, MOST, 0.7) <= expected * FINE


def test_cut_answers_do_not_shorten_the_curve() -> None:
    """Lengths that are cut at random give the quantiles of the whole ones, which a count of what was seen would not."""
    rng = np.random.default_rng(7)
    lengths = Lengths()
    whole, cuts = rng.geometric(1 / 200, 500), rng.geometric(1 / 300, 500)
    for length, cut in zip(whole, cuts, strict=True):
        lengths.learn(int(min(length, cut)), ended=bool(length <= cut))
    true = np.log(2) * 200
    assert 0.75 * true <= lengths.likely(0, MOST, 0.5) <= 1.3 * true
    assert np.quantile(np.minimum(whole, cuts), 0.5) < 0.7 * true


def test_nothing_known_is_everything_reserved() -> None:
    lengths = Lengths()
    assert lengths.likely(0, 4096, 0.7) == 4096
    for _ in range(AT_RISK - 1):
        lengths.learn(10, ended=True)
    assert lengths.likely(0, 4096, 0.7) == 4096
    lengths.learn(10, ended=True)
    assert lengths.likely(0, 4096, 0.7) == 10
    assert lengths.likely(10, 4096, 0.7) == 4096  # none was longer, so of one that is nothing is known
    assert lengths.likely(0, 7, 0.7) == 7 and LengthTable().of("never seen") is None


def test_answers_cut_short_teach_nothing_about_long_ones() -> None:
    """A client that asks for 16 tokens at a time and then for 4,096 is reserved 4,096."""
    lengths = Lengths()
    for _ in range(10_000):
        lengths.learn(16, ended=False)
    assert lengths.likely(0, 4096, 0.7) == 4096


def test_old_answers_fade() -> None:
    lengths = Lengths()
    for _ in range(100_000):
        lengths.learn(20, ended=True)
    for _ in range(int(2 * REMEMBERED)):
        lengths.learn(2000, ended=True)
    assert 2000 <= lengths.likely(0, 10**6, 0.5) <= 2000 * FINE


@pytest.mark.parametrize("tokens", [1, EDGES[-1], EDGES[-1] + 1, 2**62])
def test_every_length_has_a_bin(tokens: int) -> None:
    lengths = Lengths()
    for _ in range(AT_RISK):
        lengths.learn(tokens, ended=True)
    assert lengths.likely(0, 2**63, 0.7) == min(tokens, EDGES[-1])
    assert lengths.likely(2**62, 2**63, 0.7) == 2**63


def test_a_million_classes_take_the_room_of_a_few() -> None:
    table = LengthTable()
    for number in range(1_000_000):
        assert table.of(("route", "key", number)) is None  # asking makes no entry
    for number in range(20_000):
        table.learn(("route", "key", number), 5, ended=True)
        assert len(table.classes) <= CLASSES
    assert table.of(("route", "key", 19_999)) is not None and table.of(("route", "key", 0)) is None


def test_the_least_recently_used_class_is_forgotten() -> None:
    table = LengthTable(limit=3)
    for name in "abc":
        table.learn(name, 5, ended=True)
    table.of("a")
    table.learn("d", 5, ended=True)
    assert [name for name in "abcd" if table.of(name) is not None] == ["a", "c", "d"]


def test_likely_is_between_what_is_written_and_the_most() -> None:
    rng = random.Random()
    for _ in range(200):
        lengths = Lengths()
        for _ in range(rng.randint(0, 100)):
            lengths.learn(rng.randint(1, 5000), rng.random() < 0.7)
        most = rng.randint(1, 6000)
        written = rng.randint(0, most)
        assert min(written + 1, most) <= lengths.likely(written, most, 0.7) <= most
